"""Asking a model over a network, against a real server that does everything wrong."""

import datetime as dt
import pickle
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import badserver as bad
from filigrane.adapters.endpoints import (
    Answer,
    ApiKey,
    Budget,
    Endpoint,
    Parameters,
    Stopped,
    Unanswered,
    client,
    find_form,
    prompt_probabilities,
    read_api_key,
    read_endpoint,
)
from filigrane.adapters.endpoints.pacing import Pace, retry_after
from filigrane.adapters.endpoints.workers import in_order
from filigrane.errors import EndpointError, VocabularyMismatch
from filigrane.radioactivity.evidence import Document
from filigrane.radioactivity.rules import read_positions

SECRET = "sk-proj-Zq81mB0tLx93VwQe77"
FEW = Parameters(max_tokens=8)
Make = Callable[..., tuple[bad.BadServer, Endpoint]]


@pytest.fixture
def make() -> Iterator[Make]:
    """A server with a script, and an endpoint that waits hardly at all between tries."""
    opened: list[Any] = []

    def go(*script: bad.Behaviour, then: bad.Behaviour | None = None, **options: Any) -> Any:
        server = bad.BadServer(script, then).__enter__()
        opened.append(server)
        options = {"backoff": 0.01, "timeout": 5.0, "model": "toy"} | options
        endpoint = Endpoint(server.url, **options)
        opened.append(endpoint)
        return server, endpoint

    yield go
    for each in reversed(opened):
        each.__exit__(None, None, None)


# ---------------------------------------------------------------- what is sent, what comes back


def test_chat_sends_turns_and_parameters(make: Make) -> None:
    server, endpoint = make()
    wanted = Parameters(max_tokens=8, temperature=0.5, top_p=0.9, seed=3)
    answer = endpoint.ask("hello", "be kind", wanted)
    assert answer == Answer(
        text="You said hello", finish_reason="stop", model="toy", output_tokens=3
    )
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    body = dict(request.body)
    assert body.pop("messages") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]
    assert body == {
        "model": "toy",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 8,
        "seed": 3,
        "return_token_ids": True,
    }
    assert "Authorization" not in request.headers


def test_completions_send_the_prompt_itself(make: Make) -> None:
    server, endpoint = make(api="completions")
    assert endpoint.ask("hello", None, FEW).text == "You said hello"
    assert server.requests[0].path == "/v1/completions"
    assert server.requests[0].body["prompt"] == "hello" and "seed" not in server.requests[0].body
    with pytest.raises(EndpointError, match="no system prompt"):
        endpoint.ask("hello", "be kind", FEW)


def test_token_ids_and_log_probabilities_of_both_apis(make: Make) -> None:
    chat = {
        "choices": [
            {
                "message": {"content": "a b"},
                "finish_reason": "length",
                "token_ids": [5, 6],
                "logprobs": {
                    "content": [
                        {"token": "token_id:5", "top_logprobs": [
                            {"token": "token_id:7", "logprob": -2.0},
                            {"token": "token_id:5", "logprob": -0.5},
                        ]},
                        {"token": " b", "top_logprobs": []},
                    ]
                },
            }
        ],
        "model": "toy",
        "prompt_token_ids": [1, 2],
    }  # fmt: skip
    _, endpoint = make(then=bad.raw(chat))
    answer = endpoint.ask("x", None, Parameters(max_tokens=2, top_logprobs=2))
    assert (answer.tokens, answer.prompt_tokens, answer.output_tokens) == ([5, 6], [1, 2], 2)
    assert answer.top_logprobs == [[(5, -0.5), (7, -2.0)], []]
    assert answer.finish_reason == "length"
    old = {
        "choices": [
            {"text": "a", "finish_reason": "stop", "prompt_token_ids": [4], "logprobs": {
                "top_logprobs": [{" c": -3.0, " a": -0.1}]}}
        ]
    }  # fmt: skip
    server, endpoint = make(then=bad.raw(old), api="completions")
    answer = endpoint.ask("x", None, Parameters(max_tokens=1, top_logprobs=2))
    assert answer.top_logprobs == [[(" a", -0.1), (" c", -3.0)]]
    assert answer.prompt_tokens == [4] and answer.tokens is None
    assert answer.model == "toy", "an endpoint that does not name its model has the one asked for"
    assert server.requests[0].body["logprobs"] == 2


