"""Bob's data set: a share of marked pairs among others, and what Alice has logged of them.

    mix        records -> Mixture
    save, load a Mixture as a folder: data.jsonl, logs.jsonl, manifest.json with all hashes
    examples   records as what `adapters.finetuning.finetune` takes

Records are those that `instruct` writes. Knows nothing of keys, and of models only how to encode.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from filigrane.adapters.models import LoadedModel, LoadedTokenizer, chat_prompt
from filigrane.contexts import TokenIds
from filigrane.errors import EvidenceError, RecordError

__all__ = ["Mixture", "Record", "examples", "load", "mix", "read_pairs", "save"]

Record: TypeAlias = Mapping[str, Any]
"""One pair, as `instruct.generate` writes it."""

_DATA: Final = "data.jsonl"
_LOGS: Final = "logs.jsonl"
_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """A data set and what is known about it.

    records: what Bob trains on, in the order he sees it; logs: marked pairs that Alice knows to
    have left, among them all marked ones of the records; rho: share of marked records; known: share
    of the logs that is in the records (d in the literature); seed.
    """

    records: tuple[Record, ...]
    logs: tuple[Record, ...]
    rho: float
    known: float
    seed: int

    @property
    def n_marked(self) -> int:
        """Marked records in the data set."""
        return sum(bool(record["marked"]) for record in self.records)


def mix(
    marked: Sequence[Record],
    unmarked: Sequence[Record],
    rho: float,
    size: int,
    seed: int,
    *,
    known: float = 1.0,
) -> Mixture:
    """Draw a data set of `size` records of which round(rho * size) are marked.

    known: share of Alice's logs that Bob uses (d): her logs are the marked records drawn and as
    many others of `marked` as make it so. Of one seed, the marked records of a smaller rho are
    among those of a larger one, and so are logs. Raises EvidenceError if there are too few records,
    RecordError if the pools are not what their names say.
    """
    if not 0.0 <= rho <= 1.0:
        raise EvidenceError(f"rho is the share of marked records, 0 to 1; got {rho}.")
    if not 0.0 < known <= 1.0:
        raise EvidenceError(
            f"known is the share of the logs that was used, above 0 up to 1; got {known}. For none "
            "(unsupervised), test on new text of the model instead."
        )
    if size < 1:
        raise EvidenceError(f"a data set needs at least one record; got size={size}.")
    for pool, wanted in ((marked, True), (unmarked, False)):
        name = "marked" if wanted else "unmarked"
        for record in pool:
            if record.get("marked") is not wanted:
                raise RecordError(f"record {record.get('id')!r} among the {name} ones is not.")
        if len({record["id"] for record in pool}) < len(pool):
            raise RecordError(f"two of the {name} records have the same id; pass each once.")
    n_marked = round(rho * size)
    n_logs = round(n_marked / known)
    for name, needed, pool, advice in (
        ("marked", n_logs, marked, "a smaller rho or size, or a larger known"),
        ("unmarked", size - n_marked, unmarked, "a larger rho or a smaller size"),
    ):
        if needed > len(pool):
            raise EvidenceError(
                f"this takes {needed:,} {name} records and there are {len(pool):,}: write more of "
                f"them (instruct), or ask for {advice}."
            )
    order = np.random.default_rng([seed, 0]).permutation(len(marked))
    others = np.random.default_rng([seed, 1]).permutation(len(unmarked))
    logs = tuple(marked[i] for i in order[:n_logs])
    records = [*logs[:n_marked], *(unmarked[i] for i in others[: size - n_marked])]
    shuffled = np.random.default_rng([seed, 2]).permutation(size)
    return Mixture(
        records=tuple(records[i] for i in shuffled), logs=logs, rho=rho, known=known, seed=seed
    )


def save(mixture: Mixture, folder: str | os.PathLike[str]) -> Path:
    """Write a mixture to a new folder, which appears whole or not at all.

    A folder that holds the same mixture is left as it is. Raises RecordError if it holds another.
    """
    target = Path(folder)
    data, logs = _lines(mixture.records), _lines(mixture.logs)
    manifest = {
        "format": _FORMAT,
        "rho": mixture.rho,
        "known": mixture.known,
        "seed": mixture.seed,
        "size": len(mixture.records),
        "marked": mixture.n_marked,
        "data_sha256": hashlib.sha256(data).hexdigest(),
        "logs_sha256": hashlib.sha256(logs).hexdigest(),
        "records": [
            {"id": record["id"], "marked": record["marked"], "sha256": _sha256(record)}
            for record in mixture.records
        ],
        "logs": [record["id"] for record in mixture.logs],
    }
    if target.exists():
        if _manifest(target) != manifest:
            raise RecordError(f"{str(target)!r} holds another mixture; choose another folder.")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        (scratch / _DATA).write_bytes(data)
        (scratch / _LOGS).write_bytes(logs)
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        (scratch / _MANIFEST).write_text(text + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def load(folder: str | os.PathLike[str]) -> Mixture:
    """Read a mixture. Raises RecordError if it is none, or not what its manifest describes."""
    path = Path(folder)
    manifest = _manifest(path)
    found = {}
    for name, digest in ((_DATA, "data_sha256"), (_LOGS, "logs_sha256")):
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise RecordError(f"{str(path / name)!r} cannot be read: {error.strerror}.") from error
        if hashlib.sha256(data).hexdigest() != manifest.get(digest):
            raise RecordError(
                f"{str(path / name)!r} is not the file that its manifest describes; mix it again."
            )
        found[name] = tuple(json.loads(line) for line in data.splitlines())
    return Mixture(
        records=found[_DATA],
        logs=found[_LOGS],
        rho=float(manifest["rho"]),
        known=float(manifest["known"]),
        seed=int(manifest["seed"]),
    )


def read_pairs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file that `instruct.generate` wrote. Raises RecordError for another."""
    found: list[dict[str, Any]] = []
    try:
        for line in Path(path).read_bytes().splitlines():
            record = json.loads(line)
            if not isinstance(record, dict) or not {"id", "marked", "tokens"} <= record.keys():
                raise ValueError("not a pair")
            found.append(record)
    except OSError as error:
        raise RecordError(f"{os.fspath(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise RecordError(
            f"{os.fspath(path)}:{len(found) + 1} is not a pair of instruct; pass its own file."
        ) from error
    return found


