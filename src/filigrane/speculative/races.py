"""One-key methods whose rule needs a plan for the two laws: OTMC, the frontier, its chord."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.schemes.base import check_number
from filigrane.speculative import frontier, transport
from filigrane.speculative.base import Position, RaceMethod
from filigrane.speculative.laws import Array, clocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport(RaceMethod):
    """OTMC: of all one-key rules with acceptance 1 - TV, the one with the most evidence."""

    name: ClassVar[str] = "otmc"
    reference: ClassVar[str] = "filigrane, docs/design/0007-one-key.md"
    full_acceptance: ClassVar[bool] = True

    def resolve(self, p: Array, q: Array, clocks: Array, x: int) -> int:
        """See `transport.resolve`."""
        return transport.resolve(p, q, clocks, x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier(RaceMethod):
    """Between full strength (c = 1) and full acceptance (c = inf).

    c: at least 1. At 1.5 a third to a half of the acceptance that full strength costs is back, for
    some tenths of a percent of the evidence. Laws that share more than `frontier.LARGEST` tokens
    (no top-k) are left to OTMC, which is exact too.
    """

    name: ClassVar[str] = "frontier"
    reference: ClassVar[str] = "filigrane, docs/design/0007-one-key.md"

    c: float = 1.5

    def __post_init__(self) -> None:
        """Raise SchemeError for anything but a race, or a c below 1."""
        RaceMethod.__post_init__(self)
        frontier.check_c(self.c)

    def resolve(self, p: Array, q: Array, clocks: Array, x: int) -> int:
        """See `frontier.resolve`."""
        return frontier.resolve(p, q, clocks, x, self.c)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(RaceMethod):
    """A keyed coin per position between OTMC and the coupled race: what the frontier has to beat.

    share: of positions that OTMC decides, in (0, 1].
    """

    name: ClassVar[str] = "mixed"
    reference: ClassVar[str] = "filigrane, docs/design/0007-one-key.md"

    share: float = 0.5

    def __post_init__(self) -> None:
        """Raise SchemeError for anything but a race, or a share outside (0, 1]."""
        RaceMethod.__post_init__(self)
        check_number(self.name, "share", self.share, 0.0, math.nextafter(1.0, 2.0))

    def resolve(self, p: Array, q: Array, clocks: Array, x: int) -> int:
        """See `RaceMethod.resolve`: OTMC, to which `decide` alone knows the alternative."""
        return transport.resolve(p, q, clocks, x)

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`."""
        ids, p, q, x = here.laws()
        block = here.noise.blocks[0]
        return int(ids[frontier.mixed(p, q, clocks(block, ids), x, block, self.share)])
