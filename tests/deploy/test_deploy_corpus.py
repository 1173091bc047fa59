"""deploy/ray_corpus.py, without Ray: the same lines whatever the pieces are."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from deploykit import DEPLOY

from filigrane import Key, embed, from_tag
from filigrane.toy import ZipfModel


@pytest.fixture(scope="module")
def ray_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_corpus", DEPLOY / "ray_corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_corpus_is_read_in_pieces(ray_corpus: ModuleType, tmp_path: Path) -> None:
    key = Key.generate("acme", slots=2)
    key.save(tmp_path / "acme.key")
    rng, scheme = np.random.default_rng(3), from_tag("gumbel")
    lines = []
    for number in range(12):
        ids = rng.integers(0, 256, 120)
        if number % 4 == 1:
            ids = embed(ZipfModel(256, 1.0), np.array([1, 2]), 120, key, scheme, rng=rng).tokens
        lines.append(json.dumps({"tokens": ids.tolist()}))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join([*lines, "", '{"text": "no ids"}', '{"tokens": [1]}']))

    seen = []
    for size in (37, 400, 1_000_000):
        pieces = ray_corpus.ranges(str(corpus), size)
        seen.append(
            [
                found
                for start, stop in pieces
                for found in ray_corpus.examine(
                    str(corpus), start, stop, str(tmp_path / "acme.key"), "gumbel"
                )
            ]
        )
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 14
    out = tmp_path / "out.jsonl"
    with out.open("w") as stream:
        ray_corpus.write(seen[0], stream)
    told = [json.loads(line) for line in out.read_text().splitlines()]
    marked = {line["line"] for line in told if line.get("log10_corrected", 0) < -6}
    assert marked == {2, 6, 10}
    assert [line["problem"] for line in told[-2:]] == ["NoTokens", "TooShort"]


def test_a_corpus_without_ray_says_so(
    ray_corpus: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Key.generate("acme").save(tmp_path / "acme.key")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"tokens": list(range(100))}) + "\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [str(tmp_path / "corpus.jsonl"), "--key-file", str(tmp_path / "acme.key")]
    monkeypatch.setattr(sys, "argv", ["ray_corpus", *words, "--scheme", "gumbel"])
    assert ray_corpus.main() == 0
    said = capsys.readouterr()
    assert "Ray is not installed" in said.err and json.loads(said.out)["line"] == 1
