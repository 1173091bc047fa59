"""filigrane detect: verdicts, exit codes, and bad input of every kind."""

import json
from typing import Any

import pytest

import filigrane as fg
from filigrane import stats

KEY = ("--scheme", "gumbel", "--key-file", "acme.key")
SEVEN = (*KEY, "--user", "7")


def test_a_mark_in_every_text_is_0(run: Any) -> None:
    done = run("detect", *SEVEN, "seven.jsonl")
    assert done.code == 0 and done.out.count("mark found") == 2
    assert "seven.jsonl:1" in done.out and "2 tested, 2 with a mark" in done.out


def test_a_text_without_is_1(run: Any) -> None:
    done = run("detect", *SEVEN, "mixed.jsonl")
    lines = [line for line in done.out.splitlines() if line.startswith("mixed.jsonl:")]
    assert done.code == 1
    assert [line.endswith("no mark found") for line in lines] == [False, True, True]


def test_json_says_what_the_core_says(run: Any, world: Any, texts: Any) -> None:
    done = run("detect", *SEVEN, "mixed.jsonl", "--json")
    answer = done.json
    expected = [
        fg.detect(texts[name]["tokens"], world.key.user(7), fg.Gumbel())
        for name in ("seven", "plain", "eight")
    ]
    assert [r["log10_pvalue"] for r in answer["results"]] == [e.log10_pvalue for e in expected]
    assert [r["statistic"] for r in answer["results"]] == [e.statistic for e in expected]
    assert [r["scored"] for r in answer["results"]] == [e.n_scored for e in expected]
    assert [r["found"] for r in answer["results"]] == [True, False, False]
    assert [(r["source"], r["line"], r["id"]) for r in answer["results"]] == [
        ("mixed.jsonl", 1, 2),
        ("mixed.jsonl", 2, 5),
        ("mixed.jsonl", 3, 3),
    ]
    holm = stats.holm([e.log_pvalue for e in expected])
    assert [r["log10_pvalue_holm"] for r in answer["results"]] == pytest.approx(holm / 2.302585093)
    assert answer["key"] == "acme/7" and answer["key_fingerprint"] == world.key.fingerprint
    assert answer["summary"]["texts"] == 3 and answer["summary"]["found"] == 1
    assert done.code == 1


def test_alpha_decides(run: Any) -> None:
    exact = run("detect", *SEVEN, "seven.jsonl", "--json").json["results"][0]["log10_pvalue"]
    for alpha, code in ((10**exact * 1.01, 0), (10**exact * 0.99, 1)):
        one = (*SEVEN, "--alpha", repr(alpha), "-")
        with open("seven.jsonl") as file:
            assert run("detect", *one, input=file.readline()).code == code


@pytest.mark.parametrize("alpha", ["0", "1", "-1", "nan", "2"])
def test_alpha_out_of_range(run: Any, alpha: str) -> None:
    assert run("detect", *KEY, "--alpha", alpha, "root.jsonl").code == 2


def test_joint_is_a_corpus(run: Any, world: Any, texts: Any) -> None:
    done = run("detect", *SEVEN, "seven.jsonl", "--joint", "--json")
    corpus = fg.Corpus([texts["seven"]["tokens"], texts["seven_too"]["tokens"]])
    (result,) = done.json["results"]
    assert result["log10_pvalue"] == fg.detect(corpus, world.key.user(7), fg.Gumbel()).log10_pvalue
    assert result["texts"] == 2 and done.code == 0


