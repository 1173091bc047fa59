"""How much evidence a test needs, before any is gathered.

Knows nothing of models. A pilot that sets these numbers must not be part of the test.
"""

import math
from dataclasses import dataclass

from filigrane import stats
from filigrane.errors import EvidenceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What it takes to see a green share of gamma + excess at level alpha with this power.

    pairs: (window, token) pairs to score; tokens: to generate or read, if `kept` of them survive
    the rules; queries: requests of `tokens_per_answer`.
    """

    gamma: float
    excess: float
    alpha: float
    power: float
    pairs: int
    tokens: int
    queries: int
    kept: float
    tokens_per_answer: int


def plan(
    excess: float,
    *,
    gamma: float = 0.25,
    alpha: float = 1e-5,
    power: float = 0.9,
    kept: float = 0.4,
    tokens_per_answer: int = 100,
) -> Plan:
    """Pairs, tokens and queries for a count test.

    excess: green share above gamma that is expected (0.01 is one point); kept: share of tokens that
    survive the rules (published: 600k of 1.5 M closed); N = ((z_alpha sqrt(g(1-g)) + z_beta
    sqrt(p(1-p))) / excess)^2, checked against the exact binomial within 2 % for N above 1000.
    Raises EvidenceError for numbers outside their range.
    """
    for name, value in (("gamma", gamma), ("alpha", alpha), ("power", power)):
        if not 0.0 < value < 1.0:
            raise EvidenceError(f"{name} must be inside (0, 1), got {value}.")
    if not 0.0 < excess < 1.0 - gamma:
        raise EvidenceError(
            f"excess must be inside (0, {1.0 - gamma:g}), the share above gamma={gamma:g}, "
            f"got {excess}; published effects are 0.002 to 0.1."
        )
    if not 0.0 < kept <= 1.0 or tokens_per_answer < 1:
        raise EvidenceError("kept must be in (0, 1] and tokens_per_answer at least 1.")
    share = gamma + excess
    z_alpha = stats.log_isf_normal(math.log(alpha))
    z_beta = stats.log_isf_normal(math.log1p(-power))
    root = z_alpha * math.sqrt(gamma * (1 - gamma)) + z_beta * math.sqrt(share * (1 - share))
    pairs = math.ceil((max(0.0, root) / excess) ** 2)
    tokens = math.ceil(pairs / kept)
    return Plan(
        gamma=gamma,
        excess=excess,
        alpha=alpha,
        power=power,
        pairs=pairs,
        tokens=tokens,
        queries=math.ceil(tokens / tokens_per_answer),
        kept=kept,
        tokens_per_answer=tokens_per_answer,
    )


def needed(z: float, n: int, *, alpha: float = 1e-5, power: float = 0.5) -> int | None:
    """How much evidence of this kind it would take: n ((z_alpha + z_beta) / z)^2.

    z, n: of a pilot or of a result, from which the answer is an estimate with the error of z; None
    where there is no effect to extrapolate.
    """
    if z <= 0.0:
        return None
    z_alpha = stats.log_isf_normal(math.log(alpha))
    z_beta = stats.log_isf_normal(math.log1p(-power))
    return math.ceil(n * (max(0.0, z_alpha + z_beta) / z) ** 2)
