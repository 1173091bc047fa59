"""Green lists of lm-watermarking's extended processor: its named schemes and its free form.

Knows the eleven seeding functions and what its detector reports; the rest is `foreign.greenlists`.
With hash key k, window c (for self-salted schemes the candidate is its last token), i64 meaning
wrapped to 64 bits with a sign, T = perm(2971215073, 1000003), h(x) = T[x mod 1000003] + 1:

    additive           k * sum(c)
    multiplicative     k * i64(prod(c))
    minfunc            k * min(c)
    simple_skip        i64(prod of h(i64(k * c[i])), i = 0, 2, 4, ...)
    skipgram           h(i64(k * c[0]))
    anchored_skipgram  h(i64(k * c[0])) * h(i64(k * c[-1]))
    minhash            min of h(i64(k * c[i]))
    anchored_minhash   min of i64(k * h(c[i]) * h(c[-1]))
    minskipgram        min over i < j of h(i64(k * c[i])) * h(i64(k * c[j]))
    noncomm            s = k; for x in c: s = i64(s * h(i64(s * x))) mod 2**32
    position           i64(sum of k * c[i] * (i + 1))

all modulo 2**64 - 1. Several of them give one list to many contexts; such repeated draws count once
here and, when the contexts differ, many times in the tool.

h(k * 0) = h(0) is one number under all keys. Where the key enters through h(k * c[i]) only, windows
whose deciding tokens are 0 have one list for all keys, and so do windows whose minimum is that
h(0); long products lose their bits to powers of two. Neither is evidence: see `keyless`. The window
search of the tool reports
the p-value of a maximum and is not reproduced.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.errors import SchemeError
from filigrane.foreign.base import check_vocab
from filigrane.foreign.greenlists import (
    CPU_ONLY,
    MODULUS,
    GreenLists,
    check_ratio,
    ends_in_zeros,
)
from filigrane.foreign.keys import ForeignKey
from filigrane.foreign.transformers_kgw import (
    DEFAULT_KEY,
    MAX_WIDTH,
    TABLE_SIZE,
    as_signed,
    reduced,
)
from filigrane.schemes.base import check_integer, check_number

__all__ = ["PRFS", "SCHEME_NAMES", "KgwExtended"]

TABLE_SEED: Final = 2971215073
Ids = npt.NDArray[np.int64]


@cache
def _table() -> Ids:
    """h(0) .. h(1000002); public, the same for all keys."""
    from filigrane.kernels.mersenne import front

    table: Ids = front(TABLE_SEED, TABLE_SIZE, TABLE_SIZE).astype(np.int64) + 1
    table.flags.writeable = False
    return table


def _h(x: Ids) -> Ids:
    hashed: Ids = _table()[x % TABLE_SIZE]
    return hashed


def _big(values: Ids, number: int) -> npt.NDArray[np.uint64]:
    """number * values in whole numbers, modulo 2**64 - 1: a Python product in the tool."""
    distinct, inverse = np.unique(values, return_inverse=True)
    products = [number * value % MODULUS for value in distinct.tolist()]
    return np.array(products, dtype=np.uint64)[inverse]


def _minskipgram(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    hashed = _h(as_signed(number) * c)
    rows, columns = np.triu_indices(c.shape[1], 1)
    return reduced((hashed[:, rows] * hashed[:, columns]).min(axis=1))


def _noncomm(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    state = np.repeat(as_signed(number)[0], c.shape[0])
    for column in range(c.shape[1]):
        state = state * _h(state * c[:, column]) % 2**32
    return reduced(state)


def _simple_skip(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    return reduced(_h(as_signed(number) * c[:, ::2]).prod(axis=1))


def _skipgram(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    return reduced(_h(as_signed(number)[0] * c[:, 0]))


def _anchored_skipgram(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    hashed = _h(as_signed(number) * c)
    return reduced(hashed[:, 0] * hashed[:, -1])


def _minhash(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    return reduced(_h(as_signed(number) * c).min(axis=1))


def _anchored_minhash(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    hashed = _h(c)
    return reduced((as_signed(number) * hashed * hashed[:, -1:]).min(axis=1))


def _position(c: Ids, number: int) -> npt.NDArray[np.uint64]:
    return reduced((as_signed(number) * c * np.arange(1, c.shape[1] + 1)).sum(axis=1))


PRFS: Final[dict[str, Callable[[Ids, int], npt.NDArray[np.uint64]]]] = {
    "additive_prf": lambda c, number: _big(c.sum(axis=1), number),
    "multiplicative_prf": lambda c, number: _big(c.prod(axis=1), number),
    "minfunc_prf": lambda c, number: _big(c.min(axis=1), number),
    "simple_skip_prf": _simple_skip,
    "skipgram_prf": _skipgram,
    "anchored_skipgram_prf": _anchored_skipgram,
    "minhash_prf": _minhash,
    "anchored_minhash_prf": _anchored_minhash,
    "minskipgram_prf": _minskipgram,
    "noncomm_prf": _noncomm,
    "position_prf": _position,
}
"""Seeding functions by the tool's names: contexts (n, w) int64 and the key -> (n,) uint64."""

_KEY_INSIDE: Final = frozenset(
    {"simple_skip_prf", "skipgram_prf", "anchored_skipgram_prf", "minhash_prf", "minskipgram_prf"}
)
"""Functions in which the key does nothing but choose an entry of the public table."""
_WRAPPED: Final = frozenset({"anchored_minhash_prf", "noncomm_prf", "position_prf"})
"""Functions that multiply the key by something public, modulo a power of two."""
_PRODUCTS: Final = frozenset({"simple_skip_prf", "anchored_skipgram_prf", "minskipgram_prf"})
_LEAST_BITS: Final = 16
"""Bits of the key, or of the table, that have to be left in a seed."""


