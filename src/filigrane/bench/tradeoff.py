"""The experiment behind speed against strength: the same prompts and keys through every method.

A run lives in one directory and can be stopped at any time; the same command goes on from there.

    config.json        settings, prompts, models, and on what and how each sitting ran
    key                the one benchmark key, readable by its owner only; seed s uses user s
    generations.jsonl  one line per text: the record of `generate`, and what the metrics need
    summary.*, *.png   made anew from the records at the end of every sitting (`tradeoff_summary`)

All methods write from the same (prompt, seed), which fixes the user key, so their texts are pairs.
Texts are written in batches that are fixed beforehand and have private randomness of their own: a
run that was interrupted ends with the records of one that was not. Methods and draft lengths take
turns batch by batch, so that a slow moment of the machine hits all of them.

This module knows nothing of the command line, and of models only what `Models` says.
"""

import hashlib
import importlib.resources
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from filigrane import __version__, prf
from filigrane.bench import Report, silent
from filigrane.bench.machine import describe
from filigrane.contexts import TokenIds, collect
from filigrane.detection import DetectionResult, detect
from filigrane.embedding import Sampling, refuse_unmarkable
from filigrane.errors import FiligraneError, RecordError, TooShort
from filigrane.keys import Key, MarkingKey
from filigrane.schemes import Gumbel
from filigrane.speculative import Method, Speculated, generate, method
from filigrane.speculative.metrics import Row

TASKS: Final = ("summarise", "open-ended")
"""The built-in sets of prompts, written for this package."""

UNACCELERATED: Final = 0
"""The draft length that is recorded for methods that take no drafts."""

