"""Tracing: agreed to by two officers for one text, logged beforehand, and in bounded numbers."""

import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from bookkit import TENANT, Book, marked, open_book

from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import Busy, FiligraneError, NotFound, StateError
from filigrane.keys import Key, UserKey
from filigrane.schemes import from_tag
from filigrane.service.detecting import Query
from filigrane.service.settings import Settings, open_office
from filigrane.service.tokenizing import BYTES_SHA256
from filigrane.service.tracing import Traced, Tracer
from filigrane.store.records import Principal, Role
from filigrane.toy import ZipfModel
from servicekit import Service, operator_token, prepare, problem, running

USERS = int(os.environ.get("FILIGRANE_TRACE_USERS", "20000"))


def officer(name: str, *roles: Role, tenant: str = TENANT) -> Principal:
    return Principal(
        tenant=tenant, name=name, roles=frozenset(roles or (Role.ATTRIBUTION_OFFICER,))
    )


ANN, BOB, EVE = officer("ann"), officer("bob"), officer("eve")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with open_book(tmp_path_factory.mktemp("tracing"), TENANT, "other") as opened:
        opened.make("users", slots=1)
        opened.make("more", slots=2)
        opened.make("vllm", profile="vllm-gumbel")
        opened.make("text", slots=1, tokenizer=BYTES_SHA256)
        yield opened


@pytest.fixture(scope="module")
def tracer(book: Book) -> Iterator[Tracer]:
    made = Tracer(book.detector, book.access, book.log, book.receipts)
    yield made
    made.close()


def written_for(book: Book, name: str, user: int, seed: int = 1) -> npt.NDArray[np.int64]:
    from filigrane.embedding import embed

    key = book.keybook.key_of(book.keybook.version(TENANT, f"acme.{name}@1"))
    assert isinstance(key, Key)
    rng = np.random.default_rng(seed)
    own: UserKey = key.user(user)
    return embed(ZipfModel(256, 1.0), [1, 2], 200, own, from_tag("gumbel"), rng=rng).tokens


def agreed(book: Book, tracer: Tracer, query: Query, users: range) -> str:
    asked = tracer.request(ANN, query, users, "case 7")
    book.access.approve(TENANT, asked.id, BOB)
    return asked.id


def test_a_text_is_traced_to_its_user(book: Book, tracer: Tracer) -> None:
    ids = written_for(book, "users", 17_171 % USERS)
    query = Query(tokens=ids, key="users")
    found = tracer.trace(
        ANN, query, range(USERS), approval=agreed(book, tracer, query, range(USERS))
    )
    (named,) = found.named
    assert named.user == 17_171 % USERS and named.key_id == "acme.users@1"
    assert found.n_tests == USERS and found.n_keys == 1 and found.purpose == "case 7"
    assert found.candidates[0] == named and found.candidates[1].log_pvalue > math.log(1e-6)
    # A range that does not begin at zero names the same user, and nobody outside it.
    part = range(17_171 % USERS - 5, 17_171 % USERS + 5)
    again = tracer.trace(ANN, query, part, approval=agreed(book, tracer, query, part))
    assert [one.user for one in again.named] == [named.user]
    other = range(5)
    nobody = tracer.trace(ANN, query, other, approval=agreed(book, tracer, query, other))
    assert nobody.named == ()


def test_all_versions_are_tried_and_paid_for(book: Book, tracer: Tracer) -> None:
    ids = written_for(book, "more", 3)
    query = Query(tokens=ids)
    found = tracer.trace(ANN, query, range(50), approval=agreed(book, tracer, query, range(50)))
    # Keys of other tools tell no users apart and are left out.
    assert found.n_keys == 3 and found.n_tests == 50 * (1 + 2 + 1)
    assert [(one.key_id, one.user) for one in found.named] == [("acme.more@1", 3)]
    alone = Query(tokens=ids, key="more")
    one = tracer.trace(ANN, alone, range(50), approval=agreed(book, tracer, alone, range(50)))
    assert one.named[0].log_pvalue == pytest.approx(
        found.named[0].log_pvalue - math.log(3), rel=1e-9
    )
    only = Query(tokens=ids, key="vllm")
    with pytest.raises(StateError, match="users apart"):
        tracer.request(ANN, only, range(5), "p")


