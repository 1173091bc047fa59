"""Benchmarks run, say where they ran, and the page of the documentation is what was measured."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from filigrane.bench import Case, interleave, machine, summary
from filigrane.schemes import SCHEMES

ROOT = Path(__file__).parent.parent
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))


def check(document: dict[str, Any], name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Well formed, plain JSON, and something the page can show."""
    assert document == json.loads(json.dumps(document, allow_nan=False))
    assert document["benchmark"] == name and document["quick"] and document["protocol"]
    assert {"cpu", "cores", "os", "python", "numpy", "numba", "date"} <= set(document["machine"])
    rows: list[dict[str, Any]] = document["rows"]
    for row in rows:
        (suffix,) = (key.removeprefix("median_") for key in row if key.startswith("median_"))
        assert 0 < row[f"min_{suffix}"] <= row[f"median_{suffix}"] <= row[f"max_{suffix}"]
        assert row["runs"] >= 1
    assert set(SCHEMES) <= {row["case"] for row in rows}
    (tmp_path / f"{name}.json").write_text(json.dumps(document))
    page = TABLE["page"](tmp_path)
    assert all(row["case"] in page for row in rows)
    return rows


def test_embed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from filigrane.bench import embed

    seen: list[str] = []
    document = embed.run(quick=True, report=lambda done, total, what: seen.append(what))
    rows = check(document, "embed", tmp_path)
    assert seen[-1] == "done"
    assert all(row["ratio"] == 1.0 for row in rows if row["case"] == embed.PLAIN)
    # The figures are about marked steps; a random window may repeat, which is rare.
    marked = {row["case"]: row["marked"] for row in rows if "marked" in row}
    assert marked.pop("unmarked") == 0.0
    assert min(marked.values()) > 0.5


def test_detect(tmp_path: Path) -> None:
    from filigrane.bench import detect

    rows = check(detect.run(quick=True), "detect", tmp_path)
    assert {row["slots"] for row in rows} == {1, 8}
    stages = [row["stages_us"] for row in rows if row["case"] == "gumbel" and row["slots"] == 1]
    assert list(stages[0]) == ["windows", "keys", "scores", "tail"]


def test_trace(tmp_path: Path) -> None:
    from filigrane.bench import trace

    rows = check(trace.run(quick=True), "trace", tmp_path)
    assert {row["threads"] for row in rows} == {1, 2}


def test_cases_take_turns() -> None:
    order: list[str] = []
    cases = {name: Case(lambda _, name=name: order.append(name)) for name in "ab"}
    seconds = interleave(cases, most=3, budget=1.0, report=lambda name: None)
    # Before them, the runs that warm up; in each turn, an untimed run before the timed one.
    assert order[-12:] == ["a", "a", "b", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_slow_cases_run_less_often() -> None:
    cases = {"slow": Case(lambda _: sum(range(100_000))), "fast": Case(lambda _: None)}
    seconds = interleave(cases, most=50, budget=1e-3, report=lambda name: None)
    assert 3 <= len(seconds["slow"]) < len(seconds["fast"]) == 50


def test_summary() -> None:
    assert summary([0.002, 0.001, 0.004]) == {
        "median_ms": 2.0,
        "min_ms": 1.0,
        "max_ms": 4.0,
        "runs": 3,
    }


def test_kernels_ask_for_wide_vectors() -> None:
    """Else tracing loses a third of its speed where CPUs have 512 bits, and no result tells."""
    from numba import njit

    from filigrane.kernels.wide import use_wide_vectors

    @njit
    def nothing():  # type: ignore[no-untyped-def]
        use_wide_vectors()

    nothing()
    assert '"prefer-vector-width"="512"' in next(iter(nothing.inspect_llvm().values()))


def test_machine_outside_a_checkout(tmp_path: Path) -> None:
    assert machine._commit(tmp_path) is None


def test_page_is_what_was_measured() -> None:
    page: Path = TABLE["PAGE"]
    assert page.read_text("utf-8") == TABLE["page"](), "run python benchmarks/table.py"
