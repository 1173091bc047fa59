"""filigrane trace."""

import math
from typing import Any

import pytest

import filigrane as fg

KEY = ("--scheme", "gumbel", "--key-file", "acme.key")


def test_names_the_user(run: Any) -> None:
    done = run("trace", *KEY, "--users", "300", "seven.jsonl")
    assert done.code == 0
    assert "seven.jsonl:1: acme/7" in done.out and "seven.jsonl:2: acme/7" in done.out
    assert "2 traced among 300 keys" in done.out


def test_nobody_is_1(run: Any) -> None:
    done = run("trace", *KEY, "--users", "8:300", "mixed.jsonl")
    assert done.code == 1
    assert [line.split(": ")[1] for line in done.out.splitlines() if line.startswith("mixed")] == [
        "nobody",
        "nobody",
        "acme/8",
    ]


def test_json_says_what_the_core_says(run: Any, world: Any, texts: Any) -> None:
    done = run("trace", *KEY, "--users", "5:105", "--json", "mixed.jsonl")
    for name, result in zip(("seven", "plain", "eight"), done.json["results"], strict=True):
        expected = fg.trace(texts[name]["tokens"], world.key.users(range(5, 105)), fg.Gumbel())
        assert result["named"] == list(expected.named(1e-6))
        assert [(c["name"], c["log10_pvalue"]) for c in result["candidates"]] == [
            (c.name, c.log_pvalue / math.log(10)) for c in expected.candidates
        ]
    assert done.json["keys"] == 100 and done.json["summary"]["named"] == 2


def test_key_files_as_candidates(run: Any, world: Any) -> None:
    done = run("trace", *KEY, "--key-file", "other.key", "root.jsonl", "--json")
    (result,) = done.json["results"]
    assert done.code == 0 and result["named"] == ["acme"]
    assert result["candidates"][0]["key_fingerprint"] == world.key.fingerprint
    done = run("trace", *KEY, "--key-file", "other.key", "root.jsonl")
    assert world.other.fingerprint in done.out


def test_keys_of_one_name_are_told_apart(run: Any, world: Any) -> None:
    fg.Key.generate("acme", slots=4).save("twin.key")
    done = run("trace", "-s", "gumbel", "-k", "twin.key", "-k", "acme.key", "root.jsonl", "--json")
    (result,) = done.json["results"]
    assert result["candidates"][0]["key_fingerprint"] == world.key.fingerprint
    assert done.json["key_fingerprints"][1] == world.key.fingerprint


def test_joint(run: Any, texts: Any, world: Any) -> None:
    # Two halves of one text: they share a slot, so their evidence adds up.
    tokens = texts["seven"]["tokens"]
    path = world.write("halves.jsonl", [{"tokens": tokens[:60]}, {"tokens": tokens[60:]}])
    command = ("trace", *KEY, "--users", "100", path, "--json")
    alone = [r["candidates"][0]["log10_pvalue"] for r in run(*command).json["results"]]
    strict = ("--alpha", repr(10 ** (1.2 * min(alone))))
    assert run(*command, *strict).code == 1
    done = run(*command, *strict, "--joint")
    (result,) = done.json["results"]
    assert done.code == 0 and result["texts"] == 2 and result["named"] == ["acme/7"]


def test_too_short_and_unreadable(run: Any, world: Any, texts: Any) -> None:
    path = world.write("bad.jsonl", [texts["seven"], {"tokens": [1]}])
    done = run("trace", *KEY, "--users", "9", path)
    assert done.code == 1 and "bad.jsonl:2: too short" in done.out
    path = world.write("bad.jsonl", ["{", texts["seven"]])
    done = run("trace", *KEY, "--users", "9", path, "--json", "-j", "1")
    assert done.code == 3 and done.json["errors"][0]["line"] == 1
    assert run("trace", *KEY, "--users", "9", "missing").code == 2


@pytest.mark.parametrize(
    "users", ["0", "-1", "5:5", "9:3", "a", "1:2:3", ":", "1e3", "", "9" * 99, str(2**64)]
)
def test_users_that_make_no_sense(run: Any, users: str) -> None:
    done = run("trace", *KEY, f"--users={users}", "root.jsonl")
    assert done.code == 2 and "--users" in done.err


def test_the_last_user_there_can_be(run: Any) -> None:
    last = f"{2**64 - 2}:{2**64}"
    done = run("trace", *KEY, "--users", last, "root.jsonl", "--json")
    assert done.code == 1
    names = {candidate["name"] for candidate in done.json["results"][0]["candidates"]}
    assert names == {f"acme/{2**64 - 2}", f"acme/{2**64 - 1}"}


def test_users_of_two_roots(run: Any) -> None:
    done = run("trace", *KEY, "-k", "other.key", "--users", "9", "root.jsonl")
    assert done.code == 2 and "one root key" in done.err


def test_everybody_who_is_named_is_shown(run: Any, monkeypatch: Any) -> None:
    named = fg.TraceResult.named
    monkeypatch.setattr(
        fg.TraceResult, "named", lambda self, alpha: tuple(c.name for c in self.candidates)
    )
    done = run("trace", *KEY, "--users", "50", "root.jsonl")
    assert done.out.count(" named") == 10 and "there may be more" in done.err
    monkeypatch.setattr(fg.TraceResult, "named", named)
    assert run("trace", *KEY, "--users", "50", "root.jsonl").out.count("acme/") == 3


def test_forgotten_users_are_noticed(run: Any, world: Any, texts: Any) -> None:
    path = world.write("k.jsonl", [texts["seven"] | {"key": "acme/7"}])
    assert "this run tests acme (add --users N)" in run("trace", *KEY, path).err
    assert "this run" not in run("trace", *KEY, "--users", "9", path).err
