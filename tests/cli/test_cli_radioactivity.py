"""filigrane radioactivity, end to end: real models of a few hundred kilobytes, a real server."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import servers
from filigrane import GreenList

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCHEME = "greenlist:context_width=1,gamma=0.25,delta=3.0"
VOCAB = 256


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Alice's key and texts, a base model, Bob, and a Bob who never saw the mark."""
    from filigrane.study import tiny

    path = tmp_path_factory.mktemp("radioactivity")
    here = tiny.world(3, GreenList(context_width=1, gamma=0.25, delta=3.0))
    here.key.save(path / "alice.key")
    suspects = {"base": here.base, "bob": tiny.bob(here, 1.0), "clean": tiny.bob(here, 0.0)}
    for name, model in suspects.items():
        _save(model, path / name, [f"t{number}" for number in range(VOCAB)])
    # The same words under other numbers: another tokenizer, and the same law.
    order = np.random.default_rng(0).permutation(VOCAB)
    _save(_renumbered(suspects["bob"], order), path / "other", [f"t{old}" for old in order])
    for name, texts in (("logged", here.logged[:80]), ("fresh", here.fresh[:80])):
        rows = [
            {"id": number, "prompt_tokens": text[:8].tolist(), "tokens": text[8:].tolist()}
            for number, text in enumerate(texts)
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [" ".join(f"t{token}" for token in text[:8]) for text in here.fresh[:60]]
    (path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return path


def _save(model: Any, path: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    # As sentencepiece does it: a space is part of the word that follows.
    vocabulary = {f"\N{LOWER ONE EIGHTH BLOCK}{word}": at for at, word in enumerate(words)}
    made = Tokenizer(WordLevel(vocabulary, next(iter(vocabulary))))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=None)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _renumbered(model: Any, order: np.ndarray) -> Any:
    twin = transformers.LlamaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    index = torch.from_numpy(order)
    with torch.no_grad():
        twin.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight[index])
        twin.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight[index])
    return twin


