"""The whole study on real models: Alice writes, Bob trains, Alice tests, over a grid of choices.

    write      pairs with and without the mark, by Alice                  texts/
    train      Bob, once for every cell of the grid                       models/
    ask, read  what Bob answers, what he expects (with his base model)    answers/, readings/
    test       four settings, every statistic, the baseline               results.jsonl
    calibrate  p-values of a clean Bob over many keys                     calibration.jsonl

Every step leaves a file and skips what is there, so a run that was stopped goes on. Knows nothing
of terminals; figures and tables are made of the rows elsewhere.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from filigrane import stats
from filigrane.adapters.evidence import ReadingFolder, replacing
from filigrane.adapters.finetuning import FineTuning, finetune
from filigrane.adapters.models import DType, LoadedModel, chat_prompt, load, weights_sha256
from filigrane.adapters.reading import calibrated_losses, read
from filigrane.adapters.transformers import TransformersModel
from filigrane.contexts import as_token_ids
from filigrane.embedding import embed_batch
from filigrane.errors import EvidenceError, RecordError
from filigrane.keys import Key
from filigrane.radioactivity import (
    Document,
    Exchange,
    RadioactivityResult,
    Reading,
    Tuples,
    Weighted,
    WindowFilter,
    answers,
    argmax,
    baseline,
    differential,
    soft,
    testing,
)
from filigrane.radioactivity.weighted import ScoreLaw
from filigrane.schemes import from_tag
from filigrane.schemes.base import Scheme
from filigrane.study import instruct
from filigrane.study.documents import versions
from filigrane.study.mixing import Mixture, mix

Report = Callable[[int, int | None, str], None]
Supervision = Literal["supervised", "unsupervised"]

SETTINGS: Final = "study.json"
RESULTS: Final = "results.jsonl"
CALIBRATION: Final = "calibration.jsonl"
_EVERY_ANSWER: Final = instruct.Checks(min_tokens=2, min_distinct=0.0, refusals=True)
_SUPERVISIONS: Final[tuple[Supervision, ...]] = ("supervised", "unsupervised")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is studied, and how much of it.

    alice, bobs: models, by what `adapters.models.load` takes; schemes: tags; rhos: shares of marked
    pairs in Bob's data; learning_rates, epochs: of Bob's training; languages: of prompts, the first
    is that of the training pairs, answers in the others are tested too; known: share of Alice's
    logs that Bob used; pairs: of Bob's data; fresh: new marked texts to read and prompts to ask;
    asked: training prompts to ask; max_new_tokens: of every text; method, layers, train_batch: of
    the training; seeds: repetitions with other keys and data; keys: clean runs for calibration;
    window filters are always tried both ways.
    """

    alice: str
    bobs: tuple[str, ...]
    schemes: tuple[str, ...] = ("greenlist:context_width=1,gamma=0.25,delta=3.0",)
    rhos: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    learning_rates: tuple[float, ...] = (5e-4,)
    epochs: tuple[float, ...] = (3.0,)
    languages: tuple[str, ...] = ("en",)
    known: float = 1.0
    pairs: int = 400
    fresh: int = 160
    asked: int = 160
    max_new_tokens: int = 96
    method: Literal["full", "last_layers", "lora"] = "last_layers"
    layers: int = 6
    train_batch: int = 8
    write_batch: int = 64
    seeds: int = 1
    keys: int = 200
    decoys: int = 200
    dtype: DType = "bfloat16"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Cell:
    """One Bob: everything that tells him from another."""

    scheme: str
    seed: int
    bob: str
    rho: float
    learning_rate: float
    epochs: float

    @property
    def name(self) -> str:
        """A file name."""
        parts = (
            _slug(self.scheme),
            f"seed{self.seed}",
            _slug(self.bob.rstrip("/").rsplit("/", 1)[-1]),
            f"rho{self.rho:g}",
            f"lr{self.learning_rate:g}",
            f"epochs{self.epochs:g}",
        )
        return "_".join(parts)


def cells(settings: Settings) -> list[Cell]:
    """The grid, clean suspects last of each seed so that what is hoped for is seen first."""
    return [
        Cell(scheme, seed, bob, rho, rate, epochs)
        for seed in range(settings.seeds)
        for scheme in settings.schemes
        for bob in settings.bobs
        for rate in settings.learning_rates
        for epochs in settings.epochs
        for rho in sorted(settings.rhos, reverse=True)
    ]


