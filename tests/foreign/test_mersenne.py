"""MT19937: the readable twin against numpy's generator, the compiled one against the twin."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filigrane.foreign import mersenne
from filigrane.kernels import mersenne as compiled

SEEDS = (0, 1, 5, 5489, 19650218, 77429315, 2**31, 2**32 - 1)


def by_numpy(seed: int, n: int) -> np.ndarray:
    generator = np.random.MT19937()
    generator._legacy_seeding(seed)
    return generator.random_raw(n).astype(np.uint32)


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_are_numpys(seed: int) -> None:
    for n in (1, 623, 624, 625, 3000):
        assert (mersenne.outputs(seed, n) == by_numpy(seed, n)).all()
        assert (compiled.outputs(seed, n) == by_numpy(seed, n)).all()


def test_only_the_low_half_of_a_seed_counts() -> None:
    assert (mersenne.outputs(7 + 2**32, 5) == mersenne.outputs(7, 5)).all()
    assert (compiled.outputs(7 + 2**63, 5) == compiled.outputs(7, 5)).all()


def test_known_permutation_and_uniforms() -> None:
    # torch.randperm(1000) and torch.rand(1000) after torch.Generator().manual_seed(5)
    assert mersenne.perm(5, 1000)[:8].tolist() == [411, 49, 291, 695, 678, 515, 112, 606]
    expected = [0.8302518725395203, 0.12611091136932373, 0.9074696898460388, 0.8199270367622375]
    assert mersenne.rand(5, 1000)[:4].tolist() == expected


@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.integers(2, 3000),
    data=st.data(),
)
def test_membership_is_that_of_the_permutation(
    seed: int, vocab_size: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(0, vocab_size))
    order = mersenne.perm(seed, vocab_size)
    assert sorted(order.tolist()) == list(range(vocab_size))
    assert (compiled.front(seed, vocab_size, size) == order[:size]).all()
    inside = np.zeros(vocab_size, dtype=np.bool_)
    inside[order[:size]] = True
    tokens = np.arange(vocab_size)
    seeds = np.full(vocab_size, seed, dtype=np.uint32)
    # in one group the list is built; one by one the token is followed
    assert (compiled.in_front(seeds, tokens, vocab_size, size) == inside).all()
    few = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=4, unique=True))
    for token in few:
        assert mersenne.in_front(seed, token, vocab_size, size) == inside[token]
        one = np.array([token])
        assert compiled.in_front(seeds[:1], one, vocab_size, size)[0] == inside[token]


@pytest.mark.parametrize("vocab_size", [32000, 49152, 50257, 128256, 151936])
def test_real_vocabularies(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    size = vocab_size // 4
    seeds = rng.integers(0, 2**32, 3, dtype=np.uint32)
    for seed in seeds.tolist():
        # the permutation in numpy's words, entry by entry
        order, x = np.arange(vocab_size), by_numpy(seed, vocab_size - 1).tolist()
        for i in range(vocab_size - 1):
            j = i + x[i] % (vocab_size - i)
            order[i], order[j] = order[j], order[i]
        inside = np.zeros(vocab_size, dtype=np.bool_)
        inside[order[:size]] = True
        tokens = np.concatenate([np.arange(700), rng.integers(0, vocab_size, 100)])
        for token in tokens[::7]:
            got = compiled.in_front(
                np.array([seed], np.uint32), np.array([token]), vocab_size, size
            )
            assert got[0] == inside[token]
        many = np.full(tokens.shape[0], seed, np.uint32)
        assert (compiled.in_front(many, tokens, vocab_size, size) == inside[tokens]).all()
        indices = rng.integers(0, vocab_size, 20)
        got = compiled.outputs_at(np.full(20, seed, np.uint32), indices)
        assert (got == by_numpy(seed, vocab_size)[indices]).all()


def test_remainders_are_exact_in_double_precision() -> None:
    """The kernel's quotient, floor((x + 1/2) * (1/n)), at the worst x: around multiples of n."""
    n = np.concatenate([np.arange(1, 2000), np.random.default_rng(0).integers(2000, 2**24, 4000)])
    for n_row in n:
        top = (2**32 - 1) // n_row
        k = np.unique(np.concatenate([np.arange(min(40, top)), top - np.arange(min(40, top))]))
        x = np.unique(np.concatenate([k * n_row + d for d in (-1, 0, 1)] + [[2**32 - 1]]))
        x = x[(x >= 0) & (x < 2**32)].astype(np.float64)
        quotient = np.floor((x + 0.5) * (1.0 / float(n_row)))
        assert (x - quotient * n_row == x % n_row).all()


def test_batches_mix_seeds_in_any_order() -> None:
    rng = np.random.default_rng(1)
    seeds = rng.choice(rng.integers(0, 2**32, 40, dtype=np.uint32), 400)
    tokens = rng.integers(0, 500, 400)
    expected = [
        mersenne.in_front(int(s), int(t), 500, 125) for s, t in zip(seeds, tokens, strict=True)
    ]
    assert compiled.in_front(seeds, tokens, 500, 125).tolist() == expected
    expected = [int(mersenne.outputs(int(s), t + 1)[t]) for s, t in zip(seeds, tokens, strict=True)]
    assert compiled.outputs_at(seeds, tokens).tolist() == expected
    assert compiled.in_front(seeds[:0], tokens[:0], 500, 125).shape == (0,)
    assert compiled.outputs_at(seeds[:0], tokens[:0]).shape == (0,)


def test_threads_do_not_share_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    seeds = rng.integers(0, 2**32, 300, dtype=np.uint32)
    tokens = rng.integers(0, 2000, 300)
    alone = compiled.in_front(seeds, tokens, 2000, 500)
    numbers = compiled.outputs_at(seeds, tokens)
    monkeypatch.setattr(compiled, "_SHARE", 4000)  # many small shares, several threads
    assert (compiled.in_front(seeds, tokens, 2000, 500) == alone).all()
    assert (compiled.outputs_at(seeds, tokens) == numbers).all()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: compiled.in_front(seeds, tokens, 2000, 500), range(8)):
            assert (got == alone).all()
