"""What every scheme is: two pure functions of the keyed numbers, and a law.

    reweight(probs, block) -> probs'    how a marked position is drawn
    score(block, tokens)   -> scores    what a detector adds up
    log_sf(total, n)       -> log p     the law of that sum when there is no mark

`block` is `prf.block(key, context)`. Plain numpy here is the definition; `draw` and `statistic`
name the compiled twins. A scheme holds parameters only: no keys, no state, no randomness of its
own.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.errors import SchemeError
from filigrane.prf import Words

Probs = npt.NDArray[np.float64]
"""Next-token probabilities, shape (..., V), each row summing to one."""

MAX_CONTEXT_WIDTH = 64


class Statistic(NamedTuple):
    """How `kernels.scan` computes a scheme's summed score."""

    kind: int
    threshold: int
    table: npt.NDArray[np.float64]


NO_TABLE = np.zeros(1024, dtype=np.float64)
# Read-only like all tables: compiled functions are made per type, and that is part of it.
NO_TABLE.flags.writeable = False


class Candidates(NamedTuple):
    """Tokens one may draw from: logits (n,) float32, ids (n,) uint32 ascending, 1 / temperature."""

    logits: npt.NDArray[np.float32]
    ids: npt.NDArray[np.uint32]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme(ABC):
    """Interface of all schemes.

    context_width: number of preceding tokens that seed a position, 1 to 64.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    unbiased: ClassVar[bool]
    """Whether E_key[reweight(p)] = p for every p."""
    acts_on: ClassVar[Literal["logits", "distribution"]]
    """Raw logits (before temperature and truncation), or the final distribution after them."""
    deterministic: ClassVar[bool]
    """Whether a marked position is a function of the key alone (reweight is one-hot)."""

    context_width: int = 4

    def __post_init__(self) -> None:
        check_integer(self.name, "context_width", self.context_width, 1, MAX_CONTEXT_WIDTH)

    @property
    def label(self) -> str:
        """Names the derived key. What is part of it can never collide under one secret."""
        return f"{self.name}/{self.context_width}"

    @property
    def tag(self) -> str:
        """Text form that `schemes.from_tag` reads back: 'gumbel:context_width=4'."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return f"{self.name}:" + ",".join(f"{name}={value}" for name, value in values)

    @abstractmethod
    def reweight(self, probs: Probs, block: Words, ids: npt.ArrayLike | None = None) -> Probs:
        """The marked law: probs (..., V) and block (..., 8) -> (..., V).

        ids: (V,) the tokens that probs speak of, for laws on a support; None means 0 .. V - 1.
        """

    @abstractmethod
    def score(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The evidence of each position: block (..., 8), tokens (...) -> (...) float64."""

    @abstractmethod
    def log_sf(self, total: float, n: int) -> float:
        """log P(sum of n scores >= total) when text and key are independent; natural log."""

    @abstractmethod
    def draw(self, candidates: Candidates, block: Words, noise: Words, workspace: object) -> int:
        """Draw from the marked law of the candidates, compiled; returns an index into them.

        block: (8,) uint32; noise: (4,) uint32 of private randomness, unused if deterministic;
        workspace: a `kernels.draw.Workspace`. Returns -1 if the logits are not finite.
        """

    @property
    @abstractmethod
    def statistic(self) -> Statistic:
        """The compiled twin of `score`, summed."""


def require_scheme(scheme: object) -> None:
    """Raise SchemeError unless this is a scheme object."""
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            f"pass a scheme object such as Gumbel() or from_tag('gumbel'), not {scheme!r}."
        )


def check_integer(scheme: str, name: str, value: object, low: int, high: int) -> None:
    """Raise SchemeError unless value is an integer in low..high."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value <= high:  # type: ignore[operator]
        raise SchemeError(f"{scheme}: {name} must be an integer in {low}..{high}, got {value!r}.")


def check_number(scheme: str, name: str, value: object, low: float, high: float) -> None:
    """Raise SchemeError unless value is a number strictly between low and high."""
    real = isinstance(value, int | float | np.integer | np.floating) and value is not True
    if not real or not low < value < high:  # type: ignore[operator]
        raise SchemeError(
            f"{scheme}: {name} must be a number between {low:g} and {high:g}, got {value!r}."
        )


def private_uniform(noise: Words) -> float:
    """53 private random bits in [0, 1), from two of the noise words."""
    high, low = int(noise[0]) >> 5, int(noise[1]) >> 6
    return float((high << 26 | low) * 2.0**-53)


def all_ids(probs: Probs, ids: npt.ArrayLike | None) -> npt.NDArray[np.uint32]:
    """The tokens that probs (..., V) speak of, (V,) uint32: ids, or 0 .. V - 1 for None."""
    return (
        np.arange(probs.shape[-1], dtype=np.uint32) if ids is None else np.asarray(ids, np.uint32)
    )


def one_hot(index: npt.NDArray[np.int64], vocab_size: int) -> Probs:
    """All probability on one token: index (...) -> (..., V)."""
    probs: Probs = np.zeros((*np.shape(index), vocab_size))
    np.put_along_axis(probs, np.asarray(index)[..., None], 1.0, axis=-1)
    return probs