def run(settings: Settings, folder: Path, report: Report | None = None) -> list[dict[str, Any]]:
    """Do what is missing and return all rows. Raises RecordError for another study's folder."""
    told = report or (lambda done, total, what: None)
    begin(settings, folder)
    study = _Study(settings, folder, told)
    for scheme in settings.schemes:
        for seed in range(settings.seeds):
            study.write(scheme, seed)
    rows = read_rows(folder / RESULTS)
    done = {row["cell"] for row in rows}
    for cell in cells(settings):
        if cell.name not in done:
            found = study.suspect(cell)
            _append(folder / RESULTS, found)
            rows += found
    if settings.keys and 0.0 in settings.rhos:
        study.calibrate(next(cell for cell in cells(settings) if cell.rho == 0.0))
    return rows


def begin(settings: Settings, folder: Path) -> None:
    """Write the settings, or hold the folder to those it has."""
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    path = folder / SETTINGS
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps(wanted, indent=1).encode())
        return
    held = json.loads(path.read_text("utf-8"))
    for name in sorted({*held, *wanted}):
        if held.get(name) != wanted.get(name):
            raise RecordError(
                f"{folder} holds a study with {name}={held.get(name)!r}, now it is "
                f"{wanted.get(name)!r}; choose another folder."
            )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; half a last line, of a run that was killed, is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


