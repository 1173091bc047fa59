"""Collecting answers: what is on the disk stays there, whatever ends a run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import badserver as bad
from filigrane.adapters.answer_files import Answers, Settings
from filigrane.adapters.collecting import Collected, Prompt, collect
from filigrane.adapters.endpoints import ApiKey, Budget, Endpoint, Parameters
from filigrane.errors import EndpointError, RecordError

FEW = Parameters(max_tokens=8, seed=100)
SECRET = "sk-proj-Zq81mB0tLx93VwQe77"
Go = Callable[..., Collected]


def prompts(count: int, first: int = 0) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=f"prompt {i}", number=i) for i in range(first, first + count)]


@pytest.fixture
def serve() -> Iterator[Callable[..., bad.BadServer]]:
    opened: list[bad.BadServer] = []

    def go(*script: bad.Behaviour, then: bad.Behaviour | None = None) -> bad.BadServer:
        opened.append(bad.BadServer(script, then).__enter__())
        return opened[-1]

    yield go
    for server in opened:
        server.__exit__(None, None, None)


def run(
    server: bad.BadServer,
    path: Path,
    asked: Sequence[Prompt],
    *,
    parameters: Parameters = FEW,
    concurrency: int = 4,
    report: Any = None,
    notice: Any = None,
    **options: Any,
) -> Collected:
    options = {"backoff": 0.01, "timeout": 5.0, "retries": 2, "model": "toy"} | options
    with Endpoint(server.url, **options) as endpoint:
        return collect(
            endpoint,
            asked,
            path,
            parameters,
            concurrency=concurrency,
            report=report,
            notice=notice,
        )


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def test_answers_on_the_disk(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    server, path = serve(), tmp_path / "answers.jsonl"
    asked = [
        Prompt(id="a", text="one", number=0),
        Prompt(id="b", text="two", system="be", number=7),
    ]
    seen: list[Any] = []
    done = run(server, path, asked, key=ApiKey(SECRET), report=lambda *what: seen.append(what))
    assert done == Collected(
        written=2, skipped=0, failures=(), left=0, cut=0, without_tokens=2, requests=2,
        output_tokens=6, model="toy",
    )  # fmt: skip
    assert done.complete and seen[0] == (0, 2, "asking") and seen[-1] == (2, 2, "asking")
    by_id = {row["id"]: row for row in lines(path)}
    row = by_id["b"]
    age = datetime.now(UTC) - datetime.fromisoformat(row.pop("created"))
    assert 0 <= age.total_seconds() < 60
    assert row == {
        "id": "b",
        "prompt": "two",
        "system": "be",
        "answer": "You said two",
        "prompt_tokens": None,
        "tokens": None,
        "finish_reason": "stop",
        "model": "toy",
        "endpoint": server.url,
        "parameters": {"temperature": 0.8, "top_p": 0.95, "max_tokens": 8, "seed": 107},
    }
    settings = json.loads((tmp_path / "answers.jsonl.run.json").read_text())
    assert settings["seed"] == 100 and settings["endpoint"] == server.url
    everything = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert SECRET.encode() not in everything
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {SECRET}"}


def test_log_probabilities_are_kept_when_asked_for(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    token = {"token": "token_id:5", "top_logprobs": [{"token": "token_id:5", "logprob": -0.5}]}
    choice = {
        "message": {"content": "a"},
        "finish_reason": "length",
        "token_ids": [5],
        "logprobs": {"content": [token]},
    }
    server = serve(then=bad.raw({"choices": [choice], "model": "toy"}))
    wanted = Parameters(max_tokens=1, top_logprobs=1)
    done = run(server, tmp_path / "a.jsonl", prompts(1), parameters=wanted)
    assert (done.cut, done.without_tokens) == (1, 0)
    (row,) = lines(tmp_path / "a.jsonl")
    assert row["tokens"] == [5] and row["top_logprobs"] == [[[5, -0.5]]]


def test_a_run_goes_on(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    run(server, path, prompts(3))
    before = path.read_bytes()
    done = run(server, path, prompts(5))
    assert (done.written, done.skipped) == (2, 3) and path.read_bytes().startswith(before)
    assert [row["id"] for row in lines(path)].count("p1") == 1
    assert len(server.requests) == 5
    assert {request.body["seed"] for request in server.requests} == set(range(100, 105))
    done = run(server, path, prompts(5))
    assert (done.written, done.skipped, done.complete) == (0, 5, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": Parameters(max_tokens=9, seed=100)},
        {"parameters": Parameters(max_tokens=8)},
        {"parameters": Parameters(max_tokens=8, seed=100, top_logprobs=3)},
        {"model": "other"},
        {"api": "completions"},
    ],
)
def test_other_settings_are_refused(
    serve: Callable[..., bad.BadServer], tmp_path: Path, changes: dict[str, Any]
) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    run(server, path, prompts(1))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RecordError, match=r"was collected with .*, now it is"):
        run(server, path, prompts(2), **changes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert len(server.requests) == 1


def test_another_endpoint_is_refused(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    run(serve(), path, prompts(1))
    with pytest.raises(RecordError, match="was collected with endpoint"):
        run(serve(), path, prompts(2))


def test_files_of_other_kinds_are_not_touched(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    for content in (b"notes\n", b'{"id": 3}\n', b"notes", b'{"text": "half', b'["id"]'):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="no answer that was collected"):
            run(server, path, prompts(1))
        assert path.read_bytes() == content
    path.unlink()
    run(server, path, prompts(1))
    (tmp_path / "a.jsonl.run.json").rename(tmp_path / "lost")
    with pytest.raises(RecordError, match=r"a.jsonl.run.json is not beside it"):
        run(server, path, prompts(1))
    with pytest.raises(RecordError, match="is a device or a pipe"):
        run(server, Path("/dev/full"), prompts(1))
    with pytest.raises(RecordError, match="cannot be opened for writing"):
        run(server, tmp_path / "none" / "a.jsonl", prompts(1))
    assert len(server.requests) == 1


def test_a_prompt_that_changed_is_refused(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    run(server, path, prompts(1))
    for changed in (Prompt(id="p0", text="else"), Prompt(id="p0", text="prompt 0", system="be")):
        with pytest.raises(RecordError, match="'p0' that was another prompt"):
            run(server, path, [changed])
    with pytest.raises(RecordError, match="two prompts have the same id"):
        run(server, path, [*prompts(2), *prompts(1)])


@pytest.mark.parametrize("keep", [1, 5, 30, -1])
def test_half_a_line_is_moved_aside(
    serve: Callable[..., bad.BadServer], tmp_path: Path, keep: int
) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    run(server, path, prompts(3), concurrency=1)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:keep])
    said: list[str] = []
    done = run(server, path, prompts(3), notice=said.append)
    if keep == -1:  # nothing but the line break is missing
        assert (done.written, said, path.read_bytes()) == (0, [], whole)
        return
    assert (done.written, done.skipped) == (1, 2) and "a.jsonl.part" in said[0]
    assert (tmp_path / "a.jsonl.part").read_bytes() == last[:keep]
    assert [row["id"] for row in lines(path)] == ["p0", "p1", "p2"]


def test_space_that_was_never_filled(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    run(server, path, prompts(1))
    with path.open("ab") as file:
        file.write(b"\0" * 300)
    assert run(server, path, prompts(2)).written == 1
    assert len(lines(path)) == 2


def test_one_run_at_a_time(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    settings = Settings(endpoint=server.url, model="toy", api="chat", parameters=FEW)
    with Answers(path, settings), pytest.raises(RecordError, match="another run is writing"):
        run(server, path, prompts(1))
    assert run(server, path, prompts(1)).written == 1


# ---------------------------------------------------------------- faults


def test_a_prompt_without_an_answer_does_not_stop_the_others(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    def picky(handler: bad.Handler, body: dict[str, Any]) -> None:
        asked = body["messages"][-1]["content"]
        refused = {"prompt 1": bad.error(400, "too long"), "prompt 2": bad.ok(text="")}
        refused.get(asked, bad.ok())(handler, body)

    server, path = serve(then=picky), tmp_path / "a.jsonl"
    done = run(server, path, prompts(5))
    assert done.written == 3 and not done.complete
    assert {failure.id for failure in done.failures} == {"p1", "p2"}
    assert "too long" in " ".join(failure.message for failure in done.failures)
    assert {row["id"] for row in lines(path)} == {"p0", "p3", "p4"}
    server.then = bad.ok()
    done = run(server, path, prompts(5))
    assert (done.written, done.skipped, done.complete) == (2, 3, True)


def test_failures_among_answers_are_no_reason_to_give_up(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server = serve(*[bad.ok(), bad.error(400, "no"), bad.error(400, "no")] * 10)
    done = run(server, tmp_path / "a.jsonl", prompts(30), concurrency=1)
    assert (done.written, len(done.failures)) == (10, 20)


def test_an_endpoint_that_fails_all_prompts_is_given_up(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server, path = serve(*[bad.ok()] * 5, then=bad.error(500, "worker died")), tmp_path / "a.jsonl"
    with pytest.raises(EndpointError, match=r"8 prompts in a row got no answer.*worker died"):
        run(server, path, prompts(100), concurrency=2)
    assert len(lines(path)) == 5 and len(server.requests) < 5 + 12 * 3


def test_a_refusal_stops_the_run_at_once(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server, path = serve(then=bad.error(401, "who are you")), tmp_path / "a.jsonl"
    with pytest.raises(EndpointError, match="who are you"):
        run(server, path, prompts(100), concurrency=16)
    # Sixteen wrong requests at once would be fifteen too many.
    assert len(server.requests) == 1 and path.read_bytes() == b""


def test_a_model_that_changes_stops_the_run_and_leaves_nothing(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server = serve(*[bad.ok()] * 6, then=bad.slow(0.05, bad.ok(model="toy-2")))
    path = tmp_path / "a.jsonl"
    with pytest.raises(EndpointError, match="'toy-2' now"):
        run(server, path, prompts(50))
    assert len(lines(path)) == 6 and {row["model"] for row in lines(path)} == {"toy"}
    with pytest.raises(EndpointError, match="'toy-2' now"):
        run(server, path, prompts(50))
    assert len(lines(path)) == 6, "the model is remembered between runs"


def test_what_is_under_way_when_a_run_stops_is_kept(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    server = serve(bad.ok(), bad.slow(0.5), bad.slow(0.5), bad.error(401, "revoked"))
    path = tmp_path / "a.jsonl"
    with pytest.raises(EndpointError, match="revoked"):
        run(server, path, prompts(50), concurrency=3)
    assert len(lines(path)) == 3 and len(server.requests) == 4


def test_many_faults_and_every_prompt_once(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    faults = [
        bad.error(429),
        bad.cut,
        bad.ok(),
        bad.reset,
        bad.slow(0.05),
        bad.error(502),
        bad.ok(),
    ]
    server, path = serve(*faults * 12), tmp_path / "a.jsonl"
    done = run(server, path, prompts(60), concurrency=8, retries=20)
    assert done.complete and 1 < server.most_active <= 8
    found = lines(path)
    assert sorted(row["id"] for row in found) == sorted(f"p{i}" for i in range(60))
    assert all(row["answer"] == f"You said {row['prompt']}" for row in found)


def test_strange_characters_survive(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    text = "line\u2028two\n\x00 \ud800 \U0001f600"
    server, path = serve(then=bad.ok(text=text)), tmp_path / "a.jsonl"
    run(server, path, prompts(2))
    assert lines(path)[1]["answer"] == text.replace("\ud800", "?")


# ---------------------------------------------------------------- budgets


def test_budget_of_requests(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    server, path = serve(bad.error(500)), tmp_path / "a.jsonl"
    done = run(server, path, prompts(10), budget=Budget(max_requests=5))
    assert (done.written, done.left, done.requests) == (4, 6, 5) and not done.complete
    assert len(server.requests) == 5
    done = run(server, path, prompts(10), budget=Budget(max_requests=50))
    assert (done.written, done.skipped, done.left) == (6, 4, 0)


def test_budget_of_tokens(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    server, path = serve(), tmp_path / "a.jsonl"
    # An answer counts four words; no request is begun that could go beyond 30 with its eight.
    done = run(server, path, prompts(20), budget=Budget(max_output_tokens=30))
    assert done.output_tokens <= 30 and done.output_tokens + 8 > 30
    assert done.written == 6 and done.left == 14 and len(lines(path)) == 6


# ---------------------------------------------------------------- the end of the world


CHILD = """
import sys
import resource
from filigrane.adapters.collecting import Prompt, collect
from filigrane.adapters.endpoints import Endpoint, Parameters
url, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
prompts = [Prompt(id=f"p{i}", text=f"prompt {i}", number=i) for i in range(40)]
with Endpoint(url, "toy", backoff=0.01) as endpoint:
    try:
        done = collect(endpoint, prompts, path, Parameters(max_tokens=8, seed=100), concurrency=2)
    except OSError as error:
        sys.exit(f"{type(error).__name__} {error.errno} {error.filename} {error.strerror}")
