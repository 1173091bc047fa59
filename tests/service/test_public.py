"""The public tier: three classes, the same ones for the same text, and budgets that hold."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from bookkit import TENANT, Book, Clock, marked_letters, open_book

from filigrane.errors import BudgetSpent, NotReady
from filigrane.keys import Key
from filigrane.service.contents import Cleaned, cleaned
from filigrane.service.detecting import CAUTIONS, Query
from filigrane.service.public import (
    HEADLINES,
    TECHNIQUE,
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
    # Nothing about the text that a receipt would let slip, whether it is marked or not.
    bare = tier.answer(TENANT, "x" * 199, identity=None, address=None).as_told
    assert dataclasses.replace(told, content_sha256="", n_tokens=0) == dataclasses.replace(
        bare, content_sha256="", n_tokens=0
    )
    assert told.technique == TECHNIQUE and told.cautions == () and told.n_tests == 0


def test_the_shorter_reading_decides_what_is_too_short(book: Book, text: str) -> None:
    """Or invisible characters would make a short text long enough to be asked about."""
    tier = PublicTier(book.detector, OPEN)
    padded = text[:150] + "\u200b" * 40
    assert book.detector.detect(TENANT, Query(text=padded)).verdict == "detected"
    answer = tier.answer(TENANT, padded, identity=None, address=None)
    assert answer.verdict == "too_short" and answer.as_told.per_key == ()


def test_keys_that_cannot_be_read_are_no_answer(tmp_path: Path, text: str) -> None:
    with open_book(tmp_path) as own:
        own.make("chat", tokenizer=BYTES_SHA256)
        tier = PublicTier(own.detector, OPEN)
        own_key = own.keybook.key_of(own.keybook.version(TENANT, "acme.chat@1"))
        assert isinstance(own_key, Key)
        marked = marked_letters(own_key, "gumbel", 400, 1)
        plain = " ".join(words(1))

        def ask(sent: str) -> str:
            return tier.answer(TENANT, sent, identity=None, address=None).verdict

        assert ask(plain) == "inconclusive"
        own.make("far", tokenizer="0" * 64)
        with pytest.raises(NotReady, match="not all keys"):
            ask(plain)
        assert ask(marked) == "detected" and ask("short") == "too_short"
    (tmp_path / "none").mkdir()
    with open_book(tmp_path / "none") as own:
        own.make("far", tokenizer="0" * 64)
        with pytest.raises(NotReady, match="not all keys"):
            PublicTier(own.detector, OPEN).answer(TENANT, plain, identity=None, address=None)


def test_a_mark_that_does_not_count_is_not_called_none(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        record = own.make("chat", tokenizer=BYTES_SHA256, slots=2)
        key = own.keybook.key_of(record)
        assert isinstance(key, Key)
        tier = PublicTier(own.detector, OPEN)
        mixed = "".join(marked_letters(key, "gumbel", 300, seed) for seed in range(6))
        before = tier.answer(TENANT, mixed, identity=None, address=None)
        # What a mark's validity depends on is said to everybody.
        assert before.notes == (CAUTIONS["several_slots"],)
        own.keybook.compromise(TENANT, "chat", 1, since=own.clock.now, actor="test")
        answer = tier.answer(TENANT, mixed, identity=None, address=None)
        assert answer.verdict == "inconclusive"
        assert (answer.headline, answer.explanation) == HEADLINES["uncounted"]


def test_receipts_have_a_rate_of_their_own(book: Book, text: str) -> None:
    tier = PublicTier(book.detector, dataclasses.replace(OPEN, receipts="2/hour"))

    def ask(address: str, receipt: bool) -> str:
        try:
            tier.answer(TENANT, text, identity=None, address=address, receipt=receipt)
        except BudgetSpent as error:
            return error.reason
        return "ok"

    assert [ask("10.0.0.1", True) for _ in range(3)] == ["ok", "ok", "receipts"]
    assert ask("10.0.0.1", False) == ask("10.0.1.1", True) == "ok"


def test_a_text_is_cleaned_once_and_has_a_length(
    book: Book, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filigrane.service import detecting, public

    calls = []

    def counted(sent: str) -> Cleaned:
        calls.append(len(sent))
        return cleaned(sent)

    monkeypatch.setattr(public, "cleaned", counted)
    monkeypatch.setattr(detecting, "cleaned", counted)
    PublicTier(book.detector).answer(TENANT, text, identity="a", address=None)
    assert len(calls) == 1
    with pytest.raises(BudgetSpent, match="at most 20000"):
        PublicTier(book.detector).answer(TENANT, "a" * 20_001, identity="a", address=None)


def test_work_for_the_public_has_few_places(
    book: Book, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filigrane.service import public

    monkeypatch.setattr(public, "_PATIENCE_S", 0.01)
    tier = PublicTier(book.detector, OPEN)
    for _ in range(public._AT_ONCE):
        assert tier._places.acquire(blocking=False)
    with pytest.raises(NotReady, match="too many"):
        tier.answer(TENANT, text, identity=None, address=None)
    tier._places.release()
    assert tier.answer(TENANT, text, identity=None, address=None).verdict == "detected"


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


def spend(alike: NearDuplicates, text: str, who: str = "a", tenant: str = "t") -> bool:
    """Whether the text is answered."""
    return alike.spend(tenant, who, cleaned(text)) == 0.0


def variants(base: list[str], n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        changed = list(base)
        changed[rng.integers(len(base))] = f"other{i}"
        made.append(" ".join(changed))
    return made


def test_texts_that_are_nearly_alike_share_a_budget() -> None:
    alike = NearDuplicates(10)
    base = words(2)
    assert sum(spend(alike, text) for text in variants(base, 40, 3)) == 10
    # The very same text is free, in whatever order it is asked about; other texts have budgets.
    first = NearDuplicates(1)
    assert all(spend(first, " ".join(base)) for _ in range(5))
    assert spend(alike, " ".join(words(4)))
    assert spend(alike, " ".join(base), tenant="another")


def test_nobody_locks_a_text_out_for_others() -> None:
    alike = NearDuplicates(10, together=40)
    base = words(2)
    many = variants(base, 200, 4)
    for crowd in range(10):
        for text in many[20 * crowd : 20 * crowd + 20]:
            spend(alike, text, who=f"net{crowd}")
    # All have spent what all may; who comes with the text itself is answered, and then counted.
    assert spend(alike, " ".join(base), who="journalist")
    assert spend(alike, " ".join(base), who="journalist")
    assert not spend(alike, many[0] + "!", who="journalist")
    # One that is not alike is nobody else's business.
    assert all(spend(alike, text, who="journalist") for text in variants(words(5), 9, 6))


def test_all_together_have_a_budget() -> None:
    alike = NearDuplicates(10, together=25)
    answered = [
        spend(alike, text, who=f"net{i % 20}") for i, text in enumerate(variants(words(2), 200, 4))
    ]
    assert 25 <= sum(answered) <= 25 + 20


@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_filler_does_not_make_a_text_another(where: str) -> None:
    """Each variant comes with as much fresh text of its own, or much more."""
    alike = NearDuplicates(10)
    answered = 0
    for i, text in enumerate(variants(words(2), 60, 3)):
        filler = " ".join(words(1000 + i, 120 * (1 + i % 8)))
        before = filler if where != "after" else ""
        after = " ".join(words(2000 + i)) if where == "both" else filler if not before else ""
        answered += spend(alike, f"{before} {text} {after}")
    assert answered == 10


def test_a_text_that_drifts_keeps_its_budget() -> None:
    """A climber changes one word after the other, and goes on from the changed text."""
    alike = NearDuplicates(30)
    rng = np.random.default_rng(5)
    now = words(6)
    answered = 0
    for i in range(300):
        now = list(now)
        now[rng.integers(len(now))] = f"word{i}"
        answered += spend(alike, " ".join(now))
    # The text at the end has hardly a word in common with the first one.
    assert answered <= 31


@pytest.mark.parametrize("parts", [3, 6, 12])
def test_a_text_that_was_spread_over_many_is_not_free(parts: int) -> None:
    """Its passages are shown first, each kind in a text of its own, of which no two are alike."""
    alike = NearDuplicates(10)
    base = words(11, 240)
    for part in range(parts):
        shown = words(100 + part, 240)
        for start in range(0, 240, 10):
            if start // 10 % parts == part:
                shown[start : start + 10] = base[start : start + 10]
        assert spend(alike, " ".join(shown))
    assert sum(spend(alike, text) for text in variants(base, 100, 12)) <= 10


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
    answered = sum(spend(alike, disguise(base, i)) for i in range(40))  # type: ignore[operator]
    assert answered <= 5


def test_honest_texts_are_rarely_taken_for_copies() -> None:
    """Different texts of one vocabulary, and of one author who opens them all alike."""
    alike = NearDuplicates(1)
    rng = np.random.default_rng(8)
    vocabulary = words(9, 800)
    greeting = " ".join(words(10, 12))
    texts = [greeting + " " + " ".join(rng.choice(vocabulary, 200)) for _ in range(300)]
    assert sum(not spend(alike, text) for text in texts) <= 3


def test_budgets_are_renewed_and_memory_is_bounded() -> None:
    clock = Clock()
    alike = NearDuplicates(2, most=1000, clock=clock.monotonic)
    base = words(11)

    def ask(i: int) -> float:
        return alike.spend("t", "a", cleaned(" ".join([*base, str(i)])))

    assert [ask(i) > 0 for i in range(4)] == [False, False, True, True]
    assert 3590 < ask(9) <= 3600
    clock.pass_by(3601)
    assert ask(2) == 0.0
    for seed in range(200):
        spend(alike, " ".join(words(100 + seed, 60)))
    assert len(alike) <= 1000 and len(alike._groups) <= 1000 and len(alike._sizes) <= 1000
    held = sum(len(groups) for groups in alike._groups.values())
    assert len(alike) == held + len(alike._texts)
    # What was pushed out is forgotten, not negative.
    assert all(size > 0 for size in alike._sizes.values())


def test_features_tell_nothing_without_their_key() -> None:
    one, two = NearDuplicates(3), NearDuplicates(3)
    text = " ".join(words(12))
    assert spend(one, text) and spend(two, text)
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
                {"name": "ids", "model": "other", "slots": 2, "tokenizer_sha256": BYTES_SHA256},
            ):
                assert client.post("/v1/keys", json={"scheme": "gumbel"} | body).status_code == 201
                promote = f"/v1/keys/{body['name']}/versions/1/promote"
                assert client.post(promote).status_code == 200
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
    # A token is another identity: nobody locks a text out for others.
    assert ask(served, "detector-public", text=" ".join([*base, "x"])).status_code == 200
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
