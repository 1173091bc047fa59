"""Green lists of Hugging Face transformers (`WatermarkingConfig`), read and written.

Knows the two seeding rules, the order of the writer and what its detector reports; the rest is
`foreign.greenlists`. With hashing key k and context c, i64 meaning wrapped to 64 bits with a sign:

    lefthash  seed = k * c[-1]. context_width changes which n-grams the detector tells apart,
              never the list.
    selfhash  the window ends with the candidate; T = perm(k, 1000003), h(x) = T[x mod 1000003] + 1;
              seed = min over i of i64(k * h(c[i]) * h(c[-1]))

both modulo 2**64 - 1. What a list is made of is then the low half of the seed: keys k and k + 2**32
are one lefthash key, and after token 0 lefthash has one list for all keys (those positions are not
counted here). Releases before 5 report another p-value and their `ignore_repeated_ngrams` did
nothing; `compat` is that of 5.23.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from filigrane.foreign.base import check_vocab
from filigrane.foreign.greenlists import CPU_ONLY, MODULUS, GreenLists, check_ratio
from filigrane.foreign.keys import ForeignKey
from filigrane.schemes.base import check_integer, check_number

__all__ = ["HfLefthash", "HfSelfhash"]

DEFAULT_KEY = 15485863
TABLE_SIZE = 1000003
MAX_WIDTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _HfGreenLists(GreenLists):
    """Fields and rules of both seedings."""

    tool: ClassVar[str] = "transformers 4.47 to 5.23 (WatermarkingConfig, CPU generator)"
    reference: ClassVar[str] = "Kirchenbauer et al. 2023, arXiv 2301.10226 and 2306.04634"
    bias_last: ClassVar[bool] = True

    vocab_size: int
    greenlist_ratio: float = 0.25
    context_width: int = 1
    bias: float = 2.0
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raise SchemeError for parameters outside their range."""
        check_vocab(self.name, self.vocab_size)
        check_ratio(self.name, "greenlist_ratio", self.greenlist_ratio, self.vocab_size)
        check_integer(self.name, "context_width", self.context_width, 1, MAX_WIDTH)
        check_number(self.name, "bias", self.bias, 0.0, 1000.0)
        if self.bos_token_id is not None:
            check_integer(self.name, "bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)

    @property
    def ratio(self) -> float:
        """See `GreenLists.ratio`."""
        return self.greenlist_ratio

    @property
    def width(self) -> int:
        """See `GreenLists.width`."""
        return self.context_width

    @property
    def added(self) -> float:
        """See `GreenLists.added`."""
        return self.bias

    @property
    def bos(self) -> int | None:
        """See `GreenLists.bos`."""
        return self.bos_token_id

    def default_warnings(self, key: ForeignKey) -> tuple[str, ...]:
        """See `Profile.default_warnings`."""
        public = key.reveal() == (DEFAULT_KEY,)
        return (
            *(("this is the tool's public default key: anybody can write this mark",) * public),
            CPU_ONLY,
            "vocab_size must be the width of the model's logits, not the tokenizer's length",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HfLefthash(_HfGreenLists):
    """seeding_scheme "lefthash", the tool's default.

    vocab_size: width of the model's logits; greenlist_ratio: share of green tokens; context_width:
    which n-grams the tool tells apart, and how many tokens must precede a position (the list
    depends on the last one alone); bias: what green logits gain; bos_token_id: an id that the
    tool drops from the start of a text, or None.
    """

    name: ClassVar[str] = "hf-kgw-lefthash"

    @property
    def self_salted(self) -> bool:
        """See `GreenLists.self_salted`."""
        return False

    def seeds(
        self, contexts: npt.NDArray[np.int64], number: int, prepared: Any
    ) -> npt.NDArray[np.uint64]:
        """See `GreenLists.seeds`."""
        last, inverse = np.unique(contexts[:, -1], return_inverse=True)
        products = [number * token % MODULUS for token in last.tolist()]
        return np.array(products, dtype=np.uint64)[inverse]


@dataclass(frozen=True, slots=True, kw_only=True)
class HfSelfhash(_HfGreenLists):
    """seeding_scheme "selfhash": every candidate has its own list; the writer tries the best 40.

    Fields as `HfLefthash`; context_width counts the candidate.
    """

    name: ClassVar[str] = "hf-kgw-selfhash"

    @property
    def self_salted(self) -> bool:
        """See `GreenLists.self_salted`."""
        return True

    def prepare(self, number: int) -> npt.NDArray[np.int64]:
        """h(0) .. h(1000002), (1000003,) int64."""
        from filigrane.kernels.mersenne import front

        return front(number, TABLE_SIZE, TABLE_SIZE).astype(np.int64) + 1

    def seeds(
        self, contexts: npt.NDArray[np.int64], number: int, prepared: Any
    ) -> npt.NDArray[np.uint64]:
        """See `GreenLists.seeds`."""
        hashed = prepared[contexts % TABLE_SIZE]
        products = as_signed(number) * hashed * hashed[:, -1:]
        return reduced(products.min(axis=1))


def as_signed(number: int) -> npt.NDArray[np.int64]:
    """A key as torch's int64, wrapped; an array of shape (1, 1), because arrays wrap silently."""
    return np.array([[number & 0xFFFFFFFFFFFFFFFF]], dtype=np.uint64).view(np.int64)


def reduced(seeds: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Signed seeds modulo 2**64 - 1: (n,) int64 -> (n,) uint64."""
    return seeds.view(np.uint64) - (seeds < 0).astype(np.uint64)
