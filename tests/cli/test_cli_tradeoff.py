"""filigrane bench tradeoff, on models of a few kilobytes: run, interrupt, go on, refuse."""

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane.bench import tradeoff, tradeoff_plots, tradeoff_summary
from filigrane.bench.tradeoff import TASKS, builtin_prompts
from filigrane.cli.tradeoff import _methods

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

WORDS = [f"w{number}" for number in range(60)]
SMALL = (
    *("--methods", "watermark,plain,otmc,two-key", "--draft-lengths", "1,2", "--draft", "skip:1"),
    *("--task", "p.txt", "--seeds", "2", "--batch-size", "2", "--max-new-tokens", "20"),
)
# What a clock said is the only thing that may differ between two runs.
CLOCK = {"seconds"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices, and others may use the machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with three layers and random weights that knows sixty words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path = tmp_path_factory.mktemp("tiny") / "tiny"
    vocabulary = {word: number for number, word in enumerate(["<end>", "<unknown>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unknown>", eos_token="<end>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=256, initializer_range=0.2,
            bos_token_id=None, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def bench(run: Any, folder: Path, world: Any) -> Any:
    Path("p.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8 w9\n")

    def go(out: str, *changes: str) -> Any:
        return run("bench", "tradeoff", "--target", str(folder), "--out", out, *SMALL, *changes)

    return go


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "generations.jsonl").read_text().splitlines()]


def without_clock(out: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records(out)]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, made once."""
    from typer.testing import CliRunner

    from filigrane.cli.app import build

    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Path("p.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8 w9\n")
        command = ["bench", "tradeoff", "--target", str(folder), "--out", "whole", *SMALL]
        done = CliRunner().invoke(build(), [*command, "--json"])
    assert done.exit_code == 0, done.output
    (place / "answer.json").write_text(done.stdout)
    return place / "whole"


def test_what_a_run_leaves(finished: Path) -> None:
    made = records(str(finished))
    # watermark takes no drafts and is written once; three prompts, two seeds.
    assert len(made) == 3 * 2 * (1 + 3 * 2)
    key = fg.Key.load(finished / "key")
    assert stat.S_IMODE((finished / "key").stat().st_mode) == 0o600 and key.slots == 1
    for record in made:
        blocks = {len(record[name]) for name in ("emitted", "proposed", "accepted", "nodes")}
        assert blocks == {len(record["seconds"])}
        assert sum(record["emitted"]) == len(record["tokens"]) == record["n_tokens"] <= 20
        assert len(record["log_probs"]) == len(record["marked"]) == record["n_tokens"]
        assert set(record["prefix_log_pvalues"]) <= {"8", "16"}
        assert record["draft_length"] in ((0,) if record["method"] == "watermark" else (1, 2))
        user = key.user(record["seed"])
        assert record["key"] == (None if record["method"] == "plain" else user.name)
        if record["n_tokens"] > 4:
            found = fg.detect(record["tokens"], user, fg.Gumbel())
            assert record["log_pvalue"] == found.log_pvalue
            assert record["n_scored"] == found.n_scored
            if record["method"] == "two-key":
                assert record["sum_a"] is None and record["own_log_pvalue"] != found.log_pvalue
            else:
                assert record["sum_a"] == pytest.approx(found.statistic)
                assert 0 < record["sum_u"] < record["n_scored"]
                assert record["own_log_pvalue"] == found.log_pvalue
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["methods"] == ["watermark", "plain", "otmc", "two-key"]
    assert len(config["models"]["target"]["weights_sha256"]) == 64
    assert config["sittings"][0]["machine"]["numpy"] == np.__version__
    assert config["sittings"][0]["device"] == "cpu"
    assert config["key_fingerprint"] == key.fingerprint
    secret = key.export_text().rsplit(":", 1)[1]
    for file in finished.iterdir():
        assert file.name == "key" or secret not in file.read_text(errors="replace")


def test_the_summary_is_of_these_records(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary == json.loads((finished.parent / "answer.json").read_text())
    rows = {(row["method"], row["draft_length"]): row for row in summary["rows"]}
    assert list(rows)[:3] == [("watermark", 0), ("plain", 1), ("plain", 2)] and len(rows) == 7
    assert rows["watermark", 0]["aatps"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert rows["watermark", 0]["acceptance"] == []
    mine = [r for r in records(str(finished)) if (r["method"], r["draft_length"]) == ("otmc", 2)]
    emitted = sum(sum(r["emitted"]) for r in mine) / sum(len(r["emitted"]) for r in mine)
    otmc = rows["otmc", 2]
    assert otmc["aatps"]["value"] == emitted and len(otmc["acceptance"]) == 2
    assert otmc["anlppt_u_over_watermark"]["value"] > 0
    difference = otmc["aatps_minus_plain"]["value"]
    assert difference == pytest.approx(emitted - rows["plain", 2]["aatps"]["value"])
    assert rows["two-key", 1]["anlppt_u"]["value"] is None
    assert rows["two-key", 1]["anlppt"]["value"] > 0 and "8" in otmc["tpr_at"]
    page = (finished / "summary.md").read_text()
    assert "| otmc | 2 |" in page and "| watermark | – | 1.000 ± 0.000 |" in page
    assert "replay" not in page


def test_plots_are_there(finished: Path) -> None:
    for name in ("tradeoff", "draft-length"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (finished / f"{name}.png").stat().st_size > 10_000
        drawing = (finished / f"{name}.svg").read_text()
        assert "</svg>" in drawing and drawing.count("<path") > 20


@pytest.mark.parametrize("moment", [0, 1, 5])
def test_an_interrupted_run_goes_on(
    bench: Any, finished: Path, monkeypatch: Any, moment: int
) -> None:
    # The same key, so that the records can be compared.
    Path("o").mkdir()
    shutil.copy(finished / "key", "o/key")
    real, calls = tradeoff._generate, []

    def breaks(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tradeoff, "_generate", breaks)
    done = bench("o")
    assert done.code == 130 and "continues from there" in done.err and "interrupted" in done.err
    assert not Path("o/summary.md").exists()
    file = Path("o/generations.jsonl")
    assert len(file.read_bytes().splitlines()) == 2 * moment if moment else not file.exists()
    if moment:  # and a crash in the middle of a line, of a batch of two
        file.write_bytes(file.read_bytes()[:-40])
        Path("o/config.json.part").write_text("{")
    monkeypatch.setattr(tradeoff, "_generate", real)
    done = bench("o")
    assert done.code == 0 and "42 texts" in done.err
    assert sorted(map(json.dumps, without_clock("o"))) == sorted(
        map(json.dumps, without_clock(str(finished)))
    )
    assert len(json.loads(Path("o/config.json").read_text())["sittings"]) == 2


def test_a_finished_run_is_summarised_anew(bench: Any, finished: Path, monkeypatch: Any) -> None:
    shutil.copytree(finished, "o")
    for file in Path("o").glob("summary.*"):
        file.unlink()
    Path("o/replay.json").write_text('{"otmc": {"mean_u": 0.7744, "mean_a": 2.606}}')
    monkeypatch.setattr("filigrane.adapters.models.load", None)  # no model is needed
    done = bench("o")
    assert done.code == 0 and "otmc" in done.out and "/ watermark" in done.out
    assert max(map(len, done.out.splitlines())) <= 80 and "…" not in done.out
    before = json.loads((finished / "summary.json").read_text())
    after = json.loads(Path("o/summary.json").read_text())
    found = [row.pop("replay") for row in after["rows"] if "replay" in row]
    assert after == before
    assert found[0]["rate_u"] == pytest.approx(0.5026, abs=1e-3)
    assert found[0]["rate_a"] == pytest.approx(0.6485, abs=1e-3)
    assert "0.6482 |" in Path("o/summary.md").read_text()
    assert Path("o/generations.jsonl").read_bytes() == (finished / "generations.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seeds", "3"), "settings.seeds 2, now it is 3"),
        (("--temperature", "0.7"), "settings.temperature 1.0"),
        (("--methods", "plain,otmc"), "settings.methods"),
        (("--draft", "ngram"), 'settings.draft "skip:1", now it is "ngram"'),
        (("--prompts", "2"), "settings.prompts"),
    ],
)
def test_settings_do_not_mix(
    bench: Any, finished: Path, change: tuple[str, ...], named: str
) -> None:
    shutil.copytree(finished, "o")
    before = {file.name: file.read_bytes() for file in Path("o").iterdir()}
    done = bench("o", *change)
    assert done.code == 2 and named in done.err and "choose another directory" in done.err
    assert {file.name: file.read_bytes() for file in Path("o").iterdir()} == before


def test_other_prompts_other_weights_and_a_lost_key(
    bench: Any, finished: Path, folder: Path, monkeypatch: Any
) -> None:
    shutil.copytree(finished, "o")
    lines = Path("o/generations.jsonl").read_text().splitlines(keepends=True)
    Path("o/generations.jsonl").write_text("".join(lines[:-4]))
    with monkeypatch.context() as patch:
        patch.setattr("filigrane.bench.tradeoff_models.weights_sha256", lambda model: "0" * 64)
        done = bench("o")
    assert done.code == 2 and "models.target.weights_sha256" in done.err
    Path("o/key").rename("away")
    done = bench("o")
    assert done.code == 2 and "put it back" in done.err
    Path("away").rename("o/key")
    Path("p.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8 w10\n")
    done = bench("o")
    assert done.code == 2 and "prompts_sha256" in done.err
    Path("p.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8 w9\n")
    Path("o/generations.jsonl").write_text("".join([lines[0], "not mine\n", *lines[1:]]))
    done = bench("o")
    assert done.code == 2 and "generations.jsonl:2" in done.err


def test_a_directory_of_something_else(bench: Any) -> None:
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    done = bench("notes")
    assert done.code == 2 and "not a run directory" in done.err
    assert [file.name for file in Path("notes").iterdir()] == ["a.txt"]
    assert bench("p.txt").code == 2 and Path("p.txt").read_text().startswith("w1")
    Path("notes/config.json").write_text('{"a": 1}')
    assert "not the config.json of a run" in bench("notes").err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--methods", "otmk"), "otmc"),
        (("--methods", "otmc,,plain"), "--methods"),
        (("--methods", "otmc,otmc"), "each named once"),
        (("--methods", "mse@greenlist"), "unbiased"),
        (("--draft-lengths", "0"), "draft lengths"),
        (("--draft-lengths", "1,1"), "twice"),
        (("--draft-lengths", "1,x"), "--draft-lengths"),
        (("--draft", "skip:x"), "skip:5,12,17,26"),
        (("--draft", "skip:"), "skip:5,12,17,26"),
        (("--task", "missing.txt"), "missing.txt"),
        (("--task", "open-ended", "--prompts", "33"), "32 prompts"),
        (("--temperature", "0"), "greedy"),
        (("--top-p", "0"), "top_p"),
    ],
)
def test_bad_options_are_told_before_anything_is_made(
    bench: Any, monkeypatch: Any, change: tuple[str, ...], named: str
) -> None:
    monkeypatch.setattr("filigrane.adapters.models.load", None)
    done = bench("o", *change)
    assert done.code == 2 and named in done.err and not Path("o").exists()


def test_prompts_that_cannot_be_read(bench: Any, world: Any) -> None:
    for lines, named in (
        ([{"prompt": "w1"}, "{"], "q.jsonl:2"),
        ([{"id": "a"}], 'no "prompt"'),
        ([{"prompt": "w1", "id": 1}, {"prompt": "w2", "id": 1}], 'the same "id"'),
        ([{"prompt": 3}], "not a string"),
    ):
        world.write("q.jsonl", lines)
        done = bench("o", "--task", "q.jsonl")
        assert done.code == 2 and named in done.err and not Path("o").exists()


def test_without_matplotlib(bench: Any, monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = bench("o")
    assert done.code == 2 and "filigrane[plots]" in done.err and not Path("o").exists()


def test_n_gram_drafts_and_one_prompt(bench: Any) -> None:
    done = bench("o", "--draft", "ngram", "--prompts", "1", "--methods", "mws", "--json")
    assert done.code == 0
    row = done.json["rows"][0]
    # One prompt gives no interval, and there is nothing to compare with; plots bear both.
    assert row["aatps"]["low"] is None and "aatps_minus_plain" not in row
    assert "| mws | 1 |" in Path("o/summary.md").read_text()


def test_schemes_have_their_own_reference(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(("watermark", "watermark@tournament", "mws@tournament", "plain")):
        for prompt in range(3):
            kept = np.ones(4, dtype=np.int64)
            rows.append(
                tradeoff.Row(
                    method=name, draft_length=int(number > 1), prompt=prompt, seed=0, n_tokens=8,
                    n_scored=4, sum_u=float("nan"), sum_a=float("nan"), log_pvalue=-1.0 - number,
                    log_likelihood=-3.0, emitted=kept + 1, proposed=kept, accepted=kept,
                    nodes=kept, seconds=np.arange(4.0),
                )
            )  # fmt: skip
    names = list(dict.fromkeys(row.method for row in rows))
    summary = tradeoff_summary.summarise(rows, {"methods": names})
    found = {row["method"]: row.get("anlppt_over_watermark") for row in summary["rows"]}
    assert found.pop("mws@tournament")["value"] == pytest.approx(3 / 2)
    assert found.pop("plain") is None and found.pop("watermark") is None
    assert all(file.stat().st_size for file in tradeoff_plots.draw(summary["rows"], tmp_path))


def test_methods_may_hold_commas() -> None:
    text = "plain, mws@tournament:depth=20,scoring=weighted,frontier:c=1.5,pfr:drafts=4"
    assert _methods(text) == (
        "plain",
        "mws@tournament:depth=20,scoring=weighted",
        "frontier:c=1.5",
        "pfr:drafts=4",
    )


def test_built_in_prompts() -> None:
    for task, count in zip(TASKS, (24, 32), strict=True):
        prompts = builtin_prompts(task)
        assert len(prompts) == len({p.id for p in prompts}) == len({p.text for p in prompts})
        assert len(prompts) == count
    for prompt in builtin_prompts("summarise"):
        head, _, passage = prompt.text.partition("\n\n")
        assert head.startswith("Summarise") and 120 <= len(passage.split()) <= 200
