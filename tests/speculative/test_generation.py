"""The verify loop with every method: laws, acceptance, histories, streams, and bad input.

Models are Markov chains, so that the law of whole texts is known. Statistical tests have fixed
seeds and bounds that a correct program fails with a probability below 1e-4 when seeds change.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from markov import Markov, law_of_texts, pair
from scipy import stats as scipy_stats

from filigrane import GammaReweight, Gumbel, Key, Sampling, Tournament, detect
from filigrane.contexts import scored_positions
from filigrane.errors import (
    DraftError,
    LogitsError,
    ModelError,
    SchemeError,
    TokenError,
    UnsupportedDecoding,
    VocabularyMismatch,
)
from filigrane.schemes import DeltaReweight, GreenList
from filigrane.speculative import (
    METHODS,
    MarkedBlock,
    NGram,
    Session,
    ShiftedRace,
    Speculated,
    generate,
    method,
)
from filigrane.speculative.laws import race
from filigrane.toy import ZipfModel
from keymaker import keys_from_seed

ONE = Gumbel(context_width=1)
TAGS = [
    *(f"{name}@gumbel:context_width=1" for name in METHODS if name != "pfr"),
    *(f"pfr:drafts={n}@gumbel:context_width=1" for n in (1, 2, 3)),
    "frontier:c=3@gumbel:context_width=1",
    *(
        f"{name}@{scheme}:context_width=1"
        for name in ("watermark", "mws", "mse", "two-key", "keyed-coin")
        for scheme in ("tournament", "gamma", "delta")
    ),
]
MARKING = [tag for tag in TAGS if method(tag).marks]
"""Every method, with every scheme it takes."""


def key_of(seed: int, slots: int = 1) -> Key:
    return keys_from_seed(seed, 1, slots)[0]


def texts(
    tag_or_method,  # type: ignore[no-untyped-def]
    tables: tuple[np.ndarray, np.ndarray],
    count: int,
    length: int,
    *,
    seed: int = 0,
    draft_length: int = 3,
    batch: int = 2000,
    **options,  # type: ignore[no-untyped-def]
) -> list[Speculated]:
    """`count` texts after token 0, each under a key of its own."""
    how = method(tag_or_method) if isinstance(tag_or_method, str) else tag_or_method
    target, draft = Markov(tables[0]), Markov(tables[1])
    root = key_of(seed, slots=1)
    found: list[Speculated] = []
    for start in range(0, count, batch):
        rows = min(batch, count - start)
        keys = [root.user(start + i) if how.marks else None for i in range(rows)]
        found += generate(
            target,
            draft,
            [[0]] * rows,
            length,
            keys,
            how,
            draft_length=draft_length,
            rng=np.random.default_rng([seed, start]),
            **options,
        )
    return found


def joint_pvalue(found: list[Speculated], p: np.ndarray) -> float:
    """Chi-square of whole texts against the law of the target alone."""
    table = np.stack([text.tokens for text in found])
    size, length = p.shape[0], table.shape[1]
    numbers = table @ size ** np.arange(length - 1, -1, -1)
    seen = np.bincount(numbers, minlength=size**length)
    expected = law_of_texts(p, 0, length) * len(found)
    assert not seen[expected == 0.0].any()
    order = np.argsort(expected)[::-1]
    big = order[expected[order] >= 5.0]
    rest = order[expected[order] < 5.0]
    cells = np.append(seen[big], seen[rest].sum())
    wanted = np.append(expected[big], expected[rest].sum())
    if wanted[-1] < 5.0:
        cells, wanted = cells[:-1], wanted[:-1] * (cells[:-1].sum() / wanted[:-1].sum())
    return float(scipy_stats.chisquare(cells, wanted * cells.sum() / wanted.sum()).pvalue)


@pytest.mark.slow
@pytest.mark.parametrize("tag", TAGS)
def test_texts_have_the_law_of_the_target(tag: str) -> None:
    """Four tokens, three of them marked, fresh key per text: the joint law is the target's."""
    tables = pair(3, seed=4)
    assert joint_pvalue(texts(tag, tables, 4000, 4, seed=11), tables[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["plain", "otmc", "skt", "mws", "bv", "bv-skt", "pfr"])
def test_law_with_the_history_in_play(tag: str) -> None:
    """Six tokens of three with windows of one: windows repeat in most texts."""
    tables = pair(3, seed=4)
    found = texts(f"{tag}@gumbel:context_width=1", tables, 10_000, 6, seed=5)
    assert joint_pvalue(found, tables[0]) > 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetfulBlock(MarkedBlock):
    """Block verification that gives the windows of discarded tokens back."""

    spends_discarded: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveReuse(ShiftedRace):
    """The residual raced with the draft's own clocks, not with what they have left."""

    def resolve(self, p, q, clocks, x):  # type: ignore[no-untyped-def]
        y = ShiftedRace.resolve(self, p, q, clocks, x)
        return x if y == x else race(clocks, np.maximum(p - q, 0.0))


@pytest.mark.slow
def test_the_law_test_can_fail() -> None:
    # A draft that is wrong most of the time: much is discarded, and its windows come again.
    p = np.array([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])
    q = np.array([[0.1, 0.3, 0.6], [0.6, 0.1, 0.3], [0.3, 0.6, 0.1]])
    forgetful = texts(ForgetfulBlock(scheme=ONE), (p, q), 6000, 6, seed=5)
    assert joint_pvalue(forgetful, p) < 1e-12
    mindful = texts(MarkedBlock(scheme=ONE), (p, q), 6000, 6, seed=5)
    assert joint_pvalue(mindful, p) > 1e-4
    # The clock of a token that the draft likes is late, and the residual hardly wants it.
    p, q = np.tile([0.04, 0.5, 0.46], (3, 1)), np.tile([0.57, 0.4, 0.03], (3, 1))
    naive = texts(NaiveReuse(scheme=ONE), (p, q), 4000, 4, seed=11)
    assert joint_pvalue(naive, p) < 1e-12
    shifted = texts(ShiftedRace(scheme=ONE), (p, q), 4000, 4, seed=11)
    assert joint_pvalue(shifted, p) > 1e-4


def acceptance_z(found: list[Speculated], tables: tuple[np.ndarray, np.ndarray]) -> float:
    """First drafts kept against sum min(P, Q) at their positions, in standard deviations."""
    kept, expected, variance = 0, 0.0, 0.0
    overlap = np.minimum(*tables).sum(axis=1)
    for text in found:
        starts = np.concatenate([[0], np.cumsum(text.emitted)[:-1]])
        for start, accepted, offered in zip(starts, text.accepted, text.proposed, strict=True):
            if offered:
                a = overlap[0 if start == 0 else text.tokens[start - 1]]
                kept += accepted > 0
                expected += a
                variance += a * (1.0 - a)
    return float((kept - expected) / np.sqrt(variance))


@pytest.mark.slow
@pytest.mark.parametrize("tag", [t for t in TAGS if method(t).full_acceptance])
def test_acceptance_is_that_of_plain_speculation(tag: str) -> None:
    tables = pair(5, seed=2)
    found = texts(tag, tables, 150, 12, seed=3, draft_length=1)
    assert abs(acceptance_z(found, tables)) < 4.0


@pytest.mark.slow
def test_the_acceptance_test_can_fail() -> None:
    tables = pair(5, seed=2)
    found = texts("pfr:drafts=1@gumbel:context_width=1", tables, 900, 12, seed=3, draft_length=1)
    assert acceptance_z(found, tables) < -4.0


@pytest.mark.slow
def test_acceptance_of_the_coupled_race() -> None:
    """sum_w 1 / sum_v max(Q_v / Q_w, P_v / P_w), between (1 - TV) / (1 + TV) and 1 - TV."""
    p, q = pair(6, seed=8)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.maximum(q[:, None, :] / q[:, :, None], p[:, None, :] / p[:, :, None])
    theory = (1.0 / ratios.sum(axis=2)).sum(axis=1)
    overlap = np.minimum(p, q).sum(axis=1)
    assert np.all(theory <= overlap) and np.all(theory >= overlap / (2.0 - overlap))
    found = texts("mws@gumbel:context_width=4", (p, q), 150, 60, seed=3, draft_length=1)
    kept, wanted, variance = 0, 0.0, 0.0
    for text in found:
        start = 0
        for emitted, accepted, offered in zip(
            text.emitted, text.accepted, text.proposed, strict=True
        ):
            if offered and text.marked[start]:
                a = theory[text.tokens[start - 1]]
                kept, wanted, variance = kept + accepted, wanted + a, variance + a * (1.0 - a)
            start += emitted
    assert abs(kept - wanted) < 4.0 * np.sqrt(variance)


@pytest.mark.parametrize("tag", [t for t in MARKING if method(t).full_strength and "gumbel" in t])
def test_full_strength_writes_the_token_that_wins_the_race(tag: str) -> None:
    """Whatever was drafted, a marked token is the one that the unaccelerated mark would write."""
    how = method(tag.replace("context_width=1", "context_width=2"))
    tables = pair(40, seed=6)
    key = key_of(1, slots=1)
    (text,) = generate(
        Markov(tables[0]),
        Markov(tables[1]),
        [[3]],
        200,
        [key],
        how,
        rng=np.random.default_rng(0),
    )
    from filigrane import prf

    assert text.marked.sum() > 150
    for t in np.flatnonzero(text.marked):
        block = prf.block(key.prf_keys(how.scheme.label)[0], text.tokens[t - 2 : t])
        law = how.scheme.reweight(tables[0][text.tokens[t - 1]], block)
        assert law[text.tokens[t]] == 1.0


@pytest.mark.parametrize("tag", MARKING)
@pytest.mark.parametrize("width", [1, 3])
def test_generator_and_detector_agree_on_what_is_marked(tag: str, width: int) -> None:
    """After rejections, repeats, an early end and more drafts than there is room for."""
    how = method(tag.replace("context_width=1", f"context_width={width}"))
    found = texts(how, pair(6, seed=1), 12, 90, seed=2, draft_length=5, stop=(5,))
    spent = 0
    for text in found:
        rule = np.zeros(text.tokens.shape, dtype=bool)
        rule[scored_positions(text.tokens, width)] = True
        if how.spends_discarded:
            assert not np.any(text.marked & ~rule)
            spent += int((rule & ~text.marked).sum())
        else:
            assert np.array_equal(text.marked, rule)
        assert 5 not in text.tokens[:-1]
        assert text.emitted.sum() == text.tokens.shape[0] <= 90
        assert np.all(text.accepted <= text.proposed) and np.all(text.proposed <= 5)
        assert np.all(text.emitted <= text.accepted + 1)
        assert np.all(np.diff(text.seconds) >= 0.0)
    if how.spends_discarded and width == 1:
        assert spent > 0  # the price of block verification, and proof that the rule is in play


def test_records_hold_the_log_probabilities_of_the_target() -> None:
    tables = pair(6, seed=1)
    for text in texts("otmc", tables, 3, 40):
        before = np.concatenate([[0], text.tokens[:-1]])
        assert np.allclose(text.log_probs, np.log(tables[0][before, text.tokens]), atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    tables = pair(8, seed=1)
    target, draft, key = Markov(tables[0]), Markov(tables[1]), key_of(0, slots=4)
    for tag in ("otmc", "bv-skt", "plain", "pfr"):
        how = method(tag)
        keys = [key if how.marks else None] * 3
        several = generate(
            target, draft, [[1], [2, 5], [3]], 30, keys, how, rng=np.random.default_rng(0)
        )
        alone = generate(target, draft, [[1]], 30, keys[:1], how, rng=np.random.default_rng(0))
        assert np.array_equal(several[0].tokens, alone[0].tokens)


@pytest.mark.parametrize("tag", MARKING)
def test_a_method_finds_its_own_mark_and_no_other(tag: str) -> None:
    how = method(tag.replace("context_width=1", "context_width=4"))
    target, draft = ZipfModel(60, 1.0), ZipfModel(60, 0.7)
    key, other = key_of(1), key_of(2)
    (text,) = generate(
        target, draft, [[1]], 400, [key], how, rng=np.random.default_rng(0), draft_length=3
    )
    assert how.detect(text.tokens, key).log_pvalue < np.log(1e-6)
    assert how.detect(text.tokens, other).log_pvalue > np.log(1e-4)
    if how.one_key:
        assert how.detect(text.tokens, key) == detect(text.tokens, key, how.scheme)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["otmc", "skt", "bv-skt", "two-key", "keyed-coin", "mse"])
def test_without_the_key_p_is_uniform(tag: str) -> None:
    """Texts of one key, tested under a thousand others."""
    how = method(tag)
    target, draft = ZipfModel(60, 1.0), ZipfModel(60, 0.7)
    (text,) = generate(
        target, draft, [[1]], 60, [key_of(1, slots=1)], how, rng=np.random.default_rng(0)
    )
    others = key_of(2, slots=1)
    p = [how.detect(text.tokens, others.user(i)).pvalue for i in range(1000)]
    assert scipy_stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["otmc", "skt", "pfr", "bv-skt"])
