"""Checkpoints of MMEngine, read without running what they hold, and written whole.

MMEngine falls back to full unpickling when the safe way fails, and the file decides which way that is. After
:func:`guard` its loading goes through :func:`read_checkpoint`, which refuses such a file.
"""

import hashlib
import http.client
import pickle
import re
import urllib.parse
import urllib.request
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
TIMEOUT = 60.0
"""Seconds without a byte after which a download has failed."""
# Published checkpoints end in eight digits of their SHA-256; eight decimal ones are more likely a date.
_HASH_IN_NAME = re.compile(r"-((?=[0-9a-f]*[a-f])[0-9a-f]{8,})\.\w+$")
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
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]  # private: what the pickle of an array names
    np._core.multiarray.scalar,  # type: ignore[attr-defined]  # the same of a number
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
    """Read a checkpoint at an address; it stays in torch's cache under a name that is the whole address's.

    Raises:
        ValueError: no answer, an answer of another length or hash than said, or one that is no checkpoint.
    """
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = Path(urllib.parse.urlsplit(url).path).name or "checkpoint.pth"
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}-{name}"
    if target.is_file():
        return read_checkpoint(target, map_location)
    try:
        write_atomically(target, lambda path: _fetch(url, Path(path)))
        return read_checkpoint(target, map_location)
    except (OSError, ValueError, http.client.HTTPException) as error:
        target.unlink(missing_ok=True)
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"download of {url} (to {target}) failed: {reason}") from error


def _fetch(url: str, path: Path) -> None:
    hashed = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, path.open("wb") as file:
        while block := answer.read(1 << 20):
            file.write(block)
            hashed.update(block)
        expected = answer.headers.get("Content-Length")
    length = path.stat().st_size
    if length == 0 or (expected is not None and length != int(expected)):
        raise ValueError(f"{length} bytes came, and {expected or 'some'} were to come")
    said = _HASH_IN_NAME.search(urllib.parse.urlsplit(url).path)
    if said and not hashed.hexdigest().startswith(said[1]):
        raise ValueError(f"its hash begins with {hashed.hexdigest()[:8]}, and its name says {said[1]}")


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


def load_starting_weights(model: nn.Module, path: str) -> list[str]:
    """Load a checkpoint, ours or published, into a detector or segmenter that may have other classes.

    Args:
        model: of MMDetection or MMSegmentation.
        path: file, folder or address.

    Returns:
        Entries of the heads that have another shape, and keep what the model has.

    Raises:
        ValueError: a file that cannot be read, entries that are missing or left over, or a backbone or neck of another
            shape.
    """
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    state_dict = convert_detector(model, unwrap(checkpoint["state_dict"]))
    own = model.state_dict()
    reshaped = [key for key in own if key in state_dict and state_dict[key].shape != own[key].shape]
    problems = [f"missing: {key}" for key in own if key not in state_dict]
    problems += [f"left over: {key}" for key in state_dict if key not in own]
    problems += [f"another shape: {key}" for key in reshaped if key.startswith(("backbone.", "neck."))]
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ValueError(f"{path!r} does not fit the config ({len(problems)} entries): {shown}")
    model.load_state_dict({**own, **{key: value for key, value in state_dict.items() if key not in reshaped}})
    return reshaped
