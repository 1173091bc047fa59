"""vLLM's built-in marks, `gumbel` and `dual_key_gumbel`, with its Philox4x32-10 numbers.

The context of a position is the w tokens generated before it, missing ones written as -1; the
prompt never enters. One call of Philox per four context tokens makes a state, one more per four
candidates their numbers: 24 bits each, as the float32 nearest to (m + 1) / (2**24 + 1).

    gumbel        token = argmax logit - log(-log u), in float32; score -log(1 - u)
    dual          each position is drawn under key A with probability 1 - alpha, else under key B,
                  by a coin that nobody can recompute; score (1 - alpha) A + alpha B

The sum of n scores is Gamma(n, 1); that of two keys (1 - alpha) Gamma(n, 1) + alpha Gamma(n, 1),
whose exact tail is used here. vLLM fits a Gamma law to two moments of it, which makes its p-value
too small, by 1.4 at 1e-6 for 32 tokens; `compat` has that number.

On the lattice of 2**24 values a score exceeds an exponential variable by at most 2**-23, so the
p-value is short by at most a factor exp(n 2**-23), 1.0012 for 10,000 positions; no score exceeds
16.64.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import TokenIds
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError
from filigrane.foreign import drawing
from filigrane.foreign.base import ForeignResult, Writable, Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.windows import PADDING, Windows, Words, windows
from filigrane.schemes.base import check_integer, check_number

__all__ = ["VllmDualGumbel", "VllmGumbel", "philox_words", "uniforms"]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_CONTEXT: Final = 0x574D4358
_TOKEN: Final = 0x574D544B
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ALPHA: Final = 0.1
_WIDE: Final = 16

Dedup = Literal["none", "single_turn", "all"]


def _philox(counter: Sequence[Words], k0: Words, k1: Words) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four words, k0 and k1: the key's; arrays that broadcast, uint64 below 2**32.
    """
    c0, c1, c2, c3 = counter
    for step in range(10):
        first, second = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ k0,
            second & _MASK,
            (first >> _SHIFT) ^ c3 ^ k1,
            first & _MASK,
        )
        if step < 9:
            k0, k1 = (k0 + np.uint64(_W0)) & _MASK, (k1 + np.uint64(_W1)) & _MASK
    return c0, c1, c2, c3