def test_another_drafter_changes_detection_little(tag: str) -> None:
    """TPR at FPR 1 %: at most two points, and what 1,000 texts leave open, between two drafters."""
    how = method(tag)
    p, close = pair(30, seed=3, sharpness=0.4)
    far = 0.3 * p + 0.7 / 30
    rates = []
    for number, q in enumerate((close, far)):
        found = texts(how, (p, q), 1000, 24, seed=20 + number, draft_length=3)
        root = key_of(20 + number, slots=1)
        logs = [how.detect(text.tokens, root.user(i)).log_pvalue for i, text in enumerate(found)]
        rates.append(float(np.mean(np.array(logs) <= np.log(0.01))))
    assert min(rates) > 0.5
    noise = 3.0 * np.sqrt(sum(r * (1.0 - r) for r in rates) / 1000)
    assert abs(rates[0] - rates[1]) <= 0.02 + noise


def test_no_two_uses_share_a_stream() -> None:
    """Keys of the streams of all schemes and methods differ, as do the blocks of one position."""
    key = key_of(0, slots=1)
    labels = {method(tag).scheme.label + stream for tag in TAGS for stream in method(tag).streams}
    words = {key.prf_keys(label)[0].tobytes() for label in labels}
    assert len(words) == len(labels) >= 10
    seen: list[np.ndarray] = []

    class Spy(type(method("keyed-coin"))):  # type: ignore[misc]
        def decide(self, here, rng):  # type: ignore[no-untyped-def]
            seen.append(here.noise.blocks)
            return super().decide(here, rng)

    tables = pair(20)
    how = Spy()
    generate(
        Markov(tables[0]), Markov(tables[1]), [[0]], 50, [key], how, rng=np.random.default_rng(0)
    )
    for blocks in seen:
        assert blocks.shape == (3, 8)
        assert len({block.tobytes() for block in blocks}) == 3