@pytest.fixture
def go(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in the folder; returns exit code, JSON document (or None), stderr."""
    from typer.testing import CliRunner

    from filigrane.cli.app import build

    monkeypatch.chdir(place)

    def run(*arguments: str) -> tuple[int, Any, str]:
        done = CliRunner().invoke(build(), ["radioactivity", *arguments, "--json"])
        document = json.loads(done.stdout) if done.stdout.strip() else None
        secret = (place / "alice.key").read_text().rsplit(":", 1)[-1].strip()
        assert secret not in done.output
        return done.exit_code, document, done.stderr

    return run


KEY = ("--scheme", SCHEME, "--key-file", "alice.key")


def test_open_bob_is_found_and_the_clean_one_is_not(go: Any, place: Path) -> None:
    for suspect in ("bob", "clean"):
        code, document, _ = go(
            *("read", "fresh.jsonl", "--scheme", SCHEME, "--suspect", suspect),
            *("--base", "base", "--out", f"r-{suspect}", "-b", "16"),
        )
        assert code == 0 and document["texts"] == 80
        ledger = document["ledger"]
        dropped = sum(v for k, v in ledger.items() if k not in ("candidates", "scored"))
        assert ledger["candidates"] - dropped == ledger["scored"] == document["positions"]
        assert ledger["window in the attended context"] > 0
        # Again: everything is there, and nothing changes.
        before = sorted(p.stat().st_mtime_ns for p in Path(f"r-{suspect}").iterdir())
        assert (
            go(
                *("read", "fresh.jsonl", "--scheme", SCHEME, "--suspect", suspect),
                *("--base", "base", "--out", f"r-{suspect}", "-b", "16"),
            )[0]
            == 0
        )
        assert before == sorted(p.stat().st_mtime_ns for p in Path(f"r-{suspect}").iterdir())
    code, found, _ = go(
        *("test", "r-bob", *KEY, "--control", "r-clean", "--out", "open.json", "--sequential")
    )
    assert code == 0 and found["verdict"] is True
    assert found["combined"]["log10_pvalue"] < -50
    assert [row["statistic"] for row in found["results"]] == [
        "differential",
        "argmax count",
        "soft",
    ]
    assert [row["primary"] for row in found["results"]] == [True, False, False]
    assert found["results"][0]["decoys"]["rank"] == 0
    assert found["results"][1]["sequential"] is None  # the order of readings knows the key
    assert all(row["log10_pvalue"] > -4 for row in found["control"])
    assert found["suspect"]["name"] == "bob" and found["base"]["name"] == "base"
    assert found["inputs"][0]["name"] == "fresh.jsonl" and len(found["inputs"][0]["sha256"]) == 64
    assert json.loads((place / "open.json").read_text()) == found
    code, clean, _ = go("test", "r-clean", *KEY)
    assert code == 1 and clean["verdict"] is False
    code, both, _ = go("test", "r-bob", "r-bob", *KEY, "--combine", "holm", "--decoys", "0")
    assert code == 0 and both["combined"]["of"] == 2
    assert both["combined"]["log10_pvalue"] == pytest.approx(
        found["combined"]["log10_pvalue"] + np.log10(2.0)
    )
    code, _, stderr = go("test", "r-bob", "r-bob", *KEY, "--combine", "fisher")
    assert code == 2 and "share windows and tokens" in " ".join(stderr.split())


def test_a_suspect_of_another_tokenizer_is_read_through_an_alignment(go: Any) -> None:
    code, document, _ = go(
        *("read", "fresh.jsonl", "--scheme", SCHEME, "--suspect", "other", "--tokenizer", "bob"),
        *("--out", "r-other"),
    )
    assert code == 0
    assert document["notes"]["alignment"]["rate"] > 0.95
    code, found, _ = go("test", "r-other", *KEY, "--statistic", "soft")
    assert code == 0 and found["alignment"]["mass"] > 0.95
    # Without saying whose tokens these are, they would be read as the suspect's own.
    go(*("read", "fresh.jsonl", "--scheme", SCHEME, "--suspect", "other", "--out", "r-wrong"))
    assert go("test", "r-wrong", *KEY, "--statistic", "soft")[0] == 1


def test_closed_bob_is_found_through_a_real_server(go: Any, place: Path, tmp_path: Path) -> None:
    port = servers.free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(place / "bob"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu"]
    env = {"OMP_NUM_THREADS": "1"}
    with servers.server(command, port, tmp_path / "log", env, patience=180) as url:
        asked = (
            *("collect", "--endpoint", url, "--model", str(place / "bob")),
            *("--prompts", "prompts.txt", "--out", "said.jsonl", "--max-tokens", "96"),
            *("--temperature", "1", "--top-p", "1"),
        )
        code, part, _ = go(*asked, "--max-requests", "10")
        # A try that was repeated counts against the budget too.
        assert code == 3 and 5 <= part["written"] <= 10, part
        assert part["left"] == 60 - part["written"]
        assert go(*asked)[0] == 0
        assert len(Path("said.jsonl").read_text().splitlines()) == 60
    code, found, _ = go(
        *("test", "said.jsonl", *KEY, "--tokenizer", "bob", "--out", "closed.json", "--sequential")
    )
    assert code == 0 and found["combined"]["log10_pvalue"] < -5
    assert found["results"][0]["sequential"]["decided_at"] is not None
    assert found["suspect"]["access"] == "closed"
    assert found["suspect"]["endpoint"].startswith("http://127.0.0.1")
    code, made, _ = go(
        *("filter", "fresh.jsonl", "--scheme", SCHEME, "--tokenizer", "bob", "--out", "f.npz")
    )
    assert code == 0 and made["windows"] > 100 and made["width"] == 1
    assert made["most_frequent"][0]["text"].startswith("t")
    assert go("filter", "--inspect", "f.npz")[1]["sha256"] == made["sha256"]
    code, filtered, _ = go(*("test", "said.jsonl", *KEY, "--tokenizer", "bob", "--filter", "f.npz"))
    assert code == 0
    assert [row["statistic"] for row in filtered["results"]] == [
        "answer count, filtered",
        "answer count",
    ]
    code, baseline, _ = go(
        *("baseline", "--suspect", "bob", "--logged", "logged.jsonl", "--fresh", "fresh.jsonl")
    )
    assert baseline["result"]["n_logged"] == 80 and code in (0, 1)
    Path("b.json").write_text(json.dumps(baseline))
    # Open and closed are one claim; holm needs no independence.
    go("read", "fresh.jsonl", "--scheme", SCHEME, "--suspect", "bob", "--out", "r-plain")
    code, both, _ = go(
        *("test", "r-plain", "said.jsonl", *KEY, "--tokenizer", "bob", "--combine", "holm"),
        *("--baseline", "b.json", "--out", "both.json"),
    )
    assert code == 0 and both["baseline"]["n_fresh"] == 80
    code, _, _ = go("report", "both.json", "--out", "report.html")
    assert code == 0
    page = Path("report.html").read_text()
    assert "What this does not establish" in page
    assert "filigrane-key-1" not in page


def test_bad_input_is_said_in_words(go: Any, place: Path) -> None:
    read = ("read", "fresh.jsonl", "--suspect", "bob")
    cases = [
        (("test", "nowhere", *KEY), "nowhere"),
        (("test", "logged.jsonl", *KEY), "name the tokenizer"),
        (("test", "logged.jsonl", *KEY, "--tokenizer", "bob"), 'has no "answer"'),
        ((*read, "--scheme", SCHEME, "--out", "r", "--endpoint", "http://x/v1"), "one suspect"),
        (("read", "-", "--suspect", "bob", "--scheme", SCHEME, "--out", "r"), "stdin"),
        (("filter", "--out", "f"), "name texts"),
        (("plan", "--excess", "2"), "excess must be inside"),
        (("study", "--out", "s", "--rhos", "a;b"), "--rhos takes numbers"),
    ]
    for command, message in cases:
        code, document, stderr = go(*command)
        assert (code, document) == (2, None), command
        assert message in " ".join(stderr.split()), stderr
    two = GreenList(context_width=2).tag
    go(*read, "--scheme", SCHEME, "--out", "r-w1")
    code, _, stderr = go("test", "r-w1", "--scheme", two, "--key-file", "alice.key")
    assert code == 2 and "read for windows of 1 tokens" in " ".join(stderr.split())
    code, _, stderr = go("test", "r-w1", *KEY, "--statistic", "differential")
    assert code == 2 and "without a base model" in " ".join(stderr.split())
    code, _, stderr = go(*read, "--scheme", two, "--out", "r-w1")
    assert code == 2 and "choose another --out folder" in " ".join(stderr.split())
    code, _, stderr = go("test", "r-w1", "r-w1", *KEY)
    assert code == 2 and "--combine holm" in " ".join(stderr.split())
    (place / "hashed.jsonl").write_text(
        '{"id": 1, "tokens": [1, 2, 3], "prompt_sha256": "' + "0" * 64 + '"}\n'
    )
    code, _, stderr = go("read", "hashed.jsonl", *read[2:], "--scheme", SCHEME, "--out", "h")
    assert code == 2 and "its prompt is not known" in " ".join(stderr.split())
    (place / "large.jsonl").write_text('{"id": 1, "tokens": [1, 2, 300], "prompt": null}\n')
    (place / "silent.jsonl").write_text('{"id": 1, "tokens": [1, 2, 3]}\n')
    code, _, stderr = go("read", "silent.jsonl", *read[2:], "--scheme", SCHEME, "--out", "l")
    assert code == 2 and "says nothing of its prompt" in " ".join(stderr.split())
    (place / "marked.jsonl").write_text(
        json.dumps({"id": 1, "tokens": [1, 2, 3], "prompt": None, "scheme": two}) + "\n"
    )
    for command in (
        ("read", "marked.jsonl", *read[2:], "--scheme", SCHEME, "--out", "m"),
        ("filter", "marked.jsonl", "--scheme", SCHEME, "--out", "m.npz"),
    ):
        code, _, stderr = go(*command)
        assert code == 2 and "was marked with another scheme" in " ".join(stderr.split())
    code, _, stderr = go(*read, "--base", "bob", "--scheme", SCHEME, "--out", "same")
    assert code == 2 and "suspect and base model are the same" in " ".join(stderr.split())
    rows = [{"id": str(n), "prompt": "t1", "answer": "t2 t3", "model": f"m{n}"} for n in (1, 2)]
    (place / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, stderr = go("test", "two.jsonl", *KEY, "--tokenizer", "bob")
    assert code == 2 and "answers of 2 suspects (m1, m2)" in " ".join(stderr.split())
    code, _, stderr = go("read", "large.jsonl", *read[2:], "--scheme", SCHEME, "--out", "l")
    assert code == 2 and "300" in stderr


def test_plan_says_what_it_takes(go: Any) -> None:
    code, document, _ = go("plan", "--excess", "0.01", "--tokens-per-second", "100", "--price", "2")
    assert code == 0 and 55_000 < document["pairs"] < 60_000
    assert document["hours"] == pytest.approx(document["tokens"] / 360_000)
    assert document["cost"] == pytest.approx(document["tokens"] * 2e-6)