def test_fields_that_a_server_refuses_are_left_out(make: Make) -> None:
    def picky(handler: bad.Handler, body: dict[str, Any]) -> None:
        if "return_token_ids" in body:
            bad.send(handler, 422, {"detail": "Unexpected fields: {'return_token_ids'}"})
        elif "max_tokens" in body:
            text = "'max_tokens' is not supported, use 'max_completion_tokens' instead"
            bad.send(handler, 400, {"error": {"message": text}})
        else:
            bad.ok()(handler, body)

    server, endpoint = make(then=picky, retries=0)
    for _ in range(2):
        assert endpoint.ask("x", None, FEW).text == "You said x"
    # Learned once: three requests for the first answer, one for the second.
    assert len(server.requests) == 4
    assert server.requests[-1].body["max_completion_tokens"] == 8


def test_a_refusal_that_repeats_the_request_is_not_one_of_its_fields(make: Make) -> None:
    def verbose(handler: bad.Handler, body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "bad":
            return bad.send(handler, 400, {"detail": {"msg": "no such turn", "input": body}})
        return bad.ok()(handler, body)

    server, endpoint = make(then=verbose)
    with pytest.raises(Unanswered, match="no such turn"):
        endpoint.ask("bad", None, FEW)
    endpoint.ask("good", None, FEW)
    assert [("return_token_ids" in request.body) for request in server.requests] == [1, 0, 1]


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("https://h/v1/completions", "https://h/v1"),
        ("https://h/openai/v2?version=7", "https://h/openai/v2"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(given: str, base: str) -> None:
    with Endpoint(given, "m") as endpoint:
        assert endpoint.url == base and base in repr(endpoint)


def test_a_query_is_sent_and_not_shown(make: Make) -> None:
    server, _ = make()
    with Endpoint(f"{server.url}?version=secret7", "toy") as endpoint:
        endpoint.ask("x", None, FEW)
        assert server.requests[0].path == "/v1/chat/completions?version=secret7"
        assert "secret7" not in endpoint.url + repr(endpoint)


@pytest.mark.parametrize("given", ["localhost:8000", "ftp://h", "http://", "http://h:port", ""])
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(EndpointError, match="http://localhost:8000/v1"):
        Endpoint(given, "m")


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(EndpointError, match="FILIGRANE_API_KEY") as caught:
        Endpoint(f"https://me:{SECRET}@h/v1", "m")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0}]
)
def test_parameters_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(EndpointError):
        Parameters(**{"max_tokens": 8} | wrong)


# ---------------------------------------------------------------- faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        *(bad.error(status) for status in (408, 409, 425, 429, 500, 502, 503, 529)),
        bad.cut,
        bad.cut_silently,
        bad.reset,
        bad.hang_up,
        bad.raw(b"\x00\xffgarbage"),
        bad.raw([1]),
        bad.raw({"model": "toy"}),
        bad.raw({"model": "toy", "choices": []}),
        bad.raw({"error": {"message": "worker died"}}),
        *(
            bad.raw({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"} | wrong]})
            for wrong in (
                {"logprobs": {"content": [{"top_logprobs": [{"token": 3}]}]}},
                {"logprobs": {"content": [3]}},
                {"logprobs": {"top_logprobs": ["x"]}},
            )
        ),
        bad.ok(reason=None),
        bad.ok(reason=""),
        bad.ok(text=""),
        bad.raw({"model": "toy", "choices": [{"message": None, "finish_reason": "stop"}]}),
    ],
)
def test_a_fault_that_passes_is_asked_again(make: Make, fault: bad.Behaviour) -> None:
    server, endpoint = make(fault)
    assert endpoint.ask("x", None, FEW).text == "You said x"
    assert len(server.requests) == 2