def examples(
    records: Sequence[Record], suspect: LoadedModel | LoadedTokenizer
) -> list[tuple[TokenIds, int]]:
    """Records as (tokens, start of the answer) for a model that is going to be trained.

    With the writer's own tokenizer the ids are those that were written; with another one prompt and
    answer are encoded anew, in that model's chat template and with its end token.
    """
    found = []
    for record in records:
        if record.get("tokenizer_sha256") == suspect.tokenizer_sha256:
            prompt = np.asarray(record["prompt_tokens"], dtype=np.int64)
            answer = list(record["tokens"])
        else:
            prompt = chat_prompt(suspect, record["prompt"])
            encoded = suspect.tokenizer(record["text"], add_special_tokens=False, verbose=False)
            answer = list(encoded["input_ids"])
            end = suspect.tokenizer.eos_token_id
            if end is not None and record.get("finish_reason") != "length":
                answer.append(end)
        tokens = np.concatenate([prompt, np.asarray(answer, dtype=np.int64)])
        found.append((tokens, int(prompt.shape[0])))
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _MANIFEST).read_text("utf-8"))
    except OSError as error:
        raise RecordError(
            f"{str(folder)!r} holds no {_MANIFEST}: it is not a mixture ({error.strerror})."
        ) from error
    except ValueError as error:
        raise RecordError(f"{str(folder / _MANIFEST)!r} is damaged; mix it again.") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise RecordError(f"{str(folder / _MANIFEST)!r} is of another version; mix it again.")
    return found


def _lines(records: Sequence[Record]) -> bytes:
    return b"".join(_line(record) + b"\n" for record in records)


def _line(record: Record) -> bytes:
    return json.dumps(dict(record), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _sha256(record: Record) -> str:
    return hashlib.sha256(_line(record)).hexdigest()
