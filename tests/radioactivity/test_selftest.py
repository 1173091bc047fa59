"""The whole test on n-gram models: the published trends, the copying suspect, calibration."""

import numpy as np
import pytest

from filigrane import Gumbel, Tournament, prf
from filigrane.radioactivity import Reading, argmax, read_positions, testing
from filigrane.radioactivity.ngram import Counts, Source, marked, read
from filigrane.schemes import GreenList, Scheme
from filigrane.study.selftest import chance, dose, selftest
from keymaker import key_of

pytestmark = pytest.mark.slow


def test_selftest_holds_and_says_what_it_found() -> None:
    seen: list[tuple[int, int, str]] = []
    found = selftest(report=lambda *step: seen.append(step))
    assert [check for check in found.checks if not check.held] == []
    assert found.held and len(found.doses) == 12 and seen[0][0] == 0
    # The dose makes the poison, in every setting.
    for window in (1, 2):
        for name in ("open", "closed", "tuned: differential"):
            by_rho = [row.log10_pvalues[name] for row in found.doses if row.window == window]
            assert by_rho[0] < by_rho[1] < by_rho[2] < 0.0


@pytest.mark.parametrize("scheme", [Gumbel(context_width=1), Tournament(context_width=1)])
def test_other_schemes_leave_a_trace_too(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    found = dose(1, 256, 64_000, 1.0, rng, scheme)
    assert max(found.log10_pvalues.values()) < -12.0
    clean = dose(1, 256, 64_000, 0.0, rng, scheme)
    assert min(clean.log10_pvalues.values()) > -6.0
    copied, chances = chance(1, 40, rng, scheme)
    assert {row.name: row.ks_pvalue > 1e-4 for row in copied} == {
        "copying, rule on": True,
        "copying, rule off": False,
    }
    assert all(row.ks_pvalue > 1e-4 for row in chances)


def test_the_writer_marks_by_the_rule_and_nothing_else() -> None:
    scheme, key = GreenList(context_width=2, gamma=0.25, delta=30.0), key_of(b"\x01" * 32)
    source = Source.draw(64, np.random.default_rng(2))
    texts = marked(source, 40, 60, key, scheme, np.random.default_rng(3))
    words = np.asarray(key.prf_keys(scheme.label))[0]
    fresh_green, other = [], []
    for text in texts:
        seen = set()
        for t in range(2, 60):
            window = tuple(text[t - 2 : t])
            green = bool(scheme.is_green(prf.block(words, np.array(window)), text[t]))
            choices = source.tokens[text[t - 1]]
            assert text[t] in choices
            (other if window in seen else fresh_green).append(green)
            seen.add(window)
    # With delta = 30 a green token is taken wherever one of 32 successors is green.
    assert np.mean(fresh_green) > 0.99
    assert abs(np.mean(other) - 0.25) < 0.15


def test_reading_lists_what_the_suspect_expects() -> None:
    rng = np.random.default_rng(4)
    source = Source.draw(80, rng)
    suspect = Counts(80, 1).learn(source.write(50, 60, rng))
    base = Counts(80, 1).learn(source.write(50, 60, rng))
    texts = source.write(3, 40, rng)
    found = read(suspect, texts, 1, base=base)
    assert isinstance(found, Reading) and found.base is not None
    expected = [t for text in texts for t in read_positions(text, 0, 1)[0]]
    assert len(found) == len(expected)
    law = suspect.law(found.windows.astype(np.int64))
    assert found.tokens[found.starts[:-1]].tolist() == law.argmax(axis=1).tolist()
    listed = law[np.repeat(np.arange(len(found)), np.diff(found.starts)), found.tokens]
    np.testing.assert_allclose(found.suspect, listed, rtol=1e-6)
    assert (
        testing.test(
            argmax(found), key_of(b"\x02" * 32), GreenList(context_width=1), decoys=0
        ).log10_pvalue
        > -5
    )
