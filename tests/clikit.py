"""A command line on toy texts: no weights, no torch, and a canary that listens to every run."""

import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane.adapters import models
from filigrane.errors import DraftError
from filigrane.keys import MarkingKey
from filigrane.toy import ZipfModel

VOCAB = 1000
SCHEME = fg.Gumbel()
Record = dict[str, Any]


class ToyTokenizer:
    """Writes id 17 as the word w17."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        words = re.findall(r"\S+", text)
        ids = [int(w[1:]) if re.fullmatch(r"w\d+", w) else len(w) for w in words]
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


@dataclass(frozen=True)
class ToyWeights:
    """All that toy models differ in; skipping layers changes nothing else."""

    exponent: float = 1.5
    size: int = 1000
    layers: int = 4


TOYS = {"small": ToyWeights(1.2, 100), "large": ToyWeights(1.5, 1001)}
"""The toys that are not like all others; `foreign` has another tokenizer."""


class ToyLM(ZipfModel):
    """What TransformersModel is to a loaded model."""

    stop_ids = (0,)

    def __init__(self, loaded: Any) -> None:
        super().__init__(VOCAB, loaded.model.exponent)
        self._loaded = loaded

    @property
    def vocabulary(self) -> str:
        return str(self._loaded.tokenizer_sha256)

    @property
    def size(self) -> int:
        return int(self._loaded.model.size)


def without_layers(weights: ToyWeights, layers: Sequence[int]) -> ToyWeights:
    if max(layers) >= weights.layers:
        raise DraftError(f"ToyWeights has layers 0 to {weights.layers - 1}.")
    return replace(weights, layers=weights.layers - len(layers))


@dataclass
class World:
    """Keys, files and the texts that the tests work on."""

    folder: Path
    key: fg.Key
    other: fg.Key
    secrets: list[str] = field(default_factory=list)

    def write(self, name: str, rows: Sequence[Record | str]) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    def watch(self, key: fg.Key) -> None:
        """Every form of a key's secret: text body, hex and the derived keys of slot 0."""
        body = key.export_text().rsplit(":", 1)[1]
        words = key.prf_keys(SCHEME.label)[0].astype("<u4").tobytes().hex()
        # Parts count as well: a message that cuts a key short still shows most of it.
        self.secrets += [body[:12], body[-12:], body[20:40], words[:16]]


def record(number: int, key: MarkingKey | None, length: int = 120) -> Record:
    rng = np.random.default_rng(number)
    text = fg.embed(ZipfModel(VOCAB, 1.5), [number], length, key, SCHEME, rng=rng)
    return {"id": number, "tokens": text.tokens.tolist(), "vocab_size": VOCAB}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, f"one line of JSON and nothing else, got {self.out!r}"
        return json.loads(self.out)


Run = Callable[..., Done]


def install_toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces models and tokenizers; the list says what was loaded."""
    asked: list[str] = []
    tokenizer = ToyTokenizer()
    facts = {"tokenizer_size": VOCAB, "tokenizer_sha256": "5" * 64, "tokenizer": tokenizer}

    def load(name: str, *, dtype: None = None, device: str = "cpu") -> models.LoadedModel:
        asked.append(f"model {name}")
        name = Path(name).name
        other = {"tokenizer_sha256": "6" * 64} if name == "foreign" else {}
        weights = TOYS.get(name, ToyWeights())
        return models.LoadedModel(name=name, vocab_size=VOCAB, model=weights, **facts | other)  # type: ignore[arg-type]

    def load_tokenizer(name: str) -> models.LoadedTokenizer:
        asked.append(f"tokenizer {name}")
        return models.LoadedTokenizer(name=name, **facts)  # type: ignore[arg-type]

    module = types.ModuleType("filigrane.adapters.transformers")
    module.TransformersModel = ToyLM  # type: ignore[attr-defined]
    module.without_layers = without_layers  # type: ignore[attr-defined]
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_tokenizer", load_tokenizer)
    monkeypatch.setitem(sys.modules, "filigrane.adapters.transformers", module)
    return asked
