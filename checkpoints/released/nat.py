"""NAT, DiNAT, DiNAT_s and the isotropic variants: files of SHI-Labs."""

from .entry import ReleasedWeights

_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS"
_DINAT = "https://shilab.cs.uoregon.edu/projects/dinat/checkpoints"


def _weights(address: str, top1: float | None, num_classes: int = 1000) -> ReleasedWeights:
    origin = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
    return ReleasedWeights(url=f"{address}.pth", num_classes=num_classes, top1=top1, origin=origin)


def _nat(file: str, top1: float) -> ReleasedWeights:
    return _weights(f"{_NAT}/{file}", top1)


def _dinat(file: str, top1: float) -> ReleasedWeights:
    return _weights(f"{_DINAT}/{file}", top1)


def _dinat_22k(file: str) -> ReleasedWeights:
    return _weights(f"{_DINAT}/imagenet22k/{file}", None, 21841)


RELEASED: dict[str, ReleasedWeights] = {
    "nat_mini.shi_in1k": _nat("nat_mini", 81.8),
    "nat_tiny.shi_in1k": _nat("nat_tiny", 83.2),
    "nat_small.shi_in1k": _nat("nat_small", 83.7),
    "nat_base.shi_in1k": _nat("nat_base", 84.3),
    "dinat_mini.shi_in1k": _dinat("imagenet1k/dinat_mini_in1k_224", 81.8),
    "dinat_tiny.shi_in1k": _dinat("imagenet1k/dinat_tiny_in1k_224", 82.7),
    "dinat_small.shi_in1k": _dinat("imagenet1k/dinat_small_in1k_224", 83.8),
    "dinat_base.shi_in1k": _dinat("imagenet1k/dinat_base_in1k_224", 84.4),
    "dinat_large.shi_in22k_ft_in1k": _dinat("imagenet1k/dinat_large_in22k_in1k_224", 86.6),
    "dinat_large_384.shi_in22k_ft_in1k": _dinat("imagenet1k/dinat_large_in22k_in1k_384", 87.4),
    "dinat_large_384_11x11.shi_in22k_ft_in1k": _dinat("imagenet1k/dinat_large_in22k_in1k_384_11x11", 87.5),
    "dinat_large_21k.shi_in22k": _dinat_22k("dinat_large_in22k_224"),
    "dinat_large_21k_11x11.shi_in22k": _dinat_22k("dinat_large_in22k_224_11x11interp"),
    "dinat_s_tiny.shi_in1k": _dinat("imagenet1k/dinat_s_tiny_1k_224", 81.8),
    "dinat_s_small.shi_in1k": _dinat("imagenet1k/dinat_s_small_1k_224", 83.5),
    "dinat_s_base.shi_in1k": _dinat("imagenet1k/dinat_s_base_1k_224", 83.8),
    "dinat_s_large.shi_in22k_ft_in1k": _dinat("imagenet1k/dinat_s_large_1k_224", 86.5),
    "dinat_s_large_384.shi_in22k_ft_in1k": _dinat("imagenet1k/dinat_s_large_1k_384", 87.4),
    "dinat_s_large_21k.shi_in22k": _dinat_22k("dinat_s_large_in22k_224"),
    "nat_isotropic_small.shi_in1k": _dinat("isotropic/nat_isotropic_small_in1k_224", 80.0),
    "nat_isotropic_base.shi_in1k": _dinat("isotropic/nat_isotropic_base_in1k_224", 81.6),
    "dinat_isotropic_small.shi_in1k": _dinat("isotropic/dinat_isotropic_small_in1k_224", 80.8),
    "dinat_isotropic_base.shi_in1k": _dinat("isotropic/dinat_isotropic_base_in1k_224", 82.1),
    "vitrpb_small.shi_in1k": _dinat("isotropic/vitrpb_small_in1k_224", 81.2),
    "vitrpb_base.shi_in1k": _dinat("isotropic/vitrpb_base_in1k_224", 82.5),
}
