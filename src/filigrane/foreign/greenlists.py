"""What all green lists drawn by a seeded torch generator share: reading, writing, and the p-value.

Knows no tool. A profile says which tokens seed a list (`seeds`) and how large it is; this module
gathers a text's n-grams, counts every draw once, and computes the tail. How the count is made:

A *draw* is a pair (low 32 bits of the generator's seed, token): nothing else decides whether the
token is green. Different n-grams can be the same draw (several PRFs look at a part of the context
only, or at its minimum, and 64-bit seeds collide in their low half); a draw counts once. Draws
whose seed does not depend on the key are no evidence at all and are left out; which ones these are
is for the profile to say (`keyless`), because it follows from the seeding function.

Under no mark every draw is green with probability G / V, G = int(ratio * V) being the list's true
size; draws of different seeds are independent, and those of one seed are draws without replacement,
whose number of greens is a sum of independent indicators (Vatutin and Mikhailov 1982). For such
sums the binomial tail with the mean G / V is an upper bound from n G / V + 1 on (Hoeffding 1956),
so the binomial p-value is exact where seeds differ and never too small where it is below about 1/2.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import TokenIds
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError, TokenError
from filigrane.foreign.base import ForeignResult, Writable, Written
from filigrane.foreign.drawing import candidates, draw, softmax
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.keys import _Secret
from filigrane.schemes.base import check_number

__all__ = [
    "MODULUS",
    "GreenLists",
    "Ngrams",
    "check_ratio",
    "ends_in_zeros",
    "gather",
    "unique_draws",
]

MODULUS = 2**64 - 1
"""Tools reduce seeds by this: what `torch.Generator.manual_seed` takes without overflow."""
CPU_ONLY = "covers lists drawn by a CPU generator only: text marked on a GPU reads as unmarked"


class Ngrams(NamedTuple):
    """Every n-gram of some texts, in order.

    rows: (n, length) int64, the token it ends with last; inside: (n,) bool, False where the n-gram
    reaches into the prompt; missing: tokens with too few before them; leading: dropped BOS tokens.
    """

    rows: npt.NDArray[np.int64]
    inside: npt.NDArray[np.bool_]
    missing: int
    leading: int


def gather(texts: Sequence[Written], length: int, *, bos: int | None = None) -> Ngrams:
    """The n-grams of `length` tokens that end in one of the texts' own tokens.

    A known prompt supplies what the first tokens need; without one they are missing. bos: where a
    text without a known prompt starts with this id, it is dropped first.
    """
    rows = [np.empty((0, length), dtype=np.int64)]
    inside = [np.empty(0, dtype=np.bool_)]
    missing = leading = 0
    for text in texts:
        tokens, prompt = text.tokens, text.prompt
        if prompt is None:
            prompt = np.empty(0, dtype=np.int64)
            if bos is not None and tokens.shape[0] and tokens[0] == bos:
                tokens, leading = tokens[1:], leading + 1
        tail = prompt[max(0, prompt.shape[0] - (length - 1)) :]
        ids = np.concatenate([tail, tokens])
        if ids.shape[0] < length:
            missing += tokens.shape[0]
            continue
        found = np.lib.stride_tricks.sliding_window_view(ids, length)
        missing += tokens.shape[0] - found.shape[0]
        rows.append(found)
        inside.append(np.arange(found.shape[0]) >= tail.shape[0])
    return Ngrams(np.concatenate(rows), np.concatenate(inside), missing, leading)


def unique_draws(
    seeds: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(first, inverse): where each distinct draw occurs first, and every position's draw."""
    pairs = seeds << np.uint64(32) | tokens.astype(np.uint64)
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    return first.astype(np.int64), inverse.astype(np.int64)


def ends_in_zeros(seeds: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.bool_]:
    """Whether the signed numbers behind seeds end in so many zero bits, 1 to 32: (n,) -> (n,)."""
    mask = np.uint64(2**bits - 1)
    low = seeds & mask
    zeros: npt.NDArray[np.bool_] = (low == 0) | (low == mask)
    return zeros


