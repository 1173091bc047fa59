"""The whole test on n-gram models, where everything is known: seconds, numpy only, no download.

    dose      the share of marked text in Bob's data, against what the test says
    copying   a model that repeats what it sees, and never saw a mark: with and without the rule
    chance    clean models and many keys, the texts written anew under each

Knows nothing of terminals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from filigrane import stats
from filigrane.keys import Key
from filigrane.radioactivity import (
    RadioactivityResult,
    Tuples,
    Weighted,
    WindowFilter,
    answers,
    argmax,
    differential,
    soft,
    testing,
)
from filigrane.radioactivity.ngram import Counts, Source, marked, read
from filigrane.schemes import GreenList
from filigrane.schemes.base import Scheme

Report = Callable[[int, int, str], None]

RHOS: Final = (1.0, 0.5, 0.1, 0.05, 0.02, 0.0)
LENGTH: Final = 128
_LN10: Final = math.log(10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dose:
    """Results at one share rho of marked text: log10 p and z by name of the test, and scores."""

    window: int
    rho: float
    log10_pvalues: dict[str, float]
    z: dict[str, float]
    scored: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """p-values of clean models over keys: their Kolmogorov-Smirnov p and mean log10 p."""

    name: str
    window: int
    keys: int
    ks_pvalue: float
    mean_log10_pvalue: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim, and whether it held."""

    claim: str
    found: str
    held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """Everything that was computed."""

    doses: tuple[Dose, ...]
    copying: tuple[Chance, ...]
    chance: tuple[Chance, ...]
    checks: tuple[Check, ...]

    @property
    def held(self) -> bool:
        """Whether every claim held."""
        return all(check.held for check in self.checks)


def selftest(seed: int = 0, *, keys: int = 60, report: Report | None = None) -> SelfTest:
    """Run it: keys, how many clean runs per window. Keys are new each time, all else is of seed."""
    told = report or (lambda done, total, what: None)
    steps = 2 * len(RHOS) + 4
    doses: list[Dose] = []
    for window, vocab_size, tokens in ((1, 1024, 128_000), (2, 256, 256_000)):
        for rho in RHOS:
            told(len(doses), steps, f"k={window}, rho={rho:g}")
            doses.append(dose(window, vocab_size, tokens, rho, np.random.default_rng(seed)))
    copying: list[Chance] = []
    chances: list[Chance] = []
    for window in (1, 2):
        told(steps - 4 + window, steps, f"clean models, k={window}")
        copied, clean = chance(window, keys, np.random.default_rng([seed, window]))
        copying += copied
        chances += clean
    return SelfTest(
        doses=tuple(doses),
        copying=tuple(copying),
        chance=tuple(chances),
        checks=tuple(_checks(doses, copying, chances)),
    )


def dose(
    window: int,
    vocab_size: int,
    tokens: int,
    rho: float,
    rng: np.random.Generator,
    scheme: Scheme | None = None,
) -> Dose:
    """Alice writes `tokens`, a share rho of them marked; Bob counts them; Alice tests Bob.

    Also Bob as a fine-tuned base model: the counts of another corpus, and his own on top.
    """
    scheme = scheme or GreenList(gamma=0.25, delta=3.0, context_width=window)
    key = Key.generate("alice", slots=1)
    source = Source.draw(vocab_size, rng)
    n = tokens // LENGTH
    count = round(rho * n)
    logged = marked(source, max(count, 1), LENGTH, key, scheme, rng)
    taught = np.concatenate([logged[:count], source.write(n - count, LENGTH, rng)])
    bob = Counts(vocab_size, window).learn(taught)
    before = Counts(vocab_size, window).learn(source.write(n, LENGTH, rng))
    tuned = before.copy().learn(taught)
    fresh = marked(source, 150, LENGTH, key, scheme, rng)
    prompts = source.write(120, 8, rng)
    said = bob.answer(prompts, LENGTH, rng)
    known = WindowFilter.build(list(logged if count else fresh), window)
    reading = read(tuned, fresh, window, base=before)
    evidence: dict[str, Tuples | Weighted] = {
        "open": argmax(read(bob, fresh, window)),
        "open, logged texts": argmax(read(bob, logged[:150], window)),
        "closed": answers(said, window),
        "closed, filtered": answers(said, window, window_filter=known),
        "tuned: argmax": argmax(reading),
        "tuned: soft": soft(reading),
        "tuned: differential": differential(reading),
    }
    found: dict[str, RadioactivityResult] = {
        name: testing.test(item, key, scheme, decoys=0) for name, item in evidence.items()
    }
    return Dose(
        window=window,
        rho=rho,
        log10_pvalues={name: result.log10_pvalue for name, result in found.items()},
        z={name: result.z for name, result in found.items()},
        scored={name: result.n_scored for name, result in found.items()},
    )