class _Seeding(NamedTuple):
    prf: str
    width: int
    self_salted: bool


SCHEME_NAMES: Final = {
    "simple_1": _Seeding("additive_prf", 1, False),
    "lefthash": _Seeding("additive_prf", 1, False),
    "selfhash": _Seeding("anchored_minhash_prf", 4, True),
    "algorithm-3": _Seeding("anchored_minhash_prf", 4, True),
    "minhash": _Seeding("minhash_prf", 4, False),
    "skipgram": _Seeding("skipgram_prf", 5, False),
}
_FREE: Final = re.compile(r"ff-([a-z_]+)-([0-9]{1,3})-(True|False)(-.*)?")


def _seeding(scheme: str) -> _Seeding:
    """What a scheme's name stands for. Raises SchemeError if nothing."""
    if scheme in SCHEME_NAMES:
        return SCHEME_NAMES[scheme]
    free = _FREE.fullmatch(scheme)
    if free is not None and free[4] is not None:
        raise SchemeError(
            "kgw-ext: the last part of this scheme's name is a key, and keys are never part of a "
            "profile; leave it off and put it into the key file."
        )
    if free is None or free[1] not in PRFS:
        raise SchemeError(
            "kgw-ext: unknown scheme. Known: "
            f"{', '.join(SCHEME_NAMES)}, and ff-PRF-WIDTH-True|False with PRF one of "
            f"{', '.join(PRFS)}."
        )
    seeding = _Seeding(free[1], int(free[2]), free[3] == "True")
    check_integer("kgw-ext", "the scheme's width", seeding.width, 1, MAX_WIDTH)
    if seeding.prf == "minskipgram_prf" and seeding.width < 2:
        raise SchemeError("kgw-ext: minskipgram_prf takes pairs; its width must be 2 or more.")
    return seeding


@dataclass(frozen=True, slots=True, kw_only=True)
class KgwExtended(GreenLists):
    """The extended processor of lm-watermarking.

    vocab_size: what the tool was given as its vocabulary, usually the tokenizer's length; scheme:
    simple_1, lefthash, selfhash, algorithm-3, minhash, skipgram, or the free form
    ff-PRF-WIDTH-True|False, without the key that the tool allows at its end; gamma: share of green
    tokens; delta: bias; select_green_tokens: False for the first release, which takes a list from
    the end of the permutation; bos_token_id: an id that the tool drops from the start of a text.
    """

    name: ClassVar[str] = "kgw-ext"
    tool: ClassVar[str] = "lm-watermarking, extended_watermark_processor (CPU generator)"
    reference: ClassVar[str] = "Kirchenbauer et al. 2023, arXiv 2301.10226 and 2306.04634"
    bias_last: ClassVar[bool] = False
    tried: ClassVar[int] = 41

    vocab_size: int
    scheme: str = "selfhash"
    gamma: float = 0.25
    delta: float = 2.0
    select_green_tokens: bool = True
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raise SchemeError for parameters outside their range."""
        check_vocab(self.name, self.vocab_size)
        _seeding(self.scheme)
        check_ratio(self.name, "gamma", self.gamma, self.vocab_size)
        check_number(self.name, "delta", self.delta, 0.0, 1000.0)
        if self.bos_token_id is not None:
            check_integer(self.name, "bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)

    @property
    def ratio(self) -> float:
        """See `GreenLists.ratio`."""
        return self.gamma

    @property
    def width(self) -> int:
        """See `GreenLists.width`."""
        return _seeding(self.scheme).width

    @property
    def self_salted(self) -> bool:
        """See `GreenLists.self_salted`."""
        return _seeding(self.scheme).self_salted

    @property
    def from_the_end(self) -> bool:
        """See `GreenLists.from_the_end`."""
        return not self.select_green_tokens

    @property
    def added(self) -> float:
        """See `GreenLists.added`."""
        return self.delta

    @property
    def bos(self) -> int | None:
        """See `GreenLists.bos`."""
        return self.bos_token_id

    def seeds(
        self, contexts: npt.NDArray[np.int64], number: int, prepared: Any
    ) -> npt.NDArray[np.uint64]:
        """See `GreenLists.seeds`."""
        return PRFS[_seeding(self.scheme).prf](contexts, number)

    def keyless(
        self, seeds: npt.NDArray[np.uint64], number: int, prepared: Any
    ) -> npt.NDArray[np.bool_]:
        """See `GreenLists.keyless`: also the seed of zeros, and products that end in zeros.

        A product of the key modulo 2**32 whose public factor ends in z zero bits holds 32 - z bits
        of the key; those with 16 or fewer are left out. The zeros of the key are its own.
        """
        prf, width, _ = _seeding(self.scheme)
        found = GreenLists.keyless(self, seeds, number, prepared)
        if prf in _KEY_INSIDE:
            low = np.uint64(0xFFFFFFFF)
            found |= seeds & low == PRFS[prf](np.zeros((1, width), np.int64), number)[0] & low
        if prf in _PRODUCTS | _WRAPPED:
            own = (number & -number).bit_length() - 1 if prf in _WRAPPED and number else 0
            found |= ends_in_zeros(seeds, min(32, own + _LEAST_BITS))
        return found

    def default_warnings(self, key: ForeignKey) -> tuple[str, ...]:
        """See `Profile.default_warnings`."""
        public = key.reveal() == (DEFAULT_KEY,)
        return (
            *(("this is the tool's public default key: anybody can write this mark",) * public),
            CPU_ONLY,
            "a list's share differs by server (0.25 here by default, 0.5 in "
            "text-generation-inference): a reading that finds nothing may have the wrong gamma",
        )
