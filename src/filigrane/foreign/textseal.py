"""TextSeal's marks: green lists, Gumbel-max and a tournament over one small congruence.

The context is the last k tokens of prompt and output. With W = sum c_i q_i over ten fixed numbers,
h = (W + 100000007 t + 500001713 key) 15485863 modulo 2**64, times 40499, h ^= h >> 13, and
b = h mod 8191 is all that is left: 8,191 values.

    greenlist   green if float32(b / 8191) < gamma; score the number of green tokens
    gumbelmax   token = argmax log(u) / p with u = b / 8191; score -log(1 - u), at most 9.01
    synthid     layer l of a token is green of token + l; score the number of green layers, or their
                sum weighted 10 to 1

p-values here are exact on that lattice or above: the share of green values is counted; a Gumbel
score is at most exponential in law (p is some 1.3 times too large at 1e-6); and of numbers that are
equal for every key (equal W + 100000007 t; neighbouring ids share 29 of 30 layers) only the first
counts. The tool's own p-values are in `compat`. What no counting repairs is the congruence itself:
numbers of different windows are correlated under small keys, so the law holds on average over large
ones only.
A research generator; not for new deployments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import TokenIds
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError
from filigrane.foreign import drawing
from filigrane.foreign.base import ForeignResult, Profile, Writable, Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.layers import log_sf_layers
from filigrane.foreign.windows import first_of
from filigrane.schemes.base import check_integer, check_number

__all__ = ["TextSealGreenList", "TextSealGumbelMax", "TextSealSynthID", "buckets"]

_FACTORS: Final = (
    *(10000019, 10000247, 10000439, 10000643, 10000747),
    *(10000867, 10000993, 10001213, 10001357, 10001501),
)
_TOKEN: Final = 100000007
_KEY: Final = 500001713
_VALUES: Final = 8191
_WRAP: Final = 2**64
_FLOOR: Final = 1e-200
_PUBLIC_KEY: Final = 42

Scoring = Literal["none", "v1", "v2"]


def _arguments(
    contexts: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """W + 100000007 t: contexts (..., k), oldest first, and tokens (...)."""
    factors = np.array(_FACTORS[: contexts.shape[-1]], dtype=np.int64)
    summed: npt.NDArray[np.int64] = (contexts * factors).sum(axis=-1) + _TOKEN * tokens
    return summed


def buckets(arguments: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.int64]:
    """b of the module's docstring, 0 to 8190: arguments (...) are W + 100000007 t."""
    offset = np.array([_KEY * key % _WRAP], dtype=np.uint64)
    h = (arguments.astype(np.uint64) + offset) * np.uint64(15485863) * np.uint64(40499)
    signed = h.view(np.int64)
    result: npt.NDArray[np.int64] = (signed ^ (signed >> np.int64(13))) % _VALUES
    return result


