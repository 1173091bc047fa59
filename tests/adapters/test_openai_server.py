"""The small server: a real one in this process with a tiny model, then SmolLM2 in its own."""

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bytemodel
import ringkit
import servers
from filigrane import Key, detect, from_tag
from filigrane.adapters.models import LoadedModel, load

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

from filigrane.adapters.openai_server import Limits, application  # noqa: E402
from filigrane.adapters.openai_server import server as make_server  # noqa: E402
from filigrane.adapters.openai_server.decoding import Decoder  # noqa: E402
from filigrane.serving import Keyring  # noqa: E402

MOST = -13.8  # log(1e-6)


class Running:
    """A server, its keys and everything that it logged."""

    def __init__(self, port: int, keys: dict[str, Key], log: list[str]) -> None:
        self.port, self.keys, self.log = port, keys, log

    def client(self, tenant: str | None = "acme") -> Any:
        token = ringkit.TOKENS[tenant] if tenant else "none"
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=120)

    def ask(
        self,
        body: object,
        *,
        path: str = "/v1/completions",
        tenant: str | None = "acme",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """One request as bytes on the wire: (status, JSON)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = dict(headers or {})
        if tenant:
            sent["Authorization"] = f"Bearer {ringkit.TOKENS[tenant]}"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST" if body is not None else "GET", path, data, sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content)

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }


@contextmanager
def running(
    model: LoadedModel,
    folder: Path,
    *,
    limits: Limits | None = None,
    tokens: bool = True,
    head: str = "",
    grace: int = 30,
) -> Iterator[Running]:
    keys = ringkit.write(folder, tokens=tokens, head=head)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("filigrane", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    port = servers.free_port()
    app = application(model, Keyring.load(folder), name="tiny", limits=limits)
    server = make_server(app, host="127.0.0.1", port=port, grace=grace)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(port, keys, log)
    finally:
        server.should_exit = True
        thread.join()
        for logger in loggers:
            logger.removeHandler(handler)


def until(done: Callable[[], bool], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not done():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(bytemodel.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def server(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny, tmp_path_factory.mktemp("ring")) as made:
        yield made


def asked(**more: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "The sea", "max_tokens": 12, "ignore_eos": True, **more}


def whose(server: Running, tokens: list[int], scheme: str) -> set[str]:
    return {
        name
        for name, key in server.keys.items()
        if detect(tokens, key, from_tag(scheme)).log_pvalue < MOST
    }


# ---------------------------------------------------------------- marks


def test_concurrent_requests_carry_their_own_tenants_marks(server: Running) -> None:
    def one(number: int) -> tuple[str, str, list[int], dict[str, Any], int]:
        tenant = ringkit.TENANTS[number % 2]
        scheme = ("gumbel", "greenlist")[number // 2 % 2]
        extra = {"filigrane_scheme": scheme, "return_token_ids": True, "ignore_eos": True}
        client = server.client(tenant)
        if number // 4 % 2:
            answer = client.completions.create(
                model="tiny", prompt="x" * (number + 1), max_tokens=100, extra_body=extra
            )
        else:
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "x" * (number + 1)}],
                max_tokens=100,
                temperature=0.9,
                extra_body=extra,
            )
        choice = answer.choices[0]
        return tenant, scheme, choice.token_ids, answer.filigrane, choice.marked_tokens

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    for tenant, scheme, tokens, said, marked in answers:
        assert len(tokens) == 100 and 60 < marked < 100
        assert said == {"marked": True, "key": tenant, "scheme": from_tag(scheme).tag}
        assert whose(server, tokens, scheme) == {tenant}


def test_users_of_a_key(server: Running) -> None:
    status, answer = server.ask(
        asked(max_tokens=100, return_token_ids=True, filigrane_key="acme/17")
    )
    assert status == 200 and answer["filigrane"]["key"] == "acme/17"
    tokens = answer["choices"][0]["token_ids"]
    key, scheme = server.keys["acme"], from_tag("gumbel")
    assert detect(tokens, key.user(17), scheme).log_pvalue < MOST
    assert detect(tokens, key.user(18), scheme).log_pvalue > MOST
    assert detect(tokens, key, scheme).log_pvalue > MOST


def test_who_opts_out_is_not_marked(server: Running) -> None:
    status, answer = server.ask(
        asked(max_tokens=100, return_token_ids=True, filigrane_mark=False, temperature=0)
    )
    assert status == 200 and answer["filigrane"] == {"marked": False, "reason": "opted_out"}
    assert answer["choices"][0]["marked_tokens"] == 0
    assert whose(server, answer["choices"][0]["token_ids"], "gumbel") == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"filigrane_scheme": "greenlist"},
        {"vllm_xargs": {"filigrane_scheme": "greenlist"}},
        {"extra_body": {"filigrane_scheme": "greenlist"}},
        {"extra_body": {"vllm_xargs": {"filigrane_scheme": "greenlist"}}},
        {"filigrane_scheme": "greenlist", "filigrane_mark": None},
    ],
)
def test_where_the_fields_may_be(server: Running, fields: dict[str, object]) -> None:
    status, answer = server.ask(asked(**fields))
    assert status == 200 and answer["filigrane"]["scheme"].startswith("greenlist")


def test_greenlist_marks_greedy_text(server: Running) -> None:
    body = asked(max_tokens=200, temperature=0, filigrane_scheme="greenlist", return_token_ids=True)
    status, answer = server.ask(body)
    assert status == 200 and answer["choices"][0]["marked_tokens"] > 0
    again = server.ask(body)[1]
    # Only the slot is drawn; two answers agree up to the first marked token at least.
    assert again["choices"][0]["token_ids"][:4] == answer["choices"][0]["token_ids"][:4]


# ---------------------------------------------------------------- decoding


def test_a_seed_gives_the_same_text_whoever_else_is_served(server: Running) -> None:
    body = asked(max_tokens=40, seed=7, n=2, return_token_ids=True)
    alone = server.ask(body)[1]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.ask, asked(max_tokens=60)) for _ in range(3)]
        among = pool.submit(server.ask, body).result()[1]
        assert all(other.result()[0] == 200 for other in others)
    texts = [[choice["token_ids"] for choice in answer["choices"]] for answer in (alone, among)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert server.ask(asked(max_tokens=40, seed=-7, filigrane_mark=False))[0] == 200


def test_several_prompts_and_answers(server: Running) -> None:
    status, answer = server.ask(
        asked(prompt=["one", "two!"], n=3, max_tokens=6, return_token_ids=True)
    )
    assert status == 200 and [c["index"] for c in answer["choices"]] == list(range(6))
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == 6
    assert [len(choice["prompt_token_ids"]) for choice in answer["choices"]] == [3, 3, 3, 4, 4, 4]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 36, "total_tokens": 43}
    ids = answer["choices"][0]["prompt_token_ids"]
    status, same = server.ask(asked(prompt=ids, return_token_ids=True))
    assert status == 200 and same["choices"][0]["prompt_token_ids"] == ids


def events(server: Running, body: Mapping[str, object], path: str) -> list[Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {ringkit.TOKENS['acme']}"}
    connection.request("POST", path, json.dumps({**body, "stream": True}), headers)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.read().decode().split("\n\n") if line]
    connection.close()
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_says_what_the_whole_answer_says(server: Running) -> None:
    body = asked(max_tokens=60, seed=3, n=2, return_token_ids=True)
    (whole,) = [server.ask(body)[1]]
    found = events(server, {**body, "stream_options": {"include_usage": True}}, "/v1/completions")
    assert found[-1]["usage"] == whole["usage"] and found[-1]["choices"] == []
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in found[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [id for part in own for id in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == "length"
        assert own[-1]["marked_tokens"] == choice["marked_tokens"]
        assert len(own) > 20, "it came at once"
    assert all(event["filigrane"] == whole["filigrane"] for event in found)


def test_chats_stream(server: Running) -> None:
    stream = server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
        max_tokens=30,
        stream=True,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    whole = server.client().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        max_completion_tokens=30,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    assert whole.choices[0].message.content == text and whole.object == "chat.completion"
    assert chunks[0].object == "chat.completion.chunk"


def test_a_text_ends_before_a_stop_text(server: Running) -> None:
    body = asked(max_tokens=80, seed=5, return_token_ids=True)
    whole = server.ask(body)[1]["choices"][0]
    stop = [whole["text"][20:23], "never there"]
    place = whole["text"].find(stop[0])
    status, answer = server.ask({**body, "stop": stop})
    choice = answer["choices"][0]
    assert status == 200 and choice["finish_reason"] == "stop"
    assert choice["text"] == whole["text"][:place]
    assert choice["token_ids"] == whole["token_ids"][: len(choice["token_ids"])]
    assert len(choice["token_ids"]) < 60
    found = events(server, {**body, "stop": stop}, "/v1/completions")
    assert "".join(event["choices"][0]["text"] for event in found) == choice["text"]


def test_what_is_kept_back(tiny: LoadedModel) -> None:
    """The beginning of a stop text, and parts of a character, until it is known what they are."""

    def shown(text: str, *stop: str, last: bool = True) -> list[str]:
        decoder = Decoder(tiny.tokenizer, stop)
        ids = tiny.tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        return [
            decoder.push([id], last=last and place == len(ids) - 1) for place, id in enumerate(ids)
        ]

    assert shown("abcabd!", "abd") == ["", "", "abc", "", "", "", ""]
    assert shown("abcabx", "abd") == ["", "", "abc", "", "", "abx"]
    assert shown("abcab", "abd") == ["", "", "abc", "", "ab"]
    assert shown("abcab", "abd", last=False)[-1] == ""
    assert shown("xaab", "aab", "zzz") == ["x", "", "", ""]
    assert shown("né€", "q") == ["n", "", "é", "", "", "€"]
    broken = Decoder(tiny.tokenizer)
    assert broken.push(tiny.tokenizer("é")["input_ids"][:1]) == ""
    assert broken.push([], last=True) == "\N{REPLACEMENT CHARACTER}"


def test_end_of_text(server: Running) -> None:
    """One token in 257 ends a text; a text of 400 goes on after it only if told to."""
    body = {**asked(max_tokens=400, return_token_ids=True, n=8), "ignore_eos": False}
    choices = server.ask(body)[1]["choices"]
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert ended and all(
        choice["token_ids"].index(256) == len(choice["token_ids"]) - 1 for choice in ended
    )
    assert all("<|end|>" not in choice["text"] for choice in ended)


# ---------------------------------------------------------------- refusals

BAD: dict[str, tuple[object, int, str]] = {
    "not JSON": (b"{", 400, "malformed"),
    "not an object": ([1], 400, "malformed"),
    "deep": (b"[" * 100_000, 400, "malformed"),
    "NaN": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "malformed"),
    "infinite": (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400, "malformed"),
    "long number": (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", 400, "malformed"),
    "surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "malformed"),
    "bytes": (b"\xff\xfe\x00", 400, "malformed"),
    "no model": ({"prompt": "x"}, 400, "malformed"),
    "other model": (asked(model="gpt-9"), 404, "model_not_found"),
    "no prompt": ({"model": "tiny"}, 400, "malformed"),
    "empty prompt": (asked(prompt=""), 400, "malformed"),
    "empty prompts": (asked(prompt=[]), 400, "malformed"),
    "prompt of floats": (asked(prompt=[1.5]), 400, "malformed"),
    "prompt of truths": (asked(prompt=[True]), 400, "malformed"),
    "id too high": (asked(prompt=[257]), 400, "malformed"),
    "id below": (asked(prompt=[-1]), 400, "malformed"),
    "temperature": (asked(temperature="hot"), 400, "malformed"),
    "temperature below": (asked(temperature=-1), 400, "malformed"),
    "temperature true": (asked(temperature=True), 400, "malformed"),
    "huge": (asked(temperature=10**400), 400, "malformed"),
    "top_p": (asked(top_p=0), 400, "malformed"),
    "top_k": (asked(top_k=1.5), 400, "malformed"),
    "n": (asked(n=0), 400, "malformed"),
    "too many": (asked(n=17), 400, "malformed"),
    "stop": (asked(stop=[""]), 400, "malformed"),
    "seed": (asked(seed="x"), 400, "malformed"),
    "stream": (asked(stream="yes"), 400, "malformed"),
    "stream options": (asked(stream_options={"include_usage": True}), 400, "malformed"),
    "max_tokens": (asked(max_tokens=0), 400, "malformed"),
    "too long": (asked(max_tokens=510), 400, "context_length_exceeded"),
    "long prompt": (asked(prompt="x" * 600), 400, "context_length_exceeded"),
    "penalty": (asked(frequency_penalty=0.5), 400, "malformed"),
    "logprobs": (asked(logprobs=0), 400, "malformed"),
    "unknown": (asked(frobnicate=1), 400, "malformed"),
    "messages": (asked(messages=[]), 400, "malformed"),
    "greedy": (asked(temperature=0), 400, "greedy"),
    "top-k 1": (asked(top_k=1), 400, "greedy"),
    "too short": (asked(max_tokens=4), 400, "too_short"),
    "unknown key": (asked(filigrane_key="nobody"), 400, "unknown_key"),
    "other's key": (asked(filigrane_key="zeta"), 400, "unknown_key"),
    "other's user": (asked(filigrane_key="zeta/3"), 400, "unknown_key"),
    "scheme": (asked(filigrane_scheme="delta"), 400, "scheme"),
    "no scheme": (asked(filigrane_scheme="x"), 400, "malformed"),
    "argument": (asked(filigrane_kye="acme"), 400, "malformed"),
    "argument type": (asked(filigrane_key=17), 400, "malformed"),
    "mark": (asked(filigrane_mark="perhaps"), 400, "malformed"),
    "tenant": (asked(filigrane_tenant="acme"), 400, "unknown_tenant"),
    "tenant inside": (asked(vllm_xargs={"filigrane_tenant": "acme"}), 400, "unknown_tenant"),
    "twice": (asked(filigrane_key="acme", vllm_xargs={"filigrane_key": "x"}), 400, "malformed"),
    "xargs": (asked(vllm_xargs={"other": 1}), 400, "malformed"),
    "xargs type": (asked(vllm_xargs="x"), 400, "malformed"),
    "too large": (asked(prompt="x" * 2**20), 413, "too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(server: Running, name: str) -> None:
    body, status, code = BAD[name]
    before = server.metrics().get(
        f'filigrane_requests_total{{outcome="refused",reason="{code}"}}', 0.0
    )
    found, answer = server.ask(body)
    error = answer["error"]
    assert (found, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert 10 < len(error["message"]) < 600 and set(error) == {"message", "type", "param", "code"}
    after = server.metrics()[f'filigrane_requests_total{{outcome="refused",reason="{code}"}}']
    assert after == before + 1


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [{"content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": "x", "tool_calls": []}],
        [{"role": "user", "content": "raise"}],
    ],
)
def test_chats_that_are_refused(server: Running, messages: object) -> None:
    body = {"model": "tiny", "messages": messages, "max_tokens": 9}
    status, answer = server.ask(body, path="/v1/chat/completions")
    assert status == 400 and answer["error"]["param"] == "messages"


def test_tenants_are_known_by_their_tokens(server: Running) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {ringkit.TOKENS['acme']}"},
        {"Authorization": "Bearer token-of-nobody"},
    ):
        status, answer = server.ask(asked(), tenant=None, headers=headers)
        assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert server.ask(None, path="/v1/models", tenant=None)[0] == 401
    status, models = server.ask(None, path="/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        server.client(None).models.list()
    with pytest.raises(openai.BadRequestError, match="zeta"):
        server.client().completions.create(
            model="tiny", prompt="x", extra_body={"filigrane_key": "zeta"}
        )


def test_without_tokens_clients_say_who_they_are(tiny: LoadedModel, tmp_path: Path) -> None:
    with running(tiny, tmp_path, tokens=False, head='policy = "enforce"') as server:
        body = asked(filigrane_tenant="zeta", filigrane_scheme="greenlist")
        status, answer = server.ask(body, tenant=None)
        assert status == 200 and answer["filigrane"]["key"] == "zeta"
        status, answer = server.ask(asked(), tenant=None)
        assert (status, answer["error"]["code"]) == (400, "no_key")
        status, answer = server.ask({**body, "filigrane_mark": False}, tenant=None)
        assert (status, answer["error"]["code"]) == (400, "opt_out")


def test_paths_and_methods(server: Running) -> None:
    assert server.ask({}, path="/v1/embeddings")[0] == 404
    assert server.ask(None, path="/v1/completions")[0] == 405
    status, answer = server.ask({}, path="/nowhere")
    assert status == 404 and answer["error"]["type"] == "invalid_request_error"


# ---------------------------------------------------------------- coming and going


def test_who_goes_away_is_not_written_for(server: Running) -> None:
    for stream in (True, False):
        before = len(server.log)
        body = json.dumps(asked(max_tokens=480, n=8, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                + f"Authorization: Bearer {ringkit.TOKENS['acme']}\r\n".encode()
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            if stream:
                assert b"200 OK" in connection.recv(4096)
            else:
                time.sleep(0.3)
        until(lambda before=before: any("cancelled" in line for line in server.log[before:]))  # type: ignore[misc]
        (line,) = [line for line in server.log[before:] if "cancelled" in line]
        written = int(line.split(" tokens")[0].rsplit(" ", 1)[1])
        assert written < 480 * 8
    # The thread of the model is free again.
    assert server.ask(asked())[0] == 200


def test_too_many_at_once(tiny: LoadedModel, tmp_path: Path) -> None:
    with running(tiny, tmp_path, limits=Limits(rows=2, waiting=2)) as server:
        with ThreadPoolExecutor(12) as pool:
            body = asked(max_tokens=300, n=2)
            found = list(pool.map(lambda _: server.ask(body), range(12)))
        statuses = {status for status, _ in found}
        assert statuses == {200, 503}
        refused = next(answer for status, answer in found if status == 503)
        assert refused["error"]["code"] == "overloaded"
        # Nobody was forgotten.
        assert server.ask(asked())[0] == 200


def test_when_patience_ends_clients_are_told(tiny: LoadedModel, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(tiny, tmp_path, limits=Limits(rows=16), grace=0) as server:
            server.ask(asked())  # nothing is left to be compiled
            answer = pool.submit(server.ask, asked(max_tokens=480, n=16))
            until(lambda: "marked" in str(server.metrics()))
            time.sleep(0.2)
        status, said = answer.result()
    assert (status, said["error"]["code"]) == (503, "overloaded")
    assert any("cancelled" in line for line in server.log)


def test_nothing_secret_is_logged(server: Running) -> None:
    canary = "canary-in-a-prompt"
    key = server.keys["acme"]
    server.ask(asked(prompt=canary))
    server.ask(asked(filigrane_key=key.export_text()))
    server.ask(asked(user=canary))
    server.ask(b"{" + canary.encode())
    server.ask(asked(), path=f"/v1/completions?token={canary}")
    everything = "\n".join(server.log) + json.dumps(server.metrics())
    assert "marked with acme" in everything
    for known in server.keys.values():
        for secret in ringkit.secrets_of(known):
            assert secret not in everything
    for text in (canary, *ringkit.TOKENS.values(), "The sea"):
        assert text not in everything


def test_counts(server: Running) -> None:
    before = server.metrics()
    server.ask(asked(max_tokens=30))
    server.ask(asked(filigrane_mark=False))
    after = server.metrics()

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert more('filigrane_requests_total{outcome="marked",reason="gumbel"}') == 1
    assert more('filigrane_requests_total{outcome="unmarked",reason="opted_out"}') == 1
    marked, rest = (more(f'filigrane_tokens_total{{state="{s}"}}') for s in ("marked", "unmarked"))
    assert marked + rest == 30 and rest >= 4


# ---------------------------------------------------------------- a real model, in its own process

SERVE = "import typer; from filigrane.cli.engine_serve import serve; typer.run(serve)"


@pytest.mark.model
def test_a_real_model_end_to_end(smollm2: LoadedModel, tmp_path: Path) -> None:
    keys = ringkit.write(tmp_path / "ring", schemes='"gumbel"')
    port = servers.free_port()
    command = [sys.executable, "-c", SERVE, "--model", "smollm2"]
    command += ["--keyring", str(tmp_path / "ring"), "--port", str(port)]
    log = tmp_path / "log"

    def one(number: int) -> tuple[str, str, list[int]]:
        tenant = ringkit.TENANTS[number % 2]
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=ringkit.TOKENS[tenant], timeout=300
        )
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": f"Tell me about the number {number}."}],
            max_tokens=80,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        text, tokens = "", list[int]()
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            tokens += getattr(chunk.choices[0], "token_ids", [])
        return tenant, text, tokens

    with (
        servers.server(command, port, log, {"OMP_NUM_THREADS": "1"}, patience=180),
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(one, range(8)))
    for tenant, text, tokens in answers:
        assert len(tokens) == 80
        assert text == smollm2.tokenizer.decode(tokens, skip_special_tokens=True)
        for name, key in keys.items():
            found = detect(tokens, key, from_tag("gumbel")).log_pvalue < MOST
            assert found == (name == tenant)
    said = log.read_text()
    assert "known answers found" in said and said.count("marked with") == 8
    for key in keys.values():
        assert not any(secret in said for secret in ringkit.secrets_of(key))
    assert not any(token in said for token in ringkit.TOKENS.values())


def test_a_server_that_is_stopped_ends_its_answers(tiny: LoadedModel, tmp_path: Path) -> None:
    ringkit.write(tmp_path / "ring")
    port = servers.free_port()
    folder = bytemodel.write(tmp_path / "model", context=4096)
    command = [sys.executable, "-c", SERVE, "--model", str(folder), "--served-model-name", "tiny"]
    command += ["--keyring", str(tmp_path / "ring"), "--port", str(port)]
    with (tmp_path / "log").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Running(port, {}, [])

        def up() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                return False
            return True

        until(up, 120)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.ask, asked(max_tokens=200))
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            status, said = answer.result()
        assert status == 200 and said["usage"]["completion_tokens"] == 200
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.parametrize("broken", ["no folder", "no key"])
def test_it_does_not_start_without_its_keys(broken: str, tmp_path: Path) -> None:
    from filigrane.cli.engine_serve import serve
    from filigrane.errors import KeyringError

    if broken == "no key":
        ringkit.write(tmp_path)
        (tmp_path / "acme.key").unlink()
    with pytest.raises(KeyringError):
        serve(model="smollm2", keyring=str(tmp_path))