def check_ratio(profile: str, name: str, ratio: object, vocab_size: int) -> None:
    """Raise SchemeError unless int(V * ratio) leaves green and red tokens."""
    check_number(profile, name, ratio, 0.0, 1.0)
    if not 0 < int(vocab_size * float(ratio)) < vocab_size:  # type: ignore[arg-type]
        raise SchemeError(
            f"{profile}: {name}={ratio} of {vocab_size} tokens leaves no green or no red token."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenLists(Writable):
    """A green list per context, drawn as the front of a permutation of the vocabulary."""

    key_form: ClassVar[KeyForm] = KeyForm.INTEGER
    key_bits: ClassVar[int] = 63
    needs_vocab: ClassVar[bool] = True

    @property
    @abstractmethod
    def ratio(self) -> float:
        """The share of green tokens that the tool is told."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Tokens that seed a list."""

    @property
    @abstractmethod
    def self_salted(self) -> bool:
        """Whether the last of them is the token in question itself."""

    @abstractmethod
    def seeds(
        self, contexts: npt.NDArray[np.int64], number: int, prepared: Any
    ) -> npt.NDArray[np.uint64]:
        """The generator's seeds: contexts (n, width), the key's number -> (n,) uint64."""

    def keyless(
        self, seeds: npt.NDArray[np.uint64], number: int, prepared: Any
    ) -> npt.NDArray[np.bool_]:
        """Seeds that some window has under every key, or nearly: (n,) uint64 -> (n,) bool.

        Decides by the low 32 bits of a seed. Here: those of a product with zero, of either sign
        (a negative seed has lost one on its way through 2**64 - 1).
        """
        return ends_in_zeros(seeds, 32)

    def prepare(self, number: int) -> Any:
        """What `seeds` needs of the key and is worth keeping; nothing by default."""
        return None

    @property
    def list_size(self) -> int:
        """G: green tokens in every list."""
        return int(self.vocabulary * self.ratio)

    @property
    def from_the_end(self) -> bool:
        """Whether a list is the end of the permutation instead of its front."""
        return False

    @property
    def ngram(self) -> int:
        """Tokens that decide about one position, its own included."""
        return self.width + (not self.self_salted)

    def seed(self, context: npt.ArrayLike, key: ForeignKey) -> int:
        """The generator's seed after a context of at least `width` tokens, oldest first.

        For self-salted lists the candidate is the last of them.
        """
        self.require_key(key)
        (number,) = key.reveal()
        return int(self.seeds(self._context(context), number, self.prepare(number))[0])

    def green(self, context: npt.ArrayLike, key: ForeignKey) -> npt.NDArray[np.bool_]:
        """The list after a context as a mask, (V,) bool; `context` as in `seed`."""
        return self._mask(self.seed(context, key))

    def _context(self, context: npt.ArrayLike) -> npt.NDArray[np.int64]:
        ids = np.asarray(context, dtype=np.int64)
        if ids.ndim != 1 or ids.shape[0] < self.width:
            raise TokenError(f"{self.name}: a list is seeded by {self.width} tokens; pass those.")
        return ids[None, ids.shape[0] - self.width :]

    def _mask(self, seed: int) -> npt.NDArray[np.bool_]:
        from filigrane.kernels.mersenne import front

        size = self.vocabulary - self.list_size if self.from_the_end else self.list_size
        mask = np.full(self.vocabulary, self.from_the_end)
        mask[front(seed, self.vocabulary, size)] = not self.from_the_end
        return mask

    def _are_green(
        self, seeds: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Membership without the lists: seeds (n,), tokens (n,) -> (n,) bool."""
        from filigrane.kernels.mersenne import in_front

        low = (seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        if self.from_the_end:
            size = self.vocabulary - self.list_size
            return ~in_front(low, tokens, self.vocabulary, size)
        return in_front(low, tokens, self.vocabulary, self.list_size)

    # ------------------------------------------------------------------------ reading

    def compat(
        self, rows: npt.NDArray[np.int64], green: npt.NDArray[np.bool_]
    ) -> Mapping[str, float]:
        """What the tool says about one text: its n-grams (n, ngram) and which are green, (n,)."""
        if rows.shape[0] == 0:
            return {}
        _, first = np.unique(rows, axis=0, return_index=True)
        report: dict[str, float] = {}
        for rule, kept in (("all", green), ("distinct", green[first])):
            count, n = int(kept.sum()), kept.shape[0]
            z = (count - self.ratio * n) / math.sqrt(n * self.ratio * (1 - self.ratio))
            report |= {
                f"num_tokens_scored_{rule}": float(n),
                f"num_green_tokens_{rule}": float(count),
                f"green_fraction_{rule}": count / n,
                f"z_score_{rule}": z,
                f"p_value_{rule}": 0.5 * math.erfc(z / math.sqrt(2)),
            }
        return report

    @property
    def bos(self) -> int | None:
        """An id that the tool drops from the start of a text."""
        return None

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        (number,) = key.reveal()
        ngrams = gather(texts, self.ngram, bos=self.bos)
        prepared = self.prepare(number)
        seeds = self.seeds(ngrams.rows[:, : self.width], number, prepared)
        tokens = ngrams.rows[:, -1]
        first, inverse = unique_draws(seeds, tokens)
        green = self._are_green(seeds[first], tokens[first])
        free = self.keyless(seeds, number, prepared)
        counted = ~free[first]
        n, count = int(counted.sum()), int(green[counted].sum())
        inside = ngrams.inside
        size, vocabulary = self.list_size, self.vocabulary
        keyless = int(free.sum())
        return self.result(
            texts,
            key,
            log_pvalue=stats.log_sf_binomial(count, n, size / vocabulary) if n else 0.0,
            statistic=float(count),
            n_scored=n,
            dropped={
                "leading BOS": ngrams.leading,
                "incomplete context": ngrams.missing,
                "same list under every key": keyless,
                "draw counted before": seeds.shape[0] - keyless - n,
            },
            compat=self.compat(ngrams.rows[inside], green[inverse][inside])
            if len(texts) == 1
            else {},
            method=(
                f"exact binomial tail over distinct draws (seed, token), each green with "
                f"probability {size}/{vocabulary}, the list's true share; draws of one seed are "
                f"without replacement, for which this tail is an upper bound (the tool's own z "
                f"takes {self.ratio:g})"
            ),
        )

    # ------------------------------------------------------------------------ writing

    tried: ClassVar[int] = 40
    """Self-salted lists: how many of the best tokens are tried when writing."""
    bias_last: ClassVar[bool]
    """Whether the bias is added after temperature and truncation, or before."""

    @property
    @abstractmethod
    def added(self) -> float:
        """What is added to the logits of green tokens."""

    def start(self) -> dict[str, _Secret[Any]]:
        """Where a writer keeps what `prepare` made of the key."""
        return {}

    def biased(
        self,
        scores: npt.NDArray[np.float32],
        context: npt.ArrayLike,
        key: ForeignKey,
        *,
        state: dict[str, _Secret[Any]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Scores (V,) with the tool's bias; context: all ids before this position, oldest first.

        With fewer than `width` of them the scores come back as they are, as the tool has it.
        """
        ids = np.asarray(context, dtype=np.int64)
        self.require_width(scores)
        if ids.shape[0] < self.width:
            return scores
        self.require_key(key)
        (number,) = key.reveal()
        held = {} if state is None else state
        if "prepared" not in held:
            held["prepared"] = _Secret(self.prepare(number))
        prepared = held["prepared"].reveal()
        out = scores.copy()
        if self.self_salted:
            best = np.argsort(-scores, kind="stable")[: self.tried].astype(np.int64)
            before = ids[ids.shape[0] - self.width + 1 :]
            contexts = np.column_stack([np.tile(before, (best.shape[0], 1)), best])
            green = best[self._are_green(self.seeds(contexts, number, prepared), best)]
            out[green] += np.float32(self.added)
            return out
        context_row = ids[None, ids.shape[0] - self.width :]
        out[self._mask(int(self.seeds(context_row, number, prepared)[0]))] += np.float32(self.added)
        return out

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
        last = np.asarray(output[-self.width :], dtype=np.int64)
        context = np.concatenate([prompt[-self.width :], last])
        if self.bias_last and sampling.temperature != 0.0:
            ids, scaled = candidates(logits, sampling)
            scores = np.full(logits.shape[0], -np.inf, dtype=np.float32)
            scores[ids] = scaled
            probs = softmax(self.biased(scores, context, key, state=state)[ids])
        else:
            ids, scaled = candidates(self.biased(logits, context, key, state=state), sampling)
            probs = softmax(scaled)
        return int(ids[draw(probs, rng)])
