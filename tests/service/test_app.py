"""Over HTTP: what is refused before it is parsed, problems that repeat nothing, the whole API."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, settings
from starlette.types import Message, Receive, Scope, Send

from filigrane.custody.hierarchy import KeySpec
from filigrane.service.app import Gate
from filigrane.service.settings import Limits, Settings, open_office
from filigrane.service.tokenizing import BYTES_SHA256
from servers import free_port
from servicekit import OTHER, PATIENCE, TENANT, Service, operator_token, prepare, problem, running

CANARY = "zq7xcanarytext"
MALFORMED = int(os.environ.get("FILIGRANE_MALFORMED", "2000"))
EXAMPLES = int(os.environ.get("FILIGRANE_SCHEMA_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx2.Client]:
    with service.client("key-admin") as client:
        yield client


def test_health_and_readiness(http: httpx2.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    answer = http.get("/readyz")
    assert answer.status_code == 200
    named = {part["name"]: part["ok"] for part in answer.json()["components"]}
    parts = ("database", "kms", "log", "tokenizers", "readable", "detection")
    assert named == dict.fromkeys(parts, True)


def test_readiness_tries_the_tokenizers(tmp_path: Path) -> None:
    from filigrane.service.routes.operations import check

    made = prepare(tmp_path, sections=f'[tokenizers]\nmine = "{tmp_path}/gone"\n')
    settings = Settings.load(made.config)
    with open_office(settings) as office:
        seen = check(office, {})
        (wrong,) = (part for part in seen.components if not part.ok)
        assert (wrong.name, wrong.problem) == ("tokenizers", "ModelError") and not seen.ready
    with open_office(dataclasses.replace(settings, tokenizers={})) as office:
        spec = KeySpec(
            tenant=TENANT,
            name="elsewhere",
            model="m",
            scheme="gumbel",
            tokenizer_sha256="ab" * 32,
            slots=1,
        )
        named: dict[str, tuple[int, frozenset[str]]] = {}
        assert check(office, named).ready
        office.keybook.create(dataclasses.replace(spec, tokenizer_sha256=BYTES_SHA256), actor="t")
        assert all(part.ok for part in check(office, named).components)
        office.keybook.create(dataclasses.replace(spec, name="unreadable"), actor="t")
        seen = check(office, named)
        assert [part.name for part in seen.components if not part.ok] == ["readable"]
        # One tenant's key takes nobody's service away.
        assert seen.ready


def test_readiness_leaves_nothing_in_the_log(service: Service) -> None:
    with service.client("auditor") as client:
        before = client.get("/v1/log/records").json()["records"]
        client.get("/readyz")
        after = client.get("/v1/log/records").json()["records"]
    assert "log.try" not in {record["kind"] for record in after}
    assert [r["index"] for r in after[: len(before)]] == list(range(len(before)))


def test_every_answer_has_the_headers(http: httpx2.Client) -> None:
    for path, status in (("/healthz", 200), ("/nothing", 404), ("/v1/keys/absent", 404)):
        answer = http.get(path)
        assert answer.status_code == status
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_what_is_not_there(http: httpx2.Client) -> None:
    problem(http.get(f"/{CANARY}"), 404, "not_found")
    problem(http.put("/healthz"), 405, "method")
    for path in ("/docs", "/redoc"):
        problem(http.get(path), 404)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/xml", 415),
        ("application/json", 400),
        ("Application/JSON; charset=utf-8", 400),
    ],
)
def test_content_types_are_looked_at_first(
    http: httpx2.Client, kind: str | None, status: int
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = http.post("/v1/keys", content=f"{{{CANARY}".encode(), headers=headers)
    said = problem(answer, status)
    assert CANARY not in json.dumps(said)


BODIES = {
    "empty": b"",
    "not json": CANARY.encode(),
    "cut": b'{"name": "' + CANARY.encode(),
    "binary": bytes(range(256)),
    "not utf-8": b'{"name": "\xff\xfe"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"name":' * 50_000,
    "closed deep": b"[" * 50_000 + b"]" * 50_000,
    "nan": b'{"name": "a", "model": "m", "scheme": "gumbel", "slots": NaN}',
    "infinity": b'{"name": "a", "model": "m", "scheme": "gumbel", "slots": 1e999}',
    "huge integer": b'{"name": "a", "model": "m", "slots": ' + b"9" * 10_000 + b"}",
    "surrogate": b'{"name": "\\ud800", "model": "m", "scheme": "gumbel"}',
    "nul": b'{"name": "a\\u0000", "model": "m", "scheme": "gumbel"}',
    "wrong types": b'{"name": 1, "model": [], "scheme": {}, "slots": "2"}',
    "unknown field": f'{{"name": "a", "model": "m", "{CANARY}": 1}}'.encode(),
    "bad name": f'{{"name": "{CANARY} !", "model": "m", "scheme": "gumbel"}}'.encode(),
    "bad model": f'{{"name": "a", "model": "{CANARY} !", "scheme": "gumbel"}}'.encode(),
    "bad scheme": f'{{"name": "a", "model": "m", "scheme": "{CANARY}"}}'.encode(),
    "bad profile": f'{{"name": "a", "model": "m", "profile": "{CANARY}"}}'.encode(),
    "both": b'{"name": "a", "model": "m", "scheme": "gumbel", "profile": "kgw"}',
    "a list": b"[]",
    "a number": b"12",
    "null": b"null",
    "twice": b'{"name": "a"}{"name": "b"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_malformed_bodies_are_refused_and_not_repeated(http: httpx2.Client, body: bytes) -> None:
    answer = http.post("/v1/keys", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    problem(answer, answer.status_code)
    assert CANARY not in answer.text


def test_errors_name_known_fields_only(http: httpx2.Client) -> None:
    body = {"name": 5, CANARY: 1, "slots": 99, "model": "m", "scheme": "gumbel"}
    answer = http.post("/v1/keys", json=body)
    assert CANARY not in answer.text
    said = problem(answer, 422, "invalid")
    places = {entry["where"] for entry in said["errors"]}
    assert places == {"body.name", "body.slots", "body"}
    assert {"le": 64} in [entry.get("limits") for entry in said["errors"]]


@pytest.mark.parametrize(
    ("role", "path", "body", "where", "hint"),
    [
        ("key-admin", "/v1/keys", {"shceme": "gumbel"}, "body", "did you mean scheme?"),
        # Nothing that this request takes is like it, although another one takes "evidence".
        ("key-admin", "/v1/keys", {"evidenc": 1}, "body", "No such field here."),
        ("key-admin", "/v1/keys", {"evidence": 1}, "body.evidence", "No such field here."),
        ("detector-expert", "/v1/detect", {"txt": "a"}, "body", "did you mean text?"),
        ("detector-expert", "/v1/detect", {}, "body", "one of the two, text or tokens"),
        ("detector-expert", "/v1/detect/batch", {"item": []}, "body", "did you mean items?"),
        ("detector-expert", "/v1/detect/batch", {"items": [{}]}, "body.items.0", "one of the two"),
        ("auditor", "/v1/receipts/verify", {"text": "a", "tokens": [1]}, "body", "not both"),
    ],
)
def test_errors_say_what_was_meant(
    service: Service, role: str, path: str, body: dict[str, object], where: str, hint: str
) -> None:
    good = {
        "/v1/keys": {"name": "a", "model": "m", "scheme": "gumbel"},
        "/v1/detect/batch": {"items": [{"text": "a"}]},
        "/v1/receipts/verify": {"receipt": "x"},
    }
    with service.client(role) as client:
        said = problem(client.post(path, json=good.get(path, {}) | body), 422, "invalid")
    found = [entry for entry in said["errors"] if hint in entry.get("hint", "")]
    assert [entry["where"] for entry in found] == [where], said


def test_too_large_bodies_are_not_read(tmp_path: Path, service: Service) -> None:
    limit = 2_000_000
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        raw.sendall(
            b"POST /v1/keys HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (limit + 1)
        )
        raw.settimeout(PATIENCE)
        # Refused by its length alone: nothing of it was sent.
        assert b"413" in raw.recv(200)
    with service.client("key-admin") as client:

        def chunks() -> Iterator[bytes]:
            for _ in range(40):
                yield b" " * 100_000

        try:
            answer = client.post(
                "/v1/keys", content=chunks(), headers={"Content-Type": "application/json"}
            )
        except httpx2.HTTPError:
            return  # The connection was closed while we sent.
        problem(answer, 413, "too_large")


NARROW = "[limits]\nbody_seconds = 2\nconcurrent = 4\nunfinished = 8\n"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(prepare(tmp_path_factory.mktemp("narrow"), sections=NARROW)) as made:
        yield made


@contextlib.contextmanager
def unfinished(
    to: Service,
    path: str,
    size: int,
    *,
    sent: int = 1,
    role: str | None = None,
) -> Iterator[socket.socket]:
    """A request that has sent `sent` of `size` bytes of its body."""
    token = "" if role is None else f"Authorization: Bearer {to.token(role)}\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{token}"
    with socket.create_connection(("127.0.0.1", to.port), timeout=PATIENCE) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + b" " * sent)
        yield raw


def test_a_body_that_does_not_come(narrow: Service) -> None:
    with contextlib.ExitStack() as held:
        raws = [held.enter_context(unfinished(narrow, "/v1/keys", 100)) for _ in range(8)]
        with narrow.client("key-admin") as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/v1/keys").status_code == 200
        for raw in raws:
            assert b" 408 " in raw.recv(200)
    with narrow.client("key-admin") as client:
        assert client.post("/v1/keys", json={}).status_code == 422


def test_nobody_unknown_sends_a_job(narrow: Service) -> None:
    with unfinished(narrow, "/v1/jobs", 5_000_000) as raw:
        assert b" 401 " in raw.recv(200)
    with unfinished(narrow, "/v1/jobs", 5_000_000, role="key-admin") as raw:
        assert b" 403 " in raw.recv(200)
    with unfinished(narrow, "/v1/jobs", 2, role="detector-expert", sent=2) as raw:
        # Read, and no list of items.
        assert b" 400 " in raw.recv(200)


class Asked:
    """A request that the gate is asked to pass, whose body comes when the test says so."""

    def __init__(
        self, gate: Gate, path: str, body: int = 0, sent: int = 0, address: str = "::1"
    ) -> None:
        self.status = 0
        self._parts: asyncio.Queue[Message] = asyncio.Queue()
        self._idle = asyncio.Event()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % body)]
        self._scope = {
            **{"type": "http", "method": "POST" if body else "GET", "path": path},
            **{"headers": headers if body else [], "client": (address, 1)},
        }
        self.send(sent, end=False)
        self._task = asyncio.ensure_future(gate(self._scope, self._receive, self._answered))

    def send(self, size: int, *, end: bool) -> None:
        self._idle.clear()
        self._parts.put_nowait({"type": "http.request", "body": b" " * size, "more_body": not end})

    async def taken(self) -> int:
        """Until the gate has all that was sent, or has answered; its status, 0 for none yet."""
        idle = asyncio.ensure_future(self._idle.wait())
        await asyncio.wait([idle, self._task], return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        return self.status

    async def end(self) -> int:
        """The answer's status, after the client went away if there is none."""
        self._parts.put_nowait({"type": "http.disconnect"})
        await self._task
        return self.status

    async def _receive(self) -> Message:
        if self._parts.empty():
            self._idle.set()
        return await self._parts.get()

    async def _answered(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]


