import dataclasses
from pathlib import Path

import numpy as np
import pytest

from filigrane import GreenList
from filigrane.adapters.evidence import ReadingFolder, load_filter, require_match, save_filter
from filigrane.errors import EvidenceError, RecordError, VocabularyMismatch
from filigrane.radioactivity import (
    Exchange,
    Reading,
    WindowFilter,
    answers,
    argmax,
    differential,
    soft,
    testing,
)
from filigrane.radioactivity.evidence import exchange
from keymaker import key_of

NO_TOKENS = np.empty(0, dtype=np.int64)


def reading(base: bool = True) -> Reading:
    """Three positions, two of one window; argmaxes 4, 4 and 5."""
    return Reading(
        windows=np.array([[1], [1], [2]], dtype=np.uint32),
        documents=np.array([0, 1, 1]),
        starts=np.array([0, 2, 4, 5]),
        tokens=np.array([4, 7, 4, 9, 5], dtype=np.uint32),
        suspect=np.array([0.5, 0.25, 0.75, 0.125, 1.0], dtype=np.float32),
        base=np.array([0.25, 0.25, 0.5, 0.25, 0.5], dtype=np.float32) if base else None,
        vocab_size=10,
        ledger={"candidates": 5, "incomplete window": 2, "scored": 3},
    )


def test_argmax_counts_every_pair_once() -> None:
    found = argmax(reading())
    assert found.rows.tolist() == [[1, 4], [2, 5]]
    assert found.ledger == {
        "candidates": 5,
        "incomplete window": 2,
        "pair scored before": 1,
        "scored": 2,
    }
    assert (found.name, found.n_documents, len(found)) == ("argmax count", 2, 2)


def test_weights_of_one_window_are_summed() -> None:
    one = soft(reading())
    assert one.windows.tolist() == [[1], [2]]
    assert one.starts.tolist() == [0, 3, 4]
    assert one.tokens.tolist() == [4, 7, 9, 5]
    assert one.weights.tolist() == [1.25, 0.25, 0.125, 1.0]
    assert (one.n_candidates, one.n_documents) == (3, 2)
    change = differential(reading())
    assert change.weights.tolist() == [0.5, 0.0, -0.125, 0.5]
    assert change.concentration == pytest.approx((0.25 + 0.015625) / (0.25 + 0.015625 + 0.25))
    with pytest.raises(EvidenceError, match="read without a base model"):
        differential(reading(base=False))
    same = dataclasses.replace(reading(), base=reading().suspect)
    with pytest.raises(EvidenceError, match="suspect and base model are the same model"):
        differential(same)


def test_order_of_texts_does_not_matter_to_weights() -> None:
    rng = np.random.default_rng(0)
    parts = [_random(rng, number) for number in range(6)]
    one, two = Reading.join(parts), Reading.join(parts[::-1])
    assert len(one) == sum(map(len, parts))
    assert one.ledger["scored"] == len(one)
    a, b = soft(one), soft(two)
    assert a.windows.tolist() == b.windows.tolist() and a.tokens.tolist() == b.tokens.tolist()
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-12)
    assert a.weights.sum() == pytest.approx(one.suspect.sum(), rel=1e-6)


def test_readings_that_do_not_match_are_not_joined() -> None:
    with pytest.raises(EvidenceError, match="differ in window width"):
        Reading.join([reading(), reading(base=False)])
    with pytest.raises(EvidenceError, match="nothing to join"):
        Reading.join([])
    with pytest.raises(EvidenceError, match="do not fit together"):
        dataclasses.replace(reading(), starts=np.array([0, 2, 4, 4]))
    with pytest.raises(EvidenceError, match="lists no token"):
        dataclasses.replace(reading(), starts=np.array([0, 2, 2, 5]))


def test_answers() -> None:
    asked = [
        Exchange(prompt=np.array([1, 2]), answer=np.array([1, 5, 2, 6, 3, 4])),
        Exchange(prompt=NO_TOKENS, answer=np.array([3, 4, 3, 7])),
        Exchange(prompt=NO_TOKENS, answer=np.array([8])),
    ]
    found = answers(asked, 1)
    assert found.rows.tolist() == [[5, 2], [6, 3], [3, 4], [4, 3], [3, 7]]
    assert found.ledger == {
        "candidates": 11,
        "incomplete window": 3,
        "window in the prompt": 2,
        "pair scored before": 1,
        "scored": 5,
    }
    held = WindowFilter.build([[3, 3, 5]], 1)
    filtered = answers(asked, 1, window_filter=held)
    assert filtered.rows.tolist() == [[5, 2], [3, 4], [3, 7]]
    assert filtered.name == "answer count, filtered"
    total = filtered.ledger
    assert (
        total["candidates"]
        - sum(count for rule, count in total.items() if rule not in ("candidates", "scored"))
        == total["scored"]
    )
    assert len(answers(asked, 1, prompt_rule=False, tuple_rule=False)) == 8
    with pytest.raises(EvidenceError, match="no answers to test"):
        answers([], 1)
    with pytest.raises(EvidenceError, match="nothing is left to score: 1 candidates"):
        answers(asked[2:], 1)
    with pytest.raises(EvidenceError, match="made for windows of 1 tokens, the scheme has 2"):
        answers(asked, 2, window_filter=held)