class _Study:
    """The steps, with the models that are loaded while they are needed."""

    def __init__(self, settings: Settings, folder: Path, report: Report) -> None:
        self.settings, self.folder, self.report = settings, folder, report
        self._alice: LoadedModel | None = None

    # ------------------------------------------------------------ Alice

    @property
    def alice(self) -> LoadedModel:
        if self._alice is None:
            self.report(0, None, f"loading {self.settings.alice}")
            self._alice = self._load(self.settings.alice)
        return self._alice

    def _load(self, name: str) -> LoadedModel:
        return load(name, dtype=self.settings.dtype, device=self.settings.device)

    def key(self, scheme: str, seed: int) -> Key:
        """Alice's key for a scheme and a seed, made when it is first asked for."""
        path = self.folder / "keys" / f"{_slug(scheme)}_seed{seed}.key"
        if not path.exists():
            if (self._texts(scheme, seed) / "marked.jsonl").exists():
                raise RecordError(
                    f"{path} is missing, and the texts of this study are marked with it; put it "
                    "back, or begin another study."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            Key.generate(f"alice-{seed}", slots=1).save(path)
        return Key.load(path)

    def write(self, scheme: str, seed: int) -> None:
        """Pairs to train on, marked and not, and new marked ones."""
        s = self.settings
        marked = self._texts(scheme, seed)
        key = self.key(scheme, seed)
        logs = math.ceil(s.pairs / s.known)
        for name, count, start, mark in (
            ("marked", logs, 0, key),
            ("fresh", s.fresh, logs + s.pairs, key),
            ("unmarked", s.pairs, logs, None),
        ):
            path = (marked if mark else self._texts("", seed)) / f"{name}.jsonl"
            if path.exists() and path.with_suffix(".done").exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            instruct.generate(
                self.alice,
                instruct.prompts(count, language=s.languages[0], seed=seed, start=start),
                mark,
                from_tag(scheme),
                path,
                max_new_tokens=s.max_new_tokens,
                batch_size=s.write_batch,
                seed=seed,
                report=lambda done, total, _, name=name: self.report(done, total, name),  # type: ignore[misc]
            )
            path.with_suffix(".done").touch()

    def _texts(self, scheme: str, seed: int) -> Path:
        name = _slug(scheme) if scheme else "plain"
        return self.folder / "texts" / f"{name}_seed{seed}"

    # ------------------------------------------------------------ Bob

    def data(self, cell: Cell) -> tuple[Mixture, list[dict[str, Any]]]:
        """What Bob trains on, and fresh texts of Alice."""
        marked = read_rows(self._texts(cell.scheme, cell.seed) / "marked.jsonl")
        unmarked = read_rows(self._texts("", cell.seed) / "unmarked.jsonl")
        fresh = read_rows(self._texts(cell.scheme, cell.seed) / "fresh.jsonl")
        # The checks drop some pairs; all cells have one size.
        known = self.settings.known
        size = min(int(len(marked) * known), len(unmarked))
        return mix(marked, unmarked, cell.rho, size, cell.seed, known=known), fresh

    def train(self, cell: Cell) -> Path:
        """Bob's folder."""
        s, target = self.settings, self.folder / "models" / cell.name
        if target.exists():
            return target
        mixture, _ = self.data(cell)
        examples = [
            (
                np.asarray(record["prompt_tokens"] + record["tokens"]),
                len(record["prompt_tokens"]),
            )
            for record in mixture.records
        ]
        how = FineTuning(
            method=s.method,
            layers=s.layers,
            learning_rate=cell.learning_rate,
            epochs=cell.epochs,
            batch_size=s.train_batch,
            precision=s.dtype,
            seed=cell.seed,
        )
        base = load(cell.bob, dtype="float32", device=s.device)
        finetune(base, examples, how, target, report=self.report)
        return target

    def suspect(self, cell: Cell) -> list[dict[str, Any]]:
        """Train one Bob and test him in every setting."""
        mixture, fresh = self.data(cell)
        # A clean Bob used none of the logs; Alice, who cannot know, tests him on hers.
        logged: list[Mapping[str, Any]] = [*mixture.logs] or [
            *read_rows(self._texts(cell.scheme, cell.seed) / "marked.jsonl")
        ]
        bob = self._load(str(self.train(cell)))
        base = self._load(cell.bob)
        scheme, key = from_tag(cell.scheme), self.key(cell.scheme, cell.seed)
        rows: list[dict[str, Any]] = []
        for supervision in _SUPERVISIONS:
            texts: Sequence[Mapping[str, Any]] = logged[: self.settings.fresh]
            texts = texts if supervision == "supervised" else fresh
            place = self.folder / "readings" / f"{cell.name}_{supervision}"
            reading = self._read(bob, base, texts, scheme, place)
            for make in (argmax, soft, differential):
                rows.append(self._row(cell, "open", supervision, make(reading), key, scheme))
            language = self.settings.languages[0]
            asked = self._asked(cell, bob, logged, supervision, language)
            known = WindowFilter.build(
                [record["tokens"] for record in (logged if supervision == "supervised" else fresh)],
                scheme.context_width,
            )
            for held in (None, known):
                evidence = answers(asked, scheme.context_width, window_filter=held)
                rows.append(self._row(cell, "closed", supervision, evidence, key, scheme))
        for language in self.settings.languages[1:]:
            asked = self._asked(cell, bob, logged, "unsupervised", language)
            evidence = answers(asked, scheme.context_width)
            rows.append(self._row(cell, "closed", "unsupervised", evidence, key, scheme, language))
        rows.append(self._baseline(cell, bob, logged, fresh))
        return rows

    def _read(
        self,
        bob: LoadedModel,
        base: LoadedModel,
        texts: Sequence[Mapping[str, Any]],
        scheme: Scheme,
        place: Path,
    ) -> Reading:
        documents = [_document(record) for record in texts]
        folder = ReadingFolder(place)
        width = scheme.context_width
        digest = hashlib.sha256()
        for document in documents:
            digest.update(np.asarray(document.tokens, dtype=np.int64).tobytes())
        after = folder.begin(
            {
                "width": width,
                "texts": len(documents),
                "texts_sha256": digest.hexdigest(),
                "bob": bob.name,
                "weights_sha256": weights_sha256(bob.model),
            }
        )
        step = 16
        for reading in read(
            bob,
            documents[after:],
            width,
            base=base,
            batch_size=step,
            first=after,
            report=self.report,
        ):
            after = min(after + step, len(documents))
            folder.add(reading, after)
        return folder.load()

    def _asked(
        self,
        cell: Cell,
        bob: LoadedModel,
        logged: Sequence[Mapping[str, Any]],
        supervision: Supervision,
        language: str,
    ) -> list[Exchange]:
        s = self.settings
        if supervision == "supervised":
            todo = [
                instruct.Prompt(record["id"], record["prompt"], record["language"])
                for record in logged[: s.asked]
            ]
        else:
            # As many prompts lie before these as Alice's pairs have used.
            start = math.ceil(s.pairs / s.known) + s.pairs if language == s.languages[0] else 0
            todo = instruct.prompts(s.fresh, language=language, seed=cell.seed, start=start)
        path = self.folder / "answers" / f"{cell.name}_{supervision}_{language}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        instruct.generate(
            bob,
            todo,
            None,
            from_tag(cell.scheme),
            path,
            max_new_tokens=s.max_new_tokens,
            batch_size=s.write_batch,
            seed=cell.seed + 1,
            checks=_EVERY_ANSWER,
            report=lambda done, total, _: self.report(done, total, f"asking {cell.name}"),
        )
        return [
            Exchange(
                prompt=as_token_ids(record["prompt_tokens"]),
                answer=as_token_ids(record["tokens"]),
            )
            for record in read_rows(path)
        ]

    def _row(
        self,
        cell: Cell,
        access: str,
        supervision: Supervision,
        evidence: Tuples | Weighted,
        key: Key,
        scheme: Scheme,
        language: str | None = None,
    ) -> dict[str, Any]:
        found = testing.test(evidence, key, scheme, decoys=self.settings.decoys, seed=cell.seed)
        row = self._about(cell) | dataclasses.asdict(found)
        row |= {
            "setting": f"{access}, {supervision}",
            "language": language or self.settings.languages[0],
            "log10_pvalue": found.log10_pvalue,
        }
        assert found.decoys is not None or not self.settings.decoys
        if row["decoys"] is not None:
            del row["decoys"]["z"]  # two hundred numbers a row say nothing in a table
        return row

    def _baseline(
        self,
        cell: Cell,
        bob: LoadedModel,
        logged: Sequence[Mapping[str, Any]],
        fresh: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        samples = []
        for records in (logged, fresh):
            pieces = [np.asarray(r["prompt_tokens"] + r["tokens"]) for r in records]
            samples.append(calibrated_losses(bob, pieces, report=self.report))
        found = baseline(*samples)
        return self._about(cell) | {
            "setting": "baseline (no mark)",
            "statistic": "membership by loss",
            "language": self.settings.languages[0],
            "log_pvalue": found.log_pvalue,
            "log10_pvalue": found.log_pvalue / math.log(10.0),
            "n_scored": found.n_logged + found.n_fresh,
            "distance": found.distance,
        }

    def _about(self, cell: Cell) -> dict[str, Any]:
        scheme = from_tag(cell.scheme)
        return {
            "cell": cell.name,
            "scheme": cell.scheme,
            "window": scheme.context_width,
            "model": cell.bob,
            "rho": cell.rho,
            "learning_rate": cell.learning_rate,
            "epochs": cell.epochs,
            "seed": cell.seed,
        }

    # ------------------------------------------------------------ many keys

    def calibrate(self, cell: Cell, length: int = 48, texts: int = 2) -> None:
        """p-values of a clean Bob under fresh keys, in all four settings.

        Closed: his answers do not depend on the key, so every key tests the same ones. Open: Alice
        writes `texts` new texts of `length` tokens under every key, for logged and for new prompts.
        """
        path = self.folder / CALIBRATION
        done = len(read_rows(path))
        if done >= self.settings.keys:
            return
        scheme = from_tag(cell.scheme)
        bob, base = self._load(str(self.train(cell))), self._load(cell.bob)
        marked = read_rows(self._texts(cell.scheme, cell.seed) / "marked.jsonl")
        asked = {
            supervision: answers(
                self._asked(cell, bob, marked, supervision, self.settings.languages[0]),
                scheme.context_width,
            )
            for supervision in _SUPERVISIONS
        }
        prompts = {
            "supervised": [chat_prompt(self.alice, record["prompt"]) for record in marked[:200]],
            "unsupervised": [
                chat_prompt(self.alice, record["prompt"])
                for record in read_rows(self._texts(cell.scheme, cell.seed) / "fresh.jsonl")
            ],
        }
        lm = TransformersModel(self.alice)
        group = max(1, self.settings.write_batch // (2 * texts))
        while done < self.settings.keys:
            count = min(group, self.settings.keys - done)
            keys = [Key.generate(f"calibration-{done + i}", slots=1) for i in range(count)]
            rows = [(key, supervision) for key in keys for supervision in _SUPERVISIONS]
            rng = np.random.default_rng([cell.seed, done])
            spread = [(key, supervision) for key, supervision in rows for _ in range(texts)]
            chosen = [prompts[s][int(rng.integers(len(prompts[s])))] for _, s in spread]
            written = embed_batch(
                lm,
                chosen,
                length,
                [key for key, _ in spread],
                scheme,
                rng=rng,
                sampling=instruct.PUBLISHED,
                stop=lm.stop_ids,
            )
            documents = [
                Document(tokens=np.concatenate([prompt, text.tokens]), start=int(prompt.shape[0]))
                for prompt, text in zip(chosen, written, strict=True)
            ]
            parts = list(read(bob, documents, scheme.context_width, base=base, batch_size=texts))
            found: dict[Key, dict[str, Any]] = {key: {"key": key.name} for key in keys}
            for (key, supervision), reading in zip(rows, parts, strict=True):
                for make in (argmax, soft, differential):
                    outcome = testing.test(make(reading), key, scheme, decoys=0)
                    name = f"open, {supervision}: {outcome.statistic}"
                    found[key][name] = _spread(outcome, scheme, rng.random())
                outcome = testing.test(asked[supervision], key, scheme, decoys=0)
                name = f"closed, {supervision}: {outcome.statistic}"
                found[key][name] = _spread(outcome, scheme, rng.random())
            _append(path, list(found.values()))
            done += count
            self.report(done, self.settings.keys, "keys")


def _spread(outcome: RadioactivityResult, scheme: Scheme, uniform: float) -> float:
    """A log p-value that can be held against the uniform law: randomised where counts have atoms.

    P(> t) + u P(= t) is uniform under H0; P(>= t), which is what a test reports, is larger.
    """
    law = ScoreLaw.of(scheme)
    if not outcome.method.startswith("exact") or law.continuous:
        return outcome.log_pvalue
    n = outcome.n_scored * outcome.n_slots
    return math.log(testing.spread_pvalue(outcome.total, n, law, max(uniform, 1e-300)))


def calibration(folder: Path) -> list[dict[str, Any]]:
    """Of every setting and statistic: keys, KS p against the uniform law, share of p <= 0.05."""
    rows = read_rows(folder / CALIBRATION)
    names = [name for name in (rows[0] if rows else {}) if name != "key"]
    found = []
    for name in names:
        p = np.exp([row[name] for row in rows])
        found.append(
            {
                "test": name,
                "keys": p.shape[0],
                "ks_pvalue": math.exp(stats.log_uniformity(p)),
                "mean": float(p.mean()),
                "at_5_percent": float((p <= 0.05).mean()),
                "smallest": float(p.min()),
            }
        )
    return found


def _document(record: Mapping[str, Any]) -> Document:
    prompt = record["prompt_tokens"]
    return Document(tokens=np.asarray(prompt + record["tokens"]), start=len(prompt))


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table of rows, one line each."""
    if not rows:
        raise EvidenceError("there are no rows to show; run the study first.")
    heads = ("setting", "statistic", "language", "rho", "scored", "effect", "z", "log10 p")
    more = [
        name
        for name in ("scheme", "model", "learning_rate", "epochs", "seed")
        if len({row[name] for row in rows}) > 1
    ]
    yield "| " + " | ".join([*more, *heads]) + " |"
    yield "|" + "---|" * (len(more) + len(heads))
    for row in rows:
        numbers = (
            f"{row['rho']:g}",
            str(row["n_scored"]),
            f"{row['effect']:+.4f}" if "effect" in row else "",
            f"{row['z']:.1f}" if "z" in row else "",
            f"{row['log10_pvalue']:.1f}",
        )
        names = (row["setting"], row["statistic"], row["language"])
        yield "| " + " | ".join([*(str(row[name]) for name in more), *names, *numbers]) + " |"


def summary(folder: Path, settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything in numbers, written to summary.json and summary.md."""
    document = {
        "command": "radioactivity study",
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        "rows": [
            {name: value for name, value in row.items() if name != "hypothesis"} for row in rows
        ],
        "calibration": calibration(folder),
    }
    with replacing(folder / "summary.json") as file:
        file.write(json.dumps(document, indent=1).encode())
    text = ["# Radioactivity study", "", *lines(rows), ""]
    if document["calibration"]:
        text += [
            "## A clean Bob under many keys",
            "",
            "Counts have atoms; their p-values are randomised here, so that they can be uniform.",
            "",
            "| test | keys | KS p | mean p | p <= 0.05 | smallest p |",
            "|---|---|---|---|---|---|",
        ]
        text += [
            f"| {row['test']} | {row['keys']} | {row['ks_pvalue']:.2g} | {row['mean']:.3f} | "
            f"{row['at_5_percent']:.1%} | {row['smallest']:.2g} |"
            for row in calibration(folder)
        ]
        text.append("")
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    text += [f"Made with {found}.", ""]
    with replacing(folder / "summary.md") as file:
        file.write("\n".join(text).encode())
    return document
