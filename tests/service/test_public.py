"""The public tier: three classes, the same ones for the same text, and budgets that hold."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from bookkit import TENANT, Book, Clock, marked_letters, open_book

from filigrane.keys import Key
from filigrane.service.detecting import Query
from filigrane.service.public import (
    HEADLINES,
    BudgetSpent,
    NearDuplicates,
    PublicLimits,
    PublicTier,
    network_of,
)
from filigrane.service.tokenizing import BYTES_SHA256
from servicekit import Service, prepare, problem, running

OPEN = PublicLimits(per_identity="100000/second", per_network="100000/second", near_duplicates=0)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with open_book(tmp_path_factory.mktemp("public"), TENANT, "other") as opened:
        opened.make("chat", tokenizer=BYTES_SHA256)
        opened.make("theirs", tokenizer=BYTES_SHA256, tenant="other")
        yield opened


@pytest.fixture(scope="module")
def text(book: Book) -> str:
    key = book.keybook.key_of(book.keybook.version(TENANT, "acme.chat@1"))
    assert isinstance(key, Key)
    return marked_letters(key, "gumbel", 600, 1)


def words(seed: int, n: int = 120) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 9))) for _ in range(n)]


def test_three_classes_in_words(book: Book, text: str) -> None:
    tier = PublicTier(book.detector, OPEN)
    for sent, verdict in (
        (text, "detected"),
        (" ".join(words(1)), "inconclusive"),
        (text[:199], "too_short"),
        ("a", "too_short"),
    ):
        answer = tier.answer(TENANT, sent, identity=None, address=None)
        assert answer.verdict == verdict
        assert (answer.headline, answer.explanation) == HEADLINES[answer.verdict]
    said = " ".join(part for pair in HEADLINES.values() for part in pair).lower()
    assert "written by a human" not in said and "authored" not in said


def test_a_short_text_is_too_short_however_strong_its_mark(book: Book, text: str) -> None:
    tier = PublicTier(book.detector, OPEN)
    assert book.detector.detect(TENANT, Query(text=text[:199])).verdict == "detected"
    answer = tier.answer(TENANT, text[:199], identity=None, address=None)
    assert answer.verdict == "too_short"
    told = answer.as_told
    assert told.verdict == "too_short" and told.key_id is None


def test_the_same_text_gets_the_same_answer(book: Book, text: str) -> None:
    tiers = [PublicTier(book.detector, OPEN) for _ in range(2)]
    answers = {
        tier.answer(TENANT, text, identity=who, address=None).verdict
        for tier in tiers
        for who in ("a", "b", None)
        for _ in range(5)
    }
    assert answers == {"detected"}


def test_identities_and_networks_are_limited(book: Book, text: str) -> None:
    limits = PublicLimits(per_identity="3/minute", per_network="7/minute", near_duplicates=0)
    tier = PublicTier(book.detector, limits)

    def ask(identity: str | None, address: str | None, tenant: str = TENANT) -> str:
        try:
            tier.answer(tenant, text, identity=identity, address=address)
        except BudgetSpent as error:
            assert 0 < error.retry_after_s <= 61
            return error.reason
        return "ok"

    assert [ask("ann", "10.0.0.1") for _ in range(4)] == ["ok"] * 3 + ["identity"]
    # Another address does not help an identity, nor another identity its network.
    assert ask("ann", "10.9.9.9") == "identity"
    assert [ask(f"bob{i}", "10.0.0.2") for i in range(5)] == ["ok"] * 4 + ["network"]
    assert ask("carol", "10.0.1.2") == "ok"
    assert ask(None, "10.0.2.2") == "ok" and ask("dora", None) == "ok"
    assert ask("ann", "10.0.3.1", tenant="other") == "ok"


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("fe80::1%eth0", "fe80::/48"),
        ("unix", None),
        (None, None),
    ],
)
def test_networks(address: str | None, network: str | None) -> None:
    assert network_of(address) == network


# ------------------------------------------------------------------ nearly the same


def test_texts_that_are_nearly_alike_share_a_budget() -> None:
    alike = NearDuplicates(10)
    base = words(2)
    rng = np.random.default_rng(3)
    refused = 0
    for i in range(40):
        changed = list(base)
        changed[rng.integers(len(base))] = f"other{i}"
        refused += alike.spend("t", " ".join(changed)) > 0
    assert refused == 30
    # The very same text is free, in whatever order it is asked about; other texts have budgets.
    first = NearDuplicates(1)
    assert [first.spend("t", " ".join(base)) for _ in range(5)] == [0.0] * 5
    assert alike.spend("t", " ".join(words(4))) == 0.0
    assert alike.spend("another scope", " ".join(base)) == 0.0


def test_a_text_that_drifts_keeps_its_budget() -> None:
    """A climber changes one word after the other, and goes on from the changed text."""
    alike = NearDuplicates(30)
    rng = np.random.default_rng(5)
    now = words(6)
    answered = 0
    for i in range(300):
        now = list(now)
        now[rng.integers(len(now))] = f"word{i}"
        answered += alike.spend("t", " ".join(now)) == 0.0
    # The text at the end has hardly a word in common with the first one.
    assert answered <= 31


@pytest.mark.parametrize(
    "disguise",
    [
        lambda text, i: (text.upper() if i % 2 else text) + "!" * i,
        lambda text, i: text.replace(" ", "\u00a0", i + 1),
        lambda text, i: "\u200b" * i + text,
        lambda text, i: text.replace(" ", " " * (i + 2)),
        lambda text, i: text.replace("e", "\u0435", i + 1),
    ],
)
def test_disguises_are_alike(disguise: object) -> None:
    alike = NearDuplicates(5)
    base = " ".join(words(7))
    answered = sum(alike.spend("t", disguise(base, i)) == 0.0 for i in range(40))  # type: ignore[operator]
    assert answered <= 5


def test_honest_texts_are_rarely_taken_for_copies() -> None:
    """Different texts of one vocabulary, and of one author who opens them all alike."""
    alike = NearDuplicates(1)
    rng = np.random.default_rng(8)
    vocabulary = words(9, 800)
    greeting = " ".join(words(10, 20))
    texts = [greeting + " " + " ".join(rng.choice(vocabulary, 200)) for _ in range(300)]
    assert sum(alike.spend("t", text) > 0 for text in texts) <= 3


def test_budgets_are_renewed_and_memory_is_bounded() -> None:
    clock = Clock()
    alike = NearDuplicates(2, most=50, clock=clock.monotonic)
    base = words(11)

    def ask(i: int) -> float:
        return alike.spend("t", " ".join([*base, str(i)]))

    assert [ask(i) > 0 for i in range(4)] == [False, False, True, True]
    assert 3590 < ask(9) <= 3600
    clock.pass_by(3601)
    assert ask(2) == 0.0
    for seed in range(200):
        alike.spend("t", " ".join(words(100 + seed, 60)))
    assert len(alike) == 50 and len(alike._groups) <= 50 * 16 and len(alike._sizes) <= 50
    # What was pushed out is forgotten, not negative.
    assert all(size > 0 for size in alike._sizes.values())


def test_sketches_tell_nothing_without_their_key() -> None:
    one, two = NearDuplicates(3), NearDuplicates(3)
    text = " ".join(words(12))
    one.spend("t", text)
    two.spend("t", text)
    assert not set(one._groups) & set(two._groups) and not set(one._texts) & set(two._texts)
    assert text[:20].encode() not in repr(vars(one)).encode()


# ------------------------------------------------------------------ over HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = prepare(
        tmp_path_factory.mktemp("tiers"),
        sections='[public]\ntenant = "demo"\nper_identity = "40/minute"\n'
        'per_network = "4000/minute"\nnear_duplicates = 12\n',
    )
    with running(made):
        with made.client("key-admin") as client:
            for body in (
                {"name": "web", "model": "toy", "tokenizer_sha256": BYTES_SHA256},
                {"name": "ids", "model": "other", "slots": 2},
            ):
                assert client.post("/v1/keys", json={"scheme": "gumbel"} | body).status_code == 201
        yield made


def ask(service: Service, role: str | None, **body: object) -> httpx2.Response:
    with service.client(role) as client:
        return client.post("/v1/detect", json=body)


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_public_answers_hold_no_number_of_the_test(served: Service) -> None:
    sent = " ".join(words(13))
    for role in (None, "detector-public"):
        answer = ask(served, role, text=sent)
        assert answer.status_code == 200
        body = answer.json()
        assert body["tier"] == "public" and body["verdict"] == "inconclusive"
        assert sorted(numbers(body)) == [1e-6, 200]
        assert ask(served, role, text=sent).json() == body


def test_the_public_tier_takes_no_ids_hints_or_levels(served: Service) -> None:
    sent = " ".join(words(14))
    for more in (
        {"key": "web"},
        {"model": "toy"},
        {"alpha": 0.05},
        {"evidence": True},
        {"tokenizer": "bytes"},
        {"receipt": "x"},
    ):
        problem(ask(served, "detector-public", text=sent, **more), 422, "public_tier")
    problem(ask(served, None, tokens=[1] * 300), 422, "public_tier")


def test_budgets_end_in_429_with_the_time_to_wait(served: Service) -> None:
    base = words(15)
    answers = [ask(served, None, text=" ".join([*base, str(i)])) for i in range(16)]
    assert [answer.status_code for answer in answers] == [200] * 12 + [429] * 4
    body = problem(answers[-1], 429, "budget_near_duplicates")
    assert 3000 < int(answers[-1].headers["retry-after"]) <= 3601
    assert base[0] not in json.dumps(body)
    # A token is another identity, not another text.
    problem(ask(served, "detector-public", text=" ".join([*base, "x"])), 429)
    # Whoever may see everything is not counted.
    expert = ask(served, "detector-expert", text=" ".join([*base, "x"]), tokenizer="bytes")
    assert expert.status_code == 200 and expert.json()["tier"] == "expert"


def test_experts_get_everything_and_receipts_verify(served: Service) -> None:
    sent = " ".join(words(16))
    answer = ask(
        served, "detector-expert", text=sent, tokenizer="bytes", evidence=True, issue_receipt=True
    ).json()
    assert answer["n_keys"] == 2 and answer["log10_pvalue"] <= 0 and len(answer["keys"]) == 2
    assert answer["heat"]["offsets"][0] == [0, 1] and answer["heat"]["nats"][0] is None
    with served.client() as client:
        told = client.post("/v1/receipts/verify", json={"receipt": answer["receipt"], "text": sent})
        assert told.status_code == 200 and told.json()["verdict"] == "inconclusive"
        assert told.json()["content_sha256"] == answer["content_sha256"]
        other = client.post(
            "/v1/receipts/verify", json={"receipt": answer["receipt"], "text": sent + "."}
        )
        problem(other, 422, "receipt")
        jwks = client.get("/.well-known/jwks.json").json()
        assert {key["kid"] for key in jwks["keys"]} == {"receipt-1", "log-1"}
        assert all("d" not in key for key in jwks["keys"])
        about = client.get("/.well-known/filigrane.json").json()
        assert about["public_tier"] is True and about["detect"] == "/v1/detect"
        assert "gumbel" in {one["name"] for one in client.get("/v1/profiles").json()["schemes"]}
    from filigrane.service.receipts import verify

    assert verify(answer["receipt"], jwks, sent).tier == "expert"


def test_batches_answer_in_order_and_name_what_failed(served: Service) -> None:
    rng = np.random.default_rng(1)
    items = [
        {"tokens": rng.integers(0, 256, 100).tolist(), "key": "ids"},
        {"tokens": [1, 2, 3], "key": "nobody"},
        {"text": " ".join(words(17)), "tokenizer": "bytes"},
    ]
    with served.client("detector-expert") as client:
        results = client.post("/v1/detect/batch", json={"items": items}).json()["results"]
    assert [one["tier"] for one in results] == ["expert", None, "expert"]
    assert results[1]["code"] == "not_found" and results[0]["n_keys"] == 1
    with served.client("detector-public") as client:
        problem(client.post("/v1/detect/batch", json={"items": items}), 403)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid"),
        ({"text": "a", "tokens": [1]}, "invalid"),
        ({"text": ""}, "invalid"),
        ({"tokens": []}, "invalid"),
        ({"tokens": [-1]}, "invalid"),
        ({"tokens": [2**32]}, "invalid"),
        ({"tokens": ["canary"]}, "invalid"),
        ({"tokens": [1.5]}, "invalid"),
        ({"text": "canary", "alpha": 0}, "invalid"),
        ({"text": "canary", "alpha": 0.5}, "invalid"),
        ({"text": "canary", "canary": 1}, "invalid"),
        ({"text": "canary", "tokenizer": "canary"}, "tokenizer"),
        ({"tokens": [1, 2], "receipt": "canary"}, "receipt"),
    ],
)
def test_bad_requests_are_told_so_without_repeating_them(
    served: Service, body: dict[str, object], code: str
) -> None:
    answer = ask(served, "detector-expert", **body)
    problem(answer, 422, code)
    assert "canary" not in answer.text


def test_a_surrogate_in_json_is_refused(served: Service) -> None:
    with served.client("detector-expert") as client:
        answer = client.post(
            "/v1/detect",
            content=rb'{"text": "a\ud800"}',
            headers={"Content-Type": "application/json"},
        )
    assert answer.status_code in (400, 422)


def test_roles_that_may_not_detect(served: Service) -> None:
    for role in ("key-admin", "auditor", "attribution-officer", "custodian", "tenant-admin"):
        problem(ask(served, role, text="a"), 403)


def test_the_models_describe_what_is_answered(served: Service, tmp_path: Path) -> None:
    from filigrane.service.answers import ExpertAnswer, PublicAnswerBody

    sent = " ".join(words(18))
    expert = ask(served, "detector-expert", text=sent, tokenizer="bytes", evidence=True).json()
    assert ExpertAnswer.model_validate(expert).model_dump(mode="json") == expert
    public = ask(served, None, text=sent).json()
    assert PublicAnswerBody.model_validate(public).model_dump(mode="json") == public