def test_slow_and_dribbling_answers_are_given_up(make: Make) -> None:
    server, endpoint = make(bad.slow(1.5), bad.dribble(3.0), timeout=0.4)
    begin = time.monotonic()
    assert endpoint.ask("x", None, FEW).text == "You said x"
    assert len(server.requests) == 3 and 0.8 < time.monotonic() - begin < 1.5


def test_retries_end(make: Make) -> None:
    server, endpoint = make(then=bad.error(503, "overloaded"), retries=3)
    with pytest.raises(Unanswered, match=r"503: overloaded\. \(4 tries\)"):
        endpoint.ask("x", None, FEW)
    assert len(server.requests) == 4
    server, endpoint = make(then=bad.ok(text=""), retries=6)
    with pytest.raises(Unanswered, match=r"empty \(finish_reason stop\)\. \(2 tries\)"):
        endpoint.ask("x", None, FEW)
    assert len(server.requests) == 2, "a model that has nothing to say is not pressed"


def test_waits_grow_and_are_spread(make: Make) -> None:
    server, endpoint = make(then=bad.error(500), retries=3, backoff=0.1, jitter=lambda: 0.0)
    with pytest.raises(Unanswered):
        endpoint.ask("x", None, FEW)
    at = [request.at for request in server.requests]
    gaps = np.diff(at)
    # Half of the full wait at jitter 0: .05, .1, .2.
    assert np.all(gaps > [0.05, 0.1, 0.2]) and gaps.sum() < 1.5, gaps


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(make: Make, as_date: bool) -> None:
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
    value = format_datetime(later, usegmt=True) if as_date else "0.6"
    server, endpoint = make(bad.error(429, "slow down", {"Retry-After": value}))
    endpoint.ask("x", None, FEW)
    first, second = (request.at for request in server.requests)
    assert (0.7 if as_date else 0.6) < second - first < (2.3 if as_date else 0.9)


def test_retry_after_forms() -> None:
    assert retry_after(None) is None and retry_after("soon") is None and retry_after("nan") is None
    assert retry_after("7") == 7.0 and retry_after("-3") == 0.0
    assert retry_after("Fri, 01 Jan 1999 00:00:00 GMT") == 0.0


def test_one_that_is_told_to_wait_holds_all(make: Make) -> None:
    server, endpoint = make(bad.error(429, "later", {"Retry-After": "0.5"}))
    slow = threading.Thread(target=lambda: endpoint.ask("x", None, FEW))
    slow.start()
    time.sleep(0.2)
    endpoint.ask("y", None, FEW)
    slow.join()
    first, *others = (request.at for request in server.requests)
    assert len(others) == 2 and min(others) - first > 0.5


def test_a_wait_without_end_is_said(make: Make) -> None:
    server, endpoint = make(then=bad.error(429, "tomorrow", {"Retry-After": "86400"}))
    with pytest.raises(EndpointError, match="asks to wait 86400 s") as caught:
        endpoint.ask("x", None, FEW)
    assert not isinstance(caught.value, Unanswered) and len(server.requests) == 1


