"""Weights that the authors of each family released: where they lie, under which licence, what they reach.

The accuracies are the authors' own, on the ImageNet-1k validation set at the size in ``cfg``, or the variant's native
one. ``sha256`` stays empty where the authors give no hash; the files are read with ``weights_only=True`` anyway.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReleasedWeights:
    """One released checkpoint.

    Attributes:
        url: address of the file, or empty where it lies on the Hugging Face Hub.
        hf_hub_id: repository on the Hub, or empty.
        num_classes: rows of its classifier.
        top1: published ImageNet-1k top-1 accuracy in percent; None where none was published (22k pre-training).
        license: SPDX name of the licence of the weights.
        origin: the repository that released it.
        sha256: hash of the file, where known.
        cfg: entries of timm's pretrained configuration that differ from the variant's, such as the input size.
    """

    url: str = ""
    hf_hub_id: str = ""
    num_classes: int = 1000
    top1: float | None = None
    license: str = "mit"
    origin: str = ""
    sha256: str = ""
    cfg: Mapping[str, Any] = field(default_factory=dict)


_SHI_LABS = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
_LITV2 = "https://github.com/ziplab/LITv2"
_NAT_FILES = "https://shi-labs.com/projects/nat/checkpoints/CLS"
_DINAT_FILES = "https://shilab.cs.uoregon.edu/projects/dinat/checkpoints"


def _nat(size: str, top1: float) -> dict[str, ReleasedWeights]:
    weights = ReleasedWeights(url=f"{_NAT_FILES}/nat_{size}.pth", top1=top1, origin=_SHI_LABS)
    return {f"nat_{size}.shi_in1k": weights}


def _dinat(name: str, file: str, top1: float | None = None, tag: str = "shi_in1k") -> dict[str, ReleasedWeights]:
    num_classes = 1000 if tag.endswith("in1k") else 21841
    url = f"{_DINAT_FILES}/{file}.pth"
    return {f"{name}.{tag}": ReleasedWeights(url=url, num_classes=num_classes, top1=top1, origin=_SHI_LABS)}


def _davit(size: str, top1: float) -> dict[str, ReleasedWeights]:
    weights = ReleasedWeights(
        hf_hub_id=f"timm/davit_{size}.msft_in1k",
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/dingmyu/davit",
    )
    return {f"davit_{size}_vicinal.msft_in1k": weights}


def _maxvit(size: str, top1: Mapping[int, float]) -> dict[str, ReleasedWeights]:
    """Google's ImageNet-1k weights, as timm ported them from TensorFlow.

    Args:
        top1: accuracy by image size.
    """
    return {_maxvit_tag(size, pixels, "in1k"): _maxvit_weights(size, pixels, "in1k", top1[pixels]) for pixels in top1}


def _maxvit_21k(size: str) -> dict[str, ReleasedWeights]:
    kinds = ((224, "in21k"), (384, "in21k_ft_in1k"), (512, "in21k_ft_in1k"))
    return {_maxvit_tag(size, *kind): _maxvit_weights(size, *kind) for kind in kinds}


def _maxvit_tag(size: str, pixels: int, kind: str) -> str:
    return f"maxvit_{size}.goog_{kind}" + (f"_{pixels}" if pixels != 224 else "")


def _maxvit_weights(size: str, pixels: int, kind: str, top1: float | None = None) -> ReleasedWeights:
    cfg = {} if (pixels, kind) == (224, "in1k") else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    if pixels != 224:
        map_size = (pixels // 32,) * 2
        cfg.update(input_size=(3, pixels, pixels), pool_size=map_size, crop_pct=1.0, crop_mode="squash")
    return ReleasedWeights(
        hf_hub_id=f"timm/maxvit_{size}_tf_{pixels}.{kind}",
        num_classes=21843 if kind == "in21k" else 1000,
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/google-research/maxvit",
        cfg=cfg,
    )


def _shvit(size: str, top1: float) -> dict[str, ReleasedWeights]:
    weights = ReleasedWeights(hf_hub_id=f"timm/shvit_{size}.in1k", top1=top1, origin="https://github.com/ysj9909/SHViT")
    return {f"shvit_{size}_vicinal.in1k": weights}


def _biformer(name: str, url: str, top1: float) -> dict[str, ReleasedWeights]:
    weights = ReleasedWeights(url=url, top1=top1, origin="https://github.com/rayleizhu/BiFormer")
    return {f"biformer_{name}.in1k": weights}


def _convit(size: str, top1: float) -> dict[str, ReleasedWeights]:
    """Facebook's weights.

    The repository was under CC-BY-NC-4.0 at first, as the header of its ``convit.py`` still says. Its README and
    LICENSE of today are Apache-2.0, and so are timm's cards of these files.

    Args:
        top1: of the repository's README (tiny) and the paper (small, base); timm measures 73.140, 81.412 and 82.296.
    """
    weights = ReleasedWeights(
        hf_hub_id=f"timm/convit_{size}.fb_in1k",
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/facebookresearch/convit",
    )
    return {f"convit_{size}_vicinal.fb_in1k": weights}


def _litv2(size: str, top1: float, pixels: int = 224, **cfg: Any) -> dict[str, ReleasedWeights]:
    suffix = "" if pixels == 224 else f"_{pixels}"
    weights = ReleasedWeights(
        url=f"{_LITV2}/releases/download/v1.0/litv2_{size[0]}{suffix}.pth",
        top1=top1,
        license="apache-2.0",
        origin=_LITV2,
        cfg=cfg,
    )
    return {f"litv2_{size}.ziplab_in1k{suffix}": weights}


def _halonet(name: str, tag: str, top1: float) -> dict[str, ReleasedWeights]:
    weights = ReleasedWeights(
        hf_hub_id=f"timm/{name}.{tag}",
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/huggingface/pytorch-image-models",
    )
    return {f"{name}_vicinal.{tag}": weights}


def _transnext(name: str, file: str, top1: float, tag: str = "in1k", **cfg: Any) -> dict[str, ReleasedWeights]:
    repository = file.replace("_", "-")
    weights = ReleasedWeights(
        url=f"https://huggingface.co/DaiShiResearch/{repository}/resolve/main/{file}.pth",
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/DaiShiResearch/TransNeXt",
        cfg=cfg,
    )
    return {f"transnext_{name}.{tag}": weights}


_SQUASHED_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
_FINE_TUNED = "shi_in22k_ft_in1k"

RELEASED: dict[str, ReleasedWeights] = {
    **_nat("mini", 81.8),
    **_nat("tiny", 83.2),
    **_nat("small", 83.7),
    **_nat("base", 84.3),
    **_dinat("dinat_mini", "imagenet1k/dinat_mini_in1k_224", 81.8),
    **_dinat("dinat_tiny", "imagenet1k/dinat_tiny_in1k_224", 82.7),
    **_dinat("dinat_small", "imagenet1k/dinat_small_in1k_224", 83.8),
    **_dinat("dinat_base", "imagenet1k/dinat_base_in1k_224", 84.4),
    **_dinat("dinat_large", "imagenet1k/dinat_large_in22k_in1k_224", 86.6, _FINE_TUNED),
    **_dinat("dinat_large_384", "imagenet1k/dinat_large_in22k_in1k_384", 87.4, _FINE_TUNED),
    **_dinat("dinat_large_384_11x11", "imagenet1k/dinat_large_in22k_in1k_384_11x11", 87.5, _FINE_TUNED),
    **_dinat("dinat_large_21k", "imagenet22k/dinat_large_in22k_224", tag="shi_in22k"),
    **_dinat("dinat_large_21k_11x11", "imagenet22k/dinat_large_in22k_224_11x11interp", tag="shi_in22k"),
    **_dinat("dinat_s_tiny", "imagenet1k/dinat_s_tiny_1k_224", 81.8),
    **_dinat("dinat_s_small", "imagenet1k/dinat_s_small_1k_224", 83.5),
    **_dinat("dinat_s_base", "imagenet1k/dinat_s_base_1k_224", 83.8),
    **_dinat("dinat_s_large", "imagenet1k/dinat_s_large_1k_224", 86.5, _FINE_TUNED),
    **_dinat("dinat_s_large_384", "imagenet1k/dinat_s_large_1k_384", 87.4, _FINE_TUNED),
    **_dinat("dinat_s_large_21k", "imagenet22k/dinat_s_large_in22k_224", tag="shi_in22k"),
    **_dinat("nat_isotropic_small", "isotropic/nat_isotropic_small_in1k_224", 80.0),
    **_dinat("nat_isotropic_base", "isotropic/nat_isotropic_base_in1k_224", 81.6),
    **_dinat("dinat_isotropic_small", "isotropic/dinat_isotropic_small_in1k_224", 80.8),
    **_dinat("dinat_isotropic_base", "isotropic/dinat_isotropic_base_in1k_224", 82.1),
    **_dinat("vitrpb_small", "isotropic/vitrpb_small_in1k_224", 81.2),
    **_dinat("vitrpb_base", "isotropic/vitrpb_base_in1k_224", 82.5),
    **_davit("tiny", 82.8),
    **_davit("small", 84.2),
    **_davit("base", 84.6),
    **_shvit("s1", 72.8),
    **_shvit("s2", 75.2),
    **_shvit("s3", 77.4),
    **_shvit("s4", 79.4),
    **_litv2("small", 82.0),
    **_litv2("medium", 83.3),
    **_litv2("base", 83.6),
    **_litv2("base", 84.7, 384, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    **_biformer("tiny", "https://matix.li/e36fe9fb086c", 81.4),
    **_biformer("small", "https://matix.li/5bb436318902", 83.8),
    **_biformer("base", "https://matix.li/995db75f585d", 84.3),
    **_biformer("stl", "https://matix.li/4e9034a91a23", 82.7),
    **_biformer("stl_nchw", "https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvChWYrKbWbMgqd2Ai0/root/content", 82.7),
    **_convit("tiny", 73.1),
    **_convit("small", 81.3),
    **_convit("base", 82.4),
    **_maxvit("tiny", {224: 83.62, 384: 85.24, 512: 85.72}),
    **_maxvit("small", {224: 84.45, 384: 85.74, 512: 86.19}),
    **_maxvit("base", {224: 84.95, 384: 86.34, 512: 86.66}),
    **_maxvit("large", {224: 85.17, 384: 86.40, 512: 86.70}),
    **_maxvit_21k("base"),
    **_maxvit_21k("large"),
    **_maxvit_21k("xlarge"),
    **_transnext("micro", "transnext_micro_224_1k", 82.5),
    **_transnext("micro_aaaa", "transnext_micro_AAAA_256_1k", 82.6),
    **_transnext("tiny", "transnext_tiny_224_1k", 84.0),
    **_transnext("small", "transnext_small_224_1k", 84.7),
    **_transnext("small", "transnext_small_384_1k_ft_1k", 86.0, "in1k_ft_in1k_384", **_SQUASHED_384),
    **_transnext("base", "transnext_base_224_1k", 84.8),
    **_transnext("base", "transnext_base_384_1k_ft_1k", 86.2, "in1k_ft_in1k_384", **_SQUASHED_384),
    **_halonet("halonet26t", "a1h_in1k", 79.134),
    **_halonet("halonet50ts", "a1h_in1k", 81.640),
    **_halonet("sehalonet33ts", "ra2_in1k", 80.976),
    **_halonet("eca_halonext26ts", "c1_in1k", 79.518),
    **_halonet("haloregnetz_b", "ra3_in1k", 81.058),
    **_halonet("halo2botnet50ts_256", "a1h_in1k", 82.084),
    **_halonet("lamhalobotnet50ts_256", "a1h_in1k", 81.552),
}
