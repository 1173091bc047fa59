"""One text against very many user keys: derivation, scores, corrected exact p-values."""

import statistics
from typing import Any

import numpy as np

from filigrane.bench import Case, Document, Report, describe, document, interleave, silent, summary
from filigrane.keys import Key
from filigrane.schemes import SCHEMES, Scheme
from filigrane.tracing import trace

TOKENS = 200
PROTOCOL = (
    "One call of trace(): 200 uniform random token ids against user keys with one slot that are "
    "derived on the way, and the exact p-values of the best ten, corrected for all of them."
)


def run(quick: bool = False, report: Report = silent) -> Document:
    """Time all schemes against 1,000 to 1,000,000 keys on 1 and 2 threads; quick: fewer."""
    sizes = [1_000, 2_000] if quick else [1_000, 100_000, 1_000_000]
    most, budget = (2, 0.05) if quick else (51, 3.0)
    machine = describe()
    rng = np.random.default_rng(0)
    key = Key.generate("bench", slots=1)
    rows: list[dict[str, Any]] = []
    for number, keys in enumerate(sizes):
        what = [(scheme(), threads) for scheme in SCHEMES.values() for threads in (1, 2)]
        cases = {
            f"{scheme.name}/{threads}": _case(rng, key, keys, scheme, threads)
            for scheme, threads in what
        }

        def tell(name: str, done: int = number, where: str = f"{keys} keys") -> None:
            report(done, len(sizes), f"{where} {name}")

        seconds = interleave(cases, most=most, budget=budget, report=tell)
        for (scheme, threads), times in zip(what, seconds.values(), strict=True):
            row: dict[str, Any] = {"case": scheme.name, "keys": keys, "threads": threads}
            row |= summary(times, 1.0, "s")
            row["keys_per_s"] = float(f"{keys / statistics.median(times):.4g}")
            rows.append(row)
    report(len(sizes), len(sizes), "done")
    return document("trace", PROTOCOL, rows, quick=quick, machine=machine)


def _case(rng: np.random.Generator, key: Key, keys: int, scheme: Scheme, threads: int) -> Case:
    return Case(
        lambda text: trace(text, key.users(keys), scheme, workers=threads),
        lambda: rng.integers(50_257, size=TOKENS),
    )
