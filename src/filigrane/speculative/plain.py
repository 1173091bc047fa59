"""Without a mark: the references for quality and speed.

Speculative sampling: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (2302.01318).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.speculative.base import Position, TokenMethod
from filigrane.speculative.laws import Law, draw, excess


def accept(p: Law, q: Law, token: int, coin: float) -> bool:
    """Whether a token drafted from q is kept as one of p: coin <= p/q, coin in [0, 1)."""
    return coin * q.probability(token) < p.probability(token)


def residual(p: Law, q: Law) -> Law:
    """The law of the token that replaces a rejected one: (P - Q)+ / TV on the support of P."""
    at = np.minimum(np.searchsorted(q.ids, p.ids), q.ids.shape[0] - 1)
    mass = np.where(q.ids[at] == p.ids, q.probs[at], 0.0)
    return Law(p.ids, excess(p.probs, mass))


def speculate(p: Law, q: Law, token: int, rng: np.random.Generator) -> int:
    """One step of speculative sampling with private randomness."""
    if accept(p, q, token, rng.random()):
        return token
    return sample(residual(p, q), rng)


def sample(law: Law, rng: np.random.Generator) -> int:
    """A token of a law, drawn privately."""
    return int(law.ids[draw(law.probs, rng)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain(TokenMethod):
    """Speculative sampling without a mark; the reference for acceptance."""

    name: ClassVar[str] = "plain"
    reference: ClassVar[str] = "Leviathan et al. 2023, arXiv 2211.17192"
    streams: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[bool] = False
    full_acceptance: ClassVar[bool] = True

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`."""
        assert here.q is not None
        return speculate(here.target, here.q, here.tokens[0], rng)

    def bonus(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.bonus`."""
        return sample(here.target, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoregressive(Plain):
    """One target call per token, without a mark."""

    name: ClassVar[str] = "autoregressive"
    reference: ClassVar[str] = ""
    drafted: ClassVar[bool] = False
    full_acceptance: ClassVar[bool] = False
