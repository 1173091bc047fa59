import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from filigrane import SCHEMES, DeltaReweight, GreenList, Gumbel, Tournament, from_tag, prf
from filigrane.errors import SchemeError
from filigrane.kernels import draw
from filigrane.schemes import Scheme
from filigrane.schemes.base import Candidates

ALL = [scheme() for scheme in SCHEMES.values()]
UNBIASED = [scheme for scheme in ALL if scheme.unbiased]
LAWS = {
    "even": np.full(8, 1 / 8),
    "steep": np.array([0.7, 0.15, 0.1, 0.04, 0.01]),
    "pair": np.array([0.5, 0.5]),
    "holes": np.array([0.0, 0.6, 0.0, 0.4, 0.0]),
    "certain": np.array([0.0, 1.0, 0.0]),
}
by_name = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)


def blocks_of_keys(count: int, seed: int = 1) -> prf.Words:
    """Blocks of one fixed context under many keys."""
    keys = np.random.default_rng(seed).integers(0, 2**32, (count, 8), dtype=np.uint32)
    return prf.block(keys, [7, 8, 9, 10])


def chi_square_p(counts: np.ndarray, probs: np.ndarray) -> float:
    support = probs > 0
    assert counts[~support].sum() == 0
    if support.sum() == 1:
        return 1.0
    return float(scipy_stats.chisquare(counts[support], probs[support] * counts.sum()).pvalue)


def drawn_by_reference(scheme: Scheme, probs: np.ndarray, count: int) -> np.ndarray:
    marked = scheme.reweight(np.broadcast_to(probs, (count, len(probs))), blocks_of_keys(count))
    np.testing.assert_allclose(marked.sum(-1), 1.0, atol=1e-12)
    assert (marked >= -1e-15).all()
    uniform = np.random.default_rng(2).random(count)[:, None]
    tokens = (np.cumsum(marked, axis=-1) <= uniform).sum(-1).clip(max=len(probs) - 1)
    return np.bincount(tokens, minlength=len(probs))


def drawn_compiled(scheme: Scheme, probs: np.ndarray, count: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        logits = np.log(probs).astype(np.float32)
    ids = np.arange(len(probs), dtype=np.uint32)
    workspace = draw.Workspace(len(probs))
    noise = np.random.default_rng(3).integers(0, 2**32, (count, 4), dtype=np.uint32)
    tokens = [
        scheme.draw(Candidates(logits, ids, 1.0), block, own, workspace)
        for block, own in zip(blocks_of_keys(count), noise, strict=True)
    ]
    return np.bincount(tokens, minlength=len(probs))


# 2 paths x 4 schemes x 5 laws; the family-wise level of the whole table is 1e-3.
LEVEL = 1e-3 / (2 * len(UNBIASED) * len(LAWS))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scheme", UNBIASED, ids=lambda scheme: scheme.name)
def test_unbiased_over_keys(scheme: Scheme, law: str) -> None:
    assert chi_square_p(drawn_by_reference(scheme, LAWS[law], 12_000), LAWS[law]) > LEVEL
    assert chi_square_p(drawn_compiled(scheme, LAWS[law], 12_000), LAWS[law]) > LEVEL


def test_the_unbiasedness_test_can_fail() -> None:
    # A green list tilts single laws but is symmetric over keys on an even law; on a steep one it
    # flattens, and the same test must see it.
    assert (
        chi_square_p(drawn_by_reference(GreenList(), LAWS["steep"], 20_000), LAWS["steep"]) < 1e-9
    )


@pytest.mark.parametrize("scheme", UNBIASED, ids=lambda scheme: scheme.name)
def test_compiled_draw_follows_the_reference_law(scheme: Scheme) -> None:
    """One block, many private draws: the compiled draw has the law that `reweight` says."""
    rng = np.random.default_rng(4)
    for trial in range(3):
        logits = (rng.standard_normal(12) * 2).astype(np.float32)
        probs = np.exp(logits.astype(float) / 0.8)
        probs /= probs.sum()
        block = blocks_of_keys(5, seed=trial)[trial]
        law = scheme.reweight(probs, block)
        workspace = draw.Workspace(12)
        candidates = Candidates(logits, np.arange(12, dtype=np.uint32), 1 / 0.8)
        count = 1 if scheme.deterministic else 4000
        noise = rng.integers(0, 2**32, (count, 4), dtype=np.uint32)
        drawn = [scheme.draw(candidates, block, own, workspace) for own in noise]
        counts = np.bincount(drawn, minlength=12)
        law = np.where(law < 1e-12, 0.0, law)
        assert chi_square_p(counts, law / law.sum()) > 1e-4


@pytest.mark.parametrize("scheme", [Gumbel(), DeltaReweight()], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 5000])
def test_one_hot_draws_equal_the_reference(scheme: Scheme, vocab_size: int) -> None:
    assert scheme.deterministic
    rng = np.random.default_rng(vocab_size)
    workspace = draw.Workspace(vocab_size)
    ids = np.arange(vocab_size, dtype=np.uint32)
    for block in blocks_of_keys(30, seed=vocab_size):
        logits = (rng.standard_normal(vocab_size) * rng.uniform(0.1, 6)).astype(np.float32)
        logits[rng.random(vocab_size) < 0.2] = -np.inf
        logits[rng.integers(vocab_size)] = 0.0
        scaled = logits.astype(float) * 1.25
        probs = np.exp(scaled - scaled.max())
        winner = int(scheme.reweight(probs / probs.sum(), block).argmax())
        assert scheme.draw(Candidates(logits, ids, 1.25), block, block[:4], workspace) == winner


