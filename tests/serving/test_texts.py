"""One text as an engine writes it: the rule, its slot, what it does when it is resumed."""

import pickle

import numpy as np
import pytest

from filigrane import prf
from filigrane.contexts import scored_positions
from filigrane.detection import detect
from filigrane.embedding import MarkedSampler, Sampling
from filigrane.errors import LogitsError, NotReady, SecretLeakError, TokenError
from filigrane.keys import Key
from filigrane.schemes import SCHEMES, Gumbel, Scheme, from_tag
from filigrane.serving import Mark, MarkedText, known_answers, readiness
from filigrane.serving.drawing import Drawer, only
from filigrane.serving.texts import blocks

KEY = Key.generate("texts", slots=8)


def mark(scheme: Scheme | None = None, key: Key = KEY) -> Mark:
    return Mark(key=key, key_id=key.name, scheme=scheme or Gumbel())


def write(text: MarkedText, length: int, seed: int, vocab: int = 200) -> list[int]:
    rng = np.random.default_rng(seed)
    drawer, tokens = Drawer(vocab), list[int]()
    for _ in range(length):
        text.advance(tokens)
        logits = rng.standard_normal(vocab).astype(np.float32)
        if text.window is None:
            tokens.append(int(rng.integers(vocab)))
        elif text.scheme.acts_on == "logits":
            drawer.bias(text, blocks([text])[0], logits)
            tokens.append(int(np.argmax(logits)))
        else:
            tokens.append(drawer.draw(text, blocks([text])[0], logits, Sampling()))
    return tokens


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_found(name: str) -> None:
    scheme = from_tag(name)
    tokens = write(MarkedText(mark(scheme)), 200, 1)
    assert detect(tokens, KEY, scheme).log10_pvalue < -6
    assert detect(tokens, Key.generate("other"), scheme).log10_pvalue > -6


def test_windows_are_those_of_the_rule() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 400).tolist()
    text, marked = MarkedText(mark(from_tag("gumbel:context_width=3"))), []
    for t in range(len(tokens)):
        text.advance(tokens[:t])
        if text.window is not None:
            marked.append(t)
            assert text.window == tuple(tokens[t - 3 : t])
    assert marked == scored_positions(tokens, 3).tolist()


def test_it_draws_what_the_sampler_draws() -> None:
    """The same tokens as `embedding.MarkedSampler`, for the slot that the text has."""
    text = MarkedText(mark(), seed=5)
    slot = next(
        s
        for s in range(KEY.slots)
        if np.array_equal(KEY.prf_keys(Gumbel().label)[s], np.asarray(text.key_words))
    )
    sampler = MarkedSampler(Gumbel(), [KEY], rng=np.random.default_rng(0), slots=[slot])
    drawer, rng, tokens = Drawer(300), np.random.default_rng(3), list[int]()
    for _ in range(60):
        logits = rng.standard_normal(300).astype(np.float32)
        text.advance(tokens)
        window = text.window
        own = None if window is None else drawer.draw(text, blocks([text])[0], logits, Sampling())
        (token,) = sampler.sample(logits[None]).tolist()
        assert own in (None, token)
        tokens.append(token)


def test_blocks_of_texts_with_different_widths() -> None:
    texts = [MarkedText(mark(from_tag(f"gumbel:context_width={w}"))) for w in (2, 5, 2)]
    for text in texts:
        text.advance([7, 8, 9, 10, 11, 12])
    for text, words in zip(texts, blocks(texts), strict=True):
        np.testing.assert_array_equal(words, prf.block(text.key_words, text.window))


@pytest.mark.parametrize("name", ["gumbel", "greenlist:delta=6", "tournament"])
def test_a_resumed_text_goes_on_with_its_slot(name: str) -> None:
    scheme = from_tag(name)
    for number in range(20):
        text = MarkedText(mark(scheme))
        tokens = write(text, 60, number)
        again = MarkedText(mark(scheme), written=tokens)
        np.testing.assert_array_equal(np.asarray(again.key_words), np.asarray(text.key_words))
        text.advance(tokens)
        assert len(again) == 60 and again.window == text.window


