"""How the benchmarks measure and report.

Every implementation of a case runs in turn, again and again, inside one process, and the least process CPU time of each
counts (for training, where differences of a percent matter, the median): other work on the machine slows all of them
alike. Ratios inside one run count; times of two runs do not.

``torch.utils.benchmark`` and ``triton.testing.do_bench`` time one implementation after the other by the clock, so
that a busy moment falls on one of them alone; and ``do_bench`` empties the cache once before a call, which is over
before the host has queued a small operator, so that it measures the host. What ``do_bench_cudagraph`` does with a
graph of many calls, :func:`replayed_seconds` does with one, for which whole models have the memory.
"""

import csv
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...checkpoints import write_atomically
from ...errors import UserError
from ...outputs import check_output_file

NOTE = "Only ratios inside this table count: absolute times depend on the machine and on what else it does."


def tracked(cases: Sequence[Any]) -> Iterable[Any]:
    """The cases, with progress on a terminal's stderr, because they take minutes."""
    from rich.console import Console
    from rich.progress import track

    return track(cases, description="measuring", console=Console(stderr=True), transient=True)


def least_cpu_times(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of process CPU time; the calls take turns, so that a busy moment of the machine hits all of them."""
    for call in calls.values():
        call()
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name] = min(times[name], time.process_time() - start)
    return times


def turns_of_cpu_time(calls: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of process CPU time of every turn; the calls take turns, and swap who comes first."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - start)
    return times


def kernel_times(calls: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each call: of the process on the CPU, the least; of the GPU's own work, the median.

    Before each call the GPU overwrites more memory than its cache holds, again and again until the host has queued the
    whole call: neither what the cache still has nor the time of the host counts.
    """
    if device == "cpu":
        return least_cpu_times(calls, repeats)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    turns = {name: 1 + min(MOST_FLUSHES, int(_host_seconds(call) / FLUSH_SECONDS)) for name, call in calls.items()}
    events = {name: [_event_pair() for _ in range(repeats)] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            for _ in range(turns[name]):
                flushed.zero_()
            start, end = events[name][turn]
            start.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return {name: median(start.elapsed_time(end) for start, end in pairs) / 1e3 for name, pairs in events.items()}


def step_times(calls: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each call as a loop sees them: on a GPU the mean of calls that follow each other without a pause."""
    if device == "cpu":
        return least_cpu_times(calls, repeats)
    times = {}
    for name, call in calls.items():
        _host_seconds(call)
        start, end = _event_pair()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        times[name] = start.elapsed_time(end) / 1e3 / repeats
    return times


def replayed_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of a call captured as a CUDA graph, the mean of replays without a pause: the host does not hold them up.

    Raises:
        RuntimeError: the call does what a capture does not allow, as waiting for the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _host_seconds(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    seconds = step_times({"": graph.replay}, repeats, "cuda")[""]
    del graph
    torch.cuda.empty_cache()
    return seconds


FLUSHED_BYTES = 1 << 29
FLUSH_SECONDS, MOST_FLUSHES = 1e-4, 400
"""One takes longer than that on any GPU of today; the longest wait is of some 50 milliseconds."""


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _host_seconds(call: Callable[[], object]) -> float:
    """What the host takes to queue a call, after two calls to warm up."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: in a copy, bytes read and written, and in the product of two large square matrices."""

    bytes_per_second: float
    flops_per_second: float


def measure_ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """Measure both in about a second."""
    size = 8192 if device == "cuda" else 1024
    elements = 1 << (30 if device == "cuda" else 25)
    source = torch.randint(256, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # random numbers: with zeros or ones a GPU draws less power and is faster
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    times = kernel_times(calls, 5, device)
    return Ceilings(2 * elements / times["copy"], 2 * size**3 / times["product"])


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors that the call holds at a time, beyond those that exist before it.

    Read from the allocator, not from the process: its resident size also holds what an earlier call has freed.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def report(rows: Sequence[Any], path: Path | None) -> None:
    """Print rows (instances of one dataclass) as a table with how to read it, and write them as CSV if asked to."""
    print_table(rows)
    write_table(rows, path)


def print_table(rows: Sequence[Any]) -> None:
    """Print rows (instances of one dataclass) as a table with how to read it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"{NOTE}\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    names = [field.name for field in fields(rows[0])]
    numeric = [isinstance(getattr(rows[0], name), float) for name in names]
    for name, is_number in zip(names, numeric, strict=True):
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        values = asdict(row).values()
        table.add_row(
            *(f"{value:.2f}" if is_number else str(value) for value, is_number in zip(values, numeric, strict=True))
        )
    Console(width=None if Console().is_terminal else 190).print(table)


def check_table(path: Path | None) -> None:
    """Refuse a path at which :func:`write_table` could not write both of its files."""
    if path is None:
        return
    if path.suffix == ".json":
        raise UserError(f"--csv {path}: how the table came about goes there; give {path.with_suffix('.csv')}")
    check_output_file("--csv", path)
    check_output_file("--csv", path.with_suffix(".json"))


def write_table(rows: Sequence[Any], path: Path | None) -> None:
    """Write rows as CSV, and beside it how they came about, if there is a path."""
    if path:
        write_atomically(path, partial(_write_csv, rows))
        write_atomically(path.with_suffix(".json"), _write_provenance)


def _write_provenance(path: str) -> None:
    """Where and how a table was measured."""
    found = {
        "command": " ".join(["vicinal", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
    }
    Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _write_csv(rows: Sequence[Any], path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