def gate_of(limits: Limits) -> Gate:
    """A gate before an application that is content with everything; who sends a job is known."""

    async def content(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def known(request: object) -> None:
        pass

    return Gate(content, limits=limits, tls=False, first={"/v1/jobs": known})


def test_bodies_have_so_much_room_and_no_more() -> None:
    gate = gate_of(Limits(body_bytes=2_000, job_bytes=6_000, buffered_bytes=8_000))

    async def ask() -> None:
        large = Asked(gate, "/v1/detect", 1_900, 1_500)
        job = Asked(gate, "/v1/jobs", 5_900, 5_800)
        assert await large.taken() == await job.taken() == 0
        assert gate._held == 7_300
        # A quarter for one address, unless it is known who sends.
        assert await Asked(gate, "/v1/detect", 1_900, 1_000).taken() == 429
        assert await Asked(gate, "/v1/detect", 1_900, 1_000, "127.0.0.2").taken() == 503
        assert await Asked(gate, "/healthz").taken() == 200
        # What was held is given back, whether its client went away or was answered.
        assert await large.end() == 0
        job.send(100, end=True)
        assert await job.taken() == 200
        assert gate._held == 0 and not gate._senders
        again = Asked(gate, "/v1/jobs", 5_900, 5_800)
        again.send(100, end=True)
        assert await again.taken() == 200

    asyncio.run(ask())


def test_unfinished_requests_are_counted_by_address() -> None:
    gate = gate_of(Limits(concurrent=4, unfinished=8))

    async def ask() -> None:
        begun = [Asked(gate, "/v1/keys", 100, 1) for _ in range(8)]
        assert [await one.taken() for one in begun] == [0] * 8
        # They hold no place of those who are served, however few there are.
        assert await Asked(gate, "/v1/keys").taken() == 200
        # One address has no more of them, others have their own.
        assert await Asked(gate, "/v1/keys", 100, 1).taken() == 429
        other = Asked(gate, "/v1/keys", 2, 1, "127.0.0.2")
        other.send(1, end=True)
        assert await other.taken() == 200
        await begun[0].end()
        more = Asked(gate, "/v1/keys", 2, 1)
        more.send(1, end=True)
        assert await more.taken() == 200
        for one in begun[1:]:
            await one.end()
        assert not gate._senders

    asyncio.run(ask())


def test_places_are_counted_and_traces_have_their_own_time() -> None:
    limits = Limits(seconds=0.2, trace_seconds=60, concurrent=2)
    statuses: list[tuple[str, int]] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate = Gate(slow, limits=limits, tls=False, first={})

    async def ask(path: str) -> None:
        async def receive() -> Message:
            raise AssertionError("there is no body")

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append((path, message["status"]))

        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "client": ("::1", 1)}
        await gate(scope, receive, send)

    async def all_at_once() -> None:
        await asyncio.gather(ask("/v1/trace"), ask("/v1/keys"), ask("/late"))

    asyncio.run(all_at_once())
    assert statuses == [("/late", 503), ("/v1/keys", 503), ("/v1/trace", 200)]
    assert not gate._senders and not gate._held and not gate._running


