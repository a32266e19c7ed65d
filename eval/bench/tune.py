"""Choose launch parameters of the Triton kernels, and write them into the launch table.

``python -m vicinal.eval.bench.tune --architecture hopper`` compiles every candidate ahead of time, without a GPU, on
all cores. What spills registers or exceeds the shared memory falls out. With ``--timed`` the rest is timed on the GPU
of this machine and the fastest wins; without, the one that keeps the multiprocessor busiest. Rows that the time does
not suffice for stay as they are.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from ...checkpoints import write_atomically
from ...command import check_fields, parse_options
from ...errors import UserError, run_command
from ...kernels import launch
from ...outputs import check_output_file
from .kernel_table import ARCHITECTURES, CASES, Case, Resources, compile_launch, record_case, run_case

BLOCKS, WARPS, STAGES = (64, 32, 16), (4, 8), (1, 2)
ENOUGH_OCCUPANCY = 0.25
"""Sixteen warps of 64 hide most latency of loads and products; beyond, larger blocks, which read less, count more."""
DTYPES = {2: torch.bfloat16, 4: torch.float32}
TABLE_FILE = Path(launch.__file__).with_name("launch_table.py")
Table = dict[str, dict[str, dict[int, dict[int, tuple[int, int, int]]]]]


@dataclass(frozen=True)
class TuneOptions:
    """Retune the launch table of the Triton kernels."""

    architecture: Literal["ampere", "ada", "hopper", "blackwell"] = "hopper"
    """Row of the table."""
    kernels: tuple[str, ...] = ()
    """Kernels to tune, as "<operator>_<kernel>"; all by default."""
    head_dims: tuple[int, ...] = (32, 64)
    """Channels of a head, padded to a power of two."""
    element_sizes: tuple[int, ...] = (2, 4)
    """Bytes of an element: 2 for bfloat16 and float16, 4 for float32."""
    timed: bool = False
    """Time the candidates on the GPU of this machine, which must be of the architecture."""
    seconds: float = 540.0
    """After this time no further row is begun."""
    processes: int = 2
    """Compilers that run at a time."""
    output: Path = TABLE_FILE
    """Python file to write the table to."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kernels) - set(tunable()))
        if unknown:
            raise UserError(f"kernels={unknown} are not in the launch table; use of {', '.join(tunable())}")
        if self.processes < 1:
            raise UserError(f"processes={self.processes} must be at least 1")
        check_fields(self, head_dims="[1, inf)", element_sizes="[2, 4]")


class Row(NamedTuple):
    """One entry of the table."""

    kernel: str
    element_size: int
    head_dim: int


def tunable() -> list[str]:
    """Kernels of the table that a case launches."""
    return [kernel for kernel in launch.TABLE["hopper"] if cases_of(kernel)]


def cases_of(kernel: str) -> list[Case]:
    """The cases that launch a kernel. Windows that fit into a block have kernels of their own."""
    operator, _, name = kernel.partition("_")
    cases = [case for case in CASES if case.operator == f"{operator}_attention"]
    if operator == "window":
        cases = [case for case in cases if (case.window < 8) == name.endswith("_whole")]
    return cases


def candidates(kernel: str) -> list[launch.Parameters]:
    """Parameters to try, large blocks first."""
    # a window of seven is attended to whole only in a block of 64
    blocks = BLOCKS[:1] if kernel.endswith("_whole") else BLOCKS
    return [launch.Parameters(*values) for values in product(blocks, WARPS, STAGES)]


def compile_candidate(architecture: str, row: Row, parameters: launch.Parameters) -> Resources | None:
    """What the most demanding case takes; None if one cannot be compiled within the limits of the architecture."""
    worst = None
    for case in cases_of(row.kernel):
        with launch.replace({row.kernel: parameters}):
            launches = record_case(case, row.head_dim, DTYPES[row.element_size], architecture)
        try:
            found = compile_launch(launches[row.kernel.partition("_")[2]], architecture)
        except (RuntimeError, ZeroDivisionError):  # a layout that the compiler does not know, or too much memory
            return None
        if found.spilled or found.shared > ARCHITECTURES[architecture].shared:
            return None
        worst = found if worst is None or found.occupancy < worst.occupancy else worst
    return worst


