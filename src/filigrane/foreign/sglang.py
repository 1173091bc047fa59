"""SGLang's marks, with one key or two, and its MurmurHash3 numbers.

The context of a position is the last w tokens of prompt and output, shorter at the beginning of
both, hashed to 32 bits; key, context hash and token make a number h of 32 bits, and
u = (h + 1/2) / 2**32.

    one key    token = argmax log(u) / p; score -log(1 - u)
    two keys   a coin of both keys and the context hash, below mixing_probability 2**32, says which
               key makes the token; a detector tosses the same coin, so scores are not diluted

A sum of n scores is Gamma(n, 1) but for the lattice of 2**32 midpoints: each score is at most the
mean of an exponential variable over its cell, so moments are below those of the Gamma law. The hash
of a context takes no key: different contexts of one hash share all randomness under every key, and
such contexts are easily made. The p-value counts the first of them; the tool's numbers count all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import TokenIds
from filigrane.embedding import Sampling
from filigrane.foreign import drawing
from filigrane.foreign.base import ForeignResult, Writable, Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.windows import PADDING, Words, first_of, windows
from filigrane.schemes.base import check_integer, check_number

__all__ = ["SglangDualGumbel", "SglangGumbel", "context_hashes", "murmur", "token_hashes"]

_MASK = np.uint64(0xFFFFFFFF)
_MIXING: Final = 0.5
_MAX_CONTEXTS: Final = 4096


def _rotl(x: Words, n: int) -> Words:
    rotated: Words = ((x << np.uint64(n)) | (x >> np.uint64(32 - n))) & _MASK
    return rotated


def murmur(words: Sequence[Words], counts: Words | None = None) -> Words:
    """MurmurHash3 (x86, 32 bits, seed 0) of words given as arrays of one shape, uint64 < 2**32.

    counts: how many of the words each hash takes, counted from the last; None means all.
    """
    shape = np.broadcast_shapes(*(np.shape(word) for word in words)) if words else ()
    s = np.zeros(shape, dtype=np.uint64)
    for number, word in enumerate(words):
        v = (np.asarray(word, dtype=np.uint64) * np.uint64(0xCC9E2D51)) & _MASK
        v = (_rotl(v, 15) * np.uint64(0x1B873593)) & _MASK
        mixed = (_rotl(s ^ v, 13) * np.uint64(5) + np.uint64(0xE6546B64)) & _MASK
        if counts is None:
            s = mixed
        else:
            s = np.where(np.uint64(len(words) - number) <= counts, mixed, s)
    size = np.uint64(len(words)) if counts is None else counts
    s = s ^ ((np.uint64(4) * size) & _MASK)
    s = s ^ (s >> np.uint64(16))
    s = (s * np.uint64(0x85EBCA6B)) & _MASK
    s = s ^ (s >> np.uint64(13))
    s = (s * np.uint64(0xC2B2AE35)) & _MASK
    return s ^ (s >> np.uint64(16))


def context_hashes(contexts: npt.NDArray[np.uint32]) -> Words:
    """Hashes of contexts (..., w), oldest token first; leading 0xffffffff stand for nothing."""
    columns = [contexts[..., i].astype(np.uint64) for i in range(contexts.shape[-1])]
    return murmur(columns, (contexts != np.uint32(PADDING)).sum(axis=-1).astype(np.uint64))


def token_hashes(key: int, hashes: Words, tokens: npt.NDArray[np.uint32]) -> Words:
    """The numbers of tokens, below 2**32: hashes of contexts and tokens broadcast to one shape."""
    low, high = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    both = np.broadcast_arrays(hashes, tokens.astype(np.uint64))
    zero = np.zeros_like(both[0])
    return murmur([zero + low, zero + high, *both])


def coins(key_a: int, key_b: int, hashes: Words) -> Words:
    """The numbers that decide between two keys, one per context hash."""
    zero = np.zeros_like(hashes)
    parts = (key_a & 0xFFFFFFFF, key_a >> 32, key_b & 0xFFFFFFFF, key_b >> 32)
    return murmur([*(zero + np.uint64(part) for part in parts), hashes])


def _scores(words: Words) -> npt.NDArray[np.float64]:
    scores: npt.NDArray[np.float64] = -np.log1p(-((words.astype(np.float64) + 0.5) / 2.0**32))
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """What a claim's positions are, and what was dropped.

    hashes, tokens: (n,), of the positions that the tool scores; distinct: (n,) the first of every
    hash, which ours scores.
    """

    hashes: Words
    tokens: npt.NDArray[np.uint32]
    distinct: npt.NDArray[np.bool_]
    dropped: dict[str, int]
    unknown: int
    examined: int


@dataclass(slots=True)
class _State:
    """Context hashes already forced."""

    forced: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Murmur(Writable):
    """What both marks share.

    context_window: tokens of prompt and output before a position, 1 to 64. max_contexts: a text's
    reading stops after so many distinct contexts, and its writing marks no more. max_probability:
    writers leave positions alone whose largest truncated probability exceeds it.
    """

    tool: ClassVar[str] = "SGLang 0.5.23 (MurmurHash3)"
    reference: ClassVar[str] = "Aaronson 2022"

    context_window: int = 4
    max_contexts: int = _MAX_CONTEXTS
    max_probability: float = 1.0

    def __post_init__(self) -> None:
        check_integer(self.name, "context_window", self.context_window, 1, 64)
        check_integer(self.name, "max_contexts", self.max_contexts, 1, 2**31)
        if self.max_probability != 1.0:
            check_number(self.name, "max_probability", self.max_probability, 0.0, 1.0)

    def _scored(self, texts: Sequence[Written]) -> _Scored:
        width = self.context_window
        leads, skipped = [], 0
        unknown = 0
        for text in texts:
            if text.prompt is None or not text.prompt.shape[0]:
                leads.append(np.empty(0, dtype=np.int64))
                skipped += min(width, text.tokens.shape[0])
                unknown += 1
            else:
                lead = np.full(width, PADDING, dtype=np.int64)
                leads.append(np.concatenate([lead, text.prompt])[-width:])
        found = windows([text.tokens for text in texts], leads, width)
        # A reading of one text ends with its max_contexts-th new context.
        before: npt.NDArray[np.int64] = np.cumsum(found.first) - found.first
        start = np.searchsorted(found.text, np.arange(len(texts)))
        at_start = np.append(before, found.first.sum())[start] if len(texts) else before[:0]
        inside = before - at_start[found.text] < self.max_contexts
        which = found.first & inside
        hashes = context_hashes(found.contexts(which))
        distinct = first_of(hashes)
        return _Scored(
            hashes=hashes,
            tokens=found.tokens(which),
            distinct=distinct,
            dropped={
                "repeated context": int((~found.first & inside).sum()),
                "same hash as an earlier context": int((~distinct).sum()),
                "prompt unknown": skipped,
                "after max_contexts": int((~inside).sum()),
            },
            unknown=unknown,
            examined=skipped + int(inside.sum()),
        )

    def _notes(self, scored: _Scored) -> list[str]:
        if not scored.unknown:
            return []
        return [f"prompt unknown: the first {self.context_window} tokens of a text are skipped"]

    def start(self) -> _State:
        """No context has been forced."""
        return _State()

    def context(self, prompt: TokenIds, output: Sequence[int]) -> int:
        """The context hash of the next position."""
        ids = np.asarray([*prompt.tolist()[-self.context_window :], *output], dtype=np.int64)
        row = ids[-self.context_window :].astype(np.uint32)
        if not row.shape[0]:
            return int(murmur([]))
        return int(context_hashes(row))

    def race(
        self,
        key: int,
        context: int,
        ids: npt.NDArray[np.int64],
        scaled: npt.NDArray[np.float32],
    ) -> int:
        """The keyed choice among candidates: an id.

        context: a hash; ids: (n,) int64, ascending; scaled: (n,) float32 logits after temperature
        and truncation.
        """
        from filigrane.kernels.engines import murmur_row

        h = murmur_row(key, context, ids.astype(np.uint32)).astype(np.float64)
        # Near 1 the difference from 1 keeps its digits.
        log_u = np.where(
            h >= 2.0**31,
            np.log1p(-(2.0**32 - h - 0.5) / 2.0**32),
            np.log((h + 0.5) / 2.0**32),
        )
        return int(ids[int(np.argmax(scaled.astype(np.float64) - np.log(-log_u)))])

    def key_for(self, key: ForeignKey, context: int) -> int:
        """The number that makes the token after a context hash."""
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
        """See `Writable.choose`; greedy sampling stays unmarked, as in SGLang."""
        self.require_key(key)
        ids, scaled = drawing.candidates(logits, sampling)
        probs = drawing.softmax(scaled)
        context = self.context(prompt, output)
        free = context in state.forced or len(state.forced) >= self.max_contexts
        if free or sampling.greedy or float(probs.max()) > self.max_probability:
            return int(ids[drawing.draw(probs, rng)])
        state.forced.add(context)
        return self.race(self.key_for(key, context), context, ids, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangGumbel(_Murmur):
    """SGLang's mark with one key."""

    name: ClassVar[str] = "sglang-gumbel"
    key_form: ClassVar[KeyForm] = KeyForm.HEX

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        scored = self._scored(texts)
        scores = _scores(token_hashes(key.reveal()[0], scored.hashes, scored.tokens))
        ours = scores[scored.distinct]
        return self.result(
            texts,
            key,
            log_pvalue=_tail(ours),
            statistic=float(ours.sum()),
            n_scored=ours.shape[0],
            dropped=scored.dropped,
            compat=_report(scores, "") | {"tokens_examined": scored.examined},
            method="exact tail (Gamma)",
            warnings=self._notes(scored),
        )

    def key_for(self, key: ForeignKey, context: int) -> int:
        """See `_Murmur.key_for`."""
        return key.reveal()[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangDualGumbel(_Murmur):
    """SGLang's mark with two keys.

    mixing_probability: share of key A, 0 to 1; None means 0.5 and a warning.
    """

    name: ClassVar[str] = "sglang-dual-gumbel"
    key_form: ClassVar[KeyForm] = KeyForm.HEX_PAIR
    key_count: ClassVar[int] = 2

    mixing_probability: float | None = None

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was born in.
        _Murmur.__post_init__(self)
        if self.mixing_probability not in (None, 0.0, 1.0):
            check_number(self.name, "mixing_probability", self.mixing_probability, 0.0, 1.0)

    def _takes_a(self, key: ForeignKey, hashes: Words) -> npt.NDArray[np.bool_]:
        share = _MIXING if self.mixing_probability is None else self.mixing_probability
        a, b = key.reveal()
        threshold = math.floor(share * 2.0**32)
        taken: npt.NDArray[np.bool_] = coins(a, b, hashes) < np.uint64(threshold)
        return taken

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        scored = self._scored(texts)
        one, two = (_scores(token_hashes(k, scored.hashes, scored.tokens)) for k in key.reveal())
        takes_a = self._takes_a(key, scored.hashes)
        scores = np.where(takes_a, one, two)
        ours = scores[scored.distinct]
        notes = self._notes(scored)
        if self.mixing_probability is None:
            notes.append(
                f"mixing_probability not given: {_MIXING:g}, SGLang's default, was assumed"
            )
        compat = _report(scores, "") | {"tokens_examined": scored.examined}
        for name, part in (
            ("key_a_all_positions", one),
            ("key_b_all_positions", two),
            ("key_a_partition", one[takes_a]),
            ("key_b_partition", two[~takes_a]),
        ):
            compat |= _report(part, f"{name}.")
        return self.result(
            texts,
            key,
            log_pvalue=_tail(ours),
            statistic=float(ours.sum()),
            n_scored=ours.shape[0],
            dropped=scored.dropped,
            compat=compat,
            method="exact tail (Gamma)",
            warnings=notes,
        )

    def key_for(self, key: ForeignKey, context: int) -> int:
        """See `_Murmur.key_for`."""
        a, b = key.reveal()
        return a if bool(self._takes_a(key, np.array([context], dtype=np.uint64))[0]) else b


def _tail(scores: npt.NDArray[np.float64]) -> float:
    n = scores.shape[0]
    return stats.log_sf_gamma(float(scores.sum()), n) if n else 0.0


def _report(scores: npt.NDArray[np.float64], prefix: str) -> dict[str, float]:
    """SGLang's own numbers for some scores, by its names."""
    n, total, log_p = scores.shape[0], float(scores.sum()), _tail(scores)
    return {
        f"{prefix}num_contexts": n,
        f"{prefix}score": total,
        f"{prefix}z_score": (total - n) / math.sqrt(n) if n else 0.0,
        f"{prefix}p_value": math.exp(log_p),
        f"{prefix}log_p_value": log_p,
    }