def test_keys_from_creation_to_destruction(service: Service) -> None:
    admin, auditor = service.client("key-admin"), service.client("auditor")
    custodian = service.client("custodian")
    with admin, auditor, custodian:
        spec = {"name": "life", "model": "other", "scheme": "greenlist", "slots": 1}
        again = {"Idempotency-Key": "life-1"}
        first = admin.post("/v1/keys", json=spec, headers=again)
        assert first.status_code == 201
        assert admin.post("/v1/keys", json=spec, headers=again).json() == first.json()
        changed = admin.post("/v1/keys", json=spec | {"name": "life2"}, headers=again)
        assert changed.status_code == 409
        problem(admin.post("/v1/keys", json=spec), 409)
        problem(admin.post("/v1/keys/absent/versions"), 404, "not_found")

        version = "/v1/keys/life/versions"
        promoted = admin.post(f"{version}/1/promote").json()
        assert (promoted["state"], promoted["id"]) == ("active", "demo.life@1")
        second = admin.post(version, headers={"Idempotency-Key": "r"}).json()
        assert admin.post(version, headers={"Idempotency-Key": "r"}).json() == second
        assert admin.post(f"{version}/2/promote").json()["state"] == "active"
        states = {v["number"]: v["state"] for v in admin.get("/v1/keys/life").json()["versions"]}
        assert states == {1: "retired", 2: "active"}
        problem(admin.post(f"{version}/1/promote"), 409, "state")
        since = {"since": "2026-01-01T00:00:00Z"}
        assert admin.post(f"{version}/1/compromise", json=since).json()["state"] == "compromised"

        # Destruction takes two custodians, an approval for this very version, and no admin.
        problem(admin.post(f"{version}/1/destroy", json={"approval": "0" * 16}), 403, "role")
        ask = {"kind": "destroy", "subject": "demo.life@1", "purpose": "the key leaked"}
        asked = custodian.post("/v1/approvals", json=ask).json()
        problem(custodian.post(f"/v1/approvals/{asked['id']}/approve"), 409, "state")
        token = operator_token(service, "second-custodian", "custodian")
        headers = {"Authorization": f"Bearer {token}"}
        given = custodian.post(f"/v1/approvals/{asked['id']}/approve", headers=headers)
        assert given.json()["approved_by"] == "second-custodian"
        spent = {"approval": asked["id"]}
        problem(custodian.post(f"{version}/2/destroy", json=spent), 409, "state")
        destroyed = custodian.post(f"{version}/1/destroy", json=spent)
        assert destroyed.json()["state"] == "destroyed"

        kinds = [r["kind"] for r in auditor.get("/v1/log/records?limit=1000").json()["records"]]
        for kind in ("key.create", "key.promote", "key.compromise", "key.destroy"):
            assert kind in kinds