def test_requests_per_minute(make: Make) -> None:
    server, endpoint = make(requests_per_minute=600)
    threads = [threading.Thread(target=lambda: endpoint.ask("x", None, FEW)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    at = sorted(request.at for request in server.requests)
    assert at[-1] - at[0] > 0.38, "five requests, a tenth of a second apart"


# ---------------------------------------------------------------- faults that do not pass


@pytest.mark.parametrize(
    ("fault", "says", "ends_the_run"),
    [
        (bad.error(401, "bad key"), "401: bad key. It wants another key: set FILIGRANE_API", True),
        (bad.error(403, "not yours"), "403: not yours. This key has no right to model 'toy'", True),
        (
            bad.error(404, "no such model"),
            "404: no such model. .* It serves toy, other",
            True,
        ),
        (bad.error(402, "pay"), "402: pay. .* no credit", True),
        (bad.error(429, "insufficient_quota"), "no credit", True),
        (bad.raw({"detail": "context too long"}, 400), "400: context too long", False),
        (bad.raw({"message": "too large"}, 413), "413: too large", False),
        (bad.raw(b"", 501), "answers 501", False),
        (bad.raw(b"", 302, {"Location": "https://elsewhere/"}), "on to 'https://elsewhere/'", True),
        (bad.raw(b"<!DOCTYPE html><p>hi"), "a web page instead of JSON", True),
    ],
)
def test_refusals_are_told_at_once(
    make: Make, fault: bad.Behaviour, says: str, ends_the_run: bool
) -> None:
    server, endpoint = make(then=fault)
    server.models = ["toy", "other"]
    with pytest.raises(EndpointError, match=says) as caught:
        endpoint.ask("x", None, FEW)
    assert len(server.requests) == 1
    assert isinstance(caught.value, Unanswered) is not ends_the_run
    assert isinstance(caught.value, OSError) and server.url in str(caught.value)


def test_nobody_listens() -> None:
    with bad.closed_port() as port, Endpoint(f"http://127.0.0.1:{port}", "m") as endpoint:
        begin = time.monotonic()
        with pytest.raises(
            EndpointError, match="is the server running, and on this port"
        ) as caught:
            endpoint.ask("x", None, FEW)
    assert not isinstance(caught.value, Unanswered) and time.monotonic() - begin < 1


def test_a_server_that_goes_away_is_tried_again_first(make: Make) -> None:
    server, endpoint = make(then=bad.ok_and_close, retries=3)
    endpoint.ask("x", None, FEW)
    server.__exit__(None, None, None)
    with pytest.raises(EndpointError) as caught:
        endpoint.ask("x", None, FEW)
    assert "(4 tries)" in str(caught.value)


def test_unknown_hosts() -> None:
    # .invalid never resolves (RFC 2606).
    with (
        Endpoint("http://suspect.invalid/v1", "m") as endpoint,
        pytest.raises(EndpointError, match="name of this host is not known"),
    ):
        endpoint.ask("x", None, FEW)


def test_a_certificate_that_nobody_vouches_for(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = make()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(tmp_path))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    with (
        Endpoint(url, "m", key=ApiKey(SECRET)) as endpoint,
        pytest.raises(EndpointError, match=r"no safe connection \(TLS\).*SSL_CERT_FILE"),
    ):
        endpoint.ask("x", None, FEW)
    assert server.requests == [], "nothing was sent, the key least of all"
    monkeypatch.setenv("SSL_CERT_FILE", _certificate(tmp_path))
    context.load_cert_chain(str(tmp_path / "loopback.pem"))
    client._tls.cache_clear()
    try:
        with Endpoint(url, "m", key=ApiKey(SECRET)) as endpoint:
            assert endpoint.ask("x", None, FEW).text == "You said x"
    finally:
        client._tls.cache_clear()


def test_https_to_a_plain_server(make: Make) -> None:
    server, _ = make()
    with (
        Endpoint(server.url.replace("http:", "https:"), "m", retries=0) as endpoint,
        pytest.raises(EndpointError, match="begin the address with http://"),
    ):
        endpoint.ask("x", None, FEW)


def test_another_model_ends_the_run(make: Make) -> None:
    _, endpoint = make(bad.ok(), bad.ok(model="toy-2"))
    endpoint.ask("x", None, FEW)
    with pytest.raises(EndpointError, match="model 'toy-2' now; until here it was 'toy'"):
        endpoint.ask("x", None, FEW)
    _, endpoint = make()
    endpoint.expect("toy-1")
    with pytest.raises(EndpointError, match="until here it was 'toy-1'"):
        endpoint.ask("x", None, FEW)


def test_long_messages_of_a_server_are_shortened(make: Make) -> None:
    _, endpoint = make(then=bad.error(400, "a\x1b[31m\n" + "word " * 5000))
    with pytest.raises(Unanswered) as caught:
        endpoint.ask("x", None, FEW)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


# ---------------------------------------------------------------- the key


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FILIGRANE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    here, openai = "http://suspect.example/v1", "https://api.openai.com/v1"
    assert read_api_key(here) is None
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    assert read_api_key(here) is None, "a suspect does not get the key of somebody else"
    assert read_api_key("https://openai.com.evil.example/v1") is None
    found = read_api_key(openai)
    assert found is not None and found.header() == {"Authorization": "Bearer of-openai"}
    monkeypatch.setenv("FILIGRANE_API_KEY", "own")
    found = read_api_key(here)
    assert found is not None and found.header() == {"Authorization": "Bearer own"}
    file = tmp_path / "key"
    file.write_text("filed\n")
    found = read_api_key(here, file)
    assert found is not None and found.header() == {"Authorization": "Bearer filed"}
    file.write_text("\n")
    with pytest.raises(EndpointError, match="is empty"):
        read_api_key(here, file)
    file.write_text("two\nlines")
    with pytest.raises(EndpointError, match="copy it anew"):
        read_api_key(here, file)
    with pytest.raises(EndpointError, match="No such file"):
        read_api_key(here, tmp_path / "none")


def test_a_key_shows_itself_nowhere(make: Make) -> None:
    key = ApiKey(SECRET)
    assert SECRET not in f"{key!r} {key}"
    with pytest.raises(EndpointError):
        pickle.dumps(key)
    for status in (401, 403, 400, 503):
        words = f"key '{SECRET}' (begins {SECRET[:9]}, ends {SECRET[-8:]}) is no good"
        _, endpoint = make(then=bad.error(status, words), key=key, retries=0)
        with pytest.raises(EndpointError) as caught:
            endpoint.ask("x", None, FEW)
        shown = f"{caught.value} {caught.value!r} {endpoint!r}"
        for part in (SECRET, SECRET[:7], SECRET[-7:], SECRET[5:12]):
            assert part not in shown
        assert "key '[key]' (begins [key], ends [key]) is no good" in shown


def test_a_server_that_sends_the_key_back_is_refused(make: Make) -> None:
    server, endpoint = make(then=bad.ok(text=f"your key is {SECRET}"), key=ApiKey(SECRET))
    with pytest.raises(EndpointError, match="sends the API key back") as caught:
        endpoint.ask("x", None, FEW)
    assert SECRET not in str(caught.value)
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"


def test_a_redirection_does_not_get_the_key(make: Make) -> None:
    thief, _ = make()
    target = {"Location": f"{thief.url}/chat/completions"}
    _, endpoint = make(then=bad.raw(b"", 307, target), key=ApiKey(SECRET))
    with pytest.raises(EndpointError, match="pass that address instead"):
        endpoint.ask("x", None, FEW)
    assert thief.requests == []


# ---------------------------------------------------------------- budget, stopping, workers


def test_budget_counts_tries_and_what_was_written(make: Make) -> None:
    budget = Budget(max_requests=4, max_output_tokens=30)
    _, endpoint = make(bad.error(500), budget=budget)
    endpoint.ask("one two", None, FEW)
    assert (budget.requests, budget.output_tokens) == (2, 4)
    endpoint.ask("x", None, Parameters(max_tokens=26))
    with pytest.raises(Stopped, match="budget"):
        endpoint.ask("x", None, Parameters(max_tokens=24))
    assert (budget.requests, budget.output_tokens) == (3, 7)
    endpoint.ask("x", None, FEW)
    with pytest.raises(Stopped, match="budget"):
        endpoint.ask("x", None, FEW)


def test_what_may_have_been_written_unseen_is_counted(make: Make) -> None:
    budget = Budget()
    _, endpoint = make(bad.cut, bad.slow(1.0), budget=budget, timeout=0.3)
    endpoint.ask("x", None, FEW)
    assert budget.output_tokens == 8 + 8 + 3


def test_stop_ends_every_wait(make: Make) -> None:
    _, endpoint = make(then=bad.error(429, "later", {"Retry-After": "60"}))
    threading.Timer(0.2, endpoint.stop).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        endpoint.ask("x", None, FEW)
    assert time.monotonic() - begin < 2
    pace = Pace(None)
    pace.stop()
    with pytest.raises(Stopped):
        pace.wait()


def test_results_in_order_and_errors_in_their_turn() -> None:
    def work(number: int) -> int:
        time.sleep(0.02 * (5 - number % 5))
        if number == 7:
            raise KeyError(number)
        return number

    assert list(in_order(work, range(7), 4)) == list(range(7))
    found = []
    with pytest.raises(KeyError):
        for result in in_order(work, range(20), 4):
            found.append(result)
    assert found == list(range(7))


# ---------------------------------------------------------------- reading


VOCAB = 50


def law_after(context: Sequence[int], ties: bool = False) -> dict[int, float]:
    """A law over the vocabulary that depends on what came before, and on nothing else."""
    rng = np.random.default_rng([7, *context])
    weights = rng.integers(1, 30, VOCAB) ** 2.0 if ties else rng.exponential(size=VOCAB) ** 2
    return dict(enumerate(np.log(weights / weights.sum()).tolist()))


def listed(context: Sequence[int], nxt: int | None, count: int, ties: bool) -> list[int]:
    """As servers list them: the text's next token first, however unlikely, then the largest."""
    law = law_after(context, ties)
    top = sorted(law, key=lambda token: -law[token])[:count]
    return list(dict.fromkeys(([] if nxt is None else [nxt]) + top))


def vllm(ties: bool = False, most: int = 20, generated: bool = True) -> bad.Behaviour:
    """What vLLM answers to prompt_logprobs."""

    def behave(handler: bad.Handler, body: dict[str, Any]) -> None:
        ids, count = body["prompt"], body.get("prompt_logprobs")
        if count is None or count > most:
            text = (
                f"Requested prompt logprobs of {count}, which is greater than max allowed: {most}"
            )
            return bad.send(handler, 400, {"error": {"message": text}})
        rows: list[Any] = [None]
        for t in range(1, len(ids)):
            law = law_after(ids[:t], ties)
            rank = sorted(law.values(), reverse=True)
            rows.append({
                str(token): {"logprob": law[token], "rank": rank.index(law[token]) + 1}
                for token in listed(ids[:t], ids[t], count, ties)
            })  # fmt: skip
        law = law_after(ids, ties)
        last = {f"token_id:{token}": law[token] for token in listed(ids, None, count, ties)}
        answer = bad.completion(handler, body, "x", "toy", "length")
        answer["choices"][0]["prompt_logprobs"] = rows
        if generated:
            answer["choices"][0]["logprobs"] = {"top_logprobs": [last]}
        return bad.send(handler, 200, answer)

    return behave


def echo(names: str = "token_id:", ties: bool = False, stingy: bool = False) -> bad.Behaviour:
    """What completions with echo answer; stingy ones leave out the last of the top for the text's
    own next token."""

    def behave(handler: bad.Handler, body: dict[str, Any]) -> None:
        if "prompt_logprobs" in body:
            return bad.send(handler, 400, {"error": {"message": "unknown field prompt_logprobs"}})
        ids, count = body["prompt"], body["logprobs"]
        rows: list[Any] = [None]
        for t in range(1, len(ids) + 1):
            law = law_after(ids[:t], ties)
            nxt = ids[t] if t < len(ids) else None
            tokens = listed(ids[:t], nxt, count, ties)
            rows.append({f"{names}{x}": law[x] for x in tokens[: count if stingy else None]})
        answer = bad.completion(handler, body, "x", "toy", "length")
        answer["choices"][0]["logprobs"] = {"top_logprobs": rows}
        return bad.send(handler, 200, answer)

    return behave


def expected(context: Sequence[int], top: int, ties: bool = False) -> list[int]:
    law = law_after(context, ties)
    threshold = sorted(law.values(), reverse=True)[top]
    kept = [token for token in law if law[token] > threshold]
    return sorted(kept, key=lambda token: (-law[token], token))


TEXT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3, 14, 15]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("server", [vllm, echo])
def test_laws_of_a_prompt(make: Make, server: Callable[..., bad.Behaviour], ties: bool) -> None:
    _, endpoint = make(then=server(ties=ties), api="completions")
    form = find_form(endpoint, TEXT, 5)
    assert form == ("prompt_logprobs" if server is vllm else "echo")
    laws = prompt_probabilities(endpoint, TEXT, 5, form=form)
    assert len(laws) == len(TEXT)
    for t, found in enumerate(laws):
        wanted = expected(TEXT[: t + 1], 5, ties)
        if found is None:
            assert not wanted and ties
            continue
        law = law_after(TEXT[: t + 1], ties)
        assert found[0].tolist() == wanted
        np.testing.assert_allclose(found[1], [np.exp(law[token]) for token in wanted])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("form", "server"),
    [
        ("prompt_logprobs", vllm),
        ("echo", echo),
        ("echo", lambda ties: echo(ties=ties, stingy=True)),
    ],
)
def test_a_law_does_not_know_how_the_text_goes_on(
    make: Make, form: Any, server: Callable[..., bad.Behaviour], ties: bool
) -> None:
    """The text's next token is green by construction: no law may list it because it comes next."""
    _, endpoint = make(then=server(ties=ties), api="completions")
    # The worst case: the last of the top is as likely as the first outside of it.
    context = next(TEXT[:n] for n in range(2, len(TEXT)) if ties is _ends_in_a_tie(TEXT[:n], ties))
    found = []
    for nxt in range(VOCAB):
        law = prompt_probabilities(endpoint, [*context, nxt], 4, form=form)[len(context) - 1]
        assert law is not None
        found.append((law[0].tolist(), law[1].tolist()))
    assert all(each == found[0] for each in found)
    assert found[0][0] == expected(context, 4, ties)


