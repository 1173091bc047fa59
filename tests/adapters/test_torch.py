import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import filigrane as fg
from filigrane import prf
from filigrane.contexts import History
from filigrane.kernels.prf import LANES, blocks, field_row
from filigrane.schemes import Scheme

torch = pytest.importorskip("torch")

from filigrane.adapters.torch import (  # noqa: E402
    block,
    draw_quantile,
    field,
    fresh,
    fresh_at,
    reweight_logits,
    to_words,
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)


def to_numpy(words: "torch.Tensor") -> np.ndarray:
    return words.cpu().numpy().view(np.uint32)


@on_devices
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 9, 64])
def test_blocks_have_the_bits_of_the_reference_and_of_the_kernel(width: int, device: str) -> None:
    rng = np.random.default_rng(width)
    keys = rng.integers(0, 2**32, (20, 8), dtype=np.uint32)
    contexts = rng.integers(0, prf.MAX_TOKEN_ID, (20, width), endpoint=True)
    contexts[0], contexts[1] = prf.MAX_TOKEN_ID, 0
    found = to_numpy(block(to_words(keys, device), torch.tensor(contexts, device=device)))
    assert np.array_equal(found, prf.block(keys, contexts))
    assert np.array_equal(found, blocks(keys, contexts.astype(np.uint32)))


@on_devices
def test_fields_have_the_bits_of_the_reference_and_of_the_kernel(device: str) -> None:
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**32, (LANES, 4), dtype=np.uint32)
    tokens = rng.integers(0, prf.MAX_TOKEN_ID, LANES, endpoint=True)
    found = to_numpy(field(to_words(seeds, device), torch.tensor(tokens, device=device)))
    assert np.array_equal(found, prf.field(seeds, tokens))
    compiled = np.empty(1, dtype=np.uint32)
    for seed, token, number in zip(seeds, tokens, found, strict=True):
        field_row(*seed, np.array([token], np.uint32), compiled)
        assert compiled[0] == number


