"""Reading and writing weight files: safetensors on disk, atomic, and no unpickling of untrusted data."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import safetensors.torch
import torch
from torch import Tensor, nn

DOWNLOAD_TIMEOUT = 30.0
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

# Where training scripts keep the weights inside a checkpoint, the averaged weights first.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> Path:
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

    ``config.json`` names no licence: that of the architecture's released weights says nothing of these.

    Args:
        folder: created if missing; holds ``model.safetensors`` and ``config.json``, each written atomically.
        model: a model made by ``timm.create_model``.
        state_dict: weights to write in place of the model's own, such as their moving average.

    Returns:
        The folder.
    """
    folder = Path(folder)
    write_atomically(folder / CONFIG_NAME, lambda temporary: _write_config(model, Path(temporary)))
    save(folder / WEIGHTS_NAME, model.state_dict() if state_dict is None else state_dict)
    return folder


def _write_config(model: nn.Module, path: Path) -> None:
    from ..timm_internals import save_config_for_hf

    save_config_for_hf(model, str(path))
    config = json.loads(path.read_text(encoding="utf-8"))
    config["pretrained_cfg"].pop("license", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


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
    return _read(path, path.suffix == ".safetensors")


def _read(path: Path, is_safetensors: bool) -> dict[str, Tensor]:
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint makes whatever it likes of an unpickler: KeyError 101
        # With the type: some messages are a bare number or name.
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        kind = "safetensors file" if is_safetensors else "PyTorch checkpoint"
        why = f"it is no whole {kind} of tensors ({reason})" if path.stat().st_size else "the file is empty"
        raise ValueError(f"cannot read weights from {str(path)!r}: {why}") from error
    try:
        return unwrap(checkpoint)
    except ValueError as error:
        raise ValueError(f"cannot read weights from {str(path)!r}: {error}") from error


def fetch(
    url: str, sha256: str = "", folder: str | os.PathLike | None = None, timeout: float = DOWNLOAD_TIMEOUT
) -> Path:
    """Download a file of weights, unless it is there already; what is kept was whole, and can be read.

    Args:
        url: address; the file is kept under a name made of all of it.
        sha256: of the file, in hexadecimal, where it is known.
        folder: where downloads are kept; torch.hub's if not given.
        timeout: seconds without a byte after which to give up.

    Returns:
        The path of the file.

    Raises:
        ValueError: no answer, an answer cut short, another hash, or something that holds no weights, such as a web
            page; the message names the address, and nothing is kept.
    """
    folder = Path(folder or Path(torch.hub.get_dir()) / "checkpoints")
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not path.is_file():
        write_atomically(path, lambda temporary: _download(url, Path(temporary), sha256, timeout))
    return path


def _download(url: str, path: Path, sha256: str, timeout: float) -> None:
    digest = hashlib.sha256()
    try:
        with (
            urlopen(Request(url, headers={"User-Agent": "vicinal"}), timeout=timeout) as answer,
            path.open("wb") as file,
        ):
            announced, kind = answer.headers.get("Content-Length"), answer.headers.get_content_type()
            while chunk := answer.read(2**20):
                digest.update(chunk)
                file.write(chunk)
            size = file.tell()
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"cannot download {url}: {error or type(error).__name__}") from error
    if announced is not None and size != int(announced):
        raise ValueError(f"cannot download {url}: cut short, {size} of {announced} bytes came")
    if sha256 and digest.hexdigest() != sha256.lower():
        raise ValueError(f"cannot download {url}: its SHA-256 is {digest.hexdigest()}, expected {sha256}")
    try:
        _read(path, urlsplit(url).path.endswith(".safetensors"))
    except ValueError as error:
        raise ValueError(f"cannot download {url}: the {size} bytes of {kind} that came hold no weights") from error


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
