"""A small attacker: it climbs wherever there is a slope, and the public tier has none.

The whole attack, with its figures, is `benchmarks/service/oracle.py`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bookkit import TENANT, Book, marked_letters, open_book

from filigrane.errors import BudgetSpent
from filigrane.keys import Key
from filigrane.service.answers import public_answer
from filigrane.service.detecting import Query
from filigrane.service.public import PublicLimits, PublicTier
from filigrane.service.tokenizing import BYTES_SHA256

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "service"))

from oracle import bisect_and_restore, climb

LETTERS = 26
LENGTH = 220
LIMIT = -np.log(1e6)
OPEN = PublicLimits(near_duplicates=0)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with open_book(tmp_path_factory.mktemp("oracle")) as opened:
        opened.make("own", tokenizer=BYTES_SHA256, slots=1)
        opened.detector._revalidate_s = 1e9
        yield opened


def text_of(ids: list[int]) -> str:
    return "".join(chr(97 + i) for i in ids)


def ids_of(text: str) -> list[int]:
    return [max(0, ord(c) - 97) for c in text]


def unmarked(seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(LETTERS, size=LENGTH)]


def test_the_expert_tier_is_a_slope(book: Book) -> None:
    """The attacker is a real one: with log p it forges within some hundred queries."""
    last: dict[str, float] = {}

    def score(ids: list[int]) -> float:
        text = text_of(ids)
        last[text] = book.detector.detect(TENANT, Query(text=text)).log_pvalue
        return -last[text]

    outcome = climb(
        unmarked(1),
        score,
        lambda ids: last[text_of(ids)] <= LIMIT,
        LETTERS,
        np.random.default_rng(1),
        3000,
    )
    assert outcome.reached and outcome.moves > outcome.queries / 2


def test_the_public_tier_is_flat(book: Book) -> None:
    """The same attacker, without any budget: no answer tells one change from another."""
    tier = PublicTier(book.detector, OPEN)
    said = set()

    def score(ids: list[int]) -> float:
        answer = tier.answer(TENANT, text_of(ids), identity=None, address=None)
        shown = public_answer(answer)
        # The hash is of what the attacker sent, and nothing that it does not know.
        said.add(repr({**shown, "content_sha256": None}))
        return float(answer.verdict == "detected")

    outcome = climb(unmarked(1), score, lambda ids: False, LETTERS, np.random.default_rng(1), 400)
    assert outcome.moves == 0 and not outcome.reached
    assert len(said) == 1


def test_strength_does_not_show_in_a_public_answer(book: Book) -> None:
    """Marks that are barely found and overwhelming ones are answered in the very same bytes."""
    key = book.keybook.key_of(book.keybook.version(TENANT, "acme.own@1"))
    assert isinstance(key, Key)
    tier = PublicTier(book.detector, OPEN)
    rng = np.random.default_rng(2)
    strong = marked_letters(key, "gumbel", LENGTH, 1)
    said: dict[str, set[str]] = {}
    strengths: dict[str, list[float]] = {}
    for changes in (0, 20, 60, 80, 90, 100, 120, 200):
        letters = list(strong)
        for place in rng.permutation(LENGTH)[:changes]:
            letters[place] = chr(97 + int(rng.integers(LETTERS)))
        text = "".join(letters)
        answer = tier.answer(TENANT, text, identity=None, address=None)
        shown = repr({**public_answer(answer), "content_sha256": None})
        said.setdefault(answer.verdict, set()).add(shown)
        strengths.setdefault(answer.verdict, []).append(answer.finding.log_pvalue)
    assert set(said) == {"detected", "inconclusive"}
    assert all(len(answers) == 1 for answers in said.values())
    assert min(strengths["detected"]) < max(strengths["detected"]) - 50


def test_budgets_bound_what_a_patient_attacker_gets(book: Book) -> None:
    key = book.keybook.key_of(book.keybook.version(TENANT, "acme.own@1"))
    assert isinstance(key, Key)
    start = ids_of(marked_letters(key, "gumbel", LENGTH, 3))

    def attack(limits: PublicLimits) -> tuple[int, int]:
        tier = PublicTier(
            book.detector,
            limits,
        )
        answers = 0

        def found(ids: list[int]) -> bool | None:
            nonlocal answers
            try:
                answer = tier.answer(TENANT, text_of(ids), identity=None, address=None)
            except BudgetSpent:
                return None
            answers += 1
            return answer.verdict == "detected"

        outcome = bisect_and_restore(start, found, LETTERS, np.random.default_rng(4), 2000)
        return answers, outcome.edits

    free_answers, free_edits = attack(OPEN)
    answers, edits = attack(PublicLimits(near_duplicates=10))
    assert free_answers > 50 and answers <= 2 * 10
    # What asking buys is fewer changes; with the budget hardly any.
    assert free_edits < edits
