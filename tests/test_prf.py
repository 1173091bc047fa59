"""The PRF: its core against another library, its twins, and how the numbers of tokens behave."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filigrane import prf, stats
from filigrane.kernels import prf as kernels
from filigrane.kernels.scan import over_keys, over_positions
from filigrane.schemes import SCHEMES, DeltaReweight, GammaReweight, GreenList, Gumbel, Tournament

N = 2**32
RNG_SEED = 20_261_121
words32 = st.integers(0, N - 1)


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, N, shape, dtype=np.uint32)


# --- the core ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(key=st.binary(min_size=32, max_size=32), given_=st.binary(min_size=16, max_size=16))
def test_twenty_rounds_are_chacha20(key, given_):
    """The same code with 20 rounds, against the library's; 8 rounds are pinned by the vectors."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    wanted = Cipher(algorithms.ChaCha20(key, given_), mode=None).encryptor().update(bytes(64))
    words = prf.chacha_block(np.frombuffer(key, "<u4"), np.frombuffer(given_, "<u4"), 20)
    assert words.astype("<u4").tobytes() == wanted


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 13, 64])
@pytest.mark.parametrize("rows", [1, kernels.LANES, kernels.LANES + 3])
def test_the_compiled_block_is_the_reference(width, rows):
    rng = np.random.default_rng(RNG_SEED)
    keys, contexts = random_words(rng, rows, 8), random_words(rng, rows, width)
    np.testing.assert_array_equal(kernels.blocks(keys, contexts), prf.block(keys, contexts))


def test_longer_contexts_cascade():
    """Width 9 by hand: the first eight words of one block are the key of the next."""
    rng = np.random.default_rng(RNG_SEED)
    key, context = random_words(rng, 8), random_words(rng, 9)
    for start in (0, 4):
        key_out = prf.chacha_block(key, context[start : start + 4])[:8]
        key, first = key_out, key
        assert (key != first).all()
    last = np.array([context[8], *[prf.PADDING] * 3], dtype=np.uint32)
    wanted = prf.chacha_block(key, last)[:8]
    np.testing.assert_array_equal(
        prf.block(random_words(np.random.default_rng(RNG_SEED), 8), context), wanted
    )


def test_scans_are_the_reference_for_every_scheme_and_width():
    """Both scans, lanes over keys and over positions, against scores of the reference."""
    rng = np.random.default_rng(RNG_SEED)
    ids = rng.integers(0, 50_000, 700, dtype=np.uint32)
    for width in (1, 4, 6):
        positions = np.arange(width, 700, 2, dtype=np.int64)
        windows = ids[positions[:, None] + np.arange(-width, 0)]
        keys = random_words(rng, 3, 8)
        for scheme in (make(context_width=width) for make in SCHEMES.values()):
            wanted = [scheme.score(prf.block(key, windows), ids[positions]).sum() for key in keys]
            kind, threshold, table = scheme.statistic
            rest = (ids, positions, width, kind, np.uint32(threshold), table)
            out = np.empty(3)
            over_keys(np.ascontiguousarray(keys.T), *rest, out)
            np.testing.assert_allclose(out, wanted, rtol=1e-12)
            out[:] = np.nan
            over_positions(keys, *rest, out)
            np.testing.assert_allclose(out, wanted, rtol=1e-12)


# --- the field ---------------------------------------------------------------------------------


