"""Compile the Triton kernels ahead of time, without a GPU, and tabulate what each takes of its multiprocessor.

``python -m vicinal.eval.bench.kernel_table docs/kernel_resources.md hopper`` writes the table for the architectures
named, or for all of them, in about two minutes each.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...kernels import launch


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has. Sources: CUDA C++ Programming Guide, compute capabilities.

    Attributes:
        capability: compute capability times ten.
        shared: bytes of shared memory that one program may use.
        shared_total: bytes that all programs on a multiprocessor share.
        warps: resident warps.
    """

    capability: int
    shared: int
    shared_total: int
    warps: int


ARCHITECTURES = {
    "ampere": Architecture(80, 166912, 167936, 64),
    "ada": Architecture(89, 101376, 102400, 48),
    "hopper": Architecture(90, 232448, 233472, 64),
    "blackwell": Architecture(100, 232448, 233472, 64),
}
REGISTERS = 65536
RESERVED_SHARED = 1024
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TENSOR_CORES = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma"


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared: bytes of a program.
        tensor_core_instructions: in the program text.
        occupancy: share of the multiprocessor's warps that are resident.
    """

    registers: int
    spilled: int
    shared: int
    tensor_core_instructions: int
    occupancy: float


def compile_launch(started: launch.Launch, architecture: str) -> Resources:
    """Compile a recorded launch as the runtime would specialize it for its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(started.kernel.params):
        value = started.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = _specialize(value, (index,), constants, attributes)
    limits, (_, warps, stages) = ARCHITECTURES[architecture], started.parameters
    compiled = triton.compile(
        ASTSource(started.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", limits.capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    registers, spilled = _usage(compiled.asm["cubin"], Path(triton.__file__).parent)
    shared = compiled.metadata.shared
    by_registers = REGISTERS // (32 * warps * -(-registers // 8) * 8)
    programs = min(by_registers, limits.shared_total // (shared + RESERVED_SHARED), limits.warps // warps)
    instructions = len(re.findall(TENSOR_CORES, compiled.asm["ptx"]))
    return Resources(registers, spilled, shared, instructions, programs * warps / limits.warps)


def _specialize(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """Type of an argument in Triton's signature, by the rules of its runtime: ones and None become constants."""
    from triton.language import constexpr

    if isinstance(value, tuple):
        parts = [_specialize(item, (*path, index), constants, attributes) for index, item in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, constexpr) or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value.value if isinstance(value, constexpr) else value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _usage(binary: bytes, triton_folder: Path) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the compiled binary."""
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        report = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report).groups())
    return registers, stack + local


@dataclass(frozen=True)
class Case:
    """One call whose forward and backward are compiled.

    Attributes:
        operator: a key of ARGUMENTS.
        window: side of a window or a region, size of a kernel, or side of a block with a halo of half of it.
        rank: spatial axes of the map.
    """

    operator: str
    window: int
    rank: int = 2


CASES = (
    Case("window_attention", 7),
    Case("window_attention", 4),
    Case("window_attention", 14),
    Case("neighborhood_attention", 7),
    Case("neighborhood_attention", 13, rank=1),
    Case("neighborhood_attention", 3, rank=3),
    Case("halo_attention", 8),
    Case("aggregated_attention", 3),
    Case("routed_attention", 8),
    Case("routed_attention", 2),
)
HEAD_DIMS = (32, 64)
DTYPES = (torch.bfloat16, torch.float32)


def record_case(case: Case, head_dim: int, dtype: torch.dtype, architecture: str) -> dict[str, launch.Launch]:
    """The launches of a forward and a backward with all gradients, by name of the kernel; nothing is computed."""
    forward, backward = _calls(case, head_dim, dtype, "meta")
    with launch.record(architecture) as launches:
        backward(*forward())
    return {started.kernel.__name__.removesuffix("_kernel"): started for started in launches}


def run_case(case: Case, head_dim: int, dtype: torch.dtype, backward: bool, repeats: int = 20) -> float:
    """Median seconds of a forward, or of a backward with all gradients, on the GPU."""
    forward, differentiate = _calls(case, head_dim, dtype, "cuda")
    outputs = forward()
    call = partial(differentiate, *outputs) if backward else forward
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def _calls(case: Case, head_dim: int, dtype: torch.dtype, device: str) -> tuple[Callable, Callable]:
    """A forward, and a backward that takes what the forward returns."""
    module = import_module(f"...kernels.{case.operator.removesuffix('_attention')}.fused", __package__)
    with torch.device(device):
        arguments = ARGUMENTS[case.operator](case, head_dim, dtype)
    gradients = [True for value in arguments if isinstance(value, Tensor) and value.is_floating_point()]

    def backward(output: Tensor, logsumexp: Tensor) -> None:
        module.backward(torch.zeros_like(output), output, logsumexp, gradients, *arguments)

    return partial(module.forward, *arguments), backward


def _packed(case: Case, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value of a map, as views of a packed projection."""
    extent = {1: 4096, 2: 8 * case.window, 3: 16}[case.rank]
    return torch.zeros((8, *(extent,) * case.rank, 3, 4, head_dim), dtype=dtype).unbind(-3)


def _table(case: Case) -> Tensor:
    return torch.zeros(4, *(2 * case.window - 1,) * case.rank)


def _window(case: Case, head_dim: int, dtype: torch.dtype) -> tuple:
    options = ([case.window], "block", [case.window // 2], _table(case), None)
    return *_packed(case, head_dim, dtype), *options


def _neighborhood(case: Case, head_dim: int, dtype: torch.dtype) -> tuple:
    options = ([case.window], [1], [2], [False], _table(case), None)
    return *_packed(case, head_dim, dtype), *options


def _halo(case: Case, head_dim: int, dtype: torch.dtype) -> tuple:
    query, key, value = _packed(case, head_dim, dtype)
    halo = (case.window - 1) // 2
    logits = [torch.zeros(*query.shape[:-1], case.window + 2 * halo, dtype=dtype) for _ in range(2)]
    return query, key, value, case.window, halo, *logits, False, None


def _aggregated(case: Case, head_dim: int, dtype: torch.dtype) -> tuple:
    """49 pooled tokens, all biases and value weights."""
    query, key, value = _packed(case, head_dim, dtype)
    pooled = torch.zeros(8, 49, 2, 4, head_dim, dtype=dtype).unbind(2)
    biases = (
        torch.zeros(4, case.window**2),
        torch.zeros(4, query[0, :, :, 0, 0].numel(), 49),
    )
    weights = torch.zeros(*query.shape[:-1], case.window**2, dtype=dtype)
    return query, key, value, *pooled, case.window, *biases, weights, 1.0


def _routed(case: Case, head_dim: int, dtype: torch.dtype) -> tuple:
    """A map of 7 x 7 regions of window x window tokens, each routed to four."""
    tokens = torch.zeros(8, 7, case.window, 7, case.window, 3, 4, head_dim, dtype=dtype).unbind(-3)
    return *tokens, torch.arange(4).expand(8, 49, 4), None


ARGUMENTS = {
    "window_attention": _window,
    "neighborhood_attention": _neighborhood,
    "halo_attention": _halo,
    "aggregated_attention": _aggregated,
    "routed_attention": _routed,
}
"""Of a call of each operator: functions of case, head_dim and dtype."""


HEADER = """# What the Triton kernels take of a multiprocessor

Made by `python -m vicinal.eval.bench.kernel_table {arguments}` with triton {triton}, compiled ahead of time: no GPU
was used, and nothing here is a time. Registers and spilled bytes are of a thread, shared memory is of a program;
occupancy is the share of the multiprocessor's warps that registers and shared memory let be resident.

| architecture | operator | kernel | dtype | head_dim | block, warps, stages \
| registers | spilled | shared | tensor-core instructions | occupancy, % |
|---|---|---|---|---|---|---|---|---|---|---|
"""
DOCUMENTED_CASES = tuple(case for case in CASES if case.rank == 2 and case.window not in (2, 4))


def table_rows(architecture: str) -> Iterator[str]:
    """Lines of the table for one architecture: each kernel once for each dtype and head_dim."""
    for dtype, head_dim in product(DTYPES, HEAD_DIMS):
        launches = {}
        for case in DOCUMENTED_CASES:
            for name, started in record_case(case, head_dim, dtype, architecture).items():
                launches.setdefault((case.operator, name), started)
        for (operator, name), started in launches.items():
            found = compile_launch(started, architecture)
            cells = (
                *(architecture, operator, name, str(dtype).removeprefix("torch."), head_dim),
                ", ".join(map(str, started.parameters)),
                *(found.registers, found.spilled, found.shared, found.tensor_core_instructions),
                round(100 * found.occupancy),
            )
            yield f"| {' | '.join(map(str, cells))} |\n"


def main(argv: Sequence[str]) -> int:
    """Write the table; the paths and architectures are all that is asked for."""
    if not argv or not set(argv[1:]) <= set(ARCHITECTURES):
        raise SystemExit(f"usage: python -m vicinal.eval.bench.kernel_table FILE [{' | '.join(ARCHITECTURES)} ...]")
    import triton

    path, *chosen = argv
    text = HEADER.format(arguments=" ".join(argv), triton=triton.__version__)
    text += "".join(row for architecture in chosen or ARCHITECTURES for row in table_rows(architecture))
    partial = Path(f"{path}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
