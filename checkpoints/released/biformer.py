"""BiFormer: the authors' files, behind short addresses that they do not call permanent."""

from .entry import ReleasedWeights

_ONEDRIVE = "https://api.onedrive.com/v1.0/shares"


def _biformer(url: str, top1: float) -> ReleasedWeights:
    return ReleasedWeights(url=url, top1=top1, origin="https://github.com/rayleizhu/BiFormer")


RELEASED: dict[str, ReleasedWeights] = {
    "biformer_tiny.in1k": _biformer("https://matix.li/e36fe9fb086c", 81.4),
    "biformer_small.in1k": _biformer("https://matix.li/5bb436318902", 83.8),
    "biformer_base.in1k": _biformer("https://matix.li/995db75f585d", 84.3),
    "biformer_stl.in1k": _biformer("https://matix.li/4e9034a91a23", 82.7),
    "biformer_stl_nchw.in1k": _biformer(f"{_ONEDRIVE}/s!AkBbczdRlZvChWYrKbWbMgqd2Ai0/root/content", 82.7),
}
