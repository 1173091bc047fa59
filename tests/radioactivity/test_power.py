import math

import pytest

from filigrane import stats
from filigrane.errors import EvidenceError
from filigrane.radioactivity import needed, plan


@pytest.mark.parametrize(
    ("excess", "power", "pairs"),
    [(0.01, 0.5, 34_000), (0.005, 0.5, 136_000), (0.01, 0.9, 58_000), (0.002, 0.9, 1_440_000)],
)
def test_published_scale(excess: float, power: float, pairs: int) -> None:
    found = plan(excess, power=power)
    assert found.pairs == pytest.approx(pairs, rel=0.02)
    assert found.tokens == pytest.approx(found.pairs / 0.4, rel=1e-3)
    assert found.queries == math.ceil(found.tokens / 100)


def test_power_is_that_of_the_exact_test() -> None:
    found = plan(0.02, alpha=1e-5, power=0.9)
    n = found.pairs
    # The smallest count that rejects, and how often it is reached with the excess.
    count = next(s for s in range(n // 4, n) if stats.log_sf_binomial(s, n, 0.25) <= math.log(1e-5))
    power = math.exp(stats.log_sf_binomial(count, n, 0.27))
    assert power == pytest.approx(0.9, abs=0.01)


def test_needed() -> None:
    assert needed(4.2649, 1000, alpha=1e-5, power=0.5) == pytest.approx(1000, abs=1)
    assert needed(2.0, 1000) == pytest.approx(4 * needed(4.0, 1000), abs=4)  # type: ignore[operator]
    assert needed(0.0, 1000) is None and needed(-1.0, 1000) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"excess": 0.0}, "excess must be inside"),
        ({"excess": 0.8}, "excess must be inside"),
        ({"excess": math.nan}, "excess must be inside"),
        ({"excess": 0.01, "alpha": 0.0}, "alpha must be inside"),
        ({"excess": 0.01, "power": 1.0}, "power must be inside"),
        ({"excess": 0.01, "kept": 0.0}, "kept must be"),
    ],
)
def test_bad_numbers(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        plan(**arguments)
