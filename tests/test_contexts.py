import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filigrane.contexts import Corpus, History, as_token_ids, collect, scored_positions
from filigrane.errors import TokenError, TooShort, VocabularyMismatch

small_texts = st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=4)


@given(small_texts, st.integers(1, 6))
def test_compiled_rule_equals_history(texts: list[list[int]], width: int) -> None:
    corpus = Corpus(texts)
    if max(map(len, texts)) <= width:
        with pytest.raises(TooShort, match=f"Pass at least {width + 1}"):
            collect(corpus, width)
        return
    evidence = collect(corpus, width)
    assert evidence.positions.tolist() == scored_positions(corpus, width).tolist()
    joined = np.concatenate([np.asarray(text, dtype=int) for text in texts])
    for position, window, token in zip(
        evidence.positions, evidence.windows, evidence.tokens, strict=True
    ):
        assert joined[position] == token
        assert joined[position - width : position].tolist() == window.tolist()
    assert len({tuple(window) for window in evidence.windows.tolist()}) == evidence.n_scored
    complete = sum(max(0, len(text) - width) for text in texts)
    assert evidence.n_scored + evidence.n_repeated == complete


@given(st.lists(st.integers(0, 2), max_size=30), st.data())
def test_rollback_undoes_push(tokens: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(tokens)))
    history, short = History(2), History(2)
    for token in tokens:
        history.push(token)
    for token in tokens[:kept]:
        short.push(token)
    history.rollback(len(tokens) - kept)
    for token in (0, 1, 2, 0, 1, 2, 2, 2):
        assert history.window() == short.window()
        assert history.fresh() == short.fresh()
        history.push(token)
        short.push(token)


def test_history_spelled_out() -> None:
    history = History(2)
    fresh = []
    for token in [5, 6, 7, 5, 6, 7, 8]:
        fresh.append(history.fresh())
        history.push(token)
    # the last two windows, (5, 6) and (6, 7), had occurred before
    assert fresh == [False, False, True, True, True, False, False]


def test_windows_never_cross_texts() -> None:
    assert scored_positions(Corpus([[1, 2, 3], [4, 5, 6]]), 2).tolist() == [2, 5]


def test_earlier_texts_use_up_windows() -> None:
    history = History(2, earlier=[[1, 2, 3]])
    history.push(1)
    history.push(2)
    assert history.window() == (1, 2)
    assert not history.fresh()


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2], [3, 4]], TokenError, "one text"),
        ([[1, 2], [3]], TokenError, "nested"),
        ("a text", TokenError, "tokenizer first"),
        (["a", "b"], TokenError, "tokenizer first"),
        ([1.0, 2.0], TokenError, "integers"),
        ([1, -1], TokenError, "padding"),
        ([1, 2**32 - 1], TokenError, "must lie in"),
        ([True, False], TokenError, "integers"),
        (None, TokenError, "Pass the ids themselves"),
        ({"input_ids": [1, 2]}, TokenError, "input_ids"),
        (np.int64(3), TokenError, "one text"),
    ],
)
def test_bad_tokens(tokens: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_token_ids(tokens)  # type: ignore[arg-type]


def test_wrong_vocabulary() -> None:
    with pytest.raises(VocabularyMismatch, match="another tokenizer"):
        as_token_ids([1, 50_000], vocab_size=50_000)
    assert as_token_ids([]).shape == (0,)
