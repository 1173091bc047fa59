"""SKT: one key, full acceptance, and the residual as a race of the noise that is left over.

When the draft's race ends at time T, the clocks of all other tokens have not rung before Q_w T, and
what they have left, E_w - Q_w T, is as fresh as it was at the start (an exponential clock does not
remember). And T itself is Exp(1) whoever won. So one field gives the draft, the coin and the
residual, all independent, and an ordinary detector finds most of the evidence.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.speculative.base import RaceMethod
from filigrane.speculative.laws import Array

_SOON = 1e-300
"""Clocks that rounding has set to zero or below still ring, at once."""


def arrival(q: Array, clocks: Array, x: int) -> float:
    """When the draft's race ended: T = E_x / Q_x, Exp(1) and independent of x."""
    return float(clocks[x] / q[x])


def left_over(q: Array, clocks: Array, arrival: float, rates: Array) -> int:
    """The race of what clocks have left after `arrival`, at these rates; (n,) -> an index."""
    rest = np.maximum(clocks - q * arrival, _SOON)
    with np.errstate(divide="ignore", over="ignore"):
        return int(np.argmin(rest / rates))


def resolve(p: Array, q: Array, clocks: Array, x: int) -> int:
    """The rule: keep x if P_x >= Q_x or T <= -log(1 - P_x / Q_x), else race for the residual."""
    if p[x] >= q[x]:
        return x
    soon = arrival(q, clocks, x)
    if soon <= -math.log1p(-p[x] / q[x]):
        return x
    rest = np.maximum(p - q, 0.0)
    # Early arrivals are kept: an early clock is a large score, and a late one is given up.
    return left_over(q, clocks, soon, rest) if rest.any() else x


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedRace(RaceMethod):
    """Single key, memoryless residual; acceptance 1 - TV, the ordinary detector."""

    name: ClassVar[str] = "skt"
    reference: ClassVar[str] = "filigrane, docs/design/0007-one-key.md"
    full_acceptance: ClassVar[bool] = True

    def resolve(self, p: Array, q: Array, clocks: Array, x: int) -> int:
        """See `RaceMethod.resolve`."""
        return resolve(p, q, clocks, x)
