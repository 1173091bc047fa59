"""Benchmarks: every figure is a ratio of things that were timed side by side in one run.

    embed     a marked decoding step beside plain sampling and other tools' steps
    detect    tokens per second of a complete test, and where the time of a short text goes
    trace     one text against very many user keys
    machine   what the figures were taken on

Each of the first three has `run(quick, report) -> document`, a dictionary that is ready for JSON.
How they are taken, and what is fair about it: benchmarks/README.md.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filigrane.bench.machine import describe

Document = dict[str, Any]
"""One run: benchmark, quick, machine, protocol and rows."""

Report = Callable[[int, int | None, str], None]
"""Takes what is done, what there is to do (None if unknown) and a few words."""


def silent(done: int, total: int | None, what: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time: run(prepare()), of which only run is timed."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def interleave(
    cases: Mapping[str, Case], *, most: int, budget: float, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Time the cases in turn, over and over, so that a slow moment of the machine hits all of them.

    most: runs of a fast case; a slow one gets as many as fit into `budget` seconds, at least 3,
    spread evenly over the rounds. Each case is run once more beforehand, untimed, and a short one
    also before each timed run: its neighbour is always the same, and what that one left in the
    caches must not decide. Returns seconds.
    """
    runs: dict[str, int] = {}
    short: set[str] = set()
    for name, case in cases.items():
        report(name)
        seconds = _once(case)
        if seconds < 1.0:  # the first call may have compiled or loaded something
            seconds = _once(case)
        runs[name] = max(min(3, most), min(most, int(budget / seconds)))
        if seconds < 0.05:
            short.add(name)
    seconds_of: dict[str, list[float]] = {name: [] for name in cases}
    rounds = max(runs.values())
    for turn in range(rounds):
        for name, case in cases.items():
            if (turn + 1) * runs[name] // rounds > turn * runs[name] // rounds:
                report(name)
                if name in short:
                    _once(case)
                seconds_of[name].append(_once(case))
    return seconds_of


def _once(case: Case) -> float:
    argument = case.prepare()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        case.run(argument)
        return time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()


def summary(seconds: Sequence[float], unit: float = 1e-3, suffix: str = "ms") -> dict[str, Any]:
    """Median, minimum and maximum in the unit, and the number of runs."""
    return {
        f"median_{suffix}": _round(statistics.median(seconds) / unit),
        f"min_{suffix}": _round(min(seconds) / unit),
        f"max_{suffix}": _round(max(seconds) / unit),
        "runs": len(seconds),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def document(
    benchmark: str, protocol: str, rows: list[dict[str, Any]], *, quick: bool, machine: Document
) -> Document:
    """What a run leaves behind; machine is `describe()`, taken before the run."""
    return {
        "benchmark": benchmark,
        "quick": quick,
        "machine": machine,
        "protocol": protocol,
        "rows": rows,
    }


__all__ = ["Case", "Document", "Report", "describe", "document", "interleave", "silent", "summary"]
