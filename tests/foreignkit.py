"""What tests of foreign marks share: recorded vectors, keys, logits by rule, and null laws."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.embedding import Sampling
from filigrane.foreign import ForeignKey, KeyForm, Profile, Writable, Written, write
from filigrane.toy import ZipfModel

VECTORS = Path(__file__).parent.parent / "vectors" / "foreign"
CHANCE = -14.0
"""Natural log of what chance may do in one test: below 1e-6."""


@cache
def vectors(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text())


def key_of(value: object, form: KeyForm) -> ForeignKey:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return ForeignKey.from_text(text, form)


def close(got: float, wanted: float, relative: float) -> bool:
    return got == wanted or abs(got - wanted) <= relative * abs(wanted)


def logits_of(record: Any, position: int) -> npt.NDArray[np.float32]:
    """The integer rule that the recorded samplings name."""
    rule, t = record["logits"], np.arange(record["vocab_size"])
    values = ((rule["a"] * t + rule["b"] * position) % rule["m"] - rule["c"]) / rule["div"]
    return values.astype(np.float32)


def forced(
    profile: Writable,
    record: Any,
    key: ForeignKey,
    *,
    prompt: Sequence[int] = (),
    sampling: Sampling | None = None,
    shape: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] = lambda row: row,
) -> list[int]:
    """The tokens a writer chooses where every position is marked: a new state at each."""
    output: list[int] = []
    for position in range(len(record["tokens"])):
        output.append(
            profile.choose(
                shape(logits_of(record, position)),
                np.asarray(prompt, dtype=np.int64),
                output,
                key,
                state=profile.start(),
                rng=np.random.default_rng(0),
                sampling=sampling or Sampling(),
            )
        )
    return output


def numbers(count: int, seed: int, bits: int = 63) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(x) for x in rng.integers(1, 2**bits, size=count)]


def random_keys(profile: Profile, count: int, seed: int = 5) -> Iterable[ForeignKey]:
    """Keys of a profile's form, the same in every run."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        values = rng.integers(0, 2**63, size=profile.key_count, dtype=np.uint64)
        kept = [int(v) >> (63 - min(63, profile.key_bits)) for v in values]
        if profile.key_form in (KeyForm.HEX, KeyForm.HEX_PAIR):
            yield key_of([f"{v:x}" for v in kept], profile.key_form)
        else:
            yield key_of(kept, profile.key_form)


def written(
    profile: Profile, key: ForeignKey, length: int = 200, *, vocab: int = 600, seed: int = 1
) -> Written:
    """A text of a toy model of about 4 nats per token, with its prompt."""
    prompt = np.arange(1, 9)
    rng = np.random.default_rng(seed)
    tokens = write(ZipfModel(vocab, 1.2), prompt, length, key, profile, rng=rng)
    return Written(tokens=tokens, prompt=prompt)


def log_uniform(profile: Profile, text: Written, count: int = 240) -> float:
    """Log p-value of Kolmogorov and Smirnov that other keys' p-values are uniform."""
    ps = [profile.read(text, key).pvalue for key in random_keys(profile, count)]
    return stats.log_uniformity(np.array(ps))


def realised(
    scores: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    weights: Sequence[float],
    n: int,
    threshold: float,
    *,
    samples: int = 100_000,
    seed: int = 3,
) -> float:
    """P(sum over positions and keys of weight x score >= threshold) on the scores' own lattice.

    scores: from uniform numbers in (0, 1], of which a lattice takes the cell, to scores whose
    largest values belong to the smallest numbers. By importance sampling: exponentials of a longer
    mean, at the saddle point of the threshold.
    """
    rng = np.random.default_rng(seed)
    low, high = 0.0, 1.0 / max(weights)
    for _ in range(200):
        theta = 0.5 * (low + high)
        mean = n * sum(w / (1.0 - theta * w) for w in weights)
        low, high = (theta, high) if mean < threshold else (low, theta)
    total, log_ratio = np.zeros(samples), np.zeros(samples)
    for w in weights:
        if not w:
            continue
        rate = 1.0 - low * w
        for _ in range(n):
            e = rng.exponential(1.0 / rate, samples)
            total += w * scores(np.exp(-e))
            log_ratio += -low * w * e - np.log(rate)
    return float(np.mean(np.where(total >= threshold, np.exp(log_ratio), 0.0)))
