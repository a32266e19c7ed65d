"""TransNeXt: the authors' files on the Hugging Face Hub."""

from typing import Any

from .entry import ReleasedWeights


def _transnext(file: str, top1: float, **cfg: Any) -> ReleasedWeights:
    return ReleasedWeights(
        url=f"https://huggingface.co/DaiShiResearch/{file.replace('_', '-')}/resolve/main/{file}.pth",
        top1=top1,
        license="apache-2.0",
        origin="https://github.com/DaiShiResearch/TransNeXt",
        cfg=cfg,
    )


def _at_384(file: str, top1: float) -> ReleasedWeights:
    return _transnext(file, top1, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash")


RELEASED: dict[str, ReleasedWeights] = {
    "transnext_micro.in1k": _transnext("transnext_micro_224_1k", 82.5),
    "transnext_micro_aaaa.in1k": _transnext("transnext_micro_AAAA_256_1k", 82.6),
    "transnext_tiny.in1k": _transnext("transnext_tiny_224_1k", 84.0),
    "transnext_small.in1k": _transnext("transnext_small_224_1k", 84.7),
    "transnext_small.in1k_ft_in1k_384": _at_384("transnext_small_384_1k_ft_1k", 86.0),
    "transnext_base.in1k": _transnext("transnext_base_224_1k", 84.8),
    "transnext_base.in1k_ft_in1k_384": _at_384("transnext_base_384_1k_ft_1k", 86.2),
}
