import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from filigrane.adapters.models import LoadedTokenizer
from filigrane.errors import EvidenceError, RecordError
from filigrane.study.mixing import Mixture, examples, load, mix, read_pairs, save


def pool(count: int, marked: bool) -> list[dict[str, Any]]:
    return [
        {
            "id": f"en-{i:05d}", "marked": marked, "prompt": f"say {i}", "prompt_tokens": [1, i],
            "text": f"é{i}\u2028\r" if marked else f"plain {i}", "tokens": [i, i + 1, 2],
            "tokenizer_sha256": "writer", "finish_reason": "stop",
        }
        for i in range(count)
    ]  # fmt: skip


MARKED, PLAIN = pool(60, True), pool(100, False)


def ids(records: Any) -> list[str]:
    return [record["id"] for record in records]


@pytest.mark.parametrize(("rho", "expected"), [(0, 0), (0.01, 0), (0.05, 2), (0.5, 20), (1, 40)])
def test_shares(rho: float, expected: int) -> None:
    mixture = mix(MARKED, PLAIN, rho, 40, 7)
    assert mixture.n_marked == expected and len(mixture.records) == 40
    assert len({(record["id"], record["marked"]) for record in mixture.records}) == 40
    assert sorted(ids(mixture.logs)) == sorted(ids(r for r in mixture.records if r["marked"]))


def test_what_alice_knows_of_it() -> None:
    mixture = mix(MARKED, PLAIN, 0.3, 50, 7, known=0.25)
    used = {record["id"] for record in mixture.records if record["marked"]}
    assert len(used) == 15 and len(mixture.logs) == 60 and used < set(ids(mixture.logs))
    assert all(record["marked"] for record in mixture.logs)


def test_of_one_seed_the_smaller_is_in_the_larger() -> None:
    def marked(rho: float, seed: int = 3) -> set[str]:
        return {r["id"] for r in mix(MARKED, PLAIN, rho, 50, seed).records if r["marked"]}

    assert marked(0.1) < marked(0.2) < marked(1.0)
    assert marked(0.2) != marked(0.2, seed=4)
    # What Alice knows besides changes nothing that Bob has.
    for known in (0.2, 0.5):
        mixture = mix(MARKED, PLAIN, 0.2, 50, 3, known=known)
        assert {record["id"] for record in mixture.records if record["marked"]} == marked(0.2)
    first, second = (mix(MARKED, PLAIN, 0.2, 50, 3) for _ in range(2))
    assert ids(first.records) == ids(second.records)
    flags = [record["marked"] for record in first.records]
    assert flags != sorted(flags, reverse=True)  # the marked ones do not come first


def test_impossible_sizes_say_what_is_missing() -> None:
    with pytest.raises(EvidenceError, match="takes 61 marked records and there are 60"):
        mix(MARKED, PLAIN, 1.0, 61, 0)
    with pytest.raises(EvidenceError, match=r"takes 80 marked.*larger known"):
        mix(MARKED, PLAIN, 0.5, 80, 0, known=0.5)
    with pytest.raises(EvidenceError, match="takes 101 unmarked"):
        mix(MARKED, PLAIN, 0.0, 101, 0)
    for wrong in (
        {"rho": 1.1}, {"rho": float("nan")}, {"size": 0}, {"known": 0.0}, {"known": 1.5},
    ):  # fmt: skip
        with pytest.raises(EvidenceError):
            mix(MARKED, PLAIN, **{"rho": 0.5, "size": 4, "seed": 0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="among the marked ones is not"):
        mix(PLAIN, PLAIN, 0.5, 4, 0)
    with pytest.raises(RecordError, match="among the unmarked ones is not"):
        mix(MARKED, MARKED, 0.5, 4, 0)
    with pytest.raises(RecordError, match="same id"):
        mix(MARKED + MARKED[:1], PLAIN, 0.5, 4, 0)


def test_a_folder_brings_back_what_was_mixed(tmp_path: Path) -> None:
    mixture = mix(MARKED, PLAIN, 0.25, 40, 1, known=0.5)
    folder = save(mixture, tmp_path / "data" / "rho25")
    back = load(folder)
    assert isinstance(back, Mixture)
    for name in ("records", "logs", "rho", "known", "seed", "n_marked"):
        assert getattr(back, name) == getattr(mixture, name)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert [row["id"] for row in manifest["records"]] == ids(mixture.records)
    assert len({row["sha256"] for row in manifest["records"]}) == 40
    assert [path.name for path in folder.parent.iterdir()] == ["rho25"]
    assert len(read_pairs(folder / "data.jsonl")) == 40
    assert save(mixture, folder) == folder
    with pytest.raises(RecordError, match="holds another mixture"):
        save(mix(MARKED, PLAIN, 0.25, 40, 2, known=0.5), folder)


@pytest.mark.parametrize("name", ["data.jsonl", "logs.jsonl"])
def test_a_changed_file_is_noticed(name: str, tmp_path: Path) -> None:
    folder = save(mix(MARKED, PLAIN, 0.25, 40, 1), tmp_path / "mixed")
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b'"marked": true', b'"marked": true ', 1))
    with pytest.raises(RecordError, match="not the file that its manifest"):
        load(folder)
    path.unlink()
    with pytest.raises(RecordError, match="cannot be read"):
        load(folder)


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="it is not a mixture"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match="damaged"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(RecordError, match="another version"):
        load(tmp_path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps(MARKED[0]) + '\n{"id": 1}\n')
    with pytest.raises(RecordError, match=r"other.jsonl'?:2 is not a pair"):
        read_pairs(tmp_path / "other.jsonl")


class Letters:
    """A tokenizer of code points without a template, as far as `examples` uses one."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_examples_for_the_writers_tokenizer_and_for_another() -> None:
    tokenizer: Any = Letters()
    same = LoadedTokenizer("same", 300, "writer", tokenizer)
    ((tokens, start),) = examples(MARKED[5:6], same)
    assert tokens.tolist() == [1, 5, 5, 6, 2] and start == 2
    other = LoadedTokenizer("other", 300, "other", tokenizer)
    whole = SimpleNamespace(**MARKED[5])
    for reason, end in (("stop", [0]), ("length", [])):
        ((tokens, start),) = examples([MARKED[5] | {"finish_reason": reason}], other)
        assert tokens.tolist() == [*map(ord, whole.prompt), *map(ord, whole.text), *end]
        assert start == len(whole.prompt)
