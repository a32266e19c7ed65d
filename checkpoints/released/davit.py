"""DaViT: the authors' weights as timm keeps them."""

from .entry import ReleasedWeights


def _davit(repository: str, top1: float) -> ReleasedWeights:
    origin = "https://github.com/dingmyu/davit"
    return ReleasedWeights(hf_hub_id=f"timm/{repository}", top1=top1, license="apache-2.0", origin=origin)


RELEASED: dict[str, ReleasedWeights] = {
    "davit_tiny_vicinal.msft_in1k": _davit("davit_tiny.msft_in1k", 82.8),
    "davit_small_vicinal.msft_in1k": _davit("davit_small.msft_in1k", 84.2),
    "davit_base_vicinal.msft_in1k": _davit("davit_base.msft_in1k", 84.6),
}
