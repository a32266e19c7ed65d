"""Launch parameters of the Triton kernels: a static table by architecture, and the one place where kernels start.

Nothing is tuned at import or at the first call. Hopper's entries for two bytes and head_dim up to 32 were timed on an
H200 (docs/kernel_times.md), but for windows of several blocks; the others were chosen by compiling ahead of time. The
tests hold Hopper's entries of head_dim 32 to their registers and shared memory, and the slow ones those of all
architectures.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .launch_table import TABLE


class Parameters(NamedTuple):
    """Tokens of a block, warps of a program, stages of the software pipeline."""

    block: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """A kernel with its number of programs and its arguments by name."""

    kernel: Any
    programs: int
    parameters: Parameters
    arguments: dict[str, Any]


class _Recording(NamedTuple):
    architecture: str
    launches: list[Launch]


_recording: Optional[_Recording] = None
_replaced: Mapping[str, Parameters] = {}


@cache
def architecture(device: torch.device) -> Optional[str]:
    """Row of the table for a device, None for one that has no row. In the interpreter the CPU stands in for Hopper."""
    if device.type == "cpu":
        return "hopper"
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell"}.get(
        (major, minor), "ada" if major in (8, 12) else None
    )


def covers(operator: str, query: Tensor, channels: int) -> bool:
    """Whether the table has parameters for every kernel of an operator; arguments as for launch_parameters."""
    return _covers(_row(query), operator, query.element_size(), max(channels, 32))


@cache
def _covers(row: str, operator: str, element_size: int, channels: int) -> bool:
    kernels = (entries for kernel, entries in TABLE[row].items() if kernel.startswith(f"{operator}_"))
    return all(channels in entries[element_size] for entries in kernels)


def launch_parameters(kernel: str, query: Tensor, channels: int) -> Parameters:
    """Args: kernel: "<operator>_<kernel>"; channels: head_dim padded to a power of two."""
    if kernel in _replaced:
        return _replaced[kernel]
    return Parameters(*TABLE[_row(query)][kernel][query.element_size()][max(channels, 32)])


def _row(query: Tensor) -> str:
    return _recording.architecture if _recording else architecture(query.device)


@contextmanager
def record(architecture: str) -> Iterator[list[Launch]]:
    """Collect launches instead of starting them, with the parameters of an architecture; meta tensors will do."""
    global _recording  # noqa: PLW0603 (as the backend that dispatch holds)
    outer, _recording = _recording, _Recording(architecture, [])
    try:
        yield _recording.launches
    finally:
        _recording = outer


@contextmanager
def replace(parameters: Mapping[str, Parameters]) -> Iterator[None]:
    """Use other parameters than those of the table for the kernels named, to try them."""
    global _replaced  # noqa: PLW0603 (as above)
    outer, _replaced = _replaced, parameters
    try:
        yield
    finally:
        _replaced = outer


def submit(kernel: Any, programs: int, parameters: Parameters, **arguments: Any) -> None:
    """Start a kernel on the current stream of the device of its argument `query`, a tensor or a tuple led by one."""
    if _recording:
        _recording.launches.append(Launch(kernel, programs, parameters, arguments))
        return
    query = arguments["query"]
    with torch.cuda.device_of(query[0] if isinstance(query, tuple) else query):
        kernel[(programs,)](**arguments, num_warps=parameters.warps, num_stages=parameters.stages)
