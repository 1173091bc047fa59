"""Turn benchmarks/results/*.json into docs/benchmarks.md; tests hold the two together."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Made by `python benchmarks/table.py` from `benchmarks/results/*.json`; do not edit. How the figures
are taken, and how to take them on your machine: [benchmarks/README.md](../benchmarks/README.md).
"""
TITLES = {"embed": "One decoding step", "detect": "Testing a text", "trace": "Tracing"}
ORDER = list(TITLES)
SCHEMES = ("gumbel", "greenlist", "tournament", "gamma", "delta")

Rows = list[dict[str, Any]]
# What was aimed at, the figure that decides, and whether it is reached.
Goal = tuple[str, str, bool]


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    documents = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]
    documents.sort(key=lambda document: ORDER.index(document["benchmark"]))
    return HEAD + "".join(section(document) for document in documents)


def section(document: dict[str, Any]) -> str:
    """One run: machine, protocol, goals, tables."""
    name, rows = document["benchmark"], document["rows"]
    goals, tables = {"embed": embed, "detect": detect, "trace": trace}[name](rows)
    verdicts = [(text, shown, "yes" if met else "**no**") for text, shown, met in goals]
    parts = [
        f"\n## {TITLES[name]}\n",
        machine(document),
        document["protocol"] + "\n",
        table(("goal", "measured", "met"), verdicts),
        *tables,
    ]
    return "\n".join(parts)


def machine(document: dict[str, Any]) -> str:
    """What it was measured on, as one paragraph."""
    facts = document["machine"]
    versions = [
        f"{name} {facts[name]}"
        for name in ("python", "filigrane", "numpy", "numba", "torch", "transformers")
        if facts[name]
    ]
    quick = "A --quick run: the figures mean nothing. " if document["quick"] else ""
    commit = f", commit {facts['commit'][:10]}" if facts["commit"] else ""
    return (
        f"{quick}{facts['cpu']}, {facts['cores']} cores ({', '.join(facts['vector_extensions'])}), "
        f"{facts['os']}, load {facts['load_average']} before the run; {', '.join(versions)}; "
        f"{facts['date'][:10]}{commit}.\n"
    )


def embed(rows: Rows) -> tuple[list[Goal], list[str]]:
    """Ratios to plain sampling, then milliseconds."""
    sizes = unique((row["batch"], row["vocab"]) for row in rows)
    columns = ["", *(f"{batch} x {vocab:,}" for batch, vocab in sizes)]
    ratios = pivot(rows, sizes, ("batch", "vocab"), lambda row: f"{row['ratio']:.3g}")
    times = pivot(
        rows,
        sizes,
        ("batch", "vocab"),
        lambda row: f"{row['median_ms']:.3g} ({row['min_ms']:.3g} to {row['max_ms']:.3g})",
    )
    goals = [
        at_most(rows, "every scheme, full vocabulary, at most 1.0 x plain", SCHEMES, 1.0),
        at_most(rows, "gumbel, full vocabulary, at most 0.35 x plain", ("gumbel",), 0.35),
        at_most(
            rows,
            "tournament of 30 rounds after top-k, at most 0.10 x plain",
            ("tournament, top-k 40", "tournament, top-k 100"),
            0.10,
        ),
    ]
    return goals, [
        "Times plain sampling (batch x vocabulary):\n",
        table(columns, ratios),
        "Milliseconds, median (min to max):\n",
        table(columns, times),
    ]


def at_most(rows: Rows, text: str, cases: Iterable[str], limit: float) -> Goal:
    """The largest ratio of some cases against a limit."""
    wanted = tuple(cases)
    worst = max(row["ratio"] for row in rows if row["case"] in wanted)
    return text, f"at most {worst:.3g}", worst <= limit


def detect(rows: Rows) -> tuple[list[Goal], list[str]]:
    """Tokens per second, microseconds per text, and the parts of a short text."""
    sizes = unique((row["tokens"], row["slots"]) for row in rows)
    columns = ["", *(f"{tokens:,} tokens, {slots} slots" for tokens, slots in sizes)]
    columns = [column.replace("1 slots", "1 slot") for column in columns]
    keys = ("tokens", "slots")
    speed = pivot(rows, sizes, keys, lambda row: f"{row['tokens_per_s'] / 1e6:.3g}")
    times = pivot(
        rows,
        sizes,
        keys,
        lambda row: f"{row['median_us']:,.4g} ({row['min_us']:,.4g} to {row['max_us']:,.4g})",
    )
    longest = max(sizes)[0]
    goals = [
        at_least(rows, longest, ("gumbel", "greenlist"), 10e6),
        at_least(rows, longest, ("tournament",), 2e6),
    ]
    staged = [row for row in rows if "stages_us" in row]
    names = list(staged[0]["stages_us"])
    stages = [
        (row["case"], f"{row['tokens']:,}", *(f"{row['stages_us'][n]:,.4g}" for n in names))
        for row in staged
    ]
    return goals, [
        "Million tokens per second:\n",
        table(columns, speed),
        "Microseconds per text, median (min to max):\n",
        table(columns, times),
        "Where they go, one slot, microseconds:\n",
        table(("", "tokens", *names), stages),
    ]


def at_least(rows: Rows, tokens: int, cases: tuple[str, ...], limit: float) -> Goal:
    """The smallest speed of some cases on long texts against a limit."""
    mine = [row for row in rows if row["case"] in cases and row["slots"] == 1]
    worst = min(row["tokens_per_s"] for row in mine if row["tokens"] == tokens)
    text = f"{' and '.join(cases)}, {tokens:,} tokens, one slot: {limit / 1e6:g} M tokens/s"
    return text, f"{worst / 1e6:.3g} M tokens/s", worst >= limit


def trace(rows: Rows) -> tuple[list[Goal], list[str]]:
    """Seconds per text."""
    sizes = unique((row["keys"],) for row in rows)
    columns = ["", *(f"{keys:,} keys" for (keys,) in sizes)]
    named = [
        row | {"case": f"{row['case']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"}
        for row in rows
    ]
    times = pivot(
        named,
        sizes,
        ("keys",),
        lambda row: f"{row['median_s']:.3g} ({row['min_s']:.3g} to {row['max_s']:.3g})",
    )
    (most,) = max(sizes)
    slowest = max(r["median_s"] for r in rows if r["keys"] == most and r["threads"] == 2)
    text = f"every scheme, {most:,} keys, 2 threads: below 1 s"
    return [(text, f"at most {slowest:.3g} s", slowest < 1.0)], [
        "Seconds, median (min to max):\n",
        table(columns, times),
    ]


def unique(items: Iterable[Any]) -> list[Any]:
    """In order of first appearance."""
    return list(dict.fromkeys(items))


def pivot(
    rows: Rows, sizes: list[Any], keys: tuple[str, ...], cell: Callable[[dict[str, Any]], str]
) -> list[list[str]]:
    """One line per case, one column per size."""
    cells = {(row["case"], tuple(row[key] for key in keys)): cell(row) for row in rows}
    return [
        [case, *(cells.get((case, size), "") for size in sizes)]
        for case in unique(row["case"] for row in rows)
    ]


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; numbers to the right."""
    columns = list(columns)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
