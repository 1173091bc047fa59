"""filigrane radioactivity collect, against a real server on the loopback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import badserver as bad

SECRET = "sk-proj-Zq81mB0tLx93VwQe77"


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FILIGRANE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[bad.BadServer]:
    with bad.BadServer() as opened:
        yield opened


@pytest.fixture
def ask(run: Any, server: bad.BadServer) -> Any:
    """Runs the command against the server; Done has code, out, err."""

    def go(*options: str, **settings: Any) -> Any:
        fixed = ("--endpoint", server.url, "--model", "toy", "--out", "a.jsonl")
        return run("radioactivity", "collect", *fixed, *options, **settings)

    return go


def rows(path: str = "a.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_prompts_of_a_text_file(ask: Any, server: bad.BadServer) -> None:
    Path("p.txt").write_text("one\ntwo\n\nthree\n")
    done = ask("--prompts", "p.txt", "--system", "be kind", "-n", "9", "--seed", "5")
    assert done.code == 0 and done.out == ""
    assert "3 answers of toy written to a.jsonl" in done.err and "re-tokenise" in done.err
    found = {row["prompt"]: row for row in rows()}
    assert set(found) == {"one", "two", "three"}
    assert all(row["system"] == "be kind" for row in found.values())
    assert found["one"]["parameters"] == {
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 9,
        "seed": 5,
    }
    done = ask("--prompts", "p.txt", "--system", "be kind", "-n", "9", "--seed", "5")
    assert done.code == 0 and "0 answers" in done.err and "3 were there already" in done.err
    assert len(server.requests) == 3


def test_records_and_json(ask: Any, world: Any) -> None:
    prompts = [
        {"id": 7, "prompt": "a", "system": "own"},
        {"prompt": "b"},
        {"id": "7", "prompt": "c"},
        {"text": "d"},
        "not json",
    ]
    world.write("p.jsonl", prompts)
    done = ask("--prompts", "p.jsonl", "--json")
    assert done.code == 3
    found = done.json
    assert [error["line"] for error in found.pop("errors")] == [3, 4, 5]
    assert found.pop("endpoint").startswith("http://127.0.0.1:")
    assert found == {
        "command": "radioactivity collect",
        "out": "a.jsonl",
        "model": "toy",
        "written": 2,
        "skipped": 0,
        "left": 0,
        "cut": 0,
        "without_tokens": 2,
        "requests": 2,
        "output_tokens": 6,
        "failures": [],
    }
    assert {(row["id"], row["system"]) for row in rows()} == {("7", "own"), ("1", None)}


def test_prompts_from_a_pipe(ask: Any) -> None:
    assert ask(input="hello\n").code == 0 and rows()[0]["answer"] == "You said hello"


def test_completions(ask: Any, server: bad.BadServer, world: Any) -> None:
    world.write("p.jsonl", [{"prompt": "Once upon"}, {"prompt": "x", "system": "y"}])
    done = ask("--prompts", "p.jsonl", "--api", "completions")
    assert done.code == 3 and "knows none" in done.err
    assert [request.path for request in server.requests] == ["/v1/completions"]
    done = ask("--prompts", "p.jsonl", "--api", "completions", "--system", "y")
    assert done.code == 2 and "knows no system prompt" in done.err


def test_a_budget_leaves_the_rest_for_later(ask: Any) -> None:
    prompts = "".join(f"prompt {i}\n" for i in range(5))
    done = ask("--max-requests", "2", input=prompts)
    assert done.code == 3 and "3 prompts were not asked: the budget is spent" in done.err
    done = ask("--max-output-tokens", "300", input=prompts)
    assert done.code == 3 and len(rows()) > 2
    assert ask(input=prompts).code == 0 and len(rows()) == 5


def test_prompts_that_get_no_answer(ask: Any, server: bad.BadServer) -> None:
    server.then = bad.error(400, "too long for me")
    done = ask("--retries", "0", input="one\n")
    assert done.code == 3 and "prompt 0: " in done.err and "too long for me" in done.err


def test_an_endpoint_that_refuses(ask: Any, server: bad.BadServer) -> None:
    ask(input="one\n")
    server.then = bad.error(401, f"wrong key {SECRET}")
    done = ask("--json", input="one\ntwo\n", env={"FILIGRANE_API_KEY": SECRET})
    assert done.code == 2 and done.out == "" and "It wants another key: check" in done.err
    assert "safe in a.jsonl" in done.err and len(rows()) == 1
    assert SECRET not in done.err and SECRET[:8] not in done.err
    assert server.requests[-1].headers["Authorization"] == f"Bearer {SECRET}"


def test_a_key_in_a_file(ask: Any, server: bad.BadServer) -> None:
    Path("api.key").write_text(f"{SECRET}\n")
    assert ask("--api-key-file", "api.key", input="one\n").code == 0
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"
    stored = "".join(path.read_text() for path in Path().glob("a.jsonl*"))
    assert SECRET not in stored
    done = ask("--api-key-file", "none.key", input="one\n")
    assert done.code == 2 and "cannot be read" in done.err


def test_a_watermark_key_is_sent_to_nobody(ask: Any, server: bad.BadServer, world: Any) -> None:
    done = ask(input=f"what is {world.key.export_text()}?\nhello\n")
    assert done.code == 3 and "it is not sent to anybody" in done.err
    assert len(server.requests) == 1


def test_bad_usage(run: Any, ask: Any, server: bad.BadServer) -> None:
    for options, says in (
        (("--out", "-"), "takes a file"),
        (("--out", "none/a.jsonl"), "there is no folder none"),
        (("--endpoint", "localhost:8000"), "http://"),
        (("--endpoint", f"http://u:{SECRET}@h"), "FILIGRANE_API_KEY"),
        (("--top-p", "1.5"), "top_p 1.5 makes no sense"),
        (("--temperature", "-1"), "Usage"),
        (("--prompts", "none.txt"), "no prompt could be read"),
    ):
        done = ask(*options, input="one\n")
        assert done.code == 2 and says in done.err and done.out == "", options
        assert SECRET not in done.err
    assert server.requests == []


def test_other_settings(ask: Any) -> None:
    ask(input="one\n")
    done = ask("--temperature", "1", input="one\ntwo\n")
    assert done.code == 2 and "was collected with temperature 0.8, now it is 1.0" in done.err


def test_nobody_listens(run: Any) -> None:
    with bad.closed_port() as port:
        where = ("--endpoint", f"http://127.0.0.1:{port}", "--model", "m", "--out", "a.jsonl")
        done = run("radioactivity", "collect", *where, input="one\n")
    assert done.code == 2 and "is the server running" in done.err
