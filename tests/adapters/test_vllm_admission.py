"""What the plugin decides about requests, without vLLM: its front end imports none of it."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllmkit
from filigrane.adapters.vllm import admission, launch
from filigrane.adapters.vllm.tenants import MAX_BODY, Tenants
from filigrane.errors import RequestRefused
from filigrane.keys import Key
from filigrane.serving import Keyring, Mark, Unmarked
from filigrane.serving.keyring import ENVIRONMENT


def params(**changed: Any) -> SimpleNamespace:
    """What of vLLM's SamplingParams is looked at."""
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": None, "logprobs": None}
    return SimpleNamespace(**usual | {"detokenize": True, "extra_args": None} | changed)


def forget() -> None:
    """As in a process that has just been started."""
    admission.live.cache_clear()
    admission.live_engine.cache_clear()


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A keyring of two tenants with tokens, and a run that an engine has said it marks."""
    vllmkit.keyring(tmp_path, 'schemes = ["gumbel", "greenlist"]\n', ["anna", "berta"])
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(launch.RUN, str(tmp_path / "run"))
    forget()
    launch.prepare()
    launch.Sign("distribution")
    launch.publish(Keyring.load(tmp_path))
    yield tmp_path
    forget()


def test_a_run_says_what_it_marks(started: Path) -> None:
    assert launch.ready("distribution") and not launch.ready("logits")
    one, two = launch.Sign("logits"), launch.Sign("logits")
    one.counts += (5, 2)
    two.counts += (1, 1)
    assert launch.counts() == {"marked": 6, "unmarked": 3}
    run = launch.folder()
    assert run is not None and run.stat().st_mode & 0o777 == 0o700


def look() -> None:
    """What a second does."""
    for keys in (admission.live(), admission.live_engine()):
        assert keys is not None
        keys.look()


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "keyring.toml").read_text()
    assert old in text
    (folder / "keyring.toml").write_text(text.replace(old, new))


def test_a_rotation_while_a_server_runs(started: Path) -> None:
    """Staged, known to the engine, promoted: no restart, and what was admitted ends as it began."""
    Key.generate("next").save(started / "next.key")
    edit(
        started, "[tenants.anna]", '[keys.next]\ntenant = "anna"\nstate = "staged"\n[tenants.anna]'
    )
    before = params(extra_args={"filigrane_tenant": admission.seal("anna")})
    look()
    first = admission.admit(before)
    assert isinstance(first, Mark) and first.key_id == "key-anna"
    staged = {"filigrane_tenant": admission.seal("anna"), "filigrane_key": "next"}
    with pytest.raises(RequestRefused) as caught:
        admission.admit(params(extra_args=staged))
    assert caught.value.reason == "staged_key"

    edit(started, 'state = "staged"', 'state = "active"')
    edit(started, "[keys.key-anna]\n", '[keys.key-anna]\nstate = "retired"\n')
    edit(started, 'default = "key-anna"', 'default = "next"')
    look()
    after = params(extra_args={"filigrane_tenant": admission.seal("anna")})
    second = admission.admit(after)
    assert isinstance(second, Mark) and second.key_id == "next"
    # The first request reaches the engine only now, or comes back after it was preempted.
    assert admission.admitted(before) == first and admission.admitted(after) == second
    edit(started, '[keys.key-anna]\nstate = "retired"\ntenant = "anna"\n', "")
    (started / "key-anna.key").unlink()
    look()
    assert admission.admitted(before) == first


def test_nothing_is_admitted_before_the_engine_has_read_its_key(started: Path) -> None:
    Key.generate("late").save(started / "late.key")
    edit(started, "[tenants.anna]", '[keys.late]\ntenant = "anna"\n[tenants.anna]')
    keys = admission.live()
    assert keys is not None and "late" in keys.look().entries
    late = {"filigrane_tenant": admission.seal("anna"), "filigrane_key": "late/3"}
    with pytest.raises(RequestRefused, match="has not read key late yet") as caught:
        admission.admit(params(extra_args=late))
    assert caught.value.reason == "engine"
    other = Keyring.load(started)
    launch.publish(other)
    assert isinstance(admission.admit(params(extra_args=late)), Mark)
    # An engine elsewhere, with another secret of the same name.
    (started / "late.key").unlink()
    Key.generate("late").save(started / "late.key")
    launch.publish(Keyring.load(started))
    with pytest.raises(RequestRefused, match="another keyring"):
        admission.admit(params(extra_args=late))


def test_what_was_decided_cannot_be_forged(started: Path) -> None:
    one = params(extra_args={"filigrane_tenant": admission.seal("anna")})
    admission.admit(one)
    pin = one.extra_args[admission.ADMITTED]
    again = params(extra_args=dict(one.extra_args))  # the same request, checked once more
    assert isinstance(admission.admit(again), Mark)
    for forged in ("unmarked~opted_out~", pin[:-1] + ("0" if pin[-1] != "0" else "1"), "", 7):
        with pytest.raises(RequestRefused, match="the server's own"):
            admission.admit(params(extra_args={**one.extra_args, admission.ADMITTED: forged}))
    opted = params(
        extra_args={"filigrane_tenant": admission.seal("anna"), "filigrane_mark": "false"}
    )
    admission.admit(opted)
    edit(started, "schemes =", 'policy = "enforce"\nschemes =')
    look()
    assert admission.admitted(opted) == Unmarked(reason="opted_out")
    assert not any(secret in repr(one.extra_args) for secret in secrets_of(started))


def secrets_of(folder: Path) -> list[str]:
    found = vllmkit.secrets_of({path.stem: Key.load(path) for path in folder.glob("*.key")})
    assert len(found) == 6
    return found


def test_an_expired_key_is_refused(started: Path) -> None:
    edit(started, "[keys.key-anna]\n", "[keys.key-anna]\nexpires = 2026-01-01T00:00:00Z\n")
    look()
    for name in ("anna", "berta"):
        asked = params(extra_args={"filigrane_tenant": admission.seal(name)})
        if name == "berta":
            assert isinstance(admission.admit(asked), Mark)
            continue
        with pytest.raises(RequestRefused) as caught:
            admission.admit(asked)
        assert caught.value.reason == "lease_expired"


def test_only_the_middleware_can_say_who_asks(started: Path) -> None:
    sealed = {"filigrane_tenant": admission.seal("anna")}
    decided = admission.admit(params(extra_args=sealed))
    assert isinstance(decided, Mark) and decided.key_id == "key-anna"
    assert admission.admitted(params(extra_args=sealed)) == decided
    forged = [
        "anna",
        "anna~",
        "anná~1~ü",
        "anna~0~0",
        f"anna~{'0' * 64}",
        admission.seal("berta").replace("berta", "anna"),
    ]
    for tenant in [*forged, 3, None]:
        with pytest.raises(RequestRefused, match="bearer tokens"):
            admission.admit(params(extra_args={"filigrane_tenant": tenant}))


def test_a_seal_is_good_for_a_minute(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = {"filigrane_tenant": admission.seal("anna")}
    now = admission.time.monotonic()
    monkeypatch.setattr(admission.time, "monotonic", lambda: now + admission.SEAL_SECONDS + 2)
    with pytest.raises(RequestRefused, match="bearer tokens"):
        admission.admit(params(extra_args=sealed))


def test_a_request_that_is_checked_twice_is_counted_once(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[str, str]] = []
    monkeypatch.setattr(admission, "count", lambda *what: counted.append(what))
    one = params(extra_args={"filigrane_tenant": admission.seal("anna")})
    assert admission.admit(one) == admission.admit(one)
    assert counted == [("marked", "gumbel")]
    one.temperature = 0.0
    with pytest.raises(RequestRefused):
        admission.admit(one)


def test_an_engine_does_not_check_decoding_again(started: Path) -> None:
    """vLLM fills max_tokens in after the front end has looked."""
    sealed = {"filigrane_tenant": admission.seal("anna")}
    short = params(extra_args=sealed, max_tokens=2, temperature=0.0)
    with pytest.raises(RequestRefused):
        admission.admit(short)
    assert isinstance(admission.admitted(short), Mark)


def test_no_engine_no_mark(started: Path) -> None:
    green = {"filigrane_tenant": admission.seal("anna"), "filigrane_scheme": "greenlist"}
    with pytest.raises(RequestRefused, match="does not mark text") as caught:
        admission.admit(params(extra_args=green))
    assert caught.value.reason == "engine"
    launch.Sign("logits")
    assert isinstance(admission.admit(params(extra_args=green)), Mark)


def test_beams_are_recognised_by_their_steps(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come without the arguments of whoever asked: only the middleware has seen those."""
    for policy in ("default", "opt-in", "enforce"):
        step = params(max_tokens=1, logprobs=4, detokenize=False)
        text = (started / "keyring.toml").read_text()
        (started / "keyring.toml").write_text(f'policy = "{policy}"\n' + text)
        forget()
        monkeypatch.setattr(admission, "vetted", False)
        with pytest.raises(RequestRefused) as caught:
            admission.admit(step)
        assert caught.value.reason == "beams"
        opted = {"use_beam_search": True, "vllm_xargs": {"filigrane_mark": "false"}}
        asks = {"use_beam_search": True, "vllm_xargs": {"filigrane_mark": "true"}}
        assert ask(asks)[0] == 400
        assert ask(opted)[0] == (400 if policy == "enforce" else 200)
        assert admission.vetted
        step = params(max_tokens=1, logprobs=4, detokenize=False)
        if policy == "enforce":
            with pytest.raises(RequestRefused):
                admission.admit(step)
        else:
            assert admission.admit(step) == Unmarked(reason="beams")
        (started / "keyring.toml").write_text(text)