def unshift(x: int, n: int) -> int:
    """The inverse of x ^ (x >> n)."""
    out = x
    for _ in range(32 // n):
        out = x ^ (out >> n)
    return out


def token_of(seed: list[int], number: int) -> int:
    """The inverse of `field`: undone step by step, so no two tokens can share a number."""
    h = unshift(number, 14)
    for shift, factor, word in (
        (15, 0x31848BAB, seed[3]),
        (11, 0xAC4C1B51, seed[2]),
        (17, 0xED5AD4BB, seed[1]),
    ):
        h = unshift((h ^ word) * pow(factor, -1, N) % N, shift)
    return (h - seed[0]) % N


@given(seed=st.lists(words32, min_size=4, max_size=4), token=words32)
def test_the_field_is_a_bijection(seed, token):
    numbers = prf.field(np.array(seed, dtype=np.uint32), [token])
    assert token_of(seed, int(numbers[0])) == token


def neighbours() -> list[tuple[int, int]]:
    """Pairs of tokens with the differences that weak mixers show."""
    pairs = set()
    for t in (0, 1, 100, 255, 50_256, 151_935):
        for u in (t + 1, t ^ 1, t + 2, t ^ 2, t + 256, t + 2**16, t ^ 2**16, t ^ 2**15, t ^ 2**31):
            pairs.add((min(t, u), max(t, u)))
    return sorted(pairs)


def signs(words: np.ndarray) -> np.ndarray:
    """Bits as -1 and 1: (n,) -> (n, 32)."""
    bits = (words[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return 1.0 - 2.0 * bits.astype(np.float32)


def chi_square(cells: np.ndarray, n_cells: int) -> float:
    """Wilson and Hilferty's normal score of a chi-square test of uniformity."""
    expected = cells.size / n_cells
    counts = np.bincount(cells.astype(np.int64), minlength=n_cells)
    df = n_cells - 1
    ratio = ((counts - expected) ** 2).sum() / expected / df
    return (ratio ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def screen(mixer, rows: int) -> float:
    """The largest normal score of a mixer, as log p corrected for the number of tests."""
    rng = np.random.default_rng(RNG_SEED)
    seeds = random_words(rng, rows, 4)
    scores: list[float] = []
    for t, u in neighbours():
        a, b = mixer(seeds, np.uint32(t)), mixer(seeds, np.uint32(u))
        # Every bit of one token against every bit of the other.
        products = signs(a).T @ signs(b) / math.sqrt(rows)
        scores += np.abs(products).ravel().tolist()
        # The two numbers' top bits jointly, and the top and bottom of their xor and difference.
        scores.append(chi_square((a >> 28) << np.uint32(4) | b >> 28, 256))
        for x in (a ^ b, a - b):
            scores += [chi_square(x >> 24, 256), chi_square(x & np.uint32(255), 256)]
    for t in (0, 1, 50_256, 151_935):
        a = mixer(seeds, np.uint32(t))
        # Bits of one token against each other, and each bit alone (the diagonal).
        products = signs(a).T @ signs(a) / math.sqrt(rows)
        scores += np.abs(products[np.triu_indices(32, 1)]).tolist()
        scores += np.abs(signs(a).sum(axis=0) / math.sqrt(rows)).tolist()
        scores += [chi_square(a >> 24, 256), chi_square(a & np.uint32(255), 256)]
        # Four tokens at once: second differences, which linear structure would show.
        for i, j in ((1, 2), (1, 2**16), (2**15, 2**16)):
            x = a ^ mixer(seeds, np.uint32(t ^ i)) ^ mixer(seeds, np.uint32(t ^ j))
            x = x ^ mixer(seeds, np.uint32(t ^ i ^ j))
            scores += np.abs(signs(x).sum(axis=0) / math.sqrt(rows)).tolist()
    worst = math.erfc(max(scores) / math.sqrt(2))
    return min(1.0, worst * len(scores))


@pytest.mark.slow
def test_the_field_shows_no_bias():
    """Over random seeds, tokens that differ little have numbers that look independent."""
    assert screen(prf.field, 1 << 14) > 1e-3


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_screen_can_fail(rounds):
    """The same mixer with fewer rounds does not pass."""

    def weaker(seed, token):
        h = np.asarray(token).astype(np.uint32) + seed[..., 0]
        h = (h ^ (h >> np.uint32(17))) * np.uint32(0xED5AD4BB) ^ seed[..., 1]
        if rounds == 2:
            h = (h ^ (h >> np.uint32(11))) * np.uint32(0xAC4C1B51) ^ seed[..., 2]
        return h

    assert screen(weaker, 1 << 12) < 1e-6


# --- no p-value is too small -------------------------------------------------------------------


def block_of(numbers: list[int], coins: list[int]) -> np.ndarray:
    """Blocks under whose field token 0 has the given number."""
    block = np.zeros((len(numbers), 8), np.uint32)
    for row, number in enumerate(numbers):
        block[row, 0] = token_of([0, 0, 0, 0], number)
    block[:, prf.COIN] = coins
    assert prf.field(block[:, prf.FIELD], 0).tolist() == numbers
    return block


EDGES = [0, 1, 2, 3, 1000, 2**16, N // 4 - 1, N // 4, N // 2 - 1, N // 2, N - 1000, N - 2, N - 1]


def no_smaller(log_p: float, truth: Fraction, slack: float = 0.0) -> None:
    """A p-value is at least the probability of what it is the p-value of, up to rounding."""
    assert Fraction(math.exp(log_p)) >= truth * (1 - Fraction(1, 10**13)) - Fraction(slack)


def test_one_position():
    """P(this score or a larger one), counted on the lattice of 2**32 numbers, for every scheme."""
    for r in EDGES:
        block = block_of([r], [0])
        score = float(Gumbel().score(block, [0])[0])
        no_smaller(Gumbel().log_sf(score, 1), Fraction(r + 1, N))
        score = float(GammaReweight().score(block, [0])[0])
        no_smaller(GammaReweight().log_sf(score, 1), Fraction(N - r, N))
        for scheme in (GreenList(), GreenList(gamma=0.1), GreenList(gamma=1 / 3)):
            if scheme.score(block, [0])[0] == 1.0:
                no_smaller(scheme.log_sf(1.0, 1), Fraction(scheme.threshold, N))
        for coin in EDGES:
            distance = abs(r - coin)
            further = (N - distance) * (N - distance - 1)
            score = float(DeltaReweight().score(block_of([r], [coin]), [0])[0])
            assert score == pytest.approx(further / N**2, rel=1e-15)
            # A score near 1 holds its distance from 1 to 2**-53 only.
            truth = 1 - Fraction(further, N**2)
            no_smaller(DeltaReweight().log_sf(score, 1), truth, slack=2.0**-53)
    tournament = Tournament(depth=3)
    counts = [sum(w * (r >> i & 1) for i, w in enumerate(tournament.weights)) for r in range(8)]
    for total in sorted(set(counts)):
        truth = Fraction(sum(c >= total for c in counts), 8)
        no_smaller(tournament.log_sf(float(total), 1), truth)


@pytest.mark.parametrize("n", [2, 3])
def test_sums_on_a_small_lattice(n):
    """With 16 numbers in place of 2**32 all outcomes can be counted, and the rounding is coarse."""
    size = 16
    lattice = range(size)
    gumbel = [-math.log((r + 1) / size) for r in lattice]
    gamma = [r / size for r in lattice]
    delta = [
        (size - abs(r - c)) * (size - abs(r - c) - 1) / size**2 for r in lattice for c in lattice
    ]
    for scores, log_sf in (
        (gumbel, stats.log_sf_gamma),
        (gamma, stats.log_sf_irwin_hall),
        (delta, stats.log_sf_irwin_hall),
    ):
        sums = np.zeros(1)
        weights = np.ones(1)
        for _ in range(n):
            sums, index = np.unique(
                np.round((sums[:, None] + scores).ravel(), 12), return_inverse=True
            )
            weights = np.bincount(index, np.repeat(weights, len(scores)))
        tail = np.cumsum(weights[::-1])[::-1] / weights.sum()
        pvalues = np.exp([log_sf(float(s) - 1e-12, n) for s in sums])
        assert (pvalues >= tail * (1 - 1e-9)).all()
        # Conservative because of the lattice, not by much: a real lattice is 2**28 times finer.
        assert (pvalues <= tail + n / size).all()


def test_two_positions_on_the_real_lattice():
    """P(R1 + R2 >= m) over pairs of 32-bit numbers, in integers."""
    for m in (1, 2, N // 2, N - 1, N, N + 1, 3 * N // 2, 2 * N - 1000, 2 * N - 2):
        above = 2 * N - 1 - m
        # Pairs of numbers that sum to at least m; below the middle, by the complement.
        pairs = above * (above + 1) // 2 if m >= N - 1 else N**2 - m * (m + 1) // 2
        no_smaller(stats.log_sf_irwin_hall(m / N, 2), Fraction(pairs, N**2))


@pytest.mark.parametrize("name", SCHEMES)
def test_random_keys_find_nothing(name):
    """One text under 20,000 random keys: P(p <= a) <= a, within four standard errors."""
    scheme = SCHEMES[name]()
    rng = np.random.default_rng(RNG_SEED)
    ids = rng.integers(0, 300, 44, dtype=np.uint32)
    positions = np.arange(4, 44, dtype=np.int64)
    kind, threshold, table = scheme.statistic
    out = np.empty(20_000)
    keys = random_words(rng, 8, out.size)
    over_keys(keys, ids, positions, 4, kind, np.uint32(threshold), table, out)
    on_integers = name in ("greenlist", "tournament")
    for alpha in (0.5, 0.1, 0.01, 0.001):
        # The sum at which p crosses alpha, by bisection: a tail for every key would take minutes.
        low, high = 0.0, 40.0 * 4785
        for _ in range(60):
            middle = (low + high) / 2
            total = math.ceil(middle) if on_integers else middle
            if scheme.log_sf(total, 40) <= math.log(alpha):
                high = middle
            else:
                low = middle
        rate = float((out >= high).mean())
        error = math.sqrt(alpha * (1 - alpha) / out.size)
        assert rate <= alpha + 4 * error
        if name != "greenlist":  # whose lattice is coarse
            assert rate >= alpha - 4 * error