def test_lists_come_in_pages(service: Service) -> None:
    with service.client("key-admin") as client:
        for number in range(5):
            spec = {"name": f"page-{number}", "model": "m", "scheme": "gumbel", "slots": 1}
            assert client.post("/v1/keys", json=spec).status_code == 201
        names, after = [], None
        while True:
            params = {"limit": 2} | ({} if after is None else {"after": after})
            found = client.get("/v1/keys", params=params).json()
            assert len(found["keys"]) <= 2
            names += [key["name"] for key in found["keys"]]
            if (after := found["next"]) is None:
                break
        assert names == sorted(set(names)) and len([n for n in names if "page" in n]) == 5
        assert client.get("/v1/keys", params={"after": "zzz"}).json()["keys"] == []
        problem(client.get("/v1/keys", params={"limit": 0}), 422)
    with service.client("auditor") as client:
        shown, start = [], 0
        while start is not None:
            found = client.get("/v1/log/records", params={"start": start, "limit": 3}).json()
            shown += [record["index"] for record in found["records"]]
            start = found["next"]
        assert shown == list(range(len(shown))) and len(shown) > 10


def test_the_log_is_proved_and_taken_away(service: Service) -> None:
    from filigrane.custody.merkle import verify_inclusion
    from filigrane.custody.verification import verify_log

    with service.client("auditor") as client:
        point = client.post("/v1/log/checkpoint").json()
        assert client.get("/v1/log/checkpoint").json() == point
        size = point["size"]
        proof = client.get("/v1/log/proof", params={"index": 0, "size": size}).json()
        problem(client.get("/v1/log/proof", params={"index": size, "size": size}), 422)
        lines = client.get("/v1/log/export").text.splitlines()
    records = [json.loads(line) for line in lines]
    jwks = records[0]["jwks"]
    report = verify_log(records, jwks, None)
    assert report.n_records >= size and report.n_checkpoints >= 1
    leaf = bytes.fromhex(next(r["hash"] for r in records if "record" in r))
    hashes = [bytes.fromhex(part) for part in proof["hashes"]]
    verify_inclusion(leaf, 0, size, hashes, bytes.fromhex(point["root"]))


