"""SynthID-Text as published, in its two incompatible forms.

Both run an n-gram through f(h, x) = (h + x) a + 1 modulo 2**64, context first, then the token, then
one key per layer, and take one bit g_l per layer. A tournament over the layers tilts the law:
q <- q (1 + g_l - sum g_l q). Contexts begin as n - 1 zeros, the prompt never enters, and a context
that occurred among the last `context_history_size` ones leaves a position unmarked.

    synthid-hf         transformers, and the package synthid-text 0.2.1: g_l is looked up at the
                       hash in a table of bits
    synthid-text-head  the repository google-deepmind/synthid-text: hashes start from a digest of
                       the keys, g_l is a bit of the hash after twelve more rounds

The bits of a scored position are fair coins over random keys, so the sum of n positions and m
layers is Binomial(n m, 1/2), and sums weighted 10 to 1 have an exact law on a lattice as well;
neither tool gives a p-value. With the table only the low 16 bits of a hash count, so n-grams that
agree there have all bits in common: readers score the first of them and drop the rest, which keeps
the law true of long texts. For the same reason equal keys make equal layers, and keys may be equal
to the table and to nobody else: such layers are one, with the sum of their weights. The table is
fixed; that of seed 0 holds 32,743 ones of 65,536, 0.0004 below one half, so p-values err to the
large side. Of a table with more ones than zeros the law takes the true share of ones.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
from filigrane.foreign.layers import log_sf_layers
from filigrane.foreign.windows import first_of
from filigrane.schemes.base import check_integer

__all__ = ["Bayesian", "Posterior", "SynthIDHead", "SynthIDHf"]

_MULTIPLIER: Final = 6364136223846793005
_WRAP: Final = 2**64
_HEAD_ROUNDS: Final = 12

_FEWEST_KEYS: Final = 20
# Printed in the documentation of transformers and in the paper's code: keys of half the internet.
_PUBLISHED: Final = frozenset(
    {654, 400, 836, 123, 340, 443, 597, 160, 57, 29, 590, 639, 13, 715, 468, 990, 966, 226, 324}
    | {585, 118, 504, 421, 521, 129, 669, 732, 225, 90, 960}
)

Hashes = npt.NDArray[np.uint64]
"""Signed 64-bit values of the tools, as unsigned bits."""
Bits = npt.NDArray[np.uint8]


def _step(hashes: Hashes, values: Hashes) -> Hashes:
    """f of the module's docstring."""
    with np.errstate(over="ignore"):  # numpy minds the wrap in single numbers only
        stepped: Hashes = (hashes + values) * np.uint64(_MULTIPLIER) + np.uint64(1)
    return stepped


