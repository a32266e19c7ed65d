"""``vicinal doctor``: what is installed, which devices there are, and which backend each operator takes on them."""

import platform
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from ..command import refuse_options
from ..kernels.dispatch import OPERATORS
from ..kernels.packed import PackedOperator

PACKAGES = ("vicinal", "torch", "triton", "timm", "torchvision")
DTYPES = (torch.float32, torch.bfloat16)


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
        for operator in OPERATORS.values():
            if isinstance(operator, PackedOperator):  # its backend is that of the operator
                continue
            for dtype in DTYPES:
                arguments = operator.examples.typical.make(dtype, partial(torch.zeros, device=device))
                lines = operator.explain(*arguments).splitlines()
                yield f"  {lines[0]} ({str(dtype).removeprefix('torch.')})"
                yield from (f"    {line}" for line in lines[1:])


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
