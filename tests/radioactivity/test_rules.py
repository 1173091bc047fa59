import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filigrane.errors import EvidenceError, TokenError
from filigrane.radioactivity.rules import add, answered, first_rows, read_positions

small = st.lists(st.integers(0, 3), max_size=40)


@given(small, st.integers(0, 10), st.integers(1, 4), st.lists(small, max_size=2))
def test_positions_are_first_occurrences_in_everything_attended_to(
    tokens: list[int], start: int, width: int, earlier: list[list[int]]
) -> None:
    start = min(start, len(tokens))
    positions, ledger = read_positions(tokens, start, width, earlier=earlier)
    held = {tuple(t[i : i + width]) for t in earlier for i in range(len(t) - width + 1)}
    expected = []
    for t in range(len(tokens) - 1):
        begin = t - width + 1
        window = tuple(tokens[begin : t + 1])
        before = {tuple(tokens[i : i + width]) for i in range(begin)} if begin >= 0 else set()
        if begin >= start and window not in before | held:
            expected.append(t)
    assert positions.tolist() == expected
    assert ledger["scored"] == len(expected)
    dropped = sum(ledger.values()) - ledger["candidates"] - ledger["scored"]
    assert ledger["candidates"] - dropped == ledger["scored"]


def test_a_window_of_the_prompt_spends_the_one_in_the_text() -> None:
    # Also the prompt's last one, and the one across its border.
    # What follows the last token is no prediction worth having: texts end alike.
    tokens = [5, 6, 7, 5, 6, 8, 9]
    assert read_positions(tokens, 3, 2)[0].tolist() == [5]
    assert read_positions(tokens, 3, 2, attention_rule=False)[0].tolist() == [4, 5]
    assert read_positions(tokens[3:], 0, 2)[0].tolist() == [1, 2]
    assert read_positions(tokens[3:], 0, 2, earlier=[[5, 6, 7]])[0].tolist() == [2]


def test_positions_refuse_what_is_no_document() -> None:
    with pytest.raises(EvidenceError, match="start=4 and width=1 do not fit a document of 3"):
        read_positions([1, 2, 3], 4, 1)
    with pytest.raises(TokenError, match="integers"):
        read_positions([0.5], 0, 1)
    positions, ledger = read_positions([], 0, 2)
    assert positions.size == 0 and ledger["scored"] == 0


@given(small, small, st.integers(1, 3))
def test_answers_lose_the_windows_of_their_request(
    prompt: list[int], answer: list[int], width: int
) -> None:
    rows, ledger = answered(prompt, answer, width)
    asked = {tuple(prompt[i : i + width]) for i in range(len(prompt) - width + 1)}
    expected = [
        answer[i : i + width + 1]
        for i in range(len(answer) - width)
        if tuple(answer[i : i + width]) not in asked
    ]
    assert rows.tolist() == expected
    rest = ledger["candidates"] - ledger["incomplete window"] - ledger["window in the prompt"]
    assert rest == ledger["scored"] == len(expected)
    whole, _ = answered(prompt, answer, width, prompt_rule=False)
    assert whole.shape[0] == max(0, len(answer) - width)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=60))
def test_first_rows(rows: list[tuple[int, int]]) -> None:
    table = np.array(rows, dtype=np.uint32).reshape(-1, 2)
    seen: set[tuple[int, int]] = set()
    expected = [i for i, row in enumerate(rows) if not (row in seen or seen.add(row))]  # type: ignore[func-returns-value]
    assert first_rows(table).tolist() == expected


def test_ledgers_add_up_rule_by_rule() -> None:
    one = {"candidates": 5, "a": 1, "scored": 4}
    two = {"candidates": 3, "b": 2, "scored": 1}
    assert add([one, two]) == {"candidates": 8, "a": 1, "b": 2, "scored": 5}
    assert list(add([one, two])) == ["candidates", "a", "b", "scored"]