def test_other_tenants_things_do_not_exist(service: Service) -> None:
    with service.client("key-admin", OTHER) as client:
        assert "chat" not in {key["name"] for key in client.get("/v1/keys").json()["keys"]}
        absent = client.get("/v1/keys/never-was")
        for answer in (
            client.get("/v1/keys/chat"),
            client.post("/v1/keys/chat/versions"),
            client.post("/v1/keys/chat/versions/1/retire"),
        ):
            # The same words as for what never was.
            assert problem(answer, 404)["code"] == absent.json()["code"]
        assert client.get("/v1/keys/chat").json() == absent.json()
    with service.client("auditor", OTHER) as client:
        tenants = {r["tenant"] for r in client.get("/v1/log/records").json()["records"]}
        assert tenants == {OTHER}


def test_many_malformed_bodies_get_client_errors(service: Service) -> None:
    """FILIGRANE_MALFORMED bodies made from good ones: never 5xx, never a repeated canary."""
    rng = random.Random(7)
    good = [
        ("key-admin", "/v1/keys", {"name": "a", "model": CANARY, "scheme": "gumbel", "slots": 1}),
        ("key-admin", "/v1/keys/chat/versions/1/compromise", {"since": "2026-01-01T00:00:00Z"}),
        ("custodian", "/v1/approvals", {"kind": "destroy", "subject": CANARY, "purpose": CANARY}),
        ("tenant-admin", "/v1/tokens", {"name": CANARY, "roles": ["auditor"]}),
        (
            "tenant-admin",
            "/v1/engines",
            {"name": "e", "models": [CANARY], "public_key": {"kty": "OKP", "crv": "X25519"}},
        ),
        ("detector-expert", "/v1/jobs", [{"id": "1", "text": CANARY}, {"tokens": [1, 2, 3]}]),
        ("detector-expert", "/v1/detect", {"text": CANARY, "alpha": 0.01}),
    ]
    statuses: dict[int, int] = {}
    with service.client() as client:
        for _ in range(MALFORMED):
            role, path, body = rng.choice(good)
            answer = client.post(
                path,
                content=broken(rng, json.dumps(body).encode()),
                headers=service.headers(role) | {"Content-Type": "application/json"},
            )
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert CANARY not in answer.text
    assert statuses.keys() >= {400, 422}