def chance(
    window: int, keys: int, rng: np.random.Generator, scheme: Scheme | None = None
) -> tuple[list[Chance], list[Chance]]:
    """Clean suspects under `keys` keys, texts written anew under each: copying ones, and others."""
    scheme = scheme or GreenList(gamma=0.25, delta=3.0, context_width=window)
    vocab_size = 256 if window == 1 else 64
    source = Source.draw(vocab_size, rng)
    suspect = Counts(vocab_size, window).learn(source.write(500, LENGTH, rng))
    base = Counts(vocab_size, window).learn(source.write(500, LENGTH, rng))
    logs: dict[str, list[float]] = {}
    for number in range(keys):
        key = Key.generate(f"alice-{number}", slots=1)
        texts = marked(source, 20, 64, key, scheme, rng)
        reading = read(suspect, texts, window, base=base)
        evidence: dict[str, Tuples | Weighted] = {
            "argmax": argmax(reading),
            "soft": soft(reading),
            "differential": differential(reading),
            "closed": answers(suspect.answer(texts[:10, :8], 64, rng), window),
        }
        for rule, name in ((True, "copying, rule on"), (False, "copying, rule off")):
            copied = read(suspect, texts, window, attention_rule=rule, copying=0.9)
            evidence[name] = argmax(copied)
        for name, item in evidence.items():
            result = testing.test(item, key, scheme, decoys=0)
            logs.setdefault(name, []).append(result.log_pvalue)
    made = [_uniform(name, window, values) for name, values in logs.items()]
    return [row for row in made if "copying" in row.name], [
        row for row in made if "copying" not in row.name
    ]


def _uniform(name: str, window: int, logs: Sequence[float]) -> Chance:
    return Chance(
        name=name,
        window=window,
        keys=len(logs),
        ks_pvalue=math.exp(stats.log_uniformity(np.exp(logs))),
        mean_log10_pvalue=float(np.mean(logs)) / _LN10,
    )


def _checks(
    doses: Sequence[Dose], copying: Sequence[Chance], chances: Sequence[Chance]
) -> list[Check]:
    """What the published study and our own runs lead to expect, with room for chance."""
    at = {(row.window, row.rho): row.log10_pvalues for row in doses}
    checks: list[Check] = []

    def below(claim: str, value: float, limit: float) -> None:
        checks.append(Check(claim=claim, found=f"{value:.1f}", held=value < limit))

    for window in (1, 2):
        for name in ("open", "open, logged texts", "closed", "closed, filtered"):
            below(f"k={window}, rho=1, {name}: log10 p < -100", at[window, 1.0][name], -100.0)
        value = at[window, 0.05]["tuned: differential"]
        below(f"k={window}, rho=0.05, differential: log10 p < -20", value, -20.0)
        lowest = min(at[window, 0.0].values())
        checks.append(
            Check(
                claim=f"k={window}, rho=0: no log10 p below -5",
                found=f"{lowest:.1f}",
                held=lowest > -5.0,
            )
        )
    below("k=1, rho=0.1, closed: log10 p < -3", at[1, 0.1]["closed"], -3.0)
    below("k=2, rho=0.1, open: log10 p < -5", at[2, 0.1]["open"], -5.0)
    for row in copying:
        if row.name.endswith("on"):
            held = row.ks_pvalue > 1e-4
            claim = f"k={row.window}, {row.name}: p uniform over keys (KS p > 0.0001)"
        else:
            held = row.ks_pvalue < 1e-3
            claim = f"k={row.window}, {row.name}: a false alarm (KS p < 0.001)"
        checks.append(Check(claim=claim, found=f"{row.ks_pvalue:.2g}", held=held))
    for row in chances:
        claim = f"k={row.window}, clean, {row.name}: p uniform over keys (KS p > 0.0001)"
        found = f"{row.ks_pvalue:.2g}"
        checks.append(Check(claim=claim, found=found, held=row.ks_pvalue > 1e-4))
    return checks
