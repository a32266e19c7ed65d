"""The README's tables of speed, from the results files that the benchmarks wrote.

``python -m vicinal.eval.bench.performance README.md`` replaces what stands between the two marks of the file.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ...checkpoints import write_atomically
from ...errors import UserError, run_command
from ...outputs import check_output_file

RESULTS = Path(__file__).parents[1] / "results"
START = "<!-- speed: made by python -m vicinal.eval.bench.performance README.md -->"
END = "<!-- end of speed -->"
Row = dict[str, str]
Table = dict[tuple[str, ...], dict[str, Row]]


def read(name: str, *keys: str) -> Table:
    """Rows of a results file by the columns `keys`, and then by implementation."""
    table: Table = {}
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            table.setdefault(tuple(row[key] for key in keys), {})[row["implementation"]] = row
    return table


def provenance(name: str) -> str:
    """How a results file came about."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    line = "{device}, torch {torch}, triton {triton}, {date}: `{command}`.".format(**found)
    return f"{line} {found.get('note', '')}".strip()


def ratio(rows: dict[str, Row], slower: str, faster: str, digits: int = 1) -> str:
    """How many times the time of one implementation another takes."""
    if slower not in rows or faster not in rows:
        return ""
    return f"{float(rows[slower]['ms']) / float(rows[faster]['ms']):.{digits}f}"


def operators(name: str) -> Iterator[str]:
    """Lines of the table of operators."""
    yield "| operator, bfloat16 | shape | step | µs | of the floor | over tiled | over eager | over flex |"
    yield "|---|---|---|---|---|---|---|---|"
    for (op, bias, shape, step), rows in read(name, "op", "bias", "shape", "step").items():
        if step == "forward+backward" or "fused" not in rows:
            continue
        fused = rows["fused"]
        words = op.replace("_attention", "") + ("" if bias == "True" else " without bias")
        ratios = " | ".join(ratio(rows, slower, "fused") for slower in ("tiled", "eager", "flex"))
        floor = f"{100 * float(fused['floor_fraction']):.0f} %"
        yield f"| {words} | {shape} | {step} | {1e3 * float(fused['ms']):.0f} | {floor} | {ratios} |"


def models(name: str) -> Iterator[str]:
    """Lines of the table of models."""
    ways = ("", ", replayed", ", compiled")
    heads = (f"images/s{way} | over tiled | over timm" for way in ways)
    yield f"| model | step | peak, GiB | {' | '.join(heads)} |"
    yield f"|---|---|---|{'---|' * 3 * len(ways)}"
    for (model, step), rows in read(name, "model", "step").items():
        cells = [model, step, f"{float(rows['ours']['peak_mib']) / 1024:.1f}"]
        for way in ways:
            ours = rows.get(f"ours{way}")
            cells.append(f"{float(ours['images_per_second']):.0f}" if ours else "")
            cells += [ratio(rows, f"{other}{way}", f"ours{way}", 2) for other in ("ours, tiled", "timm")]
        yield f"| {' | '.join(cells)} |"


TABLES = {
    "operators": operators,
    "operators_without_bias": operators,
    "operators_flex": operators,
    "models": models,
}


def section() -> str:
    """What stands between the marks: a table for each results file."""
    parts = []
    for name, make in TABLES.items():
        if (RESULTS / f"{name}.csv").exists():
            parts.append("\n".join([provenance(name), "", *make(name)]))
    return "\n\n".join(parts)


def updated(text: str) -> str:
    """A text with the section renewed.

    Raises:
        ValueError: the marks are not in it.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"the file must have the lines {START!r} and {END!r}; put them where the tables shall stand")
    return f"{before}{START}\n{section()}\n{END}{after}"


def _write(text: str, path: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Renew the section of the file that is named."""
    if len(argv) != 1:
        raise UserError("usage: python -m vicinal.eval.bench.performance FILE")
    path = check_output_file("FILE", argv[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    write_atomically(path, partial(_write, updated(path.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
