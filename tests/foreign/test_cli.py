"""filigrane detect --profile, as it is typed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import filigrane as fg
from clikit import Done
from filigrane.cli.app import build
from filigrane.foreign import ForeignKey, KeyForm, Writable, Written, from_tag
from foreignkit import key_of, written

pytestmark = pytest.mark.slow

NUMBER = 8_123_456_789_012_345_678
HEX = "00c0ffee12345678"


Run = Callable[..., Done]


def record(text: Written, *, prompt: bool = False) -> dict[str, Any]:
    fields: dict[str, Any] = {"tokens": text.tokens.tolist()}
    if prompt and text.prompt is not None:
        fields["prompt_tokens"] = text.prompt.tolist()
    return fields


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("FILIGRANE_KEY", "FILIGRANE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, text in (("vllm.key", str(NUMBER)), ("sglang.key", HEX), ("words.key", "lorem")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    vllm = from_tag("vllm-gumbel")
    sglang = from_tag("sglang-gumbel")
    marked = written(vllm, key_of(NUMBER, KeyForm.UINT64))
    plain = Written(tokens=np.random.default_rng(1).integers(0, 600, 150))
    lines(tmp_path / "vllm.jsonl", [record(marked)])
    lines(tmp_path / "mixed.jsonl", [record(marked), record(plain)])
    lines(tmp_path / "plain.jsonl", [record(plain)])
    text = written(sglang, key_of(HEX, KeyForm.HEX), 30)
    lines(tmp_path / "sglang.jsonl", [record(text, prompt=True)])
    lines(tmp_path / "sglang-bare.jsonl", [record(text)])
    lines(tmp_path / "short.jsonl", [{"tokens": [1, 2]}])

    def go(*arguments: str) -> Done:
        environment = {"COLUMNS": "120", "NO_COLOR": "1"}
        result = CliRunner().invoke(build(), ["detect", *arguments], env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        for secret in (str(NUMBER), f"{NUMBER:x}", HEX):
            assert secret not in result.stdout + result.stderr, "a key has leaked"
        return Done(result.exit_code, result.stdout, result.stderr)

    return go


def test_a_mark_is_found_with_the_tools_own_key(run: Run) -> None:
    done = run("--profile", "vllm-gumbel", "--key-file", "vllm.key", "vllm.jsonl")
    assert done.code == 0 and "mark found" in done.out
    assert "does not prove origin" in done.out and "key vllm" in done.out


def test_json_says_everything(run: Run) -> None:
    done = run("--profile", "vllm-gumbel", "-k", "vllm.key", "mixed.jsonl", "--json")
    assert done.code == 1
    first, second = done.json["results"]
    assert done.json["profile"] == "vllm-gumbel"
    assert first["found"] and first["log10_pvalue"] < -20 and first["n_candidates"] == 1
    assert first["profile"].startswith("vllm-gumbel:context_width=4,")
    assert first["tool_reports"]["num_scored_tokens"] == first["scored"]
    assert first["assurance"] == "detects honest use; does not prove origin"
    assert not second["found"] and second["verdict"] == "no mark found"
    assert second["log10_pvalue_holm"] >= second["log10_pvalue"] or second["log10_pvalue"] == 0.0
    assert done.json["summary"]["found"] == 1


def test_auto_finds_the_profile_and_pays(run: Run) -> None:
    done = run("--profile", "auto", "-k", "vllm.key", "vllm.jsonl", "--json")
    (row,) = done.json["results"]
    assert done.code == 0 and row["profile"].startswith("vllm-gumbel:")
    alone = run("--profile", "vllm-gumbel", "-k", "vllm.key", "vllm.jsonl", "--json")
    paid = row["log10_pvalue"] - alone.json["results"][0]["log10_pvalue"]
    assert row["n_candidates"] > 1 and paid == pytest.approx(np.log10(row["n_candidates"]))
    shown = run("--profile", "auto", "-k", "vllm.key", "vllm.jsonl")
    assert "vllm-gumbel" in shown.out and "tried, corrected" in shown.out


def test_prompts_in_records_are_used(run: Run) -> None:
    with_prompt = run("--profile", "sglang-gumbel", "-k", "sglang.key", "sglang.jsonl", "--json")
    without = run("--profile", "sglang-gumbel", "-k", "sglang.key", "sglang-bare.jsonl", "--json")
    (one,), (other,) = with_prompt.json["results"], without.json["results"]
    assert one["scored"] == 30 and other["scored"] == 26
    assert one["log10_pvalue"] < other["log10_pvalue"] < -6
    assert not one["warnings"] and "prompt unknown" in other["warnings"][0]


def test_a_filigrane_key_derives_the_tools_key(run: Run, tmp_path: Path) -> None:
    root = fg.Key.generate("acme")
    root.save(tmp_path / "acme.key")
    profile = from_tag("sglang-gumbel")
    assert isinstance(profile, Writable)
    text = written(profile, ForeignKey.derive(root.user(7), profile))
    lines(tmp_path / "seven.jsonl", [record(text)])
    options = ("--profile", "sglang-gumbel", "-k", "acme.key", "seven.jsonl")
    assert run(*options, "--user", "7").code == 0
    assert run(*options).code == 1
    auto = run("--profile", "auto", *options[2:], "--user", "7", "--json")
    assert auto.code == 0 and auto.json["results"][0]["key"] == "acme/7"
    assert auto.json["key_fingerprint"] == root.fingerprint


def test_joint_reads_all_texts_as_one_claim(run: Run) -> None:
    done = run("--profile", "vllm-gumbel", "-k", "vllm.key", "mixed.jsonl", "--joint", "--json")
    (row,) = done.json["results"]
    assert row["texts"] == 2 and row["tokens"] == 350 and row["found"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vllm.jsonl",), "name one mark"),
        (("--scheme", "gumbel", "--profile", "auto", "vllm.jsonl"), "name one mark"),
        (("--profile", "vlm-gumbel", "-k", "vllm.key", "vllm.jsonl"), "Did you mean"),
        (("--profile", "hf-kgw-lefthash", "-k", "vllm.key", "vllm.jsonl"), "needs vocab_size"),
        (("--profile", "sglang-gumbel", "-k", "vllm.key", "vllm.jsonl"), "hex digits"),
        (("--profile", "vllm-gumbel", "-k", "none.key", "vllm.jsonl"), "no such file"),
        (("--profile", "vllm-gumbel", "-k", str(NUMBER), "vllm.jsonl"), "never an argument"),
        (("--profile", "auto", "-k", "words.key", "vllm.jsonl"), "not a key of any form"),
        (("--profile", "vllm-gumbel", "-k", "vllm.key", "--user", "1", "vllm.jsonl"), "--user"),
        (("--profile", "vllm-gumbel", "vllm.jsonl"), "no key"),
    ],
)
def test_bad_usage(run: Run, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.code == 2 and words in " ".join(done.err.split()) and not done.out


def test_records_that_do_not_fit(run: Run, tmp_path: Path) -> None:
    rows = [
        {"tokens": [1, 2, 3] * 30, "scheme": "gumbel:context_width=4"},
        {"tokens": [1, 2, 3], "prompt_tokens": ["a"]},
        {"tokens": list(range(100, 190))},
    ]
    lines(tmp_path / "odd.jsonl", rows)
    done = run("--profile", "vllm-gumbel", "-k", "vllm.key", "odd.jsonl", "--json")
    assert done.code == 3 and len(done.json["errors"]) == 2 and len(done.json["results"]) == 1
    assert "--scheme gumbel" in done.json["errors"][0]["message"]
    assert '"prompt_tokens"' in done.json["errors"][1]["message"]
    options = ("--profile", "maryland", "-k", "vllm.key", "--vocab-size", "150")
    small = run(*options, "odd.jsonl", "--json")
    assert small.code == 2 or small.json["summary"]["errors"] == 3


def test_too_short_is_a_verdict(run: Run) -> None:
    done = run("--profile", "sglang-gumbel", "-k", "sglang.key", "short.jsonl", "--json")
    assert done.code == 1 and done.json["results"][0]["verdict"] == "too short"
    assert done.json["summary"]["too_short"] == 1