def _ends_in_a_tie(context: Sequence[int], ties: bool) -> bool:
    values = sorted(law_after(context, ties).values(), reverse=True)
    return values[0] > values[3] == values[4]


def test_strings_in_place_of_ids(make: Make) -> None:
    vocabulary = {f"w{number}": number for number in range(0, VOCAB, 2)}
    _, endpoint = make(then=echo("w"), api="completions")
    laws = prompt_probabilities(endpoint, TEXT, 9, form="echo", vocabulary=vocabulary)
    wanted = [token for token in expected(TEXT[:3], 9) if token % 2 == 0]
    assert laws[2] is not None and laws[2][0].tolist() == wanted
    with pytest.raises(Unanswered, match="names no token of which the id is known"):
        prompt_probabilities(endpoint, TEXT, 9, form="echo")


def test_an_endpoint_without_prompt_probabilities(make: Make) -> None:
    server, endpoint = make(api="completions")
    with pytest.raises(EndpointError, match=r"\(closed mode\).*no prompt_logprobs.*does not echo"):
        find_form(endpoint, TEXT, 5)
    assert [request.body["prompt"] for request in server.requests] == [TEXT[:3]] * 2
    _, endpoint = make(then=vllm(most=20), api="completions")
    with pytest.raises(EndpointError, match="greater than max allowed: 20"):
        find_form(endpoint, TEXT, 19)
    _, endpoint = make(api="chat")
    with pytest.raises(EndpointError, match="api='completions'"):
        prompt_probabilities(endpoint, TEXT, 5)