def rank(parameters: launch.Parameters, found: Resources) -> tuple:
    """The larger the better, where no time is known: enough occupancy, then large blocks, then few warps and stages."""
    return min(found.occupancy, ENOUGH_OCCUPANCY), parameters.block, -parameters.warps, -parameters.stages


def seconds_of(row: Row, parameters: launch.Parameters) -> float:
    """Median time of the forward or backward of all cases on the GPU; parameters of the other kernels do not change."""
    total = 0.0
    for case in cases_of(row.kernel):
        with launch.replace({row.kernel: parameters}):
            total += run_case(case, row.head_dim, DTYPES[row.element_size], backward="backward" in row.kernel)
    return total


def choose(row: Row, survivors: dict[launch.Parameters, Resources], timed: bool) -> launch.Parameters | None:
    """The best of the candidates that compile, None if there is none."""
    if not survivors:
        return None
    if timed:
        return min(survivors, key=lambda parameters: seconds_of(row, parameters))
    return max(survivors, key=lambda parameters: rank(parameters, survivors[parameters]))


def tune(options: TuneOptions) -> Iterator[tuple[Row, launch.Parameters | None]]:
    """Rows with the parameters chosen for them, None where every candidate fails."""
    rows = [Row(*values) for values in product(options.kernels or tunable(), options.element_sizes, options.head_dims)]
    deadline = time.monotonic() + options.seconds
    # processes of their own: a fork would share the state of CUDA
    pool = ProcessPoolExecutor(options.processes, get_context("spawn")) if options.processes > 1 else None
    with pool or nullcontext():
        for row in rows:
            if time.monotonic() > deadline:
                return
            tried = candidates(row.kernel)
            work = partial(compile_candidate, options.architecture, row)
            found = dict(zip(tried, (pool.map if pool else map)(work, tried), strict=True))
            survivors = {parameters: resources for parameters, resources in found.items() if resources}
            yield row, choose(row, survivors, options.timed)


def updated(table: Table, architecture: str, row: Row, parameters: launch.Parameters) -> Table:
    """A copy of the table with one entry replaced; other architectures keep theirs."""
    kernels = {
        kernel: {size: dict(entry) for size, entry in rows.items()} for kernel, rows in table[architecture].items()
    }
    kernels[row.kernel][row.element_size][row.head_dim] = tuple(parameters)
    return {**table, architecture: kernels}


HEADER = '''"""Launch parameters of the Triton kernels by architecture.

``python -m vicinal.eval.bench.tune`` writes them.

Each entry is {kernel: {bytes of an element: {head_dim padded to a power of two: (block, warps, stages)}}}.
"""

TABLE = {
'''


def format_table(table: Table) -> str:
    """The table as a Python file."""
    lines = [HEADER]
    for architecture, kernels in table.items():
        lines.append(f'    "{architecture}": {{\n')
        for kernel, rows in kernels.items():
            lines.append(f'        "{kernel}": {{\n')
            lines.extend(f"            {size}: {entry},\n" for size, entry in rows.items())
            lines.append("        },\n")
        lines.append("    },\n")
    return "".join([*lines, "}\n"])


def write_table(table: Table, path: Path) -> None:
    text = format_table(table)
    write_atomically(path, lambda partial_path: Path(partial_path).write_text(text, encoding="utf-8"))


def main(argv: Sequence[str]) -> int:
    """Tune, print each choice beside the present one, and write the table."""
    options = parse_options(TuneOptions, "python -m vicinal.eval.bench.tune", argv)
    check_output_file("--output", options.output)
    table = launch.TABLE
    for row, parameters in tune(options):
        present = table[options.architecture][row.kernel][row.element_size].get(row.head_dim, "no entry")
        print(*row, f"{present} ->", tuple(parameters) if parameters else "no candidate fits", flush=True)
        if parameters:
            table = updated(table, options.architecture, row, parameters)
    write_table(table, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