CONFIG, KEY, RECORDS = "config.json", "key", "generations.jsonl"
_PREFIXES: Final = tuple(2**n for n in range(3, 17))
_WARM_UP: Final = 8  # tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; id is what records call it."""

    id: int | str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the texts of a run; two sittings in one directory agree in all of it.

    methods: in the text form of `speculative.method`; draft_lengths: the K of methods that take
    drafts; seeds: texts per prompt and method, each under a key of its own; batch_size: texts
    written at a time, which also decides the private randomness. The rest as in `Sampling` and
    `adapters.models.load`.
    """

    target: str
    draft: str
    methods: tuple[str, ...]
    draft_lengths: tuple[int, ...]
    task: str
    prompts: int
    seeds: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    batch_size: int
    dtype: str | None
    device: str

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise FiligraneError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise FiligraneError("methods must be at least one, each named once.")
        if not self.draft_lengths or min(self.draft_lengths) < 1:
            raise FiligraneError("draft lengths must be at least one, each 1 or more.")
        if len(set(self.draft_lengths)) != len(self.draft_lengths):
            raise FiligraneError("a draft length is named twice; name each once.")

    @property
    def sampling(self) -> Sampling:
        """How laws are made of logits, the same for target and draft."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The two models of a run, ready for `generate`.

    target, draft: what `generate` takes; prompts: (n_i,) int64 ids, one per prompt; stop: ids that
    end a text; facts: what identifies all of it, ready for JSON; device: what they run on, for
    the notes on a sitting.
    """

    target: Any
    draft: Any
    prompts: Sequence[TokenIds]
    stop: tuple[int, ...]
    facts: Mapping[str, object]
    device: str


def builtin_prompts(task: str) -> list[Prompt]:
    """The prompts of one of `TASKS`, in their order."""
    if task not in TASKS:
        raise FiligraneError(f"unknown task {task!r}; use {' or '.join(TASKS)}, or a file.")
    file = importlib.resources.files("filigrane.bench") / "prompts" / f"{task}.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [Prompt(row["id"], row["prompt"]) for row in rows]


# ---------------------------------------------------------------- the run directory


class RunDirectory:
    """The files of a run. Raises RecordError for a directory of other settings, or of others."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._config: dict[str, Any] = {}

    def open(self, settings: Settings, prompts: Sequence[Prompt]) -> None:
        """Make the directory and its key, or check that it belongs to these settings.

        Nothing in a directory that is refused is touched.
        """
        config = self.path / CONFIG
        wanted = {
            "filigrane": __version__,
            # Through JSON, so that it compares equal to what was read.
            "settings": json.loads(json.dumps(asdict(settings))),
            "prompts_sha256": _digest([[prompt.id, prompt.text] for prompt in prompts]),
        }
        if config.exists():
            self._config = _read_object(config)
            self._refuse_other("", wanted, self._config)
            return
        if self.path.exists():
            if not self.path.is_dir():
                raise RecordError(f"{self.path} is a file; choose a directory.")
            # A run that was stopped in its first moment has left its key.
            if set(os.listdir(self.path)) - {KEY}:
                raise RecordError(
                    f"{self.path} holds files and no {CONFIG}: it is not a run directory. "
                    "Choose another, or a new one."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._config = wanted | {"prompts": [prompt.id for prompt in prompts], "sittings": []}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as they are kept in config.json."""
        found: dict[str, Any] = self._config["settings"]
        return found

    def begin(self, models: Models) -> Key:
        """Note this sitting and check that the models are the ones of the earlier ones."""
        facts = json.loads(json.dumps(models.facts))
        if "models" in self._config:
            self._refuse_other("", {"models": facts}, self._config)
        file = self.path / KEY
        if not file.exists():
            if (self.path / RECORDS).exists():
                raise RecordError(
                    f"{file} is missing, and with it the key of the texts in {RECORDS}; put it "
                    "back, or choose another directory."
                )
            Key.generate("tradeoff", slots=1).save(file)
        key = Key.load(file)
        self._config["models"] = facts
        self._config["key_fingerprint"] = key.fingerprint
        self._config["sittings"].append(
            {"command": sys.argv, "device": models.device, "machine": describe()}
        )
        write(self.path / CONFIG, json.dumps(self._config, indent=1) + "\n")
        return key

    def _refuse_other(
        self, where: str, wanted: Mapping[str, Any], found: Mapping[str, Any]
    ) -> None:
        for name, value in wanted.items():
            there = found.get(name)
            if isinstance(value, dict) and isinstance(there, dict):
                self._refuse_other(f"{where}{name}.", value, there)
            elif there != value:
                raise RecordError(
                    f"{self.path} was made with {where}{name} {json.dumps(there)}, now it is "
                    f"{json.dumps(value)}; repeat the settings of {CONFIG}, or choose another "
                    "directory."
                )

    def records(self) -> Iterator[dict[str, Any]]:
        """All complete records; half a last line, of a run that was killed, is left out."""
        file = self.path / RECORDS
        if not file.exists():
            return
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError
                except ValueError:
                    raise RecordError(
                        f"{file}:{number} is not a record of a run; remove this line, and the same "
                        "command writes its text anew."
                    ) from None
                yield record

    def trim(self) -> None:
        """Drop the half line that `records` leaves out, so that the file can be appended to."""
        file = self.path / RECORDS
        if not file.exists():
            return
        with file.open("r+b") as stream:
            whole = sum(len(line) for line in stream if line.endswith(b"\n"))
            stream.truncate(whole)

    def append(self, records: Sequence[Mapping[str, object]]) -> None:
        """Write records so that they survive whatever comes next."""
        with (self.path / RECORDS).open("ab") as stream:
            for record in records:
                stream.write(json.dumps(record, allow_nan=False).encode("ascii") + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict) or "settings" not in value:
        raise RecordError(f"{path} is not the {CONFIG} of a run; choose another directory.")
    return value


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()


# ---------------------------------------------------------------- writing texts


Identity = tuple[str, int, int | str, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are written together: texts holds (seed, index of the prompt)."""

    method: Method
    name: str
    draft_length: int
    texts: tuple[tuple[int, int], ...]

    def identities(self, prompts: Sequence[Prompt]) -> list[Identity]:
        """What the records of its texts are known by."""
        return [
            (self.name, self.draft_length, prompts[prompt].id, seed) for seed, prompt in self.texts
        ]


def plan(settings: Settings) -> list[Batch]:
    """All batches of a run, in their order.

    Raises SchemeError for a method that is not known, UnsupportedDecoding for one that could not
    mark with this sampling.
    """
    methods = [(name, method(name)) for name in settings.methods]
    for _, made in methods:
        if made.marks:
            refuse_unmarkable(made.scheme, settings.sampling)
    texts = [(seed, prompt) for seed in range(settings.seeds) for prompt in range(settings.prompts)]
    batches = []
    for start in range(0, len(texts), settings.batch_size):
        chunk = tuple(texts[start : start + settings.batch_size])
        for name, made in methods:
            if not made.drafted:
                batches.append(Batch(made, name, UNACCELERATED, chunk))
        for draft_length in settings.draft_lengths:
            for name, made in methods:
                if made.drafted:
                    batches.append(Batch(made, name, draft_length, chunk))
    return batches


def write_texts(
    settings: Settings,
    prompts: Sequence[Prompt],
    models: Models,
    directory: RunDirectory,
    key: Key,
    report: Report = silent,
) -> int:
    """Write the texts that the directory lacks; returns how many there were to write.

    An interruption loses the batch that is being written and nothing else.
    """
    directory.trim()
    done = _done(directory)
    batches = missing(settings, prompts, directory)
    total = sum(len(batch.texts) for batch in plan(settings))
    to_write = sum(name not in done for b in batches for name in b.identities(prompts))
    _warm_up(settings, models, batches, key, report)
    finished = total - to_write
    for batch in batches:
        report(finished, total, f"{batch.name} K={batch.draft_length}")
        # All of the batch, even if some of it is there: a batch is timed as a whole.
        texts = _generate(settings, prompts, models, batch, key)
        records = [
            _record(batch, prompts[prompt].id, seed, made, key.user(seed))
            for (seed, prompt), made, name in zip(
                batch.texts, texts, batch.identities(prompts), strict=True
            )
            if name not in done
        ]
        directory.append(records)
        finished += len(records)
    report(total, total, "done")
    return to_write


def _done(directory: RunDirectory) -> set[Identity]:
    return {
        (record["method"], record["draft_length"], record["prompt"], record["seed"])
        for record in directory.records()
    }


def missing(settings: Settings, prompts: Sequence[Prompt], directory: RunDirectory) -> list[Batch]:
    """The batches of which the directory lacks a text."""
    done = _done(directory)
    return [
        batch for batch in plan(settings) if any(n not in done for n in batch.identities(prompts))
    ]


def _warm_up(
    settings: Settings, models: Models, batches: Sequence[Batch], key: Key, report: Report
) -> None:
    """Run each method once, unrecorded: the first call of everything compiles or loads."""
    seen = set()
    for batch in batches:
        if batch.name in seen:
            continue
        seen.add(batch.name)
        report(0, None, f"warming up {batch.name}")
        generate(
            models.target,
            models.draft,
            models.prompts[:1],
            min(_WARM_UP, settings.max_new_tokens),
            [key.user(0) if batch.method.marks else None],
            batch.method,
            draft_length=max(1, batch.draft_length),
            rng=np.random.default_rng(0),
            sampling=settings.sampling,
            stop=models.stop,
            slots=[0],
        )


def _generate(
    settings: Settings, prompts: Sequence[Prompt], models: Models, batch: Batch, key: Key
) -> list[Speculated]:
    names = [[seed, prompts[prompt].id] for seed, prompt in batch.texts]
    # Private randomness belongs to the texts and the method, not to the sitting.
    seed = hashlib.sha256(json.dumps([batch.name, batch.draft_length, names]).encode()).digest()
    return generate(
        models.target,
        models.draft,
        [models.prompts[prompt] for _, prompt in batch.texts],
        settings.max_new_tokens,
        [key.user(seed) if batch.method.marks else None for seed, _ in batch.texts],
        batch.method,
        draft_length=max(1, batch.draft_length),
        rng=np.random.default_rng(np.frombuffer(seed, "<u4")),
        sampling=settings.sampling,
        stop=models.stop,
        slots=[0] * len(batch.texts),
    )


def _record(
    batch: Batch, prompt: int | str, seed: int, made: Speculated, key: MarkingKey
) -> dict[str, object]:
    return {
        "method": batch.name,
        "draft_length": batch.draft_length,
        "prompt": prompt,
        "seed": seed,
        "batch": len(batch.texts),
        "scheme": made.scheme,
        "key": made.key,
        "tokens": made.tokens.tolist(),
        "marked": made.marked.astype(int).tolist(),
        "emitted": made.emitted.tolist(),
        "proposed": made.proposed.tolist(),
        "accepted": made.accepted.tolist(),
        "nodes": made.nodes.tolist(),
        "log_probs": [round(value, 6) for value in made.log_probs.tolist()],
        "seconds": [round(value, 6) for value in made.seconds.tolist()],
        **statistics(made.tokens, batch.method, key),
    }


def statistics(tokens: TokenIds, made_by: Method, key: MarkingKey) -> dict[str, object]:
    """What detectors see of a text: tokens (n,) ids; key: of one slot, its own or any other.

    n_scored, sum_u, sum_a and log_pvalue are the ordinary detector's (the sums null unless it is
    the method's own, or there is no mark, and the scheme is gumbel); own_log_pvalue, its detector's
    name and those of the first 8, 16, 32, ... tokens are the method's own. Natural logarithms; a
    text that is too short has 0.
    """
    scheme = made_by.scheme
    sum_u = sum_a = None
    n_scored, log_pvalue = 0, 0.0
    try:
        ordinary = detect(tokens, key, scheme)
        n_scored, log_pvalue = ordinary.n_scored, ordinary.log_pvalue
        if isinstance(scheme, Gumbel) and (made_by.one_key or not made_by.marks):
            evidence = collect(tokens, scheme.context_width)
            blocks = prf.block(key.prf_keys(scheme.label)[0], evidence.windows)
            a = scheme.score(blocks, evidence.tokens)
            sum_u, sum_a = float(-np.expm1(-a).sum()), float(a.sum())
    except TooShort:
        pass
    own = _own(tokens, made_by, key)
    prefixes = {}
    for length in (n for n in _PREFIXES if n <= tokens.shape[0]):
        part = _own(tokens[:length], made_by, key)
        prefixes[str(length)] = 0.0 if part is None else part.log_pvalue
    return {
        "n_tokens": int(tokens.shape[0]),
        "n_scored": n_scored,
        "sum_u": sum_u,
        "sum_a": sum_a,
        "log_pvalue": log_pvalue,
        "own_log_pvalue": 0.0 if own is None else own.log_pvalue,
        "own_detector": None if own is None else own.method,
        "prefix_log_pvalues": prefixes,
    }


def _own(tokens: TokenIds, made_by: Method, key: MarkingKey) -> DetectionResult | None:
    try:
        return made_by.detect(tokens, key)
    except TooShort:
        return None


def as_row(record: Mapping[str, Any]) -> Row:
    """A line of generations.jsonl as what `speculative.metrics` takes."""
    return Row(
        method=record["method"],
        draft_length=record["draft_length"],
        prompt=record["prompt"],
        seed=record["seed"],
        n_tokens=record["n_tokens"],
        n_scored=record["n_scored"],
        sum_u=math.nan if record["sum_u"] is None else record["sum_u"],
        sum_a=math.nan if record["sum_a"] is None else record["sum_a"],
        log_pvalue=record["own_log_pvalue"],
        log_likelihood=math.fsum(record["log_probs"]),
        emitted=np.array(record["emitted"], dtype=np.int64),
        proposed=np.array(record["proposed"], dtype=np.int64),
        accepted=np.array(record["accepted"], dtype=np.int64),
        nodes=np.array(record["nodes"], dtype=np.int64),
        seconds=np.array(record["seconds"], dtype=np.float64),
        prefixes={int(n): value for n, value in record["prefix_log_pvalues"].items()},
    )