def test_lists_of_another_length_are_refused(make: Make) -> None:
    def shorter(handler: bad.Handler, body: dict[str, Any]) -> None:
        vllm()(handler, body | {"prompt": body["prompt"][1:]})

    _, endpoint = make(then=shorter, api="completions")
    with pytest.raises(Unanswered, match="read something else than what was sent"):
        prompt_probabilities(endpoint, TEXT, 5)


@pytest.mark.parametrize("with_base", [False, True])
def test_readings(make: Make, with_base: bool) -> None:
    _, endpoint = make(then=vllm(), api="completions")
    _, base = make(then=echo(), api="completions")
    documents = [
        Document(tokens=np.array(TEXT), start=2),
        Document(tokens=np.array([1, 2])),
        Document(tokens=np.array(TEXT[::-1]), start=1, earlier=[np.array([9, 7])]),
    ]
    seen: list[tuple[int, int | None, str]] = []
    readings = list(
        read_endpoint(
            endpoint,
            documents,
            2,
            vocab_size=VOCAB,
            base_endpoint=base if with_base else None,
            top=4,
            first=10,
            report=lambda *what: seen.append(what),
        )
    )
    assert len(readings) == 3 and seen[-1] == (3, 3, "reading")
    for number, (reading, document) in enumerate(zip(readings, documents, strict=True), start=10):
        positions, ledger = read_positions(
            document.tokens, document.start, 2, earlier=document.earlier
        )
        assert len(reading) == len(positions) == reading.ledger["scored"] == ledger["scored"]
        assert reading.documents.tolist() == [number] * len(positions)
        assert (reading.base is not None) is with_base and reading.vocab_size == VOCAB
        for row, t in enumerate(positions):
            text = document.tokens.tolist()
            assert reading.windows[row].tolist() == text[t - 1 : t + 1]
            part = slice(reading.starts[row], reading.starts[row + 1])
            wanted = expected(text[: t + 1], 4)
            assert reading.tokens[part].tolist() == wanted
            law = law_after(text[: t + 1])
            chances = np.exp([law[token] for token in wanted])
            np.testing.assert_allclose(reading.suspect[part], chances, rtol=1e-6)
            if reading.base is not None:  # the same law, told by another server
                np.testing.assert_array_equal(reading.base[part], reading.suspect[part])