@settings(max_examples=200)
@given(
    st.integers(1, 5),
    st.integers(0, 14).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=1, max_size=4
        )
    ),
)
def test_fresh_is_the_rule_of_history(width: int, rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        history = History(width)
        for token in row:
            history.push(token)
        expected.append(history.fresh())
    ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    assert fresh(ids, width).tolist() == expected


VARIANTS = [scheme() for scheme in fg.SCHEMES.values()] + [
    # What touches the sign bit of an int32: a threshold above 2**31, and the 32nd bit.
    fg.GreenList(gamma=0.9, delta=0.5),
    fg.Tournament(depth=32),
    fg.Tournament(depth=1, scoring="mean"),
]


@on_devices
@pytest.mark.parametrize("scheme", VARIANTS, ids=lambda scheme: scheme.tag)
def test_reweights_are_those_of_the_reference(scheme: Scheme, device: str) -> None:
    rng = np.random.default_rng(2)
    logits = (3 * rng.normal(size=(60, 200))).astype(np.float32)
    logits[10:, ::3] = -np.inf  # truncated rows
    logits[20:, 2:] = -np.inf  # two tokens left
    logits[30:, :1] = -np.inf  # one
    logits[40:] = rng.normal(size=(20, 200)).astype(np.float32)
    words = rng.integers(0, 2**32, (60, 8), dtype=np.uint32)
    given_ = torch.tensor(logits, device=device)
    found = reweight_logits(scheme, given_, to_words(words, device))
    assert found.dtype == torch.float32 and found.device == given_.device
    weights = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    law = scheme.reweight(weights / weights.sum(axis=1, keepdims=True), words)
    if scheme.deterministic:
        assert np.array_equal(np.exp(found.cpu().numpy()), law)
    np.testing.assert_allclose(
        torch.softmax(found.double(), dim=-1).cpu().numpy(), law, rtol=2e-5, atol=1e-7
    )
    assert not torch.isfinite(found[given_.isneginf()]).any()


def test_green_list_adds_exactly_delta() -> None:
    scheme = fg.GreenList(delta=1.5)
    words = np.arange(8, dtype=np.uint32)[None]
    logits = torch.arange(50, dtype=torch.float32)[None]
    added = (reweight_logits(scheme, logits, to_words(words)) - logits).numpy()[0]
    assert np.array_equal(added, 1.5 * scheme.is_green(words[0], np.arange(50)))


@pytest.mark.parametrize("scheme", VARIANTS, ids=lambda scheme: scheme.tag)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_without_a_law_are_not_made_up(scheme: Scheme, bad: float) -> None:
    """transformers' own draw refuses such rows; a one-hot row would hide them from it."""
    logits = torch.randn((2, 20), generator=torch.Generator().manual_seed(0))
    if bad == -np.inf:
        logits[1] = bad
    else:
        logits[1, 7] = bad
    found = reweight_logits(scheme, logits, torch.zeros((2, 8), dtype=torch.int32))
    assert torch.isfinite(found[0].amax())
    assert torch.equal(found[1].isnan(), logits[1].isnan())
    assert found[1].isnan().any() or torch.equal(found[1].amax(), logits[1].amax())


def test_a_scheme_without_a_twin_runs_by_its_definition() -> None:
    class Unknown(Scheme):  # a Gumbel that is not of the class that the adapter knows
        name = "unknown"
        reweight, score, log_sf = fg.Gumbel.reweight, fg.Gumbel.score, fg.Gumbel.log_sf
        draw, statistic = fg.Gumbel.draw, fg.Gumbel.statistic

    logits = torch.randn((5, 40), generator=torch.Generator().manual_seed(1))
    words = to_words(np.arange(40, dtype=np.uint32).reshape(5, 8))
    assert torch.equal(
        reweight_logits(Unknown(), logits, words), reweight_logits(fg.Gumbel(), logits, words)
    )


@on_devices
@pytest.mark.parametrize("width", [1, 2, 4])
def test_fresh_at_is_the_rule_for_rows_of_different_lengths(width: int, device: str) -> None:
    rng = np.random.default_rng(width)
    tokens = rng.integers(0, 3, (200, 24))
    starts = rng.integers(0, 12, 200)
    ends = starts + rng.integers(0, 13, 200)
    wanted = []
    for row, start, end in zip(tokens, starts, ends, strict=True):
        history = History(width)
        for token in row[start:end]:
            history.push(int(token))
        wanted.append(history.fresh())
    arguments = [torch.tensor(a, device=device) for a in (tokens, starts, ends)]
    assert fresh_at(*arguments, width).tolist() == wanted
    assert 0.05 < np.mean(wanted) < 0.95
    short = torch.zeros((2, width - 1), dtype=torch.int64, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    assert fresh_at(short, zeros, zeros, width).tolist() == [False, False]


@on_devices
def test_a_drawn_quantile_is_that_of_the_compiled_draw(device: str) -> None:
    """The tournament's own draw, by the same private words."""
    from filigrane.kernels.draw import Workspace
    from filigrane.schemes.base import Candidates

    rng = np.random.default_rng(0)
    scheme, ids = fg.Tournament(), np.arange(300, dtype=np.uint32)
    logits = rng.standard_normal((64, 300)).astype(np.float32)
    words = rng.integers(0, 2**32, (64, 8), dtype=np.uint32)
    noise = rng.integers(0, 2**32, (64, 4), dtype=np.uint32)
    law = reweight_logits(scheme, torch.tensor(logits, device=device), to_words(words, device))
    found = draw_quantile(law.double(), to_words(noise, device)).tolist()
    workspace = Workspace(300)
    wanted = [
        scheme.draw(Candidates(row, ids, 1.0), word, own, workspace)
        for row, word, own in zip(logits, words, noise, strict=True)
    ]
    # The law comes back in float32: a border may fall on the other side of a quantile.
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1
    impossible = torch.full((1, 5), -torch.inf, device=device)
    impossible[0, 3] = 0.0
    assert draw_quantile(impossible, to_words(noise[:1], device)).tolist() == [3]
