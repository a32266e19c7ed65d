"""Checkpoints of MMEngine, read without running what they hold, and written whole.

MMEngine falls back to full unpickling when the safe way fails, and the file decides which way that is. After
:func:`guard` its loading goes through :func:`read_checkpoint`, which refuses such a file.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from ...checkpoints import load, write_atomically
from ...checkpoints.files import unwrap
from .backbone import VicinalBackbone, convert_backbone

ATOMIC_BACKEND = "vicinal_atomic"
# What a checkpoint of MMEngine's runner holds besides tensors: logged numbers.
_SCALAR_DTYPES = (np.float32, np.float64, np.int32, np.int64, np.uint32, np.bool_)


def _statistic(owner: Any, name: str) -> Any:
    """What getattr does in these files: look up a statistic of the logged numbers. It does nothing else here."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise pickle.UnpicklingError(f"attribute {name!r} of {owner!r} is asked for")
    return getattr(owner, name)


SAFE_TYPES = [
    (_statistic, "builtins.getattr"),
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *(type(np.dtype(kind)) for kind in _SCALAR_DTYPES),
]


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of MMEngine, or plain weights as ``state_dict``, unpickling nothing but tensors and numbers.

    Raises:
        ValueError: a missing or broken file, or one that wants to run code.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return {"meta": {}, "state_dict": load(path)}
    if not path.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}: give a .pth or .safetensors file, or a run's folder")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"refused to load {str(path)!r}, which is broken or holds more than data: {reason}") from error
    has_runner_state = isinstance(checkpoint, dict) and "state_dict" in checkpoint
    return checkpoint if has_runner_state else {"meta": {}, "state_dict": unwrap(checkpoint)}


def guard() -> None:
    """Have MMEngine read local files and downloads by :func:`read_checkpoint`, in this process."""
    CheckpointLoader.register_scheme("", loader=read_checkpoint, force=True)
    CheckpointLoader.register_scheme(("http://", "https://"), loader=_download, force=True)


def _download(url: str, map_location: Any = "cpu", **_: Any) -> dict[str, Any]:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / Path(url).name
    if not target.exists():
        write_atomically(target, lambda path: torch.hub.download_url_to_file(url, path))
    return read_checkpoint(target, map_location)


class AtomicBackend(LocalBackend):
    """MMEngine's local files, written under a temporary name and renamed."""

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        write_atomically(filepath, lambda path: Path(path).write_bytes(obj))

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        write_atomically(filepath, lambda path: Path(path).write_text(obj, encoding))


register_backend(ATOMIC_BACKEND, AtomicBackend, force=True)


def convert_detector(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A detector's or segmenter's published state dict, with the backbone in the original layout, as ours takes it.

    Args:
        model: of MMDetection or MMSegmentation, on a :class:`VicinalBackbone`.
        state_dict: necks and heads as MMDetection names them, the backbone below ``backbone.``.

    Returns:
        The same with the backbone's entries renamed; one in our layout comes back as it is.

    Raises:
        ValueError: a backbone that does not fit.
    """
    backbone = model.backbone
    if not isinstance(backbone, VicinalBackbone):
        return dict(state_dict)
    inner = {key: value for key, value in state_dict.items() if key.startswith("backbone.")}
    if not inner or all(key.startswith(("backbone.model.", "backbone.output_norms.")) for key in inner):
        return dict(state_dict)
    converted = convert_backbone(backbone.name, inner, backbone)
    others = {key: value for key, value in state_dict.items() if key not in inner}
    return {**others, **{f"backbone.{key}": value for key, value in converted.items()}}


def load_detector(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint, ours or published, into a detector or segmenter, strictly.

    Raises:
        ValueError: a file that cannot be read, or entries that are missing, left over or of another shape.
    """
    state_dict = convert_detector(model, unwrap(read_checkpoint(path)["state_dict"]))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} does not fit the config: {' '.join(str(error).split())[:600]}") from error
