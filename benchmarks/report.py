"""Rows of figures: printed as a table, and with --json written to a file beside machine and versions."""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict


class Row(TypedDict, total=False):
    """One figure.

    Keys:
        benchmark: the program, e.g. ``transfer``.
        subject: ours, a peer, or a limit such as ``memcpy``.
        case: the parameters, e.g. ``{"page_bytes": 65536}``.
        metric, value, unit: what was measured; `value` is the median, or None if `note` says why.
        min, max, samples: the spread of `value`, and of how many measurements.
    """

    benchmark: str
    subject: str
    case: dict[str, object]
    metric: str
    value: float | None
    unit: str
    min: float
    max: float
    samples: int
    note: str


def row(
    benchmark: str, subject: str, case: dict[str, object], metric: str, samples: Sequence[float], unit: str
) -> Row:
    """The row of some measurements: their median and spread.

    Raises:
        ValueError: There are none; say so by `not_run`.
    """
    if not samples:
        raise ValueError(f"{subject}, {metric}: no measurements")
    return Row(
        benchmark=benchmark,
        subject=subject,
        case=case,
        metric=metric,
        value=round(statistics.median(samples), 4),
        unit=unit,
        min=round(min(samples), 4),
        max=round(max(samples), 4),
        samples=len(samples),
    )


def not_run(
    benchmark: str, subject: str, metric: str, unit: str, why: str, case: dict[str, object] | None = None
) -> Row:
    """The row of a subject that could not be measured."""
    return Row(
        benchmark=benchmark, subject=subject, case=case or {}, metric=metric, value=None, unit=unit, note=why
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, machine and versions")


def publish(
    rows: Sequence[Row],
    file: Path | None,
    packages: Iterable[str] = (),
    others: Mapping[str, str] | None = None,
    busy: Sequence[float] = (),
    facts: Mapping[str, object] | None = None,
) -> None:
    """Print the table and, if a file is given, write the rows with machine and versions.

    Args:
        packages: distributions whose versions matter here; those not installed are left out.
        others: versions of what lives in another environment.
        busy: what `settle` returned, so that readers can tell how quiet the machine was.
        facts: what else there is to know of the machine.
    """
    print(table(rows))
    if file is not None:
        write(rows, file, packages, others, busy, facts)
        print(f"written: {file}")


def write(
    rows: Sequence[Row],
    file: Path,
    packages: Iterable[str] = (),
    others: Mapping[str, str] | None = None,
    busy: Sequence[float] = (),
    facts: Mapping[str, object] | None = None,
) -> None:
    """The file alone, of all rows or of those there are so far; arguments as for `publish`."""
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | dict(facts or {}) | ({"busy_before_turns": _spread(busy)} if busy else {}),
        "versions": versions(packages) | dict(others or {}),
        "rows": rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


def settle(limit_s: float, at_most: float = 0.1) -> float:
    """Wait until the machine's other work leaves the CPUs alone; the busy share (0 to 1) seen last.

    Args:
        limit_s: go on after this many seconds, however busy it is.
    """
    deadline = time.monotonic() + limit_s
    while True:
        before = _cpu_ticks()
        time.sleep(0.5)
        after = _cpu_ticks()
        busy = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
        if busy <= at_most or time.monotonic() > deadline:
            return round(busy, 3)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, a block for each metric: a line for each subject, a column for each case."""
    metrics = dict.fromkeys(row["metric"] for row in rows)
    return "\n\n".join(_block([row for row in rows if row["metric"] == metric]) for metric in metrics)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "system": platform.system(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _block(rows: Sequence[Row]) -> str:
    cases = list(dict.fromkeys(_case(row) for row in rows if row.get("case")))
    lines = [[f"{rows[0]['metric']} [{rows[0]['unit']}]", *(cases or [""])]]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        mine = [row for row in rows if row["subject"] == subject]
        cells = {_case(row): _cell(row) for row in mine}
        measured = any(row["value"] is not None for row in mine)
        why = "" if measured else next((row["note"] for row in mine if row.get("note")), "")
        lines.append([subject, why] if why else [subject, *(cells.get(case, "-") for case in cases or [""])])
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[at]) for line in full) for at in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def _case(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.get("case", {}).items())


def _cell(row: Row) -> str:
    value = row.get("value")
    if value is None:
        return "not run"
    spread = f" ({_number(row['min'])}-{_number(row['max'])})" if row.get("samples", 1) > 1 else ""
    return f"{_number(value)}{spread}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cpu_ticks() -> tuple[int, int]:
    """All ticks, and the idle ones, since boot."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def _spread(samples: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "max": max(samples)}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