def philox_words(
    key: int, contexts: npt.NDArray[np.uint32], tokens: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """The 32-bit numbers of tokens: contexts (..., w) and tokens, broadcast to one shape.

    contexts[..., 0] is the oldest token, 0xffffffff stands for a missing one; tokens has the shape
    of contexts[..., 0], or one that broadcasts with it.
    """
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    wide = contexts.astype(np.uint64)
    width = contexts.shape[-1]
    zero = np.zeros(contexts.shape[:-1], dtype=np.uint64)
    state = (zero + np.uint64(_CONTEXT), zero + np.uint64(width), zero, zero)
    for offset in range(0, width, 4):
        block = [
            wide[..., offset + i] if offset + i < width else np.uint64(PADDING - i)
            for i in range(4)
        ]
        mixed = [word ^ other for word, other in zip(state, block, strict=True)]
        state = _philox(mixed, zero + (k0 ^ np.uint64(offset)), zero + k1)
    ids = tokens.astype(np.uint64)
    zeros = np.zeros_like(ids)
    counter = (ids >> np.uint64(2), *(word + zeros for word in state[:3]))
    out = _philox(counter, (k0 ^ state[3]) + zeros, zeros + (k1 ^ np.uint64(_TOKEN)))
    words = np.choose((ids & np.uint64(3)).astype(np.int64), out)
    return words.astype(np.uint32)


def uniforms(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """The float32 numbers in (0, 1) that vLLM makes of words: 24 bits each."""
    exact = ((words >> np.uint32(8)).astype(np.float64) + 1.0) / (2.0**24 + 1.0)
    return exact.astype(np.float32)


def _scores(key: int, found: Windows, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    u = uniforms(philox_words(key, found.contexts(which), found.tokens(which)))
    scores: npt.NDArray[np.float64] = -np.log1p(-u.astype(np.float64))
    return scores


def _second_keys(key: int) -> tuple[int, int]:
    """Keys A and B of the dual mark."""
    data = key.to_bytes(8, "big")
    a, b = (hashlib.sha256(label + data).digest()[:8] for label in (b"key_a", b"key_b"))
    return int.from_bytes(a, "big"), int.from_bytes(b, "big")


@dataclass(slots=True)
class _State:
    """Where every context was last seen, by sequence position."""

    last: dict[tuple[int, ...], int] = field(default_factory=dict)
    filled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Philox(Writable):
    """What both marks share: contexts, deduplication, the race of numbers.

    context_width: generated tokens before a position. deduplicate_contexts and
    deduplicate_contexts_max_history decide what a writer marks: `single_turn` leaves positions
    unmarked whose context preceded one of the last so many generated positions, `all` also looks
    into the prompt and leaves the first context_width tokens unmarked, `none` marks everything.
    Readers count every context once, whatever was used.
    """

    tool: ClassVar[str] = "vLLM 0.30 to 0.33 (PRF philox4x32-10-v1)"
    reference: ClassVar[str] = "Aaronson 2022; Salmon et al. 2011 (Philox)"
    key_form: ClassVar[KeyForm] = KeyForm.UINT64

    context_width: int = 4
    deduplicate_contexts: Dedup = "single_turn"
    deduplicate_contexts_max_history: int | None = 8192

    def __post_init__(self) -> None:
        check_integer(self.name, "context_width", self.context_width, 1, 4096)
        if self.deduplicate_contexts not in ("none", "single_turn", "all"):
            raise SchemeError(
                f"{self.name}: deduplicate_contexts is none, single_turn or all, "
                f"got {self.deduplicate_contexts!r}."
            )
        limit = self.deduplicate_contexts_max_history
        if limit is not None:
            check_integer(self.name, "deduplicate_contexts_max_history", limit, 1, 2**31)

    def _windows(self, texts: Sequence[Written]) -> Windows:
        lead = np.full(self.context_width, PADDING, dtype=np.int64)
        return windows([text.tokens for text in texts], [lead] * len(texts), self.context_width)

    def _notes(self) -> tuple[str, ...]:
        if self.context_width <= _WIDE:
            return ()
        return (f"contexts of {self.context_width} tokens: every edit hides that many positions",)

    def start(self) -> _State:
        """An empty history."""
        return _State()

    def context(
        self, prompt: TokenIds, output: Sequence[int], state: _State
    ) -> tuple[int, ...] | None:
        """The context of the next position if it is to be marked, else None; remembers it."""
        width = self.context_width
        generated = tuple(int(token) for token in output[max(0, len(output) - width) :])
        context = (PADDING,) * (width - len(generated)) + generated
        if self.deduplicate_contexts == "none":
            return context
        limit = self.deduplicate_contexts_max_history
        if self.deduplicate_contexts == "single_turn":
            here = len(output)
            seen = state.last.get(context)
            state.last[context] = here
        else:
            sequence = [*prompt.tolist(), *output]
            here = len(sequence)
            for position in range(max(width, state.filled), here):
                state.last[tuple(sequence[position - width : position])] = position
            state.filled = here
            seen = state.last.get(context)
            if len(output) < width:
                return None
        repeated = seen is not None and (limit is None or here - seen <= limit)
        return None if repeated else context

    def race(
        self,
        key: int,
        context: Sequence[int],
        ids: npt.NDArray[np.int64],
        scaled: npt.NDArray[np.float32],
    ) -> int:
        """The keyed choice among candidates: an id.

        ids: (n,) int64, ascending; scaled: (n,) float32 logits after temperature and truncation.
        """
        from filigrane.kernels.engines import philox_row

        row = (np.asarray(context, dtype=np.int64) & PADDING).astype(np.uint32)
        u = uniforms(philox_row(key, row, ids.astype(np.uint32)))
        noise = -np.log(-np.log(u))
        return int(ids[int(np.argmax(scaled + noise))])

    def _keyed(self, key: ForeignKey, rng: np.random.Generator) -> int:
        raise NotImplementedError

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
        """See `Writable.choose`; greedy sampling stays unmarked, as in vLLM."""
        self.require_key(key)
        context = self.context(prompt, output, state)
        ids, scaled = drawing.candidates(logits, sampling)
        if context is None or sampling.greedy:
            return int(ids[drawing.draw(drawing.softmax(scaled), rng)])
        return self.race(self._keyed(key, rng), context, ids, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmGumbel(_Philox):
    """vLLM's algorithm `gumbel`."""

    name: ClassVar[str] = "vllm-gumbel"

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        found = self._windows(texts)
        scores = _scores(key.reveal()[0], found, np.ones_like(found.first))
        total, everything = float(scores[found.first].sum()), float(scores.sum())
        n = int(found.first.sum())
        log_p = stats.log_sf_gamma(total, n) if n else 0.0
        plain = stats.log_sf_gamma(everything, scores.shape[0]) if n else 0.0
        return self.result(
            texts,
            key,
            log_pvalue=log_p,
            statistic=total,
            n_scored=n,
            dropped={"repeated context": scores.shape[0] - n},
            compat={
                "score": total,
                "p_value": math.exp(log_p),
                "num_scored_tokens": n,
                "score_no_dedup": everything,
                "p_value_no_dedup": math.exp(plain),
            },
            method="exact tail (Gamma)",
            warnings=self._notes(),
        )

    def _keyed(self, key: ForeignKey, rng: np.random.Generator) -> int:
        return key.reveal()[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmDualGumbel(_Philox):
    """vLLM's algorithm `dual_key_gumbel`: one key in the configuration, two in use.

    alpha: weight of key B in the score, and its probability in plain generation. None means 0.1 and
    a warning: detectors of vLLM 0.30 and 0.31 took 0.2 unless told otherwise, generation 0.1. With
    speculative decoding alpha is not used to write; the acceptance rate decides how often key A
    made a token.
    """

    name: ClassVar[str] = "vllm-dual-gumbel"

    alpha: float | None = None

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was born in.
        _Philox.__post_init__(self)
        if self.alpha not in (None, 0.0, 1.0):
            check_number(self.name, "alpha", self.alpha, 0.0, 1.0)

    @property
    def weight(self) -> float:
        """alpha, or its default."""
        return _ALPHA if self.alpha is None else float(self.alpha)

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        found = self._windows(texts)
        n = int(found.first.sum())
        one, two = (_scores(k, found, found.first) for k in _second_keys(key.reveal()[0]))
        a = self.weight
        fused = (1.0 - a) * one + a * two
        total = float(fused.sum())
        notes = list(self._notes())
        if self.alpha is None:
            notes.append(
                f"alpha not given: {a:g} was assumed, the default when vLLM writes (its detectors "
                "of 0.30 and 0.31 assume 0.2)"
            )
        return self.result(
            texts,
            key,
            log_pvalue=stats.log_sf_two_gammas(total, n, a) if n else 0.0,
            statistic=total,
            n_scored=n,
            dropped={"repeated context": int((~found.first).sum())},
            compat={
                "score": total,
                "p_value": math.exp(_moment_matched(total, n, a)) if n else 1.0,
                "num_scored_tokens": n,
                "score_key_a": float(one.sum()),
                "score_key_b": float(two.sum()),
            },
            method="exact tail (sum of two weighted Gammas)",
            warnings=notes,
        )

    def _keyed(self, key: ForeignKey, rng: np.random.Generator) -> int:
        a, b = _second_keys(key.reveal()[0])
        return b if rng.random() < self.weight else a


def _moment_matched(total: float, n: int, alpha: float) -> float:
    """log of the p-value that vLLM reports: a Gamma law with the right mean and variance."""
    v = (1.0 - alpha) ** 2 + alpha**2
    return _log_upper_gamma(n / v, total / v)


def _log_upper_gamma(a: float, x: float) -> float:
    """log Q(a, x) of a real shape: series below a + 1, continued fraction above (DLMF 8.7, 8.9)."""
    if x <= 0.0:
        return 0.0
    front = a * math.log(x) - x - math.lgamma(a)
    if x < a + 1.0:
        term = total = 1.0 / a
        k = a
        while term > total * 1e-17:
            k += 1.0
            term *= x / k
            total += term
        lower = front + math.log(total)
        return stats.log1mexp(min(lower, -1e-300))
    b = x + 1.0 - a
    c, d = math.inf, 1.0 / b
    h = d
    for i in range(1, 100_000):
        an = -i * (i - a)
        b += 2.0
        d = an * d + b
        c = b + (an / c if c != math.inf else 0.0)
        d = 1.0 / d
        step = c * d
        h *= step
        if abs(step - 1.0) < 1e-16:
            break
    return front + math.log(h)