@by_name
def test_statistic_table_is_the_score(scheme: Scheme) -> None:
    from filigrane.contexts import collect
    from filigrane.kernels.scan import over_keys, over_positions

    rng = np.random.default_rng(5)
    for width in (1, 3, 4, 6, 9):
        evidence = collect(rng.integers(0, 300, 300), width)
        keys = rng.integers(0, 2**32, (270, 8), dtype=np.uint32)
        blocks = prf.block(keys[:, None], evidence.windows[None])
        expected = scheme.score(blocks, evidence.tokens).sum(-1)
        kind, threshold, table = scheme.statistic
        rest = (evidence.ids, evidence.positions, width, kind, np.uint32(threshold), table)
        out = np.empty(270)
        over_keys(np.ascontiguousarray(keys.T), *rest, out)
        np.testing.assert_allclose(out, expected, rtol=1e-13)
        out[:] = np.nan
        over_positions(keys[:5], *rest, out[:5])
        np.testing.assert_allclose(out[:5], expected[:5], rtol=1e-13)


def test_expected_gumbel_signal() -> None:
    # E[score of a marked token] = sum_w p_w H(1/p_w), H harmonic (Fernandez et al. 2023).
    probs = np.array([0.5, 0.25, 0.25])
    blocks = blocks_of_keys(40_000)
    scheme = SCHEMES["gumbel"]()
    tokens = scheme.reweight(np.broadcast_to(probs, (40_000, 3)), blocks).argmax(-1)
    scores = scheme.score(blocks, tokens)
    expected = 0.5 * (1 + 1 / 2) + 0.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4)
    assert abs(scores.mean() - expected) < 4 * scores.std() / math.sqrt(40_000)


@pytest.mark.parametrize("depth", [1, 2, 8, 9, 30, 32])
@pytest.mark.parametrize("scoring", ["weighted", "mean"])
def test_tournament_weights(depth: int, scoring: str) -> None:
    scheme = Tournament(depth=depth, scoring=scoring)  # type: ignore[arg-type]
    weights = np.array(scheme.weights)
    assert len(weights) == depth
    if scoring == "weighted" and depth > 1:
        np.testing.assert_allclose(weights / (depth - 1), np.linspace(10, 1, depth))
    else:
        assert (weights == 1).all()
    # All bits one: the whole weight, once per position.
    assert scheme.statistic.table.reshape(4, 256)[:, 255].sum() == weights.sum()


@by_name
def test_tag_round_trip(scheme: Scheme) -> None:
    assert from_tag(scheme.tag) == scheme
    assert from_tag(scheme.name) == scheme


@given(st.floats(0.01, 0.99), st.floats(0.01, 20), st.integers(1, 64))
def test_greenlist_tag_round_trip(gamma: float, delta: float, width: int) -> None:
    scheme = GreenList(gamma=gamma, delta=delta, context_width=width)
    assert from_tag(scheme.tag) == scheme


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("gumbell", "Did you mean 'gumbel'"),
        ("", "unknown scheme"),
        ("gumbel:gamma=1", "takes: context_width"),
        ("gumbel:context_width=0", "context_width must be an integer in 1..64"),
        ("gumbel:context_width=four", "not of type int"),
        ("gumbel:context_width=4,context_width=5", "given twice"),
        ("gumbel:context_width", "write context_width=VALUE"),
        ("greenlist:gamma=0", "gamma must be a number between 0 and 1"),
        ("greenlist:gamma=nan", "not of type float"),
        ("greenlist:delta=-1", "delta must be"),
        ("tournament:depth=33", "depth must be"),
        ("tournament:scoring=median", "scoring must be"),
    ],
)
def test_bad_tags(tag: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        from_tag(tag)


def test_parameters_are_keyword_only_and_closed() -> None:
    with pytest.raises(TypeError):
        GreenList(gama=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        GreenList(4)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        GreenList().gamma = 0.5  # type: ignore[misc]
    with pytest.raises(SchemeError, match="gamma"):
        GreenList(gamma="half")  # type: ignore[arg-type]