def test_slots_are_drawn_evenly_and_seeds_repeat() -> None:
    def slot(text: MarkedText) -> int:
        words = KEY.prf_keys(Gumbel().label)
        return next(s for s in range(8) if np.array_equal(words[s], np.asarray(text.key_words)))

    drawn = np.bincount([slot(MarkedText(mark())) for _ in range(1600)], minlength=8)
    assert drawn.min() > 110 and drawn.max() < 300  # 200 each; chance below 1e-9
    seeded = [slot(MarkedText(mark(), seed=n)) for n in range(64)]
    assert seeded == [slot(MarkedText(mark(), seed=n)) for n in range(64)]
    assert len(set(seeded)) == 8
    nonces = [slot(MarkedText(mark(), nonce=str(n))) for n in range(64)]
    assert nonces == [slot(MarkedText(mark(), nonce=str(n))) for n in range(64)] != seeded
    other = Key.generate("texts", slots=8)
    theirs = [np.asarray(MarkedText(mark(key=other), seed=n).noise_key) for n in range(4)]
    ours = [np.asarray(MarkedText(mark(), seed=n).noise_key) for n in range(4)]
    assert not np.array_equal(theirs, ours), "a seed says nothing without the key"


def test_noise_is_private_and_of_its_position() -> None:
    text, same = MarkedText(mark(), seed=1), MarkedText(mark(), seed=1)
    np.testing.assert_array_equal(text.noise(3), same.noise(3))
    assert not np.array_equal(text.noise(3), text.noise(4))
    np.testing.assert_array_equal(text.noise(3), prf.block(text.noise_key, [3])[:4])


def test_placeholders_and_steps_back() -> None:
    text = MarkedText(mark())
    text.advance([1, 2, 3, 4, 5])
    with pytest.raises(TokenError, match="asynchronous"):
        text.advance([1, 2, 3, 4, 5, -1])
    with pytest.raises(TokenError, match="back_to"):
        text.advance([1, 2, 3])
    text.back_to(3)
    text.advance([1, 2, 3, 9])
    assert text.window == (1, 2, 3, 9)


def test_nothing_leaks() -> None:
    text = MarkedText(mark())
    body = KEY.export_text().rpartition(":")[2]
    assert body not in repr(text) and "secret" in repr(text.key_words) + repr(text.noise_key)
    with pytest.raises(SecretLeakError):
        pickle.dumps(text)


def test_rows_from_which_nothing_can_be_drawn() -> None:
    text, drawer = MarkedText(mark()), Drawer(10)
    text.advance([1, 2, 3, 4])
    for bad in (np.nan, np.inf):
        logits = np.zeros(10, np.float32)
        logits[3] = bad
        with pytest.raises(LogitsError):
            drawer.draw(text, blocks([text])[0], logits, Sampling())
    # Masks that leave nothing, in every scheme and with truncation: an error, not a crash.
    for name in SCHEMES:
        if name == "greenlist":
            continue
        other = MarkedText(mark(from_tag(name)))
        other.advance([1, 2, 3, 4])
        for bad in (np.full(10, -np.inf), np.full(10, np.nan), np.full(10, np.inf)):
            for sampling in (Sampling(top_p=0.9), Sampling(top_k=3), Sampling(top_k=3, top_p=0.5)):
                with pytest.raises(LogitsError):
                    drawer.draw(other, blocks([other])[0], bad.astype(np.float32), sampling)
    logits = np.zeros(10, np.float32)
    only(logits, 4)
    assert drawer.draw(text, blocks([text])[0], logits, Sampling()) == 4


def test_known_answers_are_found_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [from_tag(name) for name in SCHEMES]
    found = known_answers(everything)
    assert list(found) == list(SCHEMES) and max(found.values()) < -6
    # A machine that computes something else: one logit differs at one position.
    honest = readiness.test_logits

    def wrong(position: int) -> object:
        logits = honest(position)
        if position == 100:
            logits[:] = logits[::-1].copy()
        return logits

    monkeypatch.setattr(readiness, "test_logits", wrong)
    for scheme in everything:
        with pytest.raises(NotReady, match="computes something else"):
            known_answers([scheme])