def broken(rng: random.Random, body: bytes) -> bytes:
    """A body that is no JSON any more, or JSON of another form."""
    where = rng.randrange(len(body))
    how = rng.randrange(7)
    if how == 0:
        return body[:where]
    if how == 1:
        # Outside texts too, where a control character is never allowed.
        return body[:where] + bytes([rng.randrange(0x20)]) * 2 + b"\x01" + body[where:]
    if how == 2:
        return rng.randbytes(rng.randrange(1, 300))
    if how == 3:
        return b"[" * rng.randrange(1, 5000) + body
    if how == 4:
        wrong = rng.choice([None, True, 3, -1.5e300, "x", [[]], {"a": {}}, float("nan")])
        return json.dumps({CANARY: wrong, "zz": json.loads(body)}).encode()
    if how == 5:
        return json.dumps(rng.choice([None, False, 0, 2**70, CANARY, [CANARY], [[1]]])).encode()
    return body + rng.choice([b"]", b"}", b"{}", b"\xff", b",", b"\x00"])


def test_the_schema_is_kept(service: Service) -> None:
    """schemathesis: FILIGRANE_SCHEMA_EXAMPLES requests for each operation, no error of ours."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", wait_for_schema=10)
    roles = ["key-admin", "tenant-admin", "auditor", "detector-expert", "custodian"]
    tried: list[str] = []
    for number, found in enumerate(schema.get_all_operations()):
        operation = found.ok()
        # An engine's or an officer's roles would end in 403; any role will do to get past 401.
        headers = service.headers(roles[number % len(roles)], OTHER)

        def check(case: "schemathesis.Case", headers: dict[str, str] = headers) -> None:
            answer = case.call(headers=headers, base_url=service.url)
            assert answer.status_code < 500, (case.method, case.path, answer.status_code)
            if answer.status_code >= 400:
                assert answer.headers["content-type"][0] == "application/problem+json"
                said = json.loads(answer.content)
                assert said["status"] == answer.status_code and said["detail"]
            case.validate_response(
                answer,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.checks.response_schema_conformance,
                ],
            )

        from hypothesis import given

        bounded = settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        bounded(given(case=operation.as_strategy())(lambda case: check(case)))()
        tried.append(operation.label)
    assert len(tried) > 30


def test_many_clients_at_once(service: Service) -> None:
    failures: list[object] = []

    def ask() -> None:
        with service.client("key-admin") as client:
            for _ in range(20):
                answer = client.get("/v1/whoami")
                if answer.status_code != 200:
                    failures.append(answer.status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_command_writes_serves_and_stops(tmp_path: Path) -> None:
    """`filigrane serve --init FOLDER`: from nothing to an answer, until Ctrl-C."""
    folder = tmp_path / "first"
    # The default port may be taken on the machine that runs the tests: write, then change it.
    Settings.initial(folder)
    config = folder / "filigrane.toml"
    port = free_port()
    config.write_text(config.read_text().replace("port = 8470", f"port = {port}"))
    command = [sys.executable, "-m", "filigrane", "serve", "--init", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"filigrane serves http://127.0.0.1:{port} (Ctrl-C ")
        tokens = json.loads((folder / "tokens.json").read_text())
        headers = {"Authorization": f"Bearer {tokens['auditor']}"}
        who = httpx2.get(f"http://127.0.0.1:{port}/v1/whoami", headers=headers)
        assert who.json()["tenant"] == "demo"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "filigrane.toml"
    config.write_text("[kms]\nprovider = 'local'\npath = 'x'\npassphrase_file = 'y'\n")
    command = [sys.executable, "-m", "filigrane", "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and "filigrane keys migrate" in done.stderr
