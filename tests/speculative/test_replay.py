"""Laws along a text, and methods replayed on them.

Statistical bounds are four standard errors at fixed seeds.
"""

import numpy as np
import pytest
from markov import Markov, pair
from scipy.special import digamma

from filigrane import Gumbel, Sampling
from filigrane.errors import SchemeError, TokenError
from filigrane.speculative import method
from filigrane.speculative.laws import Law, law_of
from filigrane.speculative.replay import laws_along, replay


def dirichlet(size: int, seed: int) -> Law:
    """A law on some of a hundred ids."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(100, size=size, replace=False)).astype(np.uint32)
    return Law(ids, rng.dirichlet(np.ones(size)))


def overlap(p: Law, q: Law) -> float:
    wide = np.zeros((2, 100))
    wide[0, p.ids], wide[1, q.ids] = p.probs, q.probs
    return float(wide.min(axis=0).sum())


def harmonic(x: np.ndarray) -> np.ndarray:
    """H_x of real x."""
    return np.asarray(digamma(x + 1.0) + np.euler_gamma)


class Counting(Markov):
    """Counts its reads."""

    reads = 0

    def read(self, state, tokens, valid, *, last, parents=None):  # type: ignore[no-untyped-def]
        self.reads += 1
        return super().read(state, tokens, valid, last=last, parents=parents)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=4)])
def test_laws_along_a_text_are_those_of_its_positions(sampling: Sampling) -> None:
    model = Counting(pair(9, seed=1)[0])
    tokens = np.random.default_rng(0).integers(0, 9, size=20)
    laws = laws_along(model, [4, 2], tokens, sampling)
    assert model.reads == 1 and len(laws) == 20
    for last, law in zip([2, *tokens[:-1].tolist()], laws, strict=True):
        expected = law_of(model._logits[last], sampling)
        assert np.array_equal(law.ids, expected.ids)
        assert np.array_equal(law.probs, expected.probs)
    assert len(laws_along(model, [4], [7], sampling)) == 1
    assert laws_along(model, [4], [], sampling) == []
    with pytest.raises(TokenError, match="prompt is empty"):
        laws_along(model, [], [7, 8], sampling)


def test_the_score_of_the_unaccelerated_watermark() -> None:
    """E[1 - x] = sum P/(1+P), E[-log x] = sum P H_{1/P}; the draft does not matter."""
    p, fields = dirichlet(12, 1), 3000
    for q in (p, dirichlet(30, 2)):
        found = replay([(p, q)], method("watermark"), rng=np.random.default_rng(3), fields=fields)
        mean_u = float((p.probs / (1.0 + p.probs)).sum())
        mean_a = float((p.probs * harmonic(1.0 / p.probs)).sum())
        # E[(1 - x)^2] = sum P/(1 + 2P); -log x of the winner varies as that of a maximum of 1/P.
        error_u = np.sqrt(((p.probs / (1.0 + 2.0 * p.probs)).sum() - mean_u**2) / fields)
        error_a = np.sqrt((np.pi**2 / 6.0 + np.var(harmonic(1.0 / p.probs))) / fields)
        assert abs(found.mean_u - mean_u) < 4.0 * error_u
        assert abs(found.mean_a - mean_a) < 4.0 * error_a
        assert found.acceptance == 0.0
        assert found.overlap == pytest.approx(overlap(p, q))


@pytest.mark.parametrize("tag", ["otmc", "skt", "frontier:c=1e9"])
def test_full_acceptance_is_the_overlap(tag: str) -> None:
    pairs = [(dirichlet(12, 1), dirichlet(12, 1)), (dirichlet(40, 3), dirichlet(60, 4))]
    far = dirichlet(50, 5)
    pairs.append((far, Law(far.ids, 0.5 * far.probs + 0.5 / 50)))
    fields = 1000
    found = replay(pairs, method(tag), rng=np.random.default_rng(1), fields=fields)
    rates = np.array([overlap(p, q) for p, q in pairs])
    error = np.sqrt((rates * (1.0 - rates)).sum() / fields) / len(pairs)
    assert found.overlap == pytest.approx(rates.mean())
    assert abs(found.acceptance - rates.mean()) < 4.0 * error


def test_strength_and_acceptance_are_traded_against_each_other() -> None:
    """Full strength with drafts scores what the watermark scores; full acceptance does not."""
    p, other = dirichlet(20, 3), dirichlet(20, 4)
    ids = np.union1d(p.ids, other.ids)
    q = Law(ids, 0.5 * np.array([p.probability(i) + other.probability(i) for i in ids.tolist()]))
    found = {
        tag: replay([(p, q)], method(tag), rng=np.random.default_rng(1), fields=1000)
        for tag in ("watermark", "mws", "mse")
    }
    # The same fields: the same tokens, whatever was drafted.
    assert found["mws"][:2] == found["watermark"][:2]
    assert found["mse"].mean_a < found["watermark"].mean_a - 0.1
    assert found["mws"].acceptance < found["mse"].acceptance


def test_nothing_to_replay_and_progress() -> None:
    assert replay([], method("otmc"), rng=np.random.default_rng(0)) == (0.0, 0.0, 0.0, 0.0)
    done: list[int] = []
    pairs = [(dirichlet(5, 1), dirichlet(5, 2))] * 3
    replay(pairs, method("otmc"), rng=np.random.default_rng(0), fields=2, report=done.append)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("tag", ["plain", "bv-skt", "two-key", "mws@tournament", "keyed-coin"])
def test_methods_whose_positions_are_not_alone_are_refused(tag: str) -> None:
    with pytest.raises(SchemeError, match="cannot be replayed"):
        replay([(dirichlet(5, 1), dirichlet(5, 2))], method(tag), rng=np.random.default_rng(0))


def test_the_scheme_may_have_any_width() -> None:
    """Noise is drawn, not keyed: windows play no part."""
    pairs = [(dirichlet(8, 1), dirichlet(8, 2))]
    one, four = (
        replay(pairs, method("otmc", Gumbel(context_width=w)), rng=np.random.default_rng(0))
        for w in (1, 4)
    )
    assert one == four