def test_one_bad_record_stops_nobody(run: Any, world: Any, texts: Any) -> None:
    good = texts["seven"]
    lines: list[tuple[object, str]] = [
        (good, ""),
        ("", "empty line"),
        ('{"tokens": [1, 2', "not valid JSON"),
        ("[1, 2, 3]", "not a JSON object"),
        ("9" * 5000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ({"id": 1}, 'neither "tokens" nor "text"'),
        ({"tokens": [1, 2, "3"]}, "not a list of integers"),
        ({"tokens": [1.0, 2.0]}, "not a list of integers"),
        ({"tokens": [True, 2]}, "not a list of integers"),
        ({"tokens": {"a": 1}}, "not a list of integers"),
        ({"tokens": [1, 2, 3, 4, 5, -100]}, "[0, 4294967294]"),
        ({"tokens": [2**70] * 9}, "token ids"),
        ({"tokens": [1] * 9 + [VOCAB], "vocab_size": VOCAB}, "outside the vocabulary"),
        ({"tokens": [1] * 9, "vocab_size": "x"}, "not a positive integer"),
        (good | {"scheme": "greenlist"}, "--scheme greenlist:"),
        (good | {"scheme": "gumbel:context_width=2"}, "--scheme gumbel:context_width=2"),
        (good | {"scheme": "magic"}, "not one that is known"),
        (good | {"id": []}, '"id"'),
        ({"text": "hello"}, "--tokenizer"),
        ({"text": 7}, "not a string"),
        ({"text": "\ud800"}, "lone surrogate"),
        (good, ""),
    ]
    path = world.write("bad.jsonl", [line for line, _ in lines])  # type: ignore[misc]
    with open(path, "ab") as file:
        file.write(b'{"text": "\xff"}\n\n  \n')
    done = run("detect", *SEVEN, path, "--json")
    expected = [(n, word) for n, (_, word) in enumerate(lines, 1) if word]
    expected.append((len(lines) + 1, "not UTF-8"))
    errors = [(error["line"], error["message"]) for error in done.json["errors"]]
    assert [line for line, _ in errors] == [line for line, _ in expected]
    for (line, message), (_, word) in zip(errors, expected, strict=True):
        assert word in message, (line, message)
        assert f"{path}:{line}: " in done.err
    assert [r["line"] for r in done.json["results"]] == [1, 23]
    assert done.code == 3


VOCAB = 1000


def test_a_list_of_ids_does_not_get_quoted(run: Any, world: Any) -> None:
    path = world.write("bad.jsonl", ['{"tokens": "CANARY-IN-THE-DATA"}', "CANARY-IN-THE-DATA"])
    done = run("detect", *KEY, path, "--format", "jsonl")
    assert done.code == 2 and "CANARY" not in done.out + done.err and "bad.jsonl:2" in done.err


def test_files_that_are_no_texts(run: Any, world: Any) -> None:
    (world.folder / "binary.dat").write_bytes(bytes(range(256)) * 40)
    (world.folder / "binary.jsonl").write_bytes(b'{"a"\0\n' * 100)
    (world.folder / "empty.txt").touch()
    (world.folder / "blank.jsonl").write_text("\n \n\n")
    (world.folder / "blank.txt").write_text("\n \n\n")
    (world.folder / "utf16.txt").write_bytes("hello".encode("utf-16"))
    (world.folder / "latin.txt").write_bytes("déjà".encode("latin-1"))
    names = ["binary.dat", "binary.jsonl", "empty.txt", "blank.jsonl", "blank.txt", "utf16.txt"]
    names += ["latin.txt", "missing.jsonl", "."]
    done = run("detect", *KEY, *names, "--json")
    assert done.code == 2 and done.json["results"] == [] and done.json["summary"]["texts"] == 0
    assert [error["source"] for error in done.json["errors"]] == names
    done = run("detect", *KEY, *names, "root.jsonl", "--json")
    assert done.code == 3 and done.json["summary"]["found"] == 1


def test_too_short_is_a_verdict(run: Any, world: Any, texts: Any) -> None:
    path = world.write("short.jsonl", [{"tokens": [1, 2, 3, 4]}, {"tokens": []}, texts["seven"]])
    done = run("detect", *SEVEN, path, "--json")
    assert [r["verdict"] for r in done.json["results"]] == ["too short", "too short", "mark found"]
    assert done.json["summary"]["too_short"] == 2 and done.json["summary"]["tested"] == 1
    assert done.code == 1
    assert "2 too short" in run("detect", *SEVEN, path).out


def test_what_a_record_says_is_held_to(run: Any, world: Any, texts: Any, toy: Any) -> None:
    rows = [
        texts["seven"] | {"tokenizer_sha256": "5" * 64},
        texts["seven"] | {"tokenizer_sha256": "6" * 64},
        texts["seven"] | {"vocab_size": VOCAB + 8},
        texts["seven"] | {"scheme": "gumbel"},
    ]
    path = world.write("said.jsonl", rows)
    done = run("detect", *SEVEN, path, "-t", "toy", "--vocab-size", str(VOCAB), "--json")
    assert [r["line"] for r in done.json["results"]] == [1, 4]
    assert ["tokenizer" in e["message"] for e in done.json["errors"]] == [True, False]
    assert "1008" in done.json["errors"][1]["message"] and toy == ["tokenizer toy"]


def test_a_green_list_is_tested_alike_whatever_its_delta(run: Any, world: Any, texts: Any) -> None:
    path = world.write("g.jsonl", [texts["plain"] | {"scheme": "greenlist:delta=5"}])
    key = ("--key-file", "acme.key")
    assert run("detect", "-s", "greenlist", *key, path).code == 1
    assert run("detect", "-s", "greenlist:gamma=0.5", *key, path).code == 2


def test_another_key_in_the_record_is_noticed(run: Any, world: Any, texts: Any) -> None:
    mine, theirs = world.key.fingerprint, world.other.fingerprint
    rows = [texts["seven"] | {"key_fingerprint": f} for f in (mine, theirs, theirs)]
    done = run("detect", *SEVEN, world.write("k.jsonl", rows))
    assert (
        f"2 of the records say that they were written under another key (fingerprint {theirs})"
        in (done.err)
    )


def test_texts_need_their_tokenizer(run: Any, world: Any, texts: Any, toy: Any) -> None:
    words = " ".join(f"w{i}" for i in texts["seven"]["tokens"])
    (world.folder / "note.txt").write_text(words)
    assert run("detect", *SEVEN, "note.txt").code == 2
    done = run("detect", *SEVEN, "-t", "toy", "note.txt", "--json")
    (result,) = done.json["results"]
    assert done.code == 0 and (result["source"], result["line"]) == ("note.txt", None)
    for data in (words, "﻿" + words, words.replace(" ", "\n")):
        assert run("detect", *SEVEN, "-t", "toy", "-", input=data).code == 0


def test_retokenize_takes_the_text(run: Any, world: Any, texts: Any, toy: Any) -> None:
    row = texts["plain"] | {"text": " ".join(f"w{i}" for i in texts["seven"]["tokens"])}
    path = world.write("both.jsonl", [row])
    assert run("detect", *SEVEN, "-t", "toy", path).code == 1
    assert run("detect", *SEVEN, "-t", "toy", path, "--retokenize").code == 0


def test_format(run: Any, world: Any, texts: Any, toy: Any) -> None:
    line = json.dumps(texts["seven"]) + "\n"
    assert run("detect", *SEVEN, input=line).code == 0  # stdin, by its first line
    assert run("detect", *SEVEN, "-", input="{not json\n").code == 2
    (world.folder / "records.dat").write_text(line)
    assert run("detect", *SEVEN, "records.dat").code == 0
    (world.folder / "records.txt").write_text(line)
    assert run("detect", *SEVEN, "-t", "toy", "records.txt").code == 1  # words, not a record
    assert run("detect", *SEVEN, "records.txt", "--format", "jsonl").code == 0
    (world.folder / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + line.strip().encode() + b"\r\n")
    assert run("detect", *SEVEN, "crlf.jsonl").code == 0


def test_a_text_cannot_drive_the_terminal(run: Any, world: Any, texts: Any) -> None:
    path = world.folder / "\x1b[31mevil[bold].jsonl"
    path.write_text(json.dumps(texts["seven"]) + "\nx\n")
    done = run("detect", *SEVEN, path.name)
    assert "\x1b" not in done.out + done.err and "[bold].jsonl:1" in done.out and done.code == 3


def test_unknown_scheme(run: Any) -> None:
    done = run("detect", "--scheme", "gumble", "-k", "acme.key", "root.jsonl")
    assert done.code == 2 and "Did you mean 'gumbel'" in done.err and done.out == ""


def test_a_line_that_is_too_long(run: Any, world: Any, texts: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("filigrane.cli.records.MAX_BYTES", 2000)
    path = world.write("long.jsonl", [texts["seven"], " " * 9000 + "{}", texts["seven"]])
    done = run("detect", *SEVEN, path, "--json")
    assert [e["line"] for e in done.json["errors"]] == [2]
    assert [r["line"] for r in done.json["results"]] == [1, 3]


def test_a_forgotten_user_is_noticed(run: Any, world: Any, texts: Any) -> None:
    row = texts["seven"] | {"key": "acme/17", "key_fingerprint": world.key.fingerprint}
    path = world.write("k.jsonl", [row, row, texts["seven"] | {"key": "acme"}])
    assert (
        "2 of the records say that they were written for acme/17; "
        "this run tests acme (add --user 17)"
    ) in run("detect", *KEY, path).err
    strange = [row | {"key": key} for key in (world.key.export_text(), 7, None, "x y")]
    assert run("detect", *KEY, world.write("odd.jsonl", [texts["seven"]])).err == ""
    (world.folder / "odd.txt").write_text("".join(json.dumps(r) + "\n" for r in strange))
    assert run("detect", *KEY, "odd.txt", "--format", "jsonl").err == ""


def test_json_has_every_slot(run: Any, world: Any, texts: Any) -> None:
    (result,) = run("detect", *KEY, "root.jsonl", "--json").json["results"]
    expected = fg.detect(texts["root"]["tokens"], world.key, fg.Gumbel()).slot_log_pvalues
    assert [p * 2.302585093 for p in result["slot_log10_pvalues"]] == pytest.approx(expected)


def test_a_truncated_line_says_where_it_ends(run: Any, world: Any) -> None:
    path = world.write("cut.jsonl", ['{"tokens": [1, 2'])
    assert "column 17" in run("detect", *KEY, path).err