@pytest.mark.slow
def test_more_drafts_are_kept_more_often_at_the_same_strength() -> None:
    tables = pair(30, seed=5, sharpness=0.5)
    rate, nodes = [], []
    for drafts in (1, 2, 4):
        found = texts(f"pfr:drafts={drafts}", tables, 30, 80, draft_length=3)
        rate.append(sum(t.emitted.sum() for t in found) / sum(t.emitted.size for t in found))
        nodes.append(max(int(t.nodes.max()) for t in found))
    assert rate[0] < rate[1] < rate[2] and nodes == [3, 6, 12]


@pytest.mark.slow
def test_block_verification_keeps_more() -> None:
    tables = pair(10, seed=5)
    rates = {}
    for tag in ("plain", "bv", "bv-skt"):
        found = texts(tag, tables, 150, 60, draft_length=4)
        rates[tag] = sum(t.emitted.sum() for t in found) / sum(t.emitted.size for t in found)
    assert rates["bv"] > rates["plain"] * 1.01 and rates["bv-skt"] > rates["plain"] * 1.01


# ---------------------------------------------------------------- drafts of several kinds


def test_a_draft_that_always_matches_is_always_kept() -> None:
    p, _ = pair(12, seed=1)
    for tag in MARKING:
        how = method(tag)
        if not how.drafted or how.name in ("mws", "two-key"):
            continue
        for text in texts(how, (p, p), 2, 41, draft_length=4):
            assert np.all(text.accepted[:-1] == text.proposed[:-1]), tag