def test_nothing_happens_without_an_approval_for_exactly_this(book: Book, tracer: Tracer) -> None:
    ids = written_for(book, "users", 5)
    query = Query(tokens=ids, key="users")

    def trace(
        approval: str, query: Query = query, users: range = range(10), who: Principal = ANN
    ) -> object:
        return tracer.trace(who, query, users, approval=approval)

    with pytest.raises(NotFound):
        trace("0" * 16)
    waiting = tracer.request(ANN, query, range(10), "why")
    with pytest.raises(StateError, match="second person"):
        trace(waiting.id)
    with pytest.raises(StateError, match="another person"):
        book.access.approve(TENANT, waiting.id, ANN)
    with pytest.raises(StateError):
        book.access.approve(TENANT, waiting.id, officer("sam", Role.KEY_ADMIN))
    book.access.approve(TENANT, waiting.id, BOB)
    for other in (
        lambda: trace(waiting.id, Query(tokens=ids[:-1], key="users")),
        lambda: trace(waiting.id, Query(tokens=ids, key="more")),
        lambda: trace(waiting.id, users=range(11)),
        lambda: trace(waiting.id, users=range(1, 11)),
        lambda: trace(waiting.id, who=EVE),
    ):
        with pytest.raises(StateError):
            other()
    assert trace(waiting.id, who=BOB)
    with pytest.raises(StateError, match="used before"):
        trace(waiting.id)
    with pytest.raises((NotFound, StateError)):
        tracer.trace(officer("x", tenant="other"), query, range(10), approval=waiting.id)


