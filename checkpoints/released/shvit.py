"""SHViT: the authors' weights as timm keeps them."""

from .entry import ReleasedWeights


def _shvit(repository: str, top1: float) -> ReleasedWeights:
    return ReleasedWeights(hf_hub_id=f"timm/{repository}", top1=top1, origin="https://github.com/ysj9909/SHViT")


RELEASED: dict[str, ReleasedWeights] = {
    "shvit_s1_vicinal.in1k": _shvit("shvit_s1.in1k", 72.8),
    "shvit_s2_vicinal.in1k": _shvit("shvit_s2.in1k", 75.2),
    "shvit_s3_vicinal.in1k": _shvit("shvit_s3.in1k", 77.4),
    "shvit_s4_vicinal.in1k": _shvit("shvit_s4.in1k", 79.4),
}