def test_a_draft_that_never_matches_is_never_kept() -> None:
    p = np.zeros((6, 6))
    p[:, :3] = pair(3)[0][[0, 1, 2, 0, 1, 2]]
    q = p[:, ::-1].copy()
    for tag in TAGS:
        for text in texts(tag, (p, q), 2, 20, draft_length=3):
            assert not text.accepted.any() and np.all(text.emitted == 1), tag
            assert set(text.tokens.tolist()) <= {0, 1, 2}


def test_prompt_lookup_drafts_what_followed_before() -> None:
    """A text that goes round and round is drafted by itself, and everything is kept."""
    circle = np.roll(np.eye(7), 1, axis=1)
    for tag in ("plain", "otmc", "bv-skt", "pfr"):
        how = method(tag)
        (text,) = generate(
            Markov(circle),
            NGram(),
            [[0, 1, 2, 3, 4, 5, 6, 0, 1]],
            30,
            [key_of(0) if how.marks else None],
            how,
            rng=np.random.default_rng(0),
        )
        assert text.tokens.tolist() == [(2 + i) % 7 for i in range(30)]
        assert text.emitted.tolist() == [5] * 6


def test_prompt_lookup_without_a_match_is_one_token_per_call() -> None:
    steps = np.roll(np.eye(50), 1, axis=1)
    (text,) = generate(
        Markov(steps), NGram(), [[0]], 20, [None], method("plain"), rng=np.random.default_rng(0)
    )
    assert text.emitted.tolist() == [1] * 20 and not text.proposed.any()


