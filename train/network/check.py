"""One image through the network before anything is trained or measured: what does not fit is found here."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import UserError, find_shortage, first_line
from ...torch_internals import BatchNorm
from ..config import TrainConfig
from ..data.transforms import InputSpec


@torch.no_grad()
def check_forward(model: nn.Module, spec: InputSpec, num_classes: int, config: TrainConfig | None = None) -> None:
    """Refuse a network that does not give class scores for an image of this size, or cannot train on its batches.

    Nothing of the network changes. One on the meta device computes nothing, only shapes.

    Args:
        model: images (B, 3, H, W) -> logits (B, num_classes).
        spec: the images.
        config: of the training that is to follow, if one is.

    Raises:
        UserError: names the size, the options of the model, or the batch size.
    """
    was_training, size = model.training, "x".join(map(str, spec.img_size))
    parameter = next(model.parameters(), None)
    image = torch.zeros(1, 3, *spec.img_size, device=None if parameter is None else parameter.device)
    try:
        with _watch_norms(model) as lonely:
            output = model.eval()(image)
    except Exception as error:  # a network raises whatever it comes upon
        if isinstance(error, NotImplementedError) and image.is_meta:  # an operation that only computes
            return
        if isinstance(error, UserError) or find_shortage(error):
            raise
        message = f"the network cannot compute an image of {size} pixels: {first_line(error)}"
        raise UserError(f"{message}; see --img-size and --model-kwargs") from error
    finally:
        model.train(was_training)
    if not isinstance(output, Tensor) or output.shape != (1, num_classes):
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"the network gives {found} and not {num_classes} class scores: see --model-kwargs")
    if lonely and config is not None and config.data.batch_size == 1 and not config.run.sync_bn:
        raise UserError(
            f"--batch-size 1: batch norm {lonely[0]} has one value per channel then, which has no variance; "
            "use --batch-size 2 or more"
        )


@contextmanager
def _watch_norms(model: nn.Module) -> Iterator[list[str]]:
    """Names of the batch norms that will be trained and that get a single value per channel of one image."""
    found: list[str] = []

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(name)

    is_whole = all(parameter.requires_grad for parameter in model.parameters())
    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        # As set_training_mode does: beside frozen parameters only what has some to train leaves evaluation mode.
        if isinstance(module, BatchNorm) and (is_whole or any(part.requires_grad for part in module.parameters()))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
