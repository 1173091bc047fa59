"""The study, start to end, with models of a few kilobytes: every step, stopping, going on."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from filigrane.errors import FiligraneError, RecordError
from filigrane.study import grid

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path = tmp_path_factory.mktemp("tiny") / "tiny"
    words = ["<end>", "<unknown>", *(f"w{number}" for number in range(60))]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, "<unknown>"))
    made.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unknown>", eos_token="<end>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=256, initializer_range=0.2,
            bos_token_id=None, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def settings(model: str, **changes: Any) -> grid.Settings:
    small = grid.Settings(
        alice=model,
        bobs=(model,),
        rhos=(0.0, 1.0),
        learning_rates=(3e-3,),
        epochs=(1.0,),
        languages=("en", "fr"),
        pairs=24,
        fresh=10,
        asked=10,
        max_new_tokens=24,
        method="full",
        write_batch=8,
        keys=20,
        decoys=20,
        dtype="float32",
    )
    return dataclasses.replace(small, **changes)


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "whole"
    grid.run(settings(model), folder)
    return folder


def test_a_study_has_all_settings_and_statistics(finished: Path, model: str) -> None:
    rows = grid.read_rows(finished / grid.RESULTS)
    assert {row["rho"] for row in rows} == {0.0, 1.0} and len(rows) == 2 * 12
    names = {(row["setting"], row["statistic"], row["language"]) for row in rows}
    assert len(names) == 12
    assert ("open, supervised", "differential", "en") in names
    assert ("closed, unsupervised", "answer count", "fr") in names
    assert ("baseline (no mark)", "membership by loss", "en") in names
    for row in rows:
        assert row["log10_pvalue"] <= 0.0
        if "ledger" in row:
            dropped = sum(v for k, v in row["ledger"].items() if k not in ("candidates", "scored"))
            assert row["ledger"]["candidates"] - dropped == row["ledger"]["scored"]
            assert row["decoys"]["n"] == 20 and "z" not in row["decoys"]
    found = grid.calibration(finished)
    assert len(found) == 8 and {row["keys"] for row in found} == {20}
    assert all(row["ks_pvalue"] > 1e-5 for row in found)
    document = grid.summary(finished, settings(model), rows)
    text = (finished / "summary.md").read_text()
    assert text.count("\n| ") >= 24 + 8 and "KS p" in text
    assert json.loads((finished / "summary.json").read_text())["rows"] == document["rows"]
    # No secret but in its own files, which only their owner can read.
    (key,) = (finished / "keys").iterdir()
    secret = key.read_text().rsplit(":", 1)[-1].strip()
    assert key.stat().st_mode & 0o77 == 0
    for path in finished.rglob("*.json*"):
        assert secret not in path.read_text()


def test_a_study_that_was_stopped_goes_on(finished: Path, model: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    folder = tmp_path / "again"
    folder.mkdir()
    # The same keys, so that the same texts come out.
    shutil.copytree(finished / "keys", folder / "keys")
    stopped = 0
    for when in (2, 12, 25, 40):
        calls = iter(range(when))

        def report(done: int, total: int | None, what: str, calls: Any = calls) -> None:
            if next(calls, None) is None:
                raise Stop

        try:
            grid.run(settings(model), folder, report)
        except Stop:
            stopped += 1
    assert stopped >= 2  # how often it reports depends on texts, and keys are new each time
    rows = grid.run(settings(model), folder)
    whole = grid.read_rows(finished / grid.RESULTS)
    assert [(r["cell"], r["setting"], r["statistic"]) for r in rows] == [
        (r["cell"], r["setting"], r["statistic"]) for r in whole
    ]
    for one, two in zip(rows, whole, strict=True):
        assert one["n_scored"] == two["n_scored"]
        assert one["log10_pvalue"] == pytest.approx(two["log10_pvalue"], rel=1e-3, abs=1e-3)
    assert len(grid.read_rows(folder / grid.CALIBRATION)) == 20


def test_half_a_row_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert grid.read_rows(path) == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n'


def test_another_study_is_not_written_over(finished: Path, model: str) -> None:
    with pytest.raises(RecordError, match=r"holds a study with pairs=24, now it is 30"):
        grid.run(settings(model, pairs=30), finished)
    with pytest.raises(FiligraneError, match="no rows"):
        list(grid.lines([]))


def test_cells_cover_the_grid() -> None:
    many = grid.Settings(
        alice="a", bobs=("b", "dir/c"), rhos=(0.0, 0.5), learning_rates=(1e-4, 1e-3), seeds=2
    )
    found = grid.cells(many)
    assert len(found) == 2 * 2 * 2 * 2 == len({cell.name for cell in found})
    assert all("/" not in cell.name for cell in found)