@pytest.mark.slow
def test_prompt_lookup_keeps_the_law() -> None:
    p, _ = pair(3, seed=4)
    for tag in ("plain", "skt", "otmc", "pfr", "bv-skt"):
        how = method(f"{tag}@gumbel:context_width=1")
        root = key_of(5, slots=1)
        keys = [root.user(i) if how.marks else None for i in range(3000)]
        found = generate(
            Markov(p),
            NGram(),
            [[0, 1, 2, 0, 2, 1, 0]] * 3000,
            4,
            keys,
            how,
            rng=np.random.default_rng(1),
        )
        assert joint_pvalue(found, p) > 1e-4, tag


# ---------------------------------------------------------------- the session


def test_iterating_yields_what_results_hold() -> None:
    tables = pair(9)
    session = Session(
        Markov(tables[0]),
        Markov(tables[1]),
        [[0], [1]],
        25,
        [key_of(0), None],
        method("otmc"),
        rng=np.random.default_rng(0),
    )
    parts = list(itertools.islice(session, 3))
    early = [text.tokens.tolist() for text in session.results()]
    assert early == [np.concatenate([step[row] for step in parts]).tolist() for row in (0, 1)]
    list(session)  # goes on
    assert [text.tokens.size for text in session.results()] == [25, 25]
    assert [
        text.tokens.tolist()[: len(e)] for text, e in zip(session.results(), early, strict=True)
    ] == early
    assert list(session) == []
    assert session.results()[1].key is None and not session.results()[1].marked.any()
    assert "otmc" in repr(session)


def test_warping_is_applied_to_both_models_before_anything_else() -> None:
    tables = pair(30, seed=2)
    top = np.argsort(tables[0], axis=1)[:, -3:]
    for tag in ("plain", "otmc", "bv-skt", "mws@tournament"):
        for text in texts(tag, tables, 5, 40, sampling=Sampling(top_k=3, temperature=0.7)):
            before = np.concatenate([[0], text.tokens[:-1]])
            assert all(token in top[last] for last, token in zip(before, text.tokens, strict=True))


def test_greedy_drafting_without_a_mark() -> None:
    tables = pair(30, seed=2)
    (text,) = texts("plain", tables, 1, 20, sampling=Sampling(temperature=0.0))
    before = np.concatenate([[0], text.tokens[:-1]])
    assert np.array_equal(text.tokens, np.argmax(tables[0], axis=1)[before])


# ---------------------------------------------------------------- bad input


