"""``vicinal doctor``: what is installed, which devices there are, and which backend each operator takes on them."""

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..command import refuse_options
from ..kernels import (
    aggregated_attention,
    explain,
    gated_positional_attention,
    halo_attention,
    neighborhood_attention,
    routed_attention,
    window_attention,
)

PACKAGES = ("vicinal", "torch", "triton", "timm", "torchvision")
DTYPES = (torch.float32, torch.bfloat16)
TYPICAL_CALLS: dict[Callable, Callable[[Callable[..., Tensor]], tuple]] = {
    window_attention: lambda tokens: (*[tokens(1, 56, 56, 3, 32)] * 3, 7),
    neighborhood_attention: lambda tokens: (*[tokens(1, 56, 56, 2, 32)] * 3, 7),
    halo_attention: lambda tokens: (*[tokens(1, 64, 64, 4, 16)] * 3, 8, 3),
    aggregated_attention: lambda tokens: (*[tokens(1, 56, 56, 3, 24)] * 3, *[tokens(1, 49, 3, 24)] * 2),
    routed_attention: lambda tokens: (*[tokens(1, 49, 64, 2, 32)] * 3, tokens(1, 49, 1).long()),
    gated_positional_attention: lambda tokens: (*[tokens(1, 196, 4, 48)] * 3, tokens(4, 196, 196), tokens(4)),
}
"""Arguments of each operator, made of tensors of zeros of a given shape: first stages of the families that use it."""


def main(argv: Sequence[str]) -> int:
    """Print the report; returns the exit code."""
    refuse_options("vicinal doctor", argv, "Versions, devices, and which backend each operator takes on them.")
    for line in report():
        print(line, flush=True)
    return 0


def report() -> Iterator[str]:
    """Lines of the report. Nothing is computed, and only the arguments of the calls are allocated."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield f"{name} {installed_version(name)}"
    for device in devices():
        yield f"\n{device}: {describe(device)}"
        for operator, arguments in TYPICAL_CALLS.items():
            for dtype in DTYPES:
                lines = explain(operator, *arguments(partial(_zeros, dtype, device))).splitlines()
                yield f"  {lines[0]} ({str(dtype).removeprefix('torch.')})"
                yield from (f"    {line}" for line in lines[1:])


def _zeros(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def devices() -> list[torch.device]:
    """The CPU and every accelerator."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found + [torch.device("mps")] * torch.backends.mps.is_available()


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"compute capability {properties.major}.{properties.minor}"
        return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU"
