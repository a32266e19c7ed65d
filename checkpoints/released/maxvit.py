"""MaxViT: Google's weights, as timm ported them from TensorFlow."""

from typing import Any

from .entry import ReleasedWeights


def _maxvit(repository: str, top1: float | None = None, num_classes: int = 1000, **cfg: Any) -> ReleasedWeights:
    return ReleasedWeights(
        hf_hub_id=f"timm/{repository}",
        num_classes=num_classes,
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/google-research/maxvit",
        cfg=cfg,
    )


# All but the 224 px ImageNet-1k weights were trained on images of mean and deviation 0.5.
_HALF: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_384 = {**_HALF, "input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
_512 = {**_HALF, "input_size": (3, 512, 512), "pool_size": (16, 16), "crop_pct": 1.0, "crop_mode": "squash"}

RELEASED: dict[str, ReleasedWeights] = {
    "maxvit_tiny.goog_in1k": _maxvit("maxvit_tiny_tf_224.in1k", 83.62),
    "maxvit_tiny.goog_in1k_384": _maxvit("maxvit_tiny_tf_384.in1k", 85.24, **_384),
    "maxvit_tiny.goog_in1k_512": _maxvit("maxvit_tiny_tf_512.in1k", 85.72, **_512),
    "maxvit_small.goog_in1k": _maxvit("maxvit_small_tf_224.in1k", 84.45),
    "maxvit_small.goog_in1k_384": _maxvit("maxvit_small_tf_384.in1k", 85.74, **_384),
    "maxvit_small.goog_in1k_512": _maxvit("maxvit_small_tf_512.in1k", 86.19, **_512),
    "maxvit_base.goog_in1k": _maxvit("maxvit_base_tf_224.in1k", 84.95),
    "maxvit_base.goog_in1k_384": _maxvit("maxvit_base_tf_384.in1k", 86.34, **_384),
    "maxvit_base.goog_in1k_512": _maxvit("maxvit_base_tf_512.in1k", 86.66, **_512),
    "maxvit_base.goog_in21k": _maxvit("maxvit_base_tf_224.in21k", num_classes=21843, **_HALF),
    "maxvit_base.goog_in21k_ft_in1k_384": _maxvit("maxvit_base_tf_384.in21k_ft_in1k", **_384),
    "maxvit_base.goog_in21k_ft_in1k_512": _maxvit("maxvit_base_tf_512.in21k_ft_in1k", **_512),
    "maxvit_large.goog_in1k": _maxvit("maxvit_large_tf_224.in1k", 85.17),
    "maxvit_large.goog_in1k_384": _maxvit("maxvit_large_tf_384.in1k", 86.40, **_384),
    "maxvit_large.goog_in1k_512": _maxvit("maxvit_large_tf_512.in1k", 86.70, **_512),
    "maxvit_large.goog_in21k": _maxvit("maxvit_large_tf_224.in21k", num_classes=21843, **_HALF),
    "maxvit_large.goog_in21k_ft_in1k_384": _maxvit("maxvit_large_tf_384.in21k_ft_in1k", **_384),
    "maxvit_large.goog_in21k_ft_in1k_512": _maxvit("maxvit_large_tf_512.in21k_ft_in1k", **_512),
    "maxvit_xlarge.goog_in21k": _maxvit("maxvit_xlarge_tf_224.in21k", num_classes=21843, **_HALF),
    "maxvit_xlarge.goog_in21k_ft_in1k_384": _maxvit("maxvit_xlarge_tf_384.in21k_ft_in1k", **_384),
    "maxvit_xlarge.goog_in21k_ft_in1k_512": _maxvit("maxvit_xlarge_tf_512.in21k_ft_in1k", **_512),
}
