import math
import zlib

import numpy as np
import pytest

from filigrane.errors import EvidenceError
from filigrane.radioactivity import baseline, calibrated


def test_calibrated_losses() -> None:
    text = "the same words again and again, " * 8
    found = calibrated([10.0, 10.0], [text, "qzj7!x"])
    assert found[0] == pytest.approx(10.0 / len(zlib.compress(text.encode(), 9)))
    assert found[1] > found[0]
    with pytest.raises(EvidenceError, match="2 losses for 1 texts"):
        calibrated([1.0, 2.0], ["a"])


def test_baseline_finds_what_was_learned_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    known, fresh = rng.normal(1.0, 0.2, 300), rng.normal(1.2, 0.2, 200)
    found = baseline(known, fresh)
    assert found.log_pvalue < math.log(1e-10)
    assert found.median_logged < found.median_fresh
    assert (found.n_logged, found.n_fresh) == (300, 200)
    with pytest.raises(TypeError, match=r"compare result\.log_pvalue"):
        bool(found)
    p = [
        math.exp(baseline(rng.normal(size=40), rng.normal(size=50)).log_pvalue) for _ in range(300)
    ]
    # Discrete, so never too small, and on the average a little above one half.
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) <= level) <= level + 3 * math.sqrt(level / 300)
    assert 0.45 < np.mean(p) < 0.65


def test_bad_samples() -> None:
    with pytest.raises(EvidenceError, match="at least one value"):
        baseline([], [1.0])
    with pytest.raises(EvidenceError, match="finite"):
        baseline([1.0, math.nan], [1.0])