def test_exchanges_are_checked() -> None:
    with pytest.raises(VocabularyMismatch):
        exchange([1, 2], [3, 400], 100)
    assert exchange([], [1], None).prompt.size == 0


def test_filter() -> None:
    made = WindowFilter.build([[1, 2, 3, 1, 2], [2, 3]], 2, vocab_size=10)
    assert made.windows.tolist() == [[1, 2], [2, 3], [3, 1]]
    assert made.counts.tolist() == [2, 2, 1]
    assert (made.documents, made.tokens, len(made), made.width) == (2, 7, 3, 2)
    asked = np.array([[2, 3], [3, 2], [1, 2], [70000, 1]], dtype=np.uint32)
    assert made.holds(asked).tolist() == [True, False, True, False]
    assert len(WindowFilter.build([[1, 2, 3, 1, 2]], 2, min_count=2)) == 1
    with pytest.raises(EvidenceError, match="no window of 5 tokens"):
        WindowFilter.build([[1, 2]], 5)
    with pytest.raises(VocabularyMismatch):
        WindowFilter.build([[1, 20]], 1, vocab_size=10)


def test_filter_finds_what_python_sets_find() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, 2**32 - 1, size=500)
    made = WindowFilter.build([text, text[:50]], 3)
    rows = np.concatenate([made.windows[::7], rng.integers(0, 9, (40, 3), dtype=np.uint32)])
    names = {tuple(row) for row in made.windows.tolist()}
    assert made.holds(rows).tolist() == [tuple(row) in names for row in rows.tolist()]


def test_filters_survive_the_disk_and_others_are_refused(tmp_path: Path) -> None:
    made = WindowFilter.build([[1, 2, 3]], 2, tokenizer_sha256="ab")
    path = tmp_path / "f.npz"
    save_filter(made, path)
    again = load_filter(path)
    assert again.windows.tolist() == made.windows.tolist()
    assert again.counts.tolist() == made.counts.tolist()
    assert (again.documents, again.tokens, again.tokenizer_sha256) == (1, 3, "ab")
    assert list(tmp_path.iterdir()) == [path]
    require_match(again, 2, "ab")
    with pytest.raises(EvidenceError, match="made for windows of 2 tokens"):
        require_match(again, 3, "ab")
    with pytest.raises(EvidenceError, match="another tokenizer"):
        require_match(again, 2, "cd")
    path.write_bytes(b"PK\x03\x04 no")
    with pytest.raises(RecordError, match="is not a filter"):
        load_filter(path)
    np.savez(path, windows=np.array([object()], dtype=object))
    with pytest.raises(RecordError, match="is not a filter"):  # a pickle is never opened
        load_filter(path)


def test_reading_folders_go_on_where_they_stopped(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [_random(rng, number) for number in range(4)]
    folder = ReadingFolder(tmp_path / "r")
    assert folder.begin({"width": 1, "inputs": []}) == 0
    folder.add(parts[0], 1)
    folder.add(parts[1], 2)
    again = ReadingFolder(tmp_path / "r")
    assert again.begin({"width": 1, "inputs": []}) == 2
    for number in (2, 3):
        again.add(parts[number], number + 1)
    loaded, joined = again.load(), Reading.join(parts)
    for name in ("windows", "documents", "starts", "tokens", "suspect", "base"):
        assert getattr(loaded, name).tolist() == getattr(joined, name).tolist()
    assert loaded.ledger == joined.ledger and loaded.vocab_size == 10
    again.note("alignment", {"rate": 0.5})
    assert again.notes == {"alignment": {"rate": 0.5}}
    with pytest.raises(RecordError, match=r"holds a reading with width 1, now it is 2"):
        again.begin({"width": 2, "inputs": []})


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"holds no reading.json"):
        ReadingFolder(tmp_path).settings  # noqa: B018
    folder = ReadingFolder(tmp_path)
    folder.begin({"width": 1})
    folder.add(_random(np.random.default_rng(0), 0), 1)
    (piece,) = tmp_path.glob("*.npz")
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(RecordError, match="delete it and read its documents again"):
        folder.load()
    piece.unlink()
    with pytest.raises(EvidenceError, match="no text has been read"):
        folder.load()
    (tmp_path / "reading.json").write_text("{")
    with pytest.raises(RecordError, match="damaged"):
        folder.settings  # noqa: B018


def test_a_test_of_one_pair_works() -> None:
    evidence = answers([Exchange(prompt=NO_TOKENS, answer=np.array([1, 2]))], 1)
    found = testing.test(evidence, key_of(b"\x01" * 32), GreenList(context_width=1), decoys=0)
    assert found.n_scored == 1 and found.pvalue in (1.0, pytest.approx(0.25))


def _random(rng: np.random.Generator, number: int) -> Reading:
    n, top = int(rng.integers(1, 9)), 3
    suspect = -np.sort(-rng.dirichlet(np.ones(top), size=n), axis=1)
    return Reading(
        windows=rng.integers(0, 4, size=(n, 1), dtype=np.uint32),
        documents=np.full(n, number, dtype=np.int64),
        starts=np.arange(n + 1, dtype=np.int64) * top,
        tokens=np.tile(rng.permutation(10)[:top], n).astype(np.uint32),
        suspect=suspect.reshape(-1).astype(np.float32),
        base=rng.random(n * top).astype(np.float32),
        vocab_size=10,
        ledger={"candidates": n + 1, "incomplete window": 1, "scored": n},
    )
