"""``vicinal models``: every registered model with its size, its cost and the accuracy that its authors published."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..command import refuse_options
from ..errors import UserError, nearest

MARKDOWN_HEADER = "| model | input | params, M | MACs, G | published top-1, % |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class CatalogRow:
    """One model at its native input size.

    Attributes:
        name: registered name.
        input_size: height and width in pixels.
        parameters: number of parameters, with the classifier.
        macs: multiply-accumulates of one image, in matrix products, convolutions and attention.
        top1: ImageNet-1k top-1 in percent as published with weights of that size, None where there are none.
    """

    name: str
    input_size: tuple[int, int]
    parameters: int
    macs: int
    top1: float | None

    def markdown(self) -> str:
        """The row of the README's table."""
        size = "x".join(str(side) for side in self.input_size)
        top1 = "" if self.top1 is None else f"{self.top1:.1f}"
        return f"| `{self.name}` | {size} | {self.parameters / 1e6:.2f} | {self.macs / 1e9:.2f} | {top1} |"


def list_rows() -> Iterator[CatalogRow]:
    """Rows of all models, by family and size. They are built on the meta device: nothing is allocated or computed."""
    from timm.models import list_models, model_entrypoint

    from .. import zoo

    package = zoo.__name__ + "."
    modules = {name: model_entrypoint(name).__module__ for name in list_models()}
    families: dict[str, list[CatalogRow]] = {}
    for name, module in modules.items():
        if module.startswith(package) and module != f"{package}probe":  # a head on any network
            families.setdefault(module, []).append(describe(name))
    for module in sorted(families):
        yield from sorted(families[module], key=lambda row: (row.parameters, row.macs))


def describe(name: str) -> CatalogRow:
    """One model's row, measured on the meta device.

    Raises:
        UserError: no model has this name.
    """
    from timm import create_model, is_model, list_models
    from torch.utils.flop_counter import FlopCounterMode

    from ..checkpoints import RELEASED

    if not is_model(name):
        raise UserError(f"{name}: no such model; {nearest(name, list_models()) or 'vicinal models lists ours'}")
    model = create_model(name, device="meta").eval()
    channels, *size = model.pretrained_cfg["input_size"]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, channels, *size, device="meta"))
    native = (channels, *size)
    published = [
        weights.top1
        for tag, weights in RELEASED.items()
        if tag.split(".")[0] == name and weights.top1 and tuple(weights.cfg.get("input_size", native)) == native
    ]
    return CatalogRow(
        name=name,
        input_size=tuple(size),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        top1=max(published, default=None),
    )


def main(argv: Sequence[str]) -> int:
    """Print the table of models as Markdown; returns the exit code."""
    refuse_options("vicinal models", argv, "Every model with its size, cost and published accuracy, as Markdown.")
    print(MARKDOWN_HEADER)
    for row in list_rows():
        print(row.markdown(), flush=True)
    return 0
