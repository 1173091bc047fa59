import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

import filigrane as fg
from filigrane.contexts import scored_positions
from filigrane.errors import FiligraneError, TooShort
from filigrane.localisation import Localisation, Span, _shape, _threshold, localise, window_grid
from filigrane.prf import block
from filigrane.schemes import Scheme
from filigrane.toy import ZipfModel
from keymaker import keys_from_seed

ALL = [scheme() for scheme in fg.SCHEMES.values()]
by_name = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
ROOT, OTHER = keys_from_seed(71, 2, slots=2)
LENGTHS = {"gumbel": 100, "tournament": 160, "greenlist": 200, "delta": 200, "gamma": 300}


def plain(length: int, seed: int) -> np.ndarray:
    """Unmarked text with the repetitions of text: frequent words are very frequent."""
    return np.random.default_rng(seed).zipf(1.4, length) % 5000


def marked(scheme: Scheme, length: int, seed: int, slot: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return fg.embed(ZipfModel(500, 1.0), [1], length, ROOT, scheme, rng=rng, slot=slot).tokens


def twin(tokens: np.ndarray, key: fg.Key, scheme: Scheme, alpha: float) -> Localisation:
    """`localise` in plain Python: every window tested by itself, nothing pruned or shared."""
    positions = scored_positions(tokens, scheme.context_width).tolist()
    windows = np.array([tokens[t - scheme.context_width : t] for t in positions])
    n = len(positions)
    grid = [
        (start, start + length)
        for k in range(4, 40)
        if (length := 2**k) <= n
        for start in range(0, n - length + 1, length // 2)
    ]
    if (0, n) not in grid:
        grid.append((0, n))
    n_tests = 2 ** math.ceil(math.log2(len(grid) * key.slots))
    mean = _shape(scheme).mean
    scores, found = [], []
    for slot in range(key.slots):
        blocks = block(key.prf_keys(scheme.label)[slot], windows)
        row = scheme.score(blocks, tokens[positions])
        scores.append(row)
        log_ps = {w: scheme.log_sf(math.fsum(row[w[0] : w[1]]), w[1] - w[0]) for w in grid}
        hits = [w for w in grid if log_ps[w] + math.log(n_tests) <= math.log(alpha)]
        smallest = [
            w for w in hits if not any(w[0] <= v[0] and v[1] <= w[1] and v != w for v in hits)
        ]
        pieces: list[list[int]] = []
        within = 0.0
        for start, stop in sorted(smallest):
            if pieces:
                left, right = pieces[-1]
                gap = row[right:start]
                inside = np.concatenate((row[left:right], row[start:stop]))
                middle = (mean + inside.mean()) / 2
                if start - right < 16 or gap.mean() >= middle:
                    pieces[-1][1] = stop
                    continue
            pieces.append([start, stop])
        for start, stop in pieces:
            inside = [w for w in hits if start <= w[0] and w[1] <= stop]
            best = max(
                inside,
                key=lambda w: math.fsum(row[w[0] : w[1]] - mean) / math.sqrt(w[1] - w[0]),
            )
            length = best[1] - best[0]
            low, high = max(0, start - length // 2), min(n, stop + length // 2)
            middle = (mean + row[best[0] : best[1]].mean()) / 2
            sums = np.concatenate(([0.0], np.cumsum(row[low:high] - middle)))
            within, first, last = max(
                (sums[j] - sums[i], low + i, low + j)
                for j in range(1, len(sums))
                for i in [int(np.argmin(sums[:j]))]
            )
            assert within > 0
            found.append((min(0.0, log_ps[best] + math.log(n_tests)), start, slot, first, last))
    found.sort()
    shown = [found[0][2] if found else int(np.argmax([row.sum() for row in scores]))] * n
    spans = []
    free = [True] * n
    for log_p, _, slot, first, last in found:
        if all(free[first:last]):
            free[first:last] = [False] * (last - first)
            shown[first:last] = [slot] * (last - first)
            stop = positions[last - 1] + 1
            spans.append(
                Span(start=positions[first], stop=stop, log_pvalue=log_p, n_scored=last - first)
            )
    evidence = np.full(len(tokens), np.nan)
    for i, t in enumerate(positions):
        evidence[t] = -scheme.log_sf(float(scores[shown[i]][i]), 1)
    return Localisation(
        spans=tuple(sorted(spans, key=lambda span: span.start)),
        evidence=evidence,
        n_windows=len(grid),
        n_tests=n_tests,
        method=f"exact tail per window, Bonferroni over {len(grid)} windows x {key.slots} slots",
    )


@pytest.mark.slow
@by_name
def test_agrees_with_the_plain_twin(scheme: Scheme) -> None:
    long = LENGTHS[scheme.name]
    texts = [
        np.concatenate((plain(90, 1), marked(scheme, long, 2), plain(130, 3))),
        # Two paragraphs close to each other, then one of the other slot.
        np.concatenate(
            (
                *(marked(scheme, long, 4), plain(60, 5), marked(scheme, long, 6), plain(40, 7)),
                marked(scheme, long, 8, slot=1),
            )
        ),
        plain(300, 9),
        plain(17, 10),
    ]
    n_spans = []
    for text in texts:
        for alpha in (1e-6, 0.3):
            fast, slow = localise(text, ROOT, scheme, alpha=alpha), twin(text, ROOT, scheme, alpha)
            assert [(s.start, s.stop, s.n_scored) for s in fast.spans] == [
                (s.start, s.stop, s.n_scored) for s in slow.spans
            ]
            assert [s.log_pvalue for s in fast.spans] == pytest.approx(
                [s.log_pvalue for s in slow.spans], rel=1e-9
            )
            np.testing.assert_allclose(fast.evidence, slow.evidence, rtol=1e-9, atol=1e-12)
            assert (fast.n_windows, fast.n_tests) == (slow.n_windows, slow.n_tests)
            assert fast.method == slow.method
            n_spans.append(len(fast.spans))
    assert n_spans[0] == 1 and n_spans[2] >= 2


@pytest.mark.slow
@by_name
def test_chance_of_any_span_is_at_most_alpha_over_keys(scheme: Scheme) -> None:
    alpha, count = 0.3, 2000
    text = plain(400, 11)
    # As many positions as the longest window has: no length that its thresholds are not kept for.
    text = text[: scored_positions(text, scheme.context_width)[127] + 1]
    keys = ROOT.users(count)
    wrong = sum(bool(localise(text, keys[i], scheme, alpha=alpha).spans) for i in range(count))
    assert scipy_stats.binom.sf(wrong - 1, count, alpha) > 1e-6
    # Bonferroni over overlapping windows is careful, not blind: some spans do come up.
    assert wrong > 0.02 * count


@pytest.mark.slow
def test_without_the_price_of_the_windows_it_would_not_hold() -> None:
    text, scheme, alpha, count = plain(200, 11), fg.Gumbel(), 0.3, 100
    positions = scored_positions(text, 4)
    windows = np.array([text[t - 4 : t] for t in positions])
    naive = 0
    for i in range(count):
        row = scheme.score(block(ROOT.user(i).prf_keys(scheme.label)[0], windows), text[positions])
        naive += any(
            scheme.log_sf(float(row[start : start + length].sum()), length) <= math.log(alpha)
            for length, step, number in window_grid(len(row))
            for start in range(0, step * number, step)
        )
    assert scipy_stats.binom.sf(naive - 1, count, alpha) < 1e-6


@pytest.mark.slow
@by_name
def test_finds_a_marked_paragraph_in_a_long_text(scheme: Scheme) -> None:
    long = LENGTHS[scheme.name]
    rng = np.random.default_rng(12)
    text = np.concatenate(
        (rng.integers(0, 500, 2111), marked(scheme, long, 13), rng.integers(0, 500, 2789))
    )
    (span,) = localise(text, ROOT, scheme).spans
    assert span.log_pvalue <= math.log(1e-6)
    assert abs(span.start - 2111) < long / 4 and abs(span.stop - 2111 - long) < long / 4
    assert span.n_scored <= span.stop - span.start
    assert localise(text, OTHER, scheme).spans == ()


def test_every_part_of_a_marked_text_is_covered() -> None:
    scheme = fg.Gumbel()
    text = marked(scheme, 1000, 14)
    spans = localise(text, ROOT, scheme).spans
    assert sum(span.stop - span.start for span in spans) > 900
    assert all(a.stop <= b.start for a, b in itertools.pairwise(spans))


def test_a_faint_mark_is_found_in_the_text_as_a_whole() -> None:
    """Nothing but the whole text is long enough, and its length is no power of two."""
    scheme = fg.GreenList(delta=0.6)
    rng = np.random.default_rng(15)
    text = fg.embed(ZipfModel(500, 1.0), [1], 1000, ROOT, scheme, rng=rng).tokens
    whole = fg.detect(text, ROOT, scheme).log_pvalue
    for alpha in (0.5, 1e-2, 1e-4, 1e-6):
        for span in localise(text, ROOT, scheme, alpha=alpha).spans:
            assert whole - 3 < span.log_pvalue <= math.log(alpha)
    assert localise(text, ROOT, scheme, alpha=1e-2).spans


def test_short_texts_are_one_window() -> None:
    scheme = fg.Gumbel()
    found = localise(marked(scheme, 14, 16), ROOT, scheme, alpha=0.01)
    assert (found.n_windows, found.n_tests, len(found.spans)) == (1, 2, 1)
    assert np.isnan(found.evidence[:4]).all() and not np.isnan(found.evidence[4:]).any()
    with pytest.raises(TooShort, match="Pass at least 5"):
        localise([1, 2, 3, 4], ROOT, scheme)


def test_grid_is_what_it_says() -> None:
    assert window_grid(5) == ((5, 5, 1),)
    assert window_grid(16) == ((16, 8, 1),)
    assert window_grid(47) == ((16, 8, 4), (32, 16, 1), (47, 47, 1))
    assert window_grid(64) == ((16, 8, 7), (32, 16, 3), (64, 32, 1))
    for n in range(16, 300):
        for length, step, count in window_grid(n):
            assert (count - 1) * step + length <= n < count * step + length
    with pytest.raises(ValueError, match="pass 1 or more"):
        window_grid(0)


@pytest.mark.slow
@by_name
def test_thresholds_are_the_least_significant_sums(scheme: Scheme) -> None:
    shape = _shape(scheme)
    for length in (16, 64, 1024, 65536):
        for level in (-3.0, -27.5, -300.0):
            least = _threshold(scheme, length, level)
            if math.isinf(least):
                top = shape.top * length
                assert scheme.log_sf(top if shape.lattice else math.ceil(top), length) > level
                continue
            below = least - 1 if shape.lattice else least * (1 - 1e-7)
            assert scheme.log_sf(least, length) <= level < scheme.log_sf(below, length)


@by_name
def test_mean_and_top_of_a_score(scheme: Scheme) -> None:
    rng = np.random.default_rng(17)
    words = rng.integers(0, 2**32, (20_000, 8), dtype=np.uint32)
    scores = scheme.score(words, rng.integers(0, 500, 20_000))
    shape = _shape(scheme)
    assert scores.mean() == pytest.approx(shape.mean, abs=6 * scores.std() / math.sqrt(20_000))
    assert scores.max() <= shape.top
    assert shape.lattice == bool((scores == np.round(scores)).all())


@pytest.mark.slow
def test_a_hundred_thousand_tokens_in_fifty_milliseconds() -> None:
    scheme, (key,) = fg.Gumbel(), keys_from_seed(72, 1)
    text = np.random.default_rng(18).integers(0, 50_000, 100_000)
    localise(text, key, scheme)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        localise(text, key, scheme)
        best = min(best, time.perf_counter() - start)
        if best < 0.05:
            return
    pytest.fail(f"{best:.3f} s")


def test_wrong_arguments_say_what_to_do() -> None:
    text = plain(50, 19)
    with pytest.raises(ValueError, match="alpha must be inside"):
        localise(text, ROOT, fg.Gumbel(), alpha=1.0)
    with pytest.raises(FiligraneError, match="pass a Key"):
        localise(text, "acme", fg.Gumbel())  # type: ignore[arg-type]
    with pytest.raises(FiligraneError, match="scheme object"):
        localise(text, ROOT, "gumbel")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="look at its spans"):
        bool(localise(text, ROOT, fg.Gumbel()))
