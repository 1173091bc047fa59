import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from filigrane import DeltaReweight, GreenList, Gumbel, Tournament, stats
from filigrane.errors import EvidenceError, FiligraneError, SchemeError
from filigrane.radioactivity import Reading, Tuples, argmax, soft, testing
from filigrane.schemes import Scheme
from keymaker import key_of, keys_from_seed

PUBLISHED = Path(__file__).parents[2] / "vectors" / "published" / "radioactive_scores.json"
SCHEMES = [GreenList(context_width=2), Gumbel(context_width=2), Tournament(context_width=2)]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def tuples(rows: np.ndarray) -> Tuples:
    return Tuples(
        rows=np.ascontiguousarray(rows, dtype=np.uint32),
        name="argmax count",
        ledger={"candidates": len(rows), "scored": len(rows)},
        n_documents=1,
    )


def random_rows(n: int, seed: int = 0, width: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 50_000, size=(n, width + 1), dtype=np.uint32)


def test_published_p_values() -> None:
    rows = json.loads(PUBLISHED.read_text())["rows"]
    assert len(rows) == 300
    for s, n, gamma, p in rows:
        assert math.exp(stats.log_sf_binomial(s, n, gamma)) == pytest.approx(p, rel=1e-9)


def test_counts_go_far_below_what_a_double_holds() -> None:
    # 9,000 of 10,000 green: log10 p = -4133.52, where scipy says -inf.
    key, scheme = key_of(b"\x01" * 32), GreenList(context_width=2)
    rows = random_rows(60_000)
    green = scheme.score(_blocks(key, scheme, rows), rows[:, -1]) > 0
    chosen = np.concatenate([rows[green][:9000], rows[~green][:1000]])
    found = testing.test(tuples(chosen), key, scheme, decoys=0)
    assert found.total == 9000.0
    assert found.log10_pvalue == pytest.approx(-4133.52, abs=0.005)
    assert found.log_pvalue == found.log_bound < -9500
    deep = np.concatenate([rows[green][:13_000], rows[~green][:100]])
    assert testing.test(tuples(deep), key, scheme, decoys=0).log_pvalue < -1e4


@by_scheme
def test_a_count_is_the_schemes_own_exact_tail(scheme: Scheme) -> None:
    key, rows = key_of(b"\x02" * 32), random_rows(500)
    total = float(scheme.score(_blocks(key, scheme, rows), rows[:, -1]).sum())
    found = testing.test(tuples(rows), key, scheme, decoys=0)
    assert found.total == pytest.approx(total, rel=1e-12)
    assert found.log_pvalue == pytest.approx(scheme.log_sf(found.total, 500), rel=1e-12)
    assert (found.n_scored, found.n_slots, found.method) == (500, 1, "exact tail")


@by_scheme
def test_slots_are_summed_under_one_exact_law(scheme: Scheme) -> None:
    key, rows = key_of(b"\x03" * 32, slots=3), random_rows(300)
    sums = [
        float(scheme.score(_blocks(key, scheme, rows, slot), rows[:, -1]).sum())
        for slot in range(3)
    ]
    found = testing.test(tuples(rows), key, scheme, decoys=0)
    assert found.total == pytest.approx(sum(sums))
    assert found.log_pvalue == pytest.approx(scheme.log_sf(found.total, 900), rel=1e-12)
    assert found.method == "exact tail, summed over 3 slots"


@by_scheme
def test_p_values_are_uniform_over_keys(scheme: Scheme) -> None:
    # Predictions that no key has touched, 300 keys, both kinds of evidence.
    rng = np.random.default_rng(4)
    reading = random_reading(rng, 200)
    for evidence in (argmax(reading), soft(reading)):
        p = [
            math.exp(testing.test(evidence, key, scheme, decoys=0).log_pvalue)
            for key in keys_from_seed(5, 300)
        ]
        assert stats.log_uniformity(p) > math.log(0.001), evidence.name


@by_scheme
def test_a_trace_is_found_and_decoys_stay_away(scheme: Scheme) -> None:
    key = key_of(b"\x06" * 32)
    rng = np.random.default_rng(6)
    reading = random_reading(rng, 300)
    owners = np.repeat(np.arange(len(reading)), np.diff(reading.starts))
    scores = scheme.score(_blocks(key, scheme, reading.windows)[owners], reading.tokens)
    tilted = reading.suspect * np.exp(scores / scores.std())
    order = np.lexsort((-tilted, owners))
    taught = dataclasses.replace(
        reading,
        tokens=reading.tokens[order],
        suspect=tilted[order].astype(np.float32),
    )
    for evidence in (argmax(taught), soft(taught)):
        found = testing.test(evidence, key, scheme, decoys=200)
        assert found.log10_pvalue < -8 and found.effect_low > 0
        decoys = found.decoys
        assert decoys is not None and decoys.n == len(decoys.z) == 200
        assert decoys.rank == 0 and decoys.log_pvalue == pytest.approx(-math.log(201))
        assert decoys.ks_log_pvalue > math.log(1e-4)
        assert abs(decoys.z_mean) < 0.35 and 0.8 < decoys.z_sd < 1.25
        other = testing.test(evidence, key_of(b"\x07" * 32), scheme, decoys=0)
        assert other.log10_pvalue > -4


