"""Block verification (Sun et al. 2024, arXiv 2403.10444), unmarked and with one key.

A block is judged as a whole: how much of it stays is the largest i whose coin falls below h_i, so
a token that would be rejected alone can be saved by those after it. The decision looks at coins of
tokens that it then discards. Their noise is spent, which is why `spends_discarded` is set: a
generator that used it again would write biased text (docs/design/0007-one-key.md).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.errors import SchemeError
from filigrane.schemes.gumbel import Gumbel
from filigrane.speculative.base import Method, Noise, Position, Verdict
from filigrane.speculative.laws import Array, Law, clocks, draw, race
from filigrane.speculative.plain import sample
from filigrane.speculative.shifted_race import arrival, left_over


def thresholds(chain: list[Position]) -> tuple[list[float], list[float]]:
    """h_1 .. h_K and p_0 .. p_K of a chain of K + 1 positions (Sun et al., Algorithm 2)."""
    depth = len(chain) - 1
    reach = [1.0]
    accept = []
    for i in range(depth):
        _, p, q, x = chain[i].laws()
        reach.append(min(reach[-1] * p[x] / q[x], 1.0))
        if i == depth - 1:
            accept.append(reach[-1])
            continue
        _, p, q, _ = chain[i + 1].laws()
        mass = float(np.maximum(reach[-1] * p - q, 0.0).sum())
        slack = mass + 1.0 - reach[-1]
        accept.append(mass / slack if slack > 0.0 else 1.0)
    return accept, reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(Method):
    """Block verification without a mark."""

    name: ClassVar[str] = "bv"
    reference: ClassVar[str] = "Sun et al. 2024, arXiv 2403.10444"
    streams: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[bool] = False

    def _coin(self, here: Position, rng: np.random.Generator) -> float:
        return rng.random()

    def _replace(self, here: Position, reach: float, rng: np.random.Generator) -> int:
        ids, p, q, _ = here.laws()
        return int(ids[draw(_residual(reach, p, q), rng)])

    def _bonus(self, here: Position, rng: np.random.Generator) -> int:
        return sample(here.target, rng)

    def verify(self, root: Position, rng: np.random.Generator) -> Verdict:
        """See `Method.verify`."""
        chain = [root]
        while chain[-1].then:
            chain.append(chain[-1].then[0])
        accept, reach = thresholds(chain)
        kept = 0
        for i, limit in enumerate(accept):
            if self._coin(chain[i], rng) <= limit:
                kept = i + 1
        last = chain[kept]
        if kept == len(accept):
            token = self._bonus(last, rng)
        else:
            token = self._replace(last, reach[kept], rng)
        return Verdict([here.tokens[0] for here in chain[:kept]] + [token], chain[: kept + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedBlock(Block):
    """BV-SKT: block verification whose coins are arrival times and whose residual is left over."""

    name: ClassVar[str] = "bv-skt"
    reference: ClassVar[str] = "filigrane, docs/design/0007-one-key.md"
    streams: ClassVar[tuple[str, ...]] = ("",)
    marks: ClassVar[bool] = True
    spends_discarded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise SchemeError for anything but a race."""
        if not isinstance(self.scheme, Gumbel):
            raise SchemeError(f"bv-skt is a rule about races: use gumbel, not {self.scheme.name}.")

    def _propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> int:
        return race(clocks(noise.blocks[0], q.ids), q.probs)

    def _coin(self, here: Position, rng: np.random.Generator) -> float:
        ids, _, q, x = here.laws()
        return -math.expm1(-arrival(q, clocks(here.noise.blocks[0], ids), x))

    def _replace(self, here: Position, reach: float, rng: np.random.Generator) -> int:
        ids, p, q, x = here.laws()
        noise = clocks(here.noise.blocks[0], ids)
        return int(ids[left_over(q, noise, arrival(q, noise, x), _residual(reach, p, q))])

    def _bonus(self, here: Position, rng: np.random.Generator) -> int:
        law = here.target
        return int(law.ids[race(clocks(here.noise.blocks[0], law.ids), law.probs)])


def _residual(reach: float, p: Array, q: Array) -> Array:
    """(p_tau P - Q)+, not normalised; P where rounding has left nothing."""
    rest = np.maximum(reach * p - q, 0.0)
    return rest if rest.any() else p