def test_an_answer_that_got_lost_can_be_had_again(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        own.make("users", slots=1)
        own.make("more", slots=1)
        tracer = Tracer(own.detector, own.access, own.log, own.receipts)
        ids = written_for(own, "users", 5)
        query, users = Query(tokens=ids, key="users"), range(10)
        approval = agreed(own, tracer, query, users)

        def trace(
            who: Principal = ANN, query: Query = query, users: range = users, top: int = 10
        ) -> Traced:
            return tracer.trace(who, query, users, approval=approval, top=top)

        def kinds() -> list[str]:
            return [record.kind for record in own.log.records(TENANT)]

        first = trace()
        used = own.access.approval(TENANT, approval)
        assert first.named and used.used_by == ANN.name
        own.clock.now += timedelta(hours=1)
        before = kinds()
        assert trace() == first
        assert kinds() == [*before, "approval.repeat", "trace.done"]
        assert own.log.records(TENANT)[-2].actor == ANN.name
        # It stays the use of then, by her, for this and nothing else.
        assert own.access.approval(TENANT, approval) == used
        before = kinds()
        with pytest.raises(StateError, match="used before"):
            trace(BOB)
        for other in (
            lambda: trace(EVE),
            lambda: trace(query=Query(tokens=ids[:-1], key="users")),
            lambda: trace(query=Query(tokens=ids, key="more")),
            lambda: trace(users=range(11)),
            lambda: trace(top=11),
        ):
            with pytest.raises(StateError):
                other()
        own.clock.now += timedelta(hours=23)
        with pytest.raises(StateError, match="expired"):
            trace()
        assert kinds() == before
        tracer.close()


def test_the_log_knows_before_the_answer_and_not_the_text(book: Book, tracer: Tracer) -> None:
    ids = written_for(book, "users", 5, seed=9)
    query = Query(tokens=ids, key="users")
    approval = agreed(book, tracer, query, range(10))
    seen: list[str] = []
    original = tracer._run

    def run(*given: object) -> object:
        seen.extend(record.kind for record in book.log.records(TENANT)[-1:])
        return original(*given)  # type: ignore[arg-type]

    tracer._run = run  # type: ignore[method-assign,assignment]
    try:
        found = tracer.trace(ANN, query, range(10), approval=approval)
    finally:
        tracer._run = original  # type: ignore[method-assign]
    assert seen == ["approval.use"]
    last = book.log.records(TENANT)[-4:]
    assert [record.kind for record in last] == [
        *("approval.request", "approval.give", "approval.use", "trace.done")
    ]
    assert last[-1].facts == {"approval": approval, "outcome": "named"}
    said = repr([record.facts for record in last])
    assert "case 7" in said and "users 0-9" in said and "acme.users@1" in said
    assert found.content_sha256 not in said and str(found.named[0].log_pvalue) not in said


def test_an_approval_is_not_spent_on_what_cannot_be_done(book: Book, tracer: Tracer) -> None:
    query = Query(text="a" * 300, key="users")  # names no tokenizer
    with pytest.raises(FiligraneError, match="no tokenizer"):
        tracer.trace(ANN, query, range(10), approval=tracer.request(ANN, query, range(10), "w").id)
    for users in (range(0), range(-1, 5), range(0, 10, 2), range(10**8)):
        with pytest.raises(FiligraneError, match="users"):
            tracer.request(ANN, Query(tokens=[1] * 50, key="users"), users, "w")


def test_texts_are_read_with_their_keys_tokenizer(book: Book, tracer: Tracer) -> None:
    key = book.keybook.key_of(book.keybook.version(TENANT, "acme.text@1"))
    assert isinstance(key, Key)
    from bookkit import Letters, letters

    from filigrane.embedding import embed

    rng = np.random.default_rng(1)
    text = letters(embed(Letters(), [65], 300, key.user(8), from_tag("gumbel"), rng=rng).tokens)
    query = Query(text=text, key="text")
    found = tracer.trace(ANN, query, range(20), approval=agreed(book, tracer, query, range(20)))
    assert [one.user for one in found.named] == [8]


def test_a_compromised_key_names_nobody(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        own.make("users", slots=1)
        ids = written_for(own, "users", 2)
        own.keybook.compromise(TENANT, "users", 1, since=own.clock.now, actor="t")
        tracer = Tracer(own.detector, own.access, own.log, own.receipts)
        query = Query(tokens=ids, key="users")
        found = tracer.trace(ANN, query, range(9), approval=agreed(own, tracer, query, range(9)))
        tracer.close()
        assert found.named == () and found.candidates[0].user == 2
        assert found.cautions == ("compromised_key",)


def test_traces_queue_and_more_are_turned_away(book: Book) -> None:
    tracer = Tracer(book.detector, book.access, book.log, book.receipts, queue=1)
    ids = written_for(book, "users", 5)
    query = Query(tokens=ids, key="users")
    go, running = threading.Event(), threading.Event()
    original = tracer._run

    def slow(*given: object) -> object:
        running.set()
        assert go.wait(20)
        return original(*given)  # type: ignore[arg-type]

    tracer._run = slow  # type: ignore[method-assign,assignment]
    approvals = [agreed(book, tracer, query, range(10)) for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(tracer.trace, ANN, query, range(10), approval=approvals[0])]
        assert running.wait(20)
        work.append(pool.submit(tracer.trace, ANN, query, range(10), approval=approvals[1]))
        deadline = time.monotonic() + 20
        while tracer._places._value and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.01)
        with pytest.raises(Busy):
            tracer.trace(ANN, query, range(10), approval=approvals[2])
        go.set()
        assert all(one.result().named for one in work)
    # The one that was turned away can be used later.
    assert tracer.trace(ANN, query, range(10), approval=approvals[2]).named
    tracer.close()


def test_the_three_steps_over_http(service: Service) -> None:
    rng = np.random.default_rng(1)
    body = {
        "tokens": rng.integers(0, 256, 100).tolist(),
        "key": "chat",
        "users": {"count": 100},
    }
    with service.client("attribution-officer") as ann:
        asked = ann.post("/v1/trace/requests", json=body | {"purpose": "case 9"})
        assert asked.status_code == 201
        approval = asked.json()["id"]
        problem(ann.post("/v1/trace", json=body | {"approval": approval}), 409, "state")
        problem(ann.post(f"/v1/approvals/{approval}/approve"), 409)
        second = operator_token(service, "second", "attribution-officer")
        bob = {"Authorization": f"Bearer {second}"}
        assert ann.post(f"/v1/approvals/{approval}/approve", headers=bob).status_code == 200
        done = ann.post("/v1/trace", json=body | {"approval": approval})
        assert done.status_code == 200
        assert done.json()["named"] == [] and done.json()["n_tests"] == 200
        # Whose answer got lost has it again; for the second officer it was used.
        again = ann.post("/v1/trace", json=body | {"approval": approval})
        assert (again.status_code, again.json()) == (200, done.json())
        late = ann.post("/v1/trace", json=body | {"approval": approval}, headers=bob)
        problem(late, 409, "state")
        problem(ann.post("/v1/trace", json=body | {"approval": "zz"}), 422, "invalid")
    for role in ("detector-expert", "key-admin", "auditor"):
        with service.client(role) as client:
            problem(client.post("/v1/trace", json=body | {"approval": approval}), 403)


def test_marked_texts_of_others_are_nobodys(book: Book, tracer: Tracer) -> None:
    ids = marked(Key.generate("elsewhere"), "gumbel", 200, 4)
    query = Query(tokens=ids, key="users")
    found = tracer.trace(
        ANN, query, range(USERS), approval=agreed(book, tracer, query, range(USERS))
    )
    assert found.named == ()


def test_all_that_decides_is_agreed_on(book: Book, tracer: Tracer) -> None:
    text = "some words " * 30
    query = Query(text=text, key="text", tokenizer="bytes", alpha=1e-5)
    asked = tracer.request(ANN, query, range(10), "why", top=3)
    book.access.approve(TENANT, asked.id, BOB)
    said = f"users 0-9 alpha 1e-05 top 3 tokenizer {BYTES_SHA256[:12]} of acme.text@1"
    assert asked.subject.endswith(said) and len(asked.subject) <= 200

    def trace(query: Query, top: int = 3) -> Traced:
        return tracer.trace(ANN, query, range(10), approval=asked.id, top=top)

    for other in (
        Query(text=text, key="text", tokenizer="bytes", alpha=0.1),
        Query(text=text, key="text", alpha=1e-5),
    ):
        with pytest.raises(StateError, match="nothing else"):
            trace(other)
    with pytest.raises(StateError, match="nothing else"):
        trace(query, top=10)
    assert len(trace(query).candidates) == 3
    assert book.log.records(TENANT)[-1].facts == {"approval": asked.id, "outcome": "nobody"}


def test_what_takes_too_long_costs_no_approval(
    book: Book, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Query(tokens=[1, 2] * 40)
    users = range(6_000_000)  # four slots of three versions
    with pytest.raises(StateError, match="ask for at most 5000000 users at a time"):
        tracer.request(ANN, many, users, "why")
    long = Query(tokens=[1] * 2001, key="users")
    with pytest.raises(StateError, match="this long take too long; ask for at most 1999000 users"):
        tracer.request(ANN, long, range(2_000_000), "why")
    query = Query(tokens=written_for(book, "users", 5), key="users")
    approval = agreed(book, tracer, query, range(1000))
    monkeypatch.setattr("filigrane.service.tracing.MAX_TESTS", 999)
    with pytest.raises(StateError, match="ask for at most 999 users"):
        tracer.trace(ANN, query, range(1000), approval=approval)
    monkeypatch.undo()
    assert tracer.trace(ANN, query, range(1000), approval=approval).named


def test_waiting_too_long_costs_no_approval(book: Book) -> None:
    tracer = Tracer(book.detector, book.access, book.log, book.receipts, wait_s=0.1)
    query = Query(tokens=written_for(book, "users", 5), key="users")
    approval = agreed(book, tracer, query, range(10))
    with tracer._turn, pytest.raises(Busy, match="takes its time"):
        tracer.trace(ANN, query, range(10), approval=approval)
    assert tracer.trace(ANN, query, range(10), approval=approval).named
    tracer.close()
    with pytest.raises(Busy, match="about to end"):
        tracer.trace(ANN, query, range(10), approval=approval)


def test_a_trace_over_http_may_take_longer_than_other_requests(tmp_path: Path) -> None:
    made = prepare(tmp_path, sections="[limits]\nseconds = 0.1\ntrace_seconds = 60\n")
    body = {"tokens": list(range(250)) * 6, "key": "users", "users": {"count": 10_000}}
    with open_office(Settings.load(made.config)) as office:
        spec = KeySpec(tenant="demo", name="users", model="m", scheme="gumbel", slots=4)
        office.keybook.create(spec, actor="t")
        ann, bob = officer("attribution-officer", tenant="demo"), officer("bob", tenant="demo")
        query = Query(tokens=np.array(body["tokens"]), key="users")
        asked = office.tracer.request(ann, query, range(10_000), "why")
        office.access.approve("demo", asked.id, bob)
    with running(made), made.client("attribution-officer") as client:
        started = time.monotonic()
        done = client.post("/v1/trace", json=body | {"approval": asked.id})
        assert (done.status_code, done.json().get("named")) == (200, [])
        assert time.monotonic() - started > 0.1
