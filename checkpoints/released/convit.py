"""ConViT: Facebook's weights as timm keeps them.

The repository was under CC-BY-NC-4.0 at first, as the header of its ``convit.py`` still says. Its README and LICENSE of
today are Apache-2.0, and so are timm's cards of these files. The accuracies are those of the repository's README (tiny)
and of the paper (small, base); timm measures 73.140, 81.412 and 82.296.
"""

from .entry import ReleasedWeights


def _convit(repository: str, top1: float) -> ReleasedWeights:
    origin = "https://github.com/facebookresearch/convit"
    return ReleasedWeights(hf_hub_id=f"timm/{repository}", top1=top1, license="apache-2.0", origin=origin)


RELEASED: dict[str, ReleasedWeights] = {
    "convit_tiny_vicinal.fb_in1k": _convit("convit_tiny.fb_in1k", 73.1),
    "convit_small_vicinal.fb_in1k": _convit("convit_small.fb_in1k", 81.3),
    "convit_base_vicinal.fb_in1k": _convit("convit_base.fb_in1k", 82.4),
}