def test_without_a_keyring_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.delenv(launch.RUN, raising=False)
    forget()
    launch.prepare()
    assert launch.RUN not in os.environ
    assert admission.admit(params()) == Unmarked(reason="not_asked")
    with pytest.raises(RequestRefused, match="no keyring"):
        admission.admit(params(extra_args={"filigrane_mark": True}))
    forget()


# ---------------------------------------------------------------- the middleware


class Behind:
    """What is behind the middleware: keeps what reaches it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append((scope, body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def ask(
    body: bytes | dict[str, Any],
    *,
    token: str | None = "anna",
    path: str = "/v1/completions",
    method: str = "POST",
    pieces: int = 1,
    **scope: Any,
) -> tuple[int, dict[bytes, bytes], Behind]:
    behind = Behind()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"7")]
    if token is not None:
        headers.append((b"AUTHORIZATION", f"bearer {vllmkit.token(token)}".encode()))
    size = -(-len(content) // pieces) or 1
    parts = [content[i : i + size] for i in range(0, len(content), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {"type": "http", "method": method, "path": path, "headers": headers, "root_path": ""}
    asyncio.run(Tenants(behind)(asked | scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), behind


def test_a_request_gets_its_tenant(started: Path) -> None:
    body = {"prompt": "x", "vllm_xargs": {"filigrane_scheme": "greenlist"}}
    status, headers, behind = ask(body, pieces=5)
    ((scope, arrived),) = behind.seen
    assert status == 200 and headers[b"filigrane-key"] == b"key-anna"
    assert headers[b"filigrane-scheme"].startswith(b"greenlist:")
    content = json.loads(arrived)
    tenant = content["vllm_xargs"].pop("filigrane_tenant")
    assert content == body and tenant.startswith("anna~")
    assert admission.arguments({"filigrane_tenant": tenant}, check=True) == {
        "filigrane_tenant": "anna"
    }
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    assert lengths == [str(len(arrived)).encode()]


@pytest.mark.parametrize(
    ("body", "how", "status"),
    [
        ({}, {"token": None}, 401),
        ({}, {"token": "nobody"}, 401),
        ({}, {"token": None, "method": "GET", "path": "/v1/models"}, 401),
        ({}, {"token": None, "path": "/proxy/v1/completions", "root_path": "/proxy"}, 401),
        ({}, {"token": None, "path": "/invocations"}, 401),
        ({}, {"token": None, "path": "/health/../v1/completions"}, 401),
        ({"vllm_xargs": {"filigrane_tenant": "berta"}}, {}, 400),
        ({"vllm_xargs": {"filigrane_key": "key-berta"}}, {}, 400),
        ({"vllm_xargs": {"filigrane_key": ["key-anna"]}}, {}, 400),
        ({"use_beam_search": True}, {}, 400),
        (b" " * (MAX_BODY + 1), {}, 413),
    ],
)
def test_what_never_reaches_vllm(started: Path, body: Any, how: Any, status: int) -> None:
    found, headers, behind = ask(body, **how)
    assert found == status and not behind.seen
    assert (status == 401) == (b"www-authenticate" in headers)


def test_fields_in_the_body_itself(started: Path) -> None:
    """vLLM would drop them: they are moved, or refused where they stand twice."""
    status, headers, behind = ask({"prompt": "x", "filigrane_key": "key-anna/3"})
    assert status == 200 and headers[b"filigrane-key"] == b"key-anna/3"
    content = json.loads(behind.seen[0][1])
    assert content["vllm_xargs"]["filigrane_key"] == "key-anna/3" and "filigrane_key" not in content
    twice = {"filigrane_mark": True, "vllm_xargs": {"filigrane_mark": "false"}}
    assert ask(twice)[0] == 400
    assert ask({"filigrane_tenant": "berta"})[0] == 400


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"null", b"\xff", b'{"vllm_xargs": 3}'])
def test_what_vllm_itself_refuses_arrives_unchanged(started: Path, body: bytes) -> None:
    status, headers, behind = ask(body)
    assert status == 200 and behind.seen[0][1] == body and b"filigrane-key" not in headers


def test_paths_that_write_and_others(started: Path) -> None:
    inner = {"token_ids": [1], "sampling_params": {"extra_args": {"filigrane_mark": "true"}}}
    status, headers, behind = ask(inner, path="/inference/v1/generate")
    arrived = json.loads(behind.seen[0][1])["sampling_params"]["extra_args"]
    assert status == 200 and arrived["filigrane_tenant"].startswith("anna~")
    assert headers[b"filigrane-key"] == b"key-anna"
    for path in ("/v1/embeddings", "/tokenize"):
        status, headers, behind = ask({"input": "x"}, path=path)
        assert status == 200 and b"filigrane-key" not in headers
        assert json.loads(behind.seen[0][1]) == {"input": "x"}
    assert ask({"sampling_params": 3}, path="/inference/v1/generate")[0] == 200
    for truth in (1, "true", "yes"):
        assert ask({"use_beam_search": truth, "prompt": "x"})[0] == 400


def test_open_paths(started: Path) -> None:
    for path in ("/health", "/metrics"):
        assert ask(b"", token=None, method="GET", path=path)[0] == 200
    assert ask(b"", token=None, method="OPTIONS")[0] == 200


def test_no_secret_is_shown(started: Path) -> None:
    shown = repr(admission.keyring()) + str(launch.folder()) + admission.seal("anna")
    for secret in vllmkit.secrets_of({"anna": Key.load(started / "key-anna.key")}):
        assert secret not in shown
