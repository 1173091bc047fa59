"""filigrane embed, on a toy model: records, resuming, interruption."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import filigrane as fg

KEY = ("--model", "toy", "--scheme", "gumbel", "--key-file", "acme.key")
SHORT = ("--max-new-tokens", "60", "--seed", "1")


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_one_prompt_streams(run: Any, toy: Any) -> None:
    done = run("embed", *KEY, *SHORT, "--prompt", "tell me more")
    assert done.code == 0 and all(word.startswith("w") for word in done.out.split())
    assert "marked" in done.err and "acme" in done.err
    assert done.out == run("embed", *KEY, *SHORT, "--prompt", "tell me more").out
    fresh = {run("embed", *KEY, "-n", "60", "--prompt", "tell me more").out for _ in range(2)}
    assert len(fresh) == 2


def test_a_record_says_what_a_detector_needs(run: Any, toy: Any, world: Any) -> None:
    Path("p.txt").write_text("one\ntwo words\nthree\n")
    out = ("--prompts", "p.txt", "--out", "o.jsonl")
    done = run("embed", *KEY, *SHORT, *out, "--user", "7", "--temperature", "0.9")
    made = rows("o.jsonl")
    assert done.code == 0 and done.out == "" and [row["id"] for row in made] == [0, 1, 2]
    for row, prompt in zip(made, ("one", "two words", "three"), strict=True):
        assert row["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
        assert "prompt" not in row and "slot" not in json.dumps(row)
        assert row["scheme"] == "gumbel:context_width=4" and row["key"] == "acme/7"
        assert row["key_fingerprint"] == world.key.fingerprint and row["model"] == "toy"
        assert row["vocab_size"] == 1000 and row["tokenizer_sha256"] == "5" * 64
        assert row["sampling"] == {
            "temperature": 0.9,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": 60,
            "chat_template": True,
        }
        stopped = row["tokens"][-1] == 0
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert stopped or len(row["tokens"]) == 60
        assert row["text"] == " ".join(f"w{i}" for i in row["tokens"])
        found = fg.detect(row["tokens"], world.key.user(7), fg.Gumbel())
        assert row["n_marked"] == found.n_scored
    done = run("detect", "-s", "gumbel", "-k", "acme.key", "--user", "7", "o.jsonl", "--joint")
    assert done.code == 0
    assert (
        run("trace", "-s", "gumbel", "-k", "acme.key", "--users", "99", "--joint", "o.jsonl").code
        == 0
    )


def test_batches_continue_where_they_stopped(
    run: Any, toy: Any, world: Any, monkeypatch: Any
) -> None:
    prompts = [{"id": f"p{i}", "prompt": f"prompt number {i}"} for i in range(7)]
    world.write("p.jsonl", prompts)
    command = ("embed", *KEY, *SHORT, "--prompts", "p.jsonl", "-b", "2", "--out")
    assert run(*command, "whole.jsonl").code == 0

    import filigrane.cli.embed as module

    real, calls = module.embed_batch, []

    def breaks(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "embed_batch", breaks)
    done = run(*command, "o.jsonl")
    assert done.code == 130 and "4 of 7 records were written" in done.err
    assert [row["id"] for row in rows("o.jsonl")] == ["p0", "p1", "p2", "p3"]
    done = run(*command, "o.jsonl", "--json")
    assert done.code == 0 and "4 of 7 prompts are in o.jsonl already" in done.err
    assert done.json["written"] == 3 and done.json["skipped"] == 4
    # The private randomness belongs to the prompt, not to the run.
    assert rows("o.jsonl") == rows("whole.jsonl")
    assert rows("o.jsonl")[0]["prompt"] == "prompt number 0"
    before, loads = Path("o.jsonl").read_bytes(), len(toy)
    assert run(*command, "o.jsonl").code == 0
    assert Path("o.jsonl").read_bytes() == before and len(toy) == loads  # nothing to do, no model


def test_a_changed_prompt_is_written_anew(run: Any, toy: Any, world: Any) -> None:
    command = ("embed", *KEY, *SHORT, "--prompts", "p.txt", "--out", "o.jsonl")
    Path("p.txt").write_text("one\ntwo\n")
    run(*command)
    Path("p.txt").write_text("one\nother\n")
    done = run(*command)
    assert "1 of 2 prompts" in done.err and [row["id"] for row in rows("o.jsonl")] == [0, 1, 1]


def test_batches_do_not_share_their_randomness(run: Any, toy: Any) -> None:
    Path("p.txt").write_text("same\nsame\n")
    run("embed", *KEY, *SHORT, "--prompts", "p.txt", "-b", "1", "--out", "o.jsonl")
    first, second = rows("o.jsonl")
    assert first["tokens"] != second["tokens"]


def test_why_a_text_ended(run: Any, toy: Any, monkeypatch: Any) -> None:
    from clikit import ToyLM

    for stop, reason in ((tuple(range(1000)), "stop"), ((), "length")):
        monkeypatch.setattr(ToyLM, "stop_ids", stop)
        monkeypatch.setattr("clikit.ToyTokenizer.eos_token_id", None)
        made = run("embed", *KEY, *SHORT, "--prompt", "one", "--json").json
        assert (made["finish_reason"], len(made["tokens"])) == (reason, 1 if stop else 60)


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_line_cut_short_by_a_crash(run: Any, toy: Any, cut: int) -> None:
    Path("p.txt").write_text("one\ntwo\n")
    command = ("embed", *KEY, *SHORT, "--prompts", "p.txt", "--out", "o.jsonl")
    run(*command)
    whole = Path("o.jsonl").read_bytes()
    Path("o.jsonl").write_bytes(whole[:-cut])
    Path("p.txt").write_text("one\ntwo\nthree\n")
    done = run(*command)
    assert done.code == 0 and ("unfinished" in done.err) == (cut > 1)
    assert [row["id"] for row in rows("o.jsonl")] == [0, 1, 2]


def test_out_must_be_ours(run: Any, toy: Any) -> None:
    Path("p.txt").write_text("one\n")
    for content in ("my notes", "my notes\n", '{"a": 1}\n', '{"id": 1, "a"\n', '{"a'):
        Path("o.jsonl").write_text(content)
        done = run("embed", *KEY, *SHORT, "--prompts", "p.txt", "--out", "o.jsonl")
        assert done.code == 2 and Path("o.jsonl").read_text() == content, content
    assert toy == []


@pytest.mark.parametrize(
    "change",
    [
        ("--scheme", "delta"),
        ("--user", "8"),
        ("--key-file", "other.key"),
        ("--temperature", "0.7"),
        ("--raw",),
        ("--model", "another"),
    ],
)
def test_settings_do_not_mix(run: Any, toy: Any, change: tuple[str, ...]) -> None:
    Path("p.txt").write_text("one\n")
    Path("q.txt").write_text("two\n")
    assert run("embed", *KEY, *SHORT, "--prompts", "p.txt", "--out", "o.jsonl").code == 0
    before = Path("o.jsonl").read_bytes()
    done = run("embed", *KEY, *SHORT, *change, "--prompts", "q.txt", "--out", "o.jsonl")
    assert done.code == 2 and "choose another --out" in done.err
    assert Path("o.jsonl").read_bytes() == before


def test_json_without_a_file_is_records(run: Any, toy: Any) -> None:
    done = run("embed", *KEY, *SHORT, "--prompts", "-", "--json", input="one\ntwo\n")
    made = [json.loads(line) for line in done.out.splitlines()]
    assert [row["id"] for row in made] == [0, 1] and made[0]["tokens"]
    assert run("embed", *KEY, *SHORT, "--prompt", "one", "--json").json["id"] == 0
    done = run("embed", *KEY, *SHORT, input="one\ntwo\n")
    assert done.out.startswith("--- 0\nw") and "\n--- 1\nw" in done.out


def test_bad_prompts_are_located(run: Any, toy: Any, world: Any) -> None:
    lines = [{"prompt": "one"}, "{", {"id": 5}, {"prompt": "\ud800"}, {"prompt": "two", "id": 0}]
    world.write("p.jsonl", [*lines, {"prompt": " "}, {"prompt": "three"}])
    done = run("embed", *KEY, *SHORT, "--prompts", "p.jsonl", "--out", "o.jsonl", "--json")
    assert done.code == 3 and [e["line"] for e in done.json["errors"]] == [2, 3, 4, 5, 6]
    assert [row["id"] for row in rows("o.jsonl")] == [0, 6]
    world.write("p.jsonl", ["{"])
    assert run("embed", *KEY, "--prompts", "p.jsonl", "--out", "o.jsonl").code == 2


def test_unmarked_is_never_silent(run: Any, toy: Any, world: Any) -> None:
    model = ("embed", "--model", "toy", *SHORT, "--prompt", "one")
    done = run(*model, "--unmarked", "--json")
    assert done.code == 0 and "carries no mark" in done.err
    assert done.json["key"] is None and done.json["scheme"] is None and done.json["n_marked"] == 0
    assert run(*model, "--unmarked", "--key-file", "acme.key").code == 2
    assert run(*model, "--unmarked", "--scheme", "gumbel").code == 2
    assert run(*model).code == 2  # no key is no reason to write without


def test_refusals_come_before_the_model(run: Any, toy: Any) -> None:
    for wrong in (
        ("--temperature", "0", "--prompt", "one"),
        ("--top-k", "1", "--prompt", "one"),
        ("--top-p", "0", "--prompt", "one"),
        ("--prompt", " "),
        ("--prompt", "one", "--prompts", "p.txt"),
        ("--prompts", "missing.txt"),
        ("--prompt", "one", "--out", "-"),
        ("--prompt", "one", "--out", "no/such/folder.jsonl"),
        ("--prompt", "one", "--user", str(2**64)),
        ("--prompt", "one", "--scheme", "gumble"),
    ):
        assert run("embed", *KEY, *wrong).code == 2, wrong
    assert toy == []


def test_a_file_that_cannot_be_written(run: Any, toy: Any) -> None:
    done = run("embed", *KEY, *SHORT, "--prompt", "one", "--out", "no/such/folder.jsonl")
    assert done.code == 2 and "no/such/folder.jsonl" in done.err


def test_greedy_takes_a_green_list(run: Any, toy: Any) -> None:
    greedy = ("--model", "toy", "-s", "greenlist", "-k", "acme.key", "--temperature", "0", *SHORT)
    assert run("embed", *greedy, "--prompt", "one", "--json").json["n_marked"] > 0


def test_generated_text_cannot_drive_the_terminal(run: Any, toy: Any, monkeypatch: Any) -> None:
    from clikit import ToyTokenizer

    monkeypatch.setattr(ToyTokenizer, "decode", lambda self, ids, **o: "\x1b[2J\n" * len(ids))
    assert "\x1b" not in run("embed", *KEY, *SHORT, "--prompt", "one").out
    assert "\x1b" not in run("embed", *KEY, *SHORT, input="one\ntwo\n").out


def test_binary_prompts_are_refused_whole(run: Any, toy: Any) -> None:
    for data in (b"fine\nthen \0 not\n", b"fine\n\xff\n", b"GGUF\n" + bytes(range(256))):
        Path("bin.dat").write_bytes(data)
        done = run("embed", *KEY, "--prompts", "bin.dat")
        assert done.code == 2 and done.err.count("not UTF-8 text") == 1 and toy == []
    Path("cut.txt").write_text("x" + "é" * 3000, encoding="utf-8")  # 4096 is inside a character
    assert run("embed", *KEY, *SHORT, "--prompts", "cut.txt").code == 0


def test_blank_lines_between_prompts_are_nothing(run: Any, toy: Any) -> None:
    Path("p.txt").write_text("\none\n\n\ntwo\n\n")
    done = run("embed", *KEY, *SHORT, "--prompts", "p.txt", "--out", "o.jsonl")
    assert done.code == 0 and "empty line" not in done.err and "2 records written" in done.err
    assert [row["id"] for row in rows("o.jsonl")] == [0, 1]


def test_a_file_of_one_prompt_is_records(run: Any, toy: Any) -> None:
    assert run("embed", *KEY, *SHORT, input="one\n").out.startswith("--- 0\nw")


def test_a_text_without_a_mark_is_noticed(run: Any, toy: Any) -> None:
    short = ("--prompt", "one", "-n", "1", "--raw")
    for out in ((), ("--out", "o.jsonl"), ("--json",)):
        done = run("embed", *KEY, *short, *out)
        assert done.code == 0 and "this text carries no mark at all" in done.err
    assert "1 record written" in run("embed", *KEY, *short, "--out", "p.jsonl").err