def test_a_base_with_another_law(make: Make) -> None:
    def other(handler: bad.Handler, body: dict[str, Any]) -> None:
        vllm()(handler, body | {"prompt": [1, *body["prompt"][1:]]})

    _, endpoint = make(then=vllm(), api="completions")
    _, base = make(then=other, api="completions")
    (reading,) = read_endpoint(
        endpoint, [Document(tokens=np.array(TEXT))], 3, vocab_size=VOCAB, base_endpoint=base, top=4
    )
    text = reading.tokens[: reading.starts[1]].tolist()
    mine, theirs = expected(TEXT[:3], 4), expected([1, *TEXT[1:3]], 4)
    assert set(text) == set(mine) | set(theirs) and text[: len(mine)] == mine
    assert reading.base is not None
    for token, chance, before in zip(text, reading.suspect, reading.base, strict=False):
        assert (chance > 0) is np.bool_(token in mine) and (before > 0) is np.bool_(token in theirs)


def test_positions_without_a_law_are_in_the_ledger(make: Make) -> None:
    _, endpoint = make(then=vllm(generated=False), api="completions")
    (reading,) = read_endpoint(
        endpoint, [Document(tokens=np.array(TEXT[:8]))], 2, vocab_size=VOCAB, top=4
    )
    # Sent is what ends with the last position that counts; its law is the one that is missing.
    assert reading.ledger["no prediction of the endpoint there"] == 1
    assert reading.ledger["scored"] == len(reading) == 5


def test_another_vocabulary_is_noticed(make: Make) -> None:
    _, endpoint = make(then=vllm(), api="completions")
    with pytest.raises(VocabularyMismatch, match="its model has another tokenizer"):
        list(read_endpoint(endpoint, [Document(tokens=np.array(TEXT))], 2, vocab_size=40, top=8))


# ---------------------------------------------------------------- a certificate


def _certificate(folder: Path) -> str:
    """A certificate for 127.0.0.1 that its own key has signed."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    file = folder / "loopback.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return str(file)
