"""A transformer trained from nothing: found in all four settings when taught, clean when not."""

import math

import numpy as np
import pytest

from filigrane import GreenList, Key, stats
from filigrane.radioactivity import answers, argmax, differential, soft, testing
from filigrane.radioactivity.ngram import marked
from filigrane.study import tiny

SCHEME = GreenList(context_width=1, gamma=0.25, delta=3.0)


@pytest.fixture(scope="module")
def here() -> tiny.World:
    return tiny.world(0, SCHEME)


def test_taught_on_marked_text_alone_he_is_found_in_every_setting(here: tiny.World) -> None:
    rows = tiny.trial(here, 1.0)
    assert len(rows) == 8
    assert {row["setting"] for row in rows} == {
        f"{access}, {logs}"
        for access in ("open", "closed")
        for logs in ("supervised", "unsupervised")
    }
    for row in rows:
        assert row["log10_pvalue"] < -5.0, row


def test_a_tenth_is_seen_by_what_training_has_changed(here: tiny.World) -> None:
    rows = tiny.trial(here, 0.1)
    z = {(row["setting"], row["statistic"]): row["z"] for row in rows}
    for setting in ("open, supervised", "open, unsupervised"):
        assert z[setting, "differential"] > 6.0
        assert z[setting, "differential"] > 2.5 * max(z[setting, "argmax count"], 1.0)


def test_clean_he_is_clean_under_two_hundred_keys(here: tiny.World) -> None:
    suspect = tiny.bob(here, 0.0)
    asked = answers(tiny.asked(here, suspect, here.fresh[:, :8]), 1)
    rng = np.random.default_rng(1)
    logs: dict[str, list[float]] = {}
    for number in range(200):
        key = Key.generate(f"key-{number}", slots=1)
        seen = tiny.reading(here, suspect, marked(here.source, 5, tiny.LENGTH, key, SCHEME, rng))
        for evidence in (argmax(seen), soft(seen), differential(seen), asked):
            found = testing.test(evidence, key, SCHEME, decoys=0)
            logs.setdefault(found.statistic, []).append(found.log_pvalue)
    assert len(logs) == 4
    for name, values in logs.items():
        # Fresh keys each time: a threshold that chance crosses once in ten thousand runs.
        assert stats.log_uniformity(np.exp(values)) > math.log(2.5e-5), name