@lru_cache(maxsize=8)
def _table(seed: int, size: int) -> Bits:
    """The sampling table: parities of a Mersenne twister's outputs."""
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)
    bits: Bits = (twister.random_raw(size) & 1).astype(np.uint8)
    bits.flags.writeable = False
    return bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """What a trained Bayesian detector says of a text: a probability under its prior, no p-value.

    probability: that the text is marked; log_likelihood_ratio: natural log; n_scored: positions.
    """

    probability: float
    log_likelihood_ratio: float
    n_scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bayesian:
    """Parameters of SynthID-Text's Bayesian detector, as trained for one model and one set of keys.

    beta: (m,) and delta: (m, m) nested tuples, of which delta[l][j] counts for j < l; prior: of a
    text being marked. Only for the tool's own texts: its score is not calibrated elsewhere.
    """

    beta: tuple[float, ...]
    delta: tuple[tuple[float, ...], ...]
    prior: float

    def __post_init__(self) -> None:
        m = len(self.beta)
        if m == 0 or len(self.delta) != m or any(len(row) != m for row in self.delta):
            raise SchemeError("a Bayesian detector has m values of beta and m rows of m of delta.")
        if not 0.0 < self.prior < 1.0:
            raise SchemeError(f"prior must be inside (0, 1), got {self.prior!r}.")

    def log_ratios(self, bits: Bits) -> npt.NDArray[np.float64]:
        """Log likelihood ratio of every position: bits (n, m) -> (n,)."""
        g = bits.astype(np.float64)
        lower = np.tril(np.asarray(self.delta, dtype=np.float64), -1)
        psi = 1.0 / (1.0 + np.exp(-(np.asarray(self.beta) + g @ lower.T)))
        ratios: npt.NDArray[np.float64] = np.log1p((g - 0.5) * psi).sum(axis=1)
        return ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Bits of a claim's positions and which of them count.

    bits: (n, m) of all n-grams; mask: (n,) the tool's own choice; distinct: (n,) those of the mask
    whose bits are not those of an earlier one; ended: n-grams at or after the first end token.
    """

    bits: Bits
    mask: npt.NDArray[np.bool_]
    distinct: npt.NDArray[np.bool_]
    ended: int
    short: int


@dataclass(slots=True)
class _State:
    """Hashes of the last contexts, newest first, and the number of calls."""

    history: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SynthID(Writable):
    """What both forms share.

    ngram_len: tokens of an n-gram, the scored one included. scoring: `weighted` (layers count 10 to
    1) or `mean`. eos_token_id: positions from the first such token on do not count.
    skip_first_ngram_calls: writers leave the first ngram_len - 1 tokens unmarked.
    """

    key_form: ClassVar[KeyForm] = KeyForm.INTEGERS
    key_count: ClassVar[int] = 30

    ngram_len: int = 5
    context_history_size: int = 1024
    scoring: Literal["weighted", "mean"] = "weighted"
    eos_token_id: int | None = None
    skip_first_ngram_calls: bool = False

    def __post_init__(self) -> None:
        check_integer(self.name, "ngram_len", self.ngram_len, 2, 64)
        check_integer(self.name, "context_history_size", self.context_history_size, 1, 2**31)
        if self.scoring not in ("weighted", "mean"):
            raise SchemeError(f"{self.name}: scoring is weighted or mean, got {self.scoring!r}.")
        if self.eos_token_id is not None:
            check_integer(self.name, "eos_token_id", self.eos_token_id, 0, 2**32 - 2)

    # ------------------------------------------------------------------ hashes and bits

    @abstractmethod
    def initial(self, keys: Sequence[int]) -> int:
        """What hashes start from."""

    @abstractmethod
    def layer_bits(self, ngrams: Hashes, keys: Sequence[int]) -> Bits:
        """Bits of n-gram hashes (...) -> (..., m)."""

    @abstractmethod
    def bits_depend_on(self, ngrams: Hashes) -> Hashes:
        """What of the n-gram hashes decides all bits: equal values, equal bits."""

    @abstractmethod
    def effective(self, number: int) -> int:
        """What of a key's number decides a layer: equal values, equal layers."""

    def ones(self) -> tuple[int, int]:
        """Share of ones among a layer's bits, as (ones, of how many)."""
        return 1, 2

    def context_hashes(self, contexts: npt.NDArray[np.int64], keys: Sequence[int]) -> Hashes:
        """Hashes of contexts (..., ngram_len - 1), oldest token first."""
        h = np.full(contexts.shape[:-1], self.initial(keys) % _WRAP, dtype=np.uint64)
        for i in range(contexts.shape[-1]):
            h = _step(h, contexts[..., i].astype(np.uint64))
        return h

    def ngram_hashes(self, contexts: Hashes, tokens: npt.NDArray[np.int64]) -> Hashes:
        """Hashes of n-grams, of the hashes of their contexts and their last tokens."""
        return _step(contexts, tokens.astype(np.uint64))

    def g_values(
        self, context: Sequence[int], tokens: npt.ArrayLike, key: ForeignKey
    ) -> npt.NDArray[np.uint8]:
        """The bits of tokens after one context: (ngram_len - 1,), (n,) -> (n, layers)."""
        keys = key.reveal()
        hashed = self.context_hashes(np.asarray(context, dtype=np.int64), keys)
        return self.layer_bits(self.ngram_hashes(hashed, np.asarray(tokens, np.int64)), keys)

    # ------------------------------------------------------------------ reading

    def _scored(self, texts: Sequence[Written], keys: Sequence[int]) -> _Scored:
        width = self.ngram_len - 1
        grams: list[Hashes] = [np.empty(0, dtype=np.uint64)]
        masks: list[npt.NDArray[np.bool_]] = [np.empty(0, dtype=np.bool_)]
        ended = short = 0
        for text in texts:
            ids = text.tokens
            n = max(0, ids.shape[0] - width)
            short += min(width, ids.shape[0])
            contexts = self.context_hashes(ids[np.arange(n)[:, None] + np.arange(width)], keys)
            grams.append(self.ngram_hashes(contexts, ids[width:]))
            mask = ~_repeated(contexts, self.context_history_size)
            if self.eos_token_id is not None:
                ends = np.flatnonzero(ids == self.eos_token_id)
                if ends.size:
                    live = np.arange(n) + width < ends[0]
                    ended += int((mask & ~live).sum())
                    mask &= live
            masks.append(mask)
        ngrams, mask = np.concatenate(grams), np.concatenate(masks)
        distinct = np.zeros_like(mask)
        chosen = np.flatnonzero(mask)
        distinct[chosen[first_of(self.bits_depend_on(ngrams[chosen]))]] = True
        bits = self.layer_bits(ngrams, keys)
        return _Scored(bits=bits, mask=mask, distinct=distinct, ended=ended, short=short)

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        keys = key.reveal()
        m = len(keys)
        scored = self._scored(texts, keys)
        theirs = scored.bits[scored.mask].sum(axis=0, dtype=np.int64)
        ours = scored.bits[scored.distinct].sum(axis=0, dtype=np.int64)
        n, told = int(scored.distinct.sum()), int(scored.mask.sum())
        weights = [10 * (m - 1) - 9 * layer for layer in range(m)] if m > 1 else [1]
        if self.scoring == "mean":
            weights = [1] * m
        total = int(sum(int(w) * int(g) for w, g in zip(weights, ours, strict=True)))
        log_p, method, notes = self._tail(total, n, weights, keys)
        scale = np.linspace(10.0, 1.0, m) if m > 1 else np.ones(1)
        scale = scale * (m / scale.sum())
        return self.result(
            texts,
            key,
            log_pvalue=log_p,
            statistic=total / (sum(weights) * n) if n else 0.0,
            n_scored=n,
            dropped={
                "no complete context": scored.short,
                "repeated context": int(scored.mask.shape[0]) - told - scored.ended,
                "after the end": scored.ended,
                "same bits as an earlier position": told - n,
            },
            compat={
                "num_scored_positions": told,
                "g_sum": int(theirs.sum()),
                "mean_score": float(theirs.sum()) / (told * m) if told else 0.0,
                "weighted_mean_score": float(theirs @ scale) / (told * m) if told else 0.0,
            },
            method=method,
            warnings=notes,
        )

    def _tail(
        self, total: int, n: int, weights: Sequence[int], keys: Sequence[int]
    ) -> tuple[float, str, list[str]]:
        """Of a weighted sum over n positions: log p-value, how it was made, and warnings."""
        merged: dict[int, int] = {}
        for weight, number in zip(weights, keys, strict=True):
            same = self.effective(number)
            merged[same] = merged.get(same, 0) + weight
        notes = []
        layers = np.array(list(merged.values()), dtype=np.int64)
        method = "binomial" if np.all(layers == layers[0]) else "weighted bits"
        if len(merged) < len(keys):
            notes.append(
                f"some keys are equal to this generator: {len(keys)} keys make {len(merged)} "
                "different layers, and equal ones count as one"
            )
            method += f", {len(merged)} different layers"
        ones, size = self.ones()
        if 2 * ones > size:
            method += f", {ones} ones of {size}"
        if n == 0 or ones == size:
            log_p = 0.0
        elif 2 * ones <= size:
            log_p = stats.log_sf_weighted_bits(total, n, layers.tolist())
        else:
            log_p = log_sf_layers(total, np.full(layers.shape[0], n), layers, ones / size)
        return log_p, f"exact tail ({method})", notes

    def posterior(
        self, texts: Sequence[Written] | Written, key: ForeignKey, detector: Bayesian
    ) -> Posterior:
        """The tool's Bayesian detector, over the positions that the tool scores.

        Raises SchemeError if detector and key have different numbers of layers.
        """
        self.require_key(key)
        keys = key.reveal()
        if len(keys) != len(detector.beta):
            raise SchemeError(
                f"the detector was trained for {len(detector.beta)} layers, the key has "
                f"{len(keys)}; use the parameters that belong to these keys."
            )
        scored = self._scored((texts,) if isinstance(texts, Written) else tuple(texts), keys)
        ratio = float(detector.log_ratios(scored.bits[scored.mask]).sum())
        logit = math.log(detector.prior) - math.log1p(-detector.prior) + ratio
        probability = 1.0 / (1.0 + math.exp(-logit)) if logit > -700.0 else 0.0
        return Posterior(
            probability=probability,
            log_likelihood_ratio=ratio,
            n_scored=int(scored.mask.sum()),
        )

    def default_warnings(self, key: ForeignKey) -> tuple[str, ...]:
        """See `Profile.default_warnings`."""
        if all(number in _PUBLISHED for number in key.reveal()):
            return ("these are published example keys: anybody can write this mark",)
        if len(key.reveal()) < _FEWEST_KEYS:
            return (
                f"{len(key.reveal())} keys, where 20 to 30 are usual: with some of a generator's "
                "keys left out, a reading finds little",
            )
        return ()

    # ------------------------------------------------------------------ writing

    def start(self) -> _State:
        """No context has been seen."""
        return _State()

    def tilt(self, probs: npt.NDArray[np.float64], bits: Bits) -> npt.NDArray[np.float64]:
        """The tournament: probabilities (n,) and bits (n, m) -> probabilities (n,)."""
        for layer in range(bits.shape[1]):
            g = bits[:, layer]
            probs = probs * (1.0 + g - float(probs @ g))
        return probs

    def law(
        self,
        logits: npt.NDArray[np.float32],
        output: Sequence[int],
        key: ForeignKey,
        *,
        state: Any,
        sampling: Sampling,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The law of the next token: ids and probabilities, (n,) each; remembers the context."""
        ids, scaled = drawing.candidates(logits, sampling)
        probs = drawing.softmax(scaled)
        width = self.ngram_len - 1
        if self.skip_first_ngram_calls and len(output) < width:
            return ids, probs
        recent = [int(token) for token in output[max(0, len(output) - width) :]]
        row = np.array([0] * (width - len(recent)) + recent, dtype=np.int64)
        keys = key.reveal()
        context = self.context_hashes(row, keys)
        repeated = int(context) in state.history
        state.history.insert(0, int(context))
        del state.history[self.context_history_size :]
        if repeated:
            return ids, probs
        tilted = self.tilt(probs, self.layer_bits(self.ngram_hashes(context, ids), keys))
        return ids, np.clip(tilted, 0.0, None)

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
        """See `Writable.choose`."""
        self.require_key(key)
        ids, probs = self.law(logits, output, key, state=state, sampling=sampling)
        return int(ids[drawing.draw(probs, rng)])


def _repeated(contexts: Hashes, size: int) -> npt.NDArray[np.bool_]:
    """Whether each context is among the `size` before it."""
    n = contexts.shape[0]
    order = np.argsort(contexts, kind="stable")
    previous = np.full(n, -size - 1, dtype=np.int64)
    same = contexts[order[1:]] == contexts[order[:-1]] if n else np.empty(0, dtype=np.bool_)
    previous[order[1:][same]] = order[:-1][same]
    repeated: npt.NDArray[np.bool_] = np.arange(n) - previous <= size
    return repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthIDHf(_SynthID):
    """SynthID-Text of transformers, and of the package synthid-text 0.2.1.

    sampling_table_size, sampling_table_seed: of the table of bits.
    """

    name: ClassVar[str] = "synthid-hf"
    tool: ClassVar[str] = "transformers 4.46 to 5.23, synthid-text 0.2.1"
    reference: ClassVar[str] = "Dathathri et al. 2024 (Nature 634)"
    key_bits: ClassVar[int] = 16

    sampling_table_size: int = 65536
    sampling_table_seed: int = 0

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was born in.
        _SynthID.__post_init__(self)
        check_integer(self.name, "sampling_table_size", self.sampling_table_size, 2, 2**26)
        check_integer(self.name, "sampling_table_seed", self.sampling_table_seed, 0, 2**64 - 1)

    def initial(self, keys: Sequence[int]) -> int:
        """See `_SynthID.initial`: one, whatever the keys."""
        return 1

    def layer_bits(self, ngrams: Hashes, keys: Sequence[int]) -> Bits:
        """See `_SynthID.layer_bits`: entries of the table."""
        table = _table(self.sampling_table_seed, self.sampling_table_size)
        out = np.empty((*ngrams.shape, len(keys)), dtype=np.uint8)
        for layer, key in enumerate(keys):
            hashed = _step(ngrams, np.array(key % _WRAP, dtype=np.uint64)).view(np.int64)
            out[..., layer] = table[hashed % np.int64(self.sampling_table_size)]
        return out

    def bits_depend_on(self, ngrams: Hashes) -> Hashes:
        """See `_SynthID.bits_depend_on`: of a table of 2**k entries, as much as the low k bits.

        With other sizes an index jumps where a hash wraps; but for that, the same is true.
        """
        return ngrams * np.uint64(_MULTIPLIER) % np.uint64(self.sampling_table_size)

    def effective(self, number: int) -> int:
        """See `_SynthID.effective`: what `bits_depend_on` takes of a hash, of a key."""
        return number * _MULTIPLIER % _WRAP % self.sampling_table_size

    def ones(self) -> tuple[int, int]:
        """See `_SynthID.ones`: counted in the table."""
        table = _table(self.sampling_table_seed, self.sampling_table_size)
        return int(table.sum(dtype=np.int64)), self.sampling_table_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthIDHead(_SynthID):
    """SynthID-Text of the repository google-deepmind/synthid-text, commit addb4a1.

    num_leaves: 2 does not distort the law on average; more leaves mark more and distort (writers).
    """

    name: ClassVar[str] = "synthid-text-head"
    tool: ClassVar[str] = "google-deepmind/synthid-text at addb4a1"
    reference: ClassVar[str] = "Dathathri et al. 2024 (Nature 634)"
    key_bits: ClassVar[int] = 63

    num_leaves: int = 2

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was born in.
        _SynthID.__post_init__(self)
        check_integer(self.name, "num_leaves", self.num_leaves, 2, 1024)

    def initial(self, keys: Sequence[int]) -> int:
        """See `_SynthID.initial`: a digest of the keys."""
        data = b"".join((key % _WRAP).to_bytes(8, "little") for key in keys)
        return int.from_bytes(hashlib.sha256(data).digest(), "big") % (2**63 - 1)

    def layer_bits(self, ngrams: Hashes, keys: Sequence[int]) -> Bits:
        """See `_SynthID.layer_bits`: one bit of a hash that went on for twelve rounds."""
        out = np.empty((*ngrams.shape, len(keys)), dtype=np.uint8)
        one = np.array(1, dtype=np.uint64)
        for layer, key in enumerate(keys):
            k = _step(ngrams, np.array(key % _WRAP, dtype=np.uint64))
            for _ in range(_HEAD_ROUNDS):
                k = (_step(k, one).view(np.int64) >> np.int64(5)).view(np.uint64)
            out[..., layer] = (k >> np.uint64(30)) & np.uint64(1)
        return out

    def bits_depend_on(self, ngrams: Hashes) -> Hashes:
        """See `_SynthID.bits_depend_on`: the whole hash."""
        return ngrams

    def effective(self, number: int) -> int:
        """See `_SynthID.effective`: 64 bits."""
        return number % _WRAP

    def tilt(self, probs: npt.NDArray[np.float64], bits: Bits) -> npt.NDArray[np.float64]:
        """See `_SynthID.tilt`; with N leaves, the winner of N draws in every layer."""
        leaves = self.num_leaves
        if leaves == 2:
            return _SynthID.tilt(self, probs, bits)
        for layer in range(bits.shape[1]):
            g = bits[:, layer] == 1
            green = float(probs[g].sum())
            if 0.0 < green < 1.0:
                rest = (1.0 - green) ** (leaves - 1)
                probs = probs * np.where(g, (1.0 - rest * (1.0 - green)) / green, rest)
        return probs
