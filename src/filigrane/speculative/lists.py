"""Several drafts per position at full strength: a draft is kept iff it is what the mark chooses.

The text is a function of field and target alone: whatever list or tree is offered, it never shows.
With one draft this is `coupled` for a race. Next to Liu et al. 2026 (arXiv 2609.21858, MPFR), who
take the first arrivals of a Poisson process with repetition, the list here holds distinct tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.errors import SchemeError
from filigrane.schemes.base import check_integer
from filigrane.schemes.gumbel import Gumbel
from filigrane.speculative.base import Noise, Position, RaceMethod
from filigrane.speculative.laws import Array, Law, clocks, race

MAX_DRAFTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceLists(RaceMethod):
    """PFR-topB: the `drafts` earliest tokens of the draft's race, kept iff the target's is one.

    drafts: tokens offered per position, 1 to 64. Drafts of several positions make a tree; of its
    branches the `drafts` likeliest are followed: a block verifies up to drafts * K nodes.
    """

    name: ClassVar[str] = "pfr"
    reference: ClassVar[str] = "filigrane; Liu et al. 2026, arXiv 2609.21858"
    full_strength: ClassVar[bool] = True

    drafts: int = 2

    def __post_init__(self) -> None:
        """Raise SchemeError for anything but a race, or drafts outside its range."""
        if not isinstance(self.scheme, Gumbel):
            raise SchemeError(f"pfr is a rule about races: use gumbel, not {self.scheme.name}.")
        check_integer(self.name, "drafts", self.drafts, 1, MAX_DRAFTS)

    @property
    def branching(self) -> int:
        """See `Method.branching`."""
        return self.drafts

    def propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> list[tuple[int, float]]:
        """See `Method.propose`: by arrival time, with gaps in its logarithm."""
        with np.errstate(divide="ignore", over="ignore"):
            times = clocks(noise.blocks[0], q.ids) / q.probs
        few = min(self.drafts, times.shape[0])
        first = np.argpartition(times, few - 1)[:few]
        first = first[np.argsort(times[first], kind="stable")]
        first = first[np.isfinite(times[first])]
        gaps = np.log(times[first] / times[first[0]])
        return [(int(q.ids[i]), float(gap)) for i, gap in zip(first, gaps, strict=True)]

    def resolve(self, p: Array, q: Array, clocks: Array, x: int) -> int:
        """See `RaceMethod.resolve`: the draft has no say."""
        return race(clocks, p)

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`."""
        return self.bonus(here, rng)