def _uniforms(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    return numbers.astype(np.float32) / np.float32(_VALUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Positions:
    """A claim's positions: contexts (n, k) and tokens (n,) of those the tool scores."""

    contexts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    repeated: int
    short: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextSeal(Profile):
    """What all three share.

    ngram: tokens of a context, 1 to 10. scoring_method: v1 drops a context that was seen, v2 a
    context and token that were seen together, none drops nothing (for `compat` only: the p-value
    always counts equal numbers once).
    """

    tool: ClassVar[str] = "TextSeal at 2c63fb8 (0.0.5)"
    key_form: ClassVar[KeyForm] = KeyForm.INTEGER
    # 500001713 times the key has to fit into 64 bits with a sign.
    key_bits: ClassVar[int] = 34

    ngram: int = 1
    scoring_method: Scoring = "v2"

    def __post_init__(self) -> None:
        check_integer(self.name, "ngram", self.ngram, 1, len(_FACTORS))
        if self.scoring_method not in ("none", "v1", "v2"):
            raise SchemeError(
                f"{self.name}: scoring_method is none, v1 or v2, got {self.scoring_method!r}."
            )

    def default_warnings(self, key: ForeignKey) -> tuple[str, ...]:
        """See `Profile.default_warnings`."""
        notes = ["a research generator with 8,191 values: not for new deployments"]
        if key.reveal()[0] == _PUBLIC_KEY:
            notes.append("this is the tool's default key: anybody can write this mark")
        return tuple(notes)

    def _positions(self, texts: Sequence[Written]) -> _Positions:
        k = self.ngram
        contexts = [np.empty((0, k), dtype=np.int64)]
        tokens = [np.empty(0, dtype=np.int64)]
        short = 0
        for text in texts:
            ids = text.tokens
            # The first token with a whole context is never scored by the tool.
            at = np.arange(k + 1, ids.shape[0])
            short += min(k + 1, ids.shape[0])
            contexts.append(ids[at[:, None] + np.arange(-k, 0)])
            tokens.append(ids[at])
        windows, targets = np.concatenate(contexts), np.concatenate(tokens)
        if self.scoring_method == "none":
            kept = np.ones(targets.shape[0], dtype=np.bool_)
        elif self.scoring_method == "v1":
            kept = first_of(windows)
        else:
            kept = first_of(np.concatenate([windows, targets[:, None]], axis=1))
        return _Positions(
            contexts=windows[kept],
            tokens=targets[kept],
            repeated=int((~kept).sum()),
            short=short,
        )

    def _dropped(self, positions: _Positions, alike: int) -> dict[str, int]:
        return {
            "before the first scored": positions.short,
            f"repeated ({self.scoring_method})": positions.repeated,
            "same number as an earlier position": alike,
        }

    def _context(self, prompt: TokenIds, output: Sequence[int]) -> npt.NDArray[np.int64] | None:
        ids = [*prompt.tolist()[-self.ngram :], *output][-self.ngram :]
        return np.array(ids, dtype=np.int64) if len(ids) == self.ngram else None


def _green_values(gamma: float) -> int:
    """How many of the 8,191 values are green."""
    return int((_uniforms(np.arange(_VALUES)) < np.float32(gamma)).sum())


def _mid_p(count: int, n: int, share: float) -> float:
    """P(Bin(n, share) > count) + P(= count) / 2, with the tool's floor."""
    if n == 0:
        return 1.0
    above = math.exp(stats.log_sf_binomial(count + 1, n, share))
    here = math.exp(stats.log_sf_binomial(count, n, share))
    return min(1.0, max(_FLOOR, 0.5 * (above + here)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSealGreenList(_TextSeal, Writable):
    """TextSeal's green list, also read as its `dipmark` and `morphmark`.

    gamma: share of green tokens; delta: bias in nats that writers add after top-p.
    """

    name: ClassVar[str] = "textseal-greenlist"
    reference: ClassVar[str] = "Kirchenbauer et al. 2023 (2301.10226)"

    gamma: float = 0.5
    delta: float = 2.0

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was born in.
        _TextSeal.__post_init__(self)
        check_number(self.name, "gamma", self.gamma, 0.0, 1.0)
        check_number(self.name, "delta", self.delta, 0.0, 1000.0)

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        found = self._positions(texts)
        arguments = _arguments(found.contexts, found.tokens)
        green = self._green(arguments, key)
        distinct = first_of(arguments)
        n, count = int(distinct.sum()), int(green[distinct].sum())
        share = _green_values(self.gamma) / _VALUES
        return self.result(
            texts,
            key,
            log_pvalue=stats.log_sf_binomial(count, n, share) if n and 0.0 < share < 1.0 else 0.0,
            statistic=float(count),
            n_scored=n,
            dropped=self._dropped(found, green.shape[0] - n),
            compat={
                "num_scored": green.shape[0],
                "score": float(green.sum()),
                "p_value": _mid_p(int(green.sum()), green.shape[0], self.gamma),
            },
            method=f"exact tail (binomial, {share * _VALUES:.0f} of {_VALUES} values green)",
        )

    def _green(self, arguments: npt.NDArray[np.int64], key: ForeignKey) -> npt.NDArray[np.bool_]:
        green: npt.NDArray[np.bool_]
        green = _uniforms(buckets(arguments, key.reveal()[0])) < np.float32(self.gamma)
        return green

    def choose(
        self,
        logits: npt.NDArray[np.float32],
        prompt: TokenIds,
        output: Sequence[int],
        key: ForeignKey,
        *,
        state: Any,
        rng: np.random.Generator,
        sampling: Sampling,
    ) -> int:
        """See `Writable.choose`: the bias goes to what truncation has left."""
        self.require_key(key)
        ids, scaled = drawing.candidates(logits, sampling)
        context = self._context(prompt, output)
        if context is not None:
            green = self._green(_arguments(context, ids), key)
            scaled = (scaled + np.float32(self.delta) * green).astype(np.float32)
        return drawing.pick(ids, scaled, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSealGumbelMax(_TextSeal, Writable):
    """TextSeal's Gumbel-max mark."""

    name: ClassVar[str] = "textseal-gumbelmax"
    reference: ClassVar[str] = "Aaronson 2022"

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        found = self._positions(texts)
        arguments = _arguments(found.contexts, found.tokens)
        numbers = buckets(arguments, key.reveal()[0])
        distinct = first_of(arguments)
        scores = -np.log1p(-(numbers[distinct].astype(np.float64) / _VALUES))
        n = int(distinct.sum())
        told = numbers.shape[0]
        theirs = float(-np.log1p(-_uniforms(numbers)).astype(np.float64).sum())
        log_told = stats.log_sf_gamma(theirs, told) if told else 0.0
        return self.result(
            texts,
            key,
            log_pvalue=stats.log_sf_gamma(float(scores.sum()), n) if n else 0.0,
            statistic=float(scores.sum()),
            n_scored=n,
            dropped=self._dropped(found, told - n),
            compat={
                "num_scored": told,
                "score": theirs,
                "p_value": max(_FLOOR, math.exp(log_told)),
            },
            method="upper bound (Gamma; the score takes 8,191 values, each at most exponential)",
        )

    def race(
        self,
        key: int,
        context: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        scaled: npt.NDArray[np.float32],
    ) -> int:
        """The keyed choice among candidates: an id, the lowest of a tie."""
        u = buckets(_arguments(context, ids), key).astype(np.float64) / _VALUES
        with np.errstate(divide="ignore"):  # u = 0 loses to everything
            return int(ids[int(np.argmax(scaled.astype(np.float64) - np.log(-np.log(u))))])

    def choose(
        self,
        logits: npt.NDArray[np.float32],
        prompt: TokenIds,
        output: Sequence[int],
        key: ForeignKey,
        *,
        state: Any,
        rng: np.random.Generator,
        sampling: Sampling,
    ) -> int:
        """See `Writable.choose`: every position with a context is marked, repeated or not."""
        self.require_key(key)
        ids, scaled = drawing.candidates(logits, sampling)
        context = self._context(prompt, output)
        if context is None:
            return drawing.pick(ids, scaled, rng)
        return self.race(key.reveal()[0], context, ids, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSealSynthID(_TextSeal):
    """TextSeal's tournament; read only.

    gamma: share of green layers; depth: layers; weighted: whether layers count 10 to 1.
    """

    name: ClassVar[str] = "textseal-synthid"
    reference: ClassVar[str] = "Dathathri et al. 2024 (Nature 634)"

    gamma: float = 0.5
    depth: int = 30
    weighted: bool = False

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was born in.
        _TextSeal.__post_init__(self)
        check_number(self.name, "gamma", self.gamma, 0.0, 1.0)
        check_integer(self.name, "depth", self.depth, 1, 256)

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        found = self._positions(texts)
        d, told = self.depth, found.tokens.shape[0]
        base = _arguments(found.contexts, found.tokens)
        arguments = base[:, None] + _TOKEN * np.arange(d)
        values = _uniforms(buckets(arguments, key.reveal()[0]))
        green = values < np.float32(self.gamma)
        share = _green_values(self.gamma) / _VALUES
        distinct = first_of(arguments.reshape(-1)).reshape(told, d)
        by_layer = (green & distinct).sum(axis=0).astype(np.int64)
        sizes = distinct.sum(axis=0).astype(np.int64)
        bits = int(sizes.sum())
        weights = (
            np.array([10 * (d - 1) - 9 * layer for layer in range(d)], dtype=np.int64)
            if self.weighted and d > 1
            else np.ones(d, dtype=np.int64)
        )
        statistic = float(by_layer @ weights) / float(weights.mean())
        if not self.weighted or d == 1:
            log_p = stats.log_sf_binomial(int(by_layer.sum()), bits, share) if bits else 0.0
            method = f"exact tail (binomial over {bits} different layers)"
        else:
            log_p = log_sf_layers(int(by_layer @ weights), sizes, weights, share)
            method = f"exact tail (weighted binomials over {bits} different layers)"
        return self.result(
            texts,
            key,
            log_pvalue=log_p,
            statistic=statistic,
            n_scored=told,
            dropped=self._dropped(found, 0) | {"layers shared with others": told * d - bits},
            compat=self._compat(green),
            method=method,
        )

    def _compat(self, green: npt.NDArray[np.bool_]) -> dict[str, float]:
        told, d = green.shape
        if not self.weighted:
            count = int(green.sum())
            p = _mid_p(count, told * d, self.gamma)
            return {"num_scored": told, "score": float(count), "p_value": p}
        scale = np.linspace(10.0, 1.0, d) if d > 1 else np.ones(1)
        scale = scale * (d / scale.sum())
        score = float((green * scale).sum())
        variance = told * self.gamma * (1.0 - self.gamma) * float(scale @ scale)
        z = (score - told * d * self.gamma) / math.sqrt(variance) if told else 0.0
        # One minus a distribution function, as the tool has it: no digits beyond 1e-16.
        p = 1.0 - 0.5 * math.erfc(-z / math.sqrt(2.0)) if told else 1.0
        return {"num_scored": told, "score": score, "p_value": max(_FLOOR, p)}
