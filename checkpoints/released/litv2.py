"""LITv2: files of ziplab's releases."""

from typing import Any

from .entry import ReleasedWeights

_ORIGIN = "https://github.com/ziplab/LITv2"


def _litv2(file: str, top1: float, **cfg: Any) -> ReleasedWeights:
    url = f"{_ORIGIN}/releases/download/v1.0/{file}.pth"
    return ReleasedWeights(url=url, top1=top1, license="apache-2.0", origin=_ORIGIN, cfg=cfg)


RELEASED: dict[str, ReleasedWeights] = {
    "litv2_small.ziplab_in1k": _litv2("litv2_s", 82.0),
    "litv2_medium.ziplab_in1k": _litv2("litv2_m", 83.3),
    "litv2_base.ziplab_in1k": _litv2("litv2_b", 83.6),
    "litv2_base.ziplab_in1k_384": _litv2(
        "litv2_b_384", 84.7, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
    ),
}