print(done.written, done.skipped)
"""


def child(server: bad.BadServer, path: Path, limit: int = 0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(path), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background inherits an ignored SIGINT, and python then leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_file_that_cannot_grow(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write is cut short, then refused."""
    server, path = serve(), tmp_path / "a.jsonl"
    limit = 3000
    first = child(server, path, limit)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1 and str(path) in said and "File too large" in said, said
    kept = path.read_bytes()
    found = lines(path)
    assert 3 < len(found) < 40 and limit - 400 < len(kept) <= limit
    again = child(server, path)
    out, said = again.communicate(timeout=60)
    assert out.split() == [str(40 - len(found)), str(len(found))], said
    assert path.read_bytes().startswith(kept)
    assert sorted(row["id"] for row in lines(path)) == sorted(f"p{i}" for i in range(40))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_full_disk(serve: Callable[..., bad.BadServer], tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        server, path = serve(), place / "a.jsonl"
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(server, path, prompts(200))
        assert caught.value.filename == str(path)
        found = lines(path)
        assert 10 < len(found) < 100
        subprocess.run(
            ["mount", "-o", "remount,size=1m", str(place)], capture_output=True, check=True
        )
        done = run(server, path, prompts(200))
        assert (done.skipped, done.complete) == (len(found), True)
        assert len({row["id"] for row in lines(path)}) == 200
    finally:
        subprocess.run(["umount", str(place)], capture_output=True, check=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_impatient_hand(
    serve: Callable[..., bad.BadServer], tmp_path: Path, how: signal.Signals
) -> None:
    server, path = serve(*[bad.ok()] * 10, then=bad.slow(30)), tmp_path / "a.jsonl"
    first = child(server, path)
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    begin = time.monotonic()
    first.send_signal(how)
    _, said = first.communicate(timeout=20)
    assert time.monotonic() - begin < 5, "what is under way is not waited for"
    assert first.returncode != 0 and ("KeyboardInterrupt" in said) is (how == signal.SIGINT)
    assert len(lines(path)) == 10
    server.then = bad.ok()
    again = child(server, path)
    out, said = again.communicate(timeout=60)
    assert out.split() == ["30", "10"], said
    assert len({row["id"] for row in lines(path)}) == 40


def test_answers_are_written_as_they_come(
    serve: Callable[..., bad.BadServer], tmp_path: Path
) -> None:
    hold = threading.Event()

    def wait(handler: bad.Handler, body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "prompt 1":
            hold.wait(20)
        bad.ok()(handler, body)

    server, path = serve(then=wait), tmp_path / "a.jsonl"
    thread = threading.Thread(target=lambda: run(server, path, prompts(5), concurrency=2))
    thread.start()
    deadline = time.monotonic() + 20
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline, "one slow answer holds up the others"
        time.sleep(0.02)
    hold.set()
    thread.join()
    assert [row["id"] for row in lines(path)][-1] == "p1"
