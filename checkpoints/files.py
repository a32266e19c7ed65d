"""Reading and writing weight files: safetensors on disk, atomic, and no unpickling of untrusted data."""

import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

# Where training scripts keep the weights inside a checkpoint, the averaged weights first.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> Path:
    """Call ``write`` with a temporary name beside ``path``, flush it to the disk, and rename it to ``path``.

    A reader sees the old file or the new one, never half of one. The temporary file is removed if ``write`` raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        _flush(temporary)
        os.chmod(temporary, 0o666 & ~_current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush(path.parent)
    return path


def save(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a state dict as one safetensors file, atomically.

    Args:
        path: file to write; must end in ``.safetensors``.
        state_dict: tensors of any dtype and device, by name. Tensors that share memory are written once each.
        metadata: strings kept in the file's header.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix, or an entry that is not a tensor.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {str(path)!r}: weights are written as safetensors; use {path.stem}.safetensors")
    foreign = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"state_dict holds entries that are not tensors: {foreign[:5]}; keep them in metadata")
    # safetensors refuses shared memory; a clone of each tensor keeps every name.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state_dict.items()}
    header = {"format": "pt", **(metadata or {})}
    return write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, header))


def save_model(folder: str | os.PathLike, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Write a timm model as a folder that ``timm.create_model("local-dir:FOLDER")`` rebuilds.

    Args:
        folder: created if missing; holds ``model.safetensors`` and ``config.json``, each written atomically.
        model: a model made by ``timm.create_model``.
        state_dict: weights to write in place of the model's own, such as their moving average.

    Returns:
        The folder.
    """
    from ..timm_internals import save_config_for_hf

    folder = Path(folder)
    write_atomically(folder / CONFIG_NAME, lambda temporary: save_config_for_hf(model, temporary))
    save(folder / WEIGHTS_NAME, model.state_dict() if state_dict is None else state_dict)
    return folder


def load(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, a PyTorch checkpoint, or a folder written by :func:`save_model`.

    Training checkpoints are unwrapped (averaged weights first), and the prefixes of DistributedDataParallel and
    torch.compile are removed. PyTorch checkpoints are read with ``weights_only=True``.

    Raises:
        ValueError: missing file, unreadable file, or a file that holds no weights; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(
            f"no weights at {str(path)!r}: give a .safetensors or .pth file, or a folder with {WEIGHTS_NAME}"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot read weights from {str(path)!r}: {reason}") from error
    return unwrap(checkpoint)


def unwrap(checkpoint: object) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without wrapper prefixes.

    Raises:
        ValueError: nothing in it looks like a state dict.
    """
    if isinstance(checkpoint, Mapping):
        for container in _CONTAINERS:
            inner = checkpoint.get(container)
            if isinstance(inner, Mapping) and inner:
                checkpoint = inner
                break
    if not isinstance(checkpoint, Mapping) or not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(f"no state dict found: expected tensors by name, at the top or under one of {_CONTAINERS}")
    return {_strip_wrappers(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}


def _strip_wrappers(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _flush(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