def test_bad_input_is_refused_before_anything_is_generated() -> None:
    tables = pair(5)
    target, draft, key = Markov(tables[0]), Markov(tables[1]), key_of(0)
    rng = np.random.default_rng(0)

    def go(**changes):  # type: ignore[no-untyped-def]
        arguments = {"draft_length": 4, "method": method("otmc"), "keys": [key], **changes}
        return generate(
            arguments.get("target", target),
            arguments.get("draft", draft),
            arguments.get("prompts", [[0]]),
            10,
            arguments["keys"],
            arguments["method"],
            draft_length=arguments["draft_length"],
            rng=rng,
            sampling=arguments.get("sampling"),
            slots=arguments.get("slots"),
        )

    assert len(go()[0].tokens) == 10
    for value in (0, -1, 65):
        with pytest.raises(DraftError, match=r"1\.\.64"):
            go(draft_length=value)
    with pytest.raises(DraftError, match="needs a draft"):
        go(draft=None)
    with pytest.raises(DraftError, match="cannot draft"):
        go(draft="smollm2")
    with pytest.raises(ModelError, match="cannot be a target"):
        go(target="smollm2")
    with pytest.raises(VocabularyMismatch, match="do not share a vocabulary"):
        go(draft=Markov(pair(6)[1]))
    with pytest.raises(TokenError, match="prompt 0 is empty"):
        go(prompts=[[]])
    with pytest.raises(SchemeError, match="2 prompts, 1 keys"):
        go(prompts=[[0], [1]])
    with pytest.raises(SchemeError, match="slots 0 to"):
        go(slots=[99])
    with pytest.raises(SchemeError, match="leaves text unmarked"):
        go(method=method("plain"))
    with pytest.raises(UnsupportedDecoding, match="greedy"):
        go(sampling=Sampling(temperature=0.0))

    class Named(Markov):
        size = 10
        vocabulary = "a"

    small = Named(tables[1])
    small.size = 11  # type: ignore[misc]
    with pytest.raises(DraftError, match="Did you swap them"):
        go(target=Named(tables[0]), draft=small)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_leave_nothing_to_draw(value: float) -> None:
    tables = pair(5)

    class Broken(Markov):
        def read(self, state, tokens, valid, *, last, parents=None):  # type: ignore[no-untyped-def]
            logits = super().read(state, tokens, valid, last=last).copy()
            logits[0, -1, 2] = value
            return logits

    with pytest.raises(LogitsError, match="row 0"):
        generate(
            Broken(tables[0]),
            Markov(tables[1]),
            [[0]],
            10,
            [None],
            method("plain"),
            rng=np.random.default_rng(0),
        )


def test_all_logits_minus_infinity() -> None:
    tables = pair(5)
    nothing = np.zeros((5, 5))
    with pytest.raises(LogitsError, match="no token can be drawn"):
        generate(
            Markov(nothing),
            Markov(tables[1]),
            [[0]],
            10,
            [None],
            method("plain"),
            rng=np.random.default_rng(0),
        )


def test_room_for_no_token_and_for_one() -> None:
    tables = pair(5)
    for tag in ("plain", "otmc", "bv-skt"):
        assert texts(tag, tables, 1, 0)[0].tokens.size == 0
        (one,) = texts(tag, tables, 1, 1, draft_length=9)
        assert one.tokens.size == 1 and not one.proposed.any()


def test_methods_have_a_text_form() -> None:
    assert method("pfr:drafts=4").branching == 4
    assert method("frontier:c=2").c == 2.0  # type: ignore[attr-defined]
    assert method("mws@tournament:depth=20").scheme == Tournament(depth=20)
    assert method("mse", GammaReweight()).scheme == GammaReweight()
    assert method("mse", DeltaReweight()).tag == "mse@delta:context_width=4"
    for tag in (*TAGS, "mixed:share=0.25", "frontier:c=inf", "pfr:drafts=7"):
        assert method(method(tag).tag) == method(tag)
    for text, message in (
        ("otcm", "Did you mean 'otmc'"),
        ("otmc:c=1", "no parameter 'c'"),
        ("otmc:", "no parameter ''"),
        ("pfr:drafts=2,drafts=3", "given twice"),
        ("frontier:c=x", "is not of type float"),
        ("frontier:c=0.5", "c must be from 1"),
        ("pfr:drafts=0", "drafts must be an integer"),
        ("otmc@tournament", "its scheme is gumbel"),
        ("bv-skt@gamma", "gumbel"),
        ("mws@greenlist", "unbiased"),
        ("mws@nothing", "unknown scheme"),
    ):
        with pytest.raises(SchemeError, match=message):
            method(text)
    with pytest.raises(SchemeError, match="unbiased"):
        METHODS["mws"](scheme=GreenList())


def test_a_session_shows_no_secret() -> None:
    tables = pair(5)
    session = Session(
        Markov(tables[0]),
        Markov(tables[1]),
        [[0]],
        5,
        [Key.generate("k")],
        method("otmc"),
        rng=np.random.default_rng(0),
    )
    assert "array" not in repr(session) and "uint32" not in repr(session._rows)