def test_decoys_are_drawn_from_their_seed() -> None:
    evidence, key = tuples(random_rows(100)), key_of(b"\x08" * 32)
    scheme = GreenList(context_width=2)
    one, two, three = (
        testing.test(evidence, key, scheme, decoys=20, seed=seed).decoys for seed in (1, 1, 2)
    )
    assert one == two != three


def test_the_effect_is_in_points_with_an_exact_interval() -> None:
    low, high = testing.clopper_pearson(30, 100)
    # Clopper and Pearson's interval of 30 of 100, from the quantiles of the Beta law.
    assert (low, high) == (pytest.approx(0.2124064, abs=1e-6), pytest.approx(0.3998147, abs=1e-6))
    assert testing.clopper_pearson(0, 10)[0] == 0.0
    assert testing.clopper_pearson(10, 10)[1] == 1.0
    found = testing.test(
        tuples(random_rows(400)), key_of(b"\x09" * 32), GreenList(context_width=2), decoys=0
    )
    assert found.effect == pytest.approx(found.total / 400 - 0.25)
    assert found.effect_low < found.effect < found.effect_high
    assert found.effect_interval == "Clopper-Pearson, exact"


def test_results_are_values_and_have_no_truth() -> None:
    found = testing.test(
        tuples(random_rows(50)), key_of(b"\x0a" * 32), GreenList(context_width=2), decoys=20
    )
    with pytest.raises(TypeError, match=r"compare result.log_pvalue with math.log\(alpha\)"):
        bool(found)
    json.dumps(dataclasses.asdict(found))
    assert found.pvalue == math.exp(found.log_pvalue)
    assert "independent of the key" in found.hypothesis
    assert "0a0a" not in repr(found)


def test_bad_input() -> None:
    evidence, key, scheme = (
        tuples(random_rows(50)),
        key_of(b"\x0b" * 32),
        GreenList(context_width=2),
    )
    with pytest.raises(EvidenceError, match="windows of 2 tokens, but greenlist looks at 4"):
        testing.test(evidence, key, GreenList(context_width=4))
    with pytest.raises(FiligraneError, match="test takes one key"):
        testing.test(evidence, "key", scheme)  # type: ignore[arg-type]
    with pytest.raises(EvidenceError, match="decoys must be 0 or at least 20"):
        testing.test(evidence, key, scheme, decoys=5)
    with pytest.raises(SchemeError, match="scores after one window are not independent"):
        testing.test(evidence, key, DeltaReweight(context_width=2))


def test_a_million_pairs_in_a_second_or_so() -> None:
    # The goal is a million a second; a shared machine gets some room.
    evidence, key = tuples(random_rows(1_000_000)), key_of(b"\x0c" * 32)
    scheme = GreenList(context_width=2)
    testing.test(tuples(random_rows(100)), key, scheme, decoys=0)
    begin = time.perf_counter()
    testing.test(evidence, key, scheme, decoys=0)
    assert time.perf_counter() - begin < 5.0


def random_reading(rng: np.random.Generator, n: int, top: int = 8) -> Reading:
    laws = -np.sort(-rng.dirichlet(np.full(top, 0.3), size=n), axis=1)
    return Reading(
        windows=rng.integers(0, 20, size=(n, 2), dtype=np.uint32),
        documents=np.arange(n, dtype=np.int64) // 50,
        starts=np.arange(n + 1, dtype=np.int64) * top,
        tokens=rng.permuted(np.tile(np.arange(64, dtype=np.uint32), (n, 1)), axis=1)[
            :, :top
        ].reshape(-1),
        suspect=laws.reshape(-1).astype(np.float32),
        base=None,
        vocab_size=64,
        ledger={"candidates": n, "scored": n},
    )


def _blocks(key: object, scheme: Scheme, rows: np.ndarray, slot: int = 0) -> np.ndarray:
    from filigrane import prf

    words = np.asarray(key.prf_keys(scheme.label))[slot]  # type: ignore[attr-defined]
    return prf.block(words, rows[:, : scheme.context_width])
