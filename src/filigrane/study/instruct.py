"""Instruction and answer pairs, written by a model under its mark: what Bob will train on.

    prompts    thousands of distinct instructions, the same ones every time
    generate   a model answers them, marked or not, into a JSON Lines file

After self-instruct (Wang et al. 2022, 2212.10560), as in Sander et al. 2024, section 5: instead of
asking the model for new instructions they come from tasks and from forms filled with topics
(instructions.jsonl), because small models write poor ones. Knows nothing of who trains on them.
"""

import importlib.resources
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from filigrane.adapters.models import LoadedModel
from filigrane.embedding import Generated, Sampling, embed_batch, refuse_unmarkable
from filigrane.errors import EvidenceError, RecordError
from filigrane.keys import MarkingKey
from filigrane.schemes.base import Scheme

__all__ = ["LANGUAGES", "PUBLISHED", "Checks", "Prompt", "Written", "generate", "prompts"]

Report = Callable[[int, int | None, str], None]
"""Takes what is done, what there is to do (None if unknown) and a few words."""

LANGUAGES: Final = ("en", "fr", "de", "es")

PUBLISHED: Final = Sampling(temperature=0.8, top_p=0.95)
"""How the published pairs were drawn."""

_DATA: Final = "instructions.jsonl"
_REFUSALS: Final = re.compile(
    r"\s*(?:I(?:'|’)?m (?:very |really )?sorry|I am sorry|Sorry, |I can(?:'|’)?t |I cannot |"
    r"I(?:'|’)m unable|I am unable|As an AI|As a language model)",
    re.IGNORECASE,
)
_SETTINGS: Final = ("model", "tokenizer_sha256", "vocab_size", "sampling")
_MARK: Final = ("scheme", "key", "key_fingerprint")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One instruction. id: the same for the same text, in every order; language: ISO 639."""

    id: str
    text: str
    language: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What an answer must be to be kept; none of it looks at the mark.

    min_tokens: shorter ones are dropped; min_distinct: smallest share of distinct ones among its
    runs of four tokens; refusals: whether "I'm sorry, I cannot" is an answer.
    """

    min_tokens: int = 16
    min_distinct: float = 0.5
    refusals: bool = False

    def reason(self, tokens: Sequence[int], text: str) -> str | None:
        """Why an answer is dropped, None if it is kept."""
        if len(tokens) < self.min_tokens or not text.strip():
            return "too short"
        runs = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        if runs and len(set(runs)) < self.min_distinct * len(runs):
            return "repetitive"
        if not self.refusals and _REFUSALS.match(text):
            return "refusal"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a run of `generate` left in its files, earlier runs included.

    kept, marked: pairs in the file, and those of them that are marked; dropped: reason -> pairs
    that the checks refused, which stand in a file beside it; tokens: of the answers kept.
    """

    kept: int
    marked: int
    dropped: Mapping[str, int]
    tokens: int


def prompts(count: int, *, language: str = "en", seed: int = 0, start: int = 0) -> list[Prompt]:
    """Distinct instructions `start` to `start + count` of the order that `seed` makes.

    Two ranges of one seed never share a text, for pairs to train on and new ones to test with.
    English has 64,000, each other language 1,200. Raises EvidenceError if that is not enough.
    """
    data = _data(language)
    tasks, forms, topics = data["task"], data["form"], data["topic"]
    manners = data["manner"]
    plain = len(tasks) + len(forms) * len(topics)
    total = plain * (1 + len(manners))
    if count < 0 or start < 0 or start + count > total:
        raise EvidenceError(
            f"there are {total:,} instructions in {language!r}; asked for {start:,} to "
            f"{start + count:,}. Take fewer, or add another language."
        )
    # Plain ones first: what is asked in a certain manner repeats them.
    rng = np.random.default_rng([seed, LANGUAGES.index(language)])
    order = np.concatenate([rng.permutation(plain), plain + rng.permutation(total - plain)])

    def text(number: int) -> str:
        manner, place = divmod(number, plain)
        if place < len(tasks):
            instruction = tasks[place]
        else:
            form, topic = divmod(place - len(tasks), len(topics))
            instruction = forms[form].replace("{topic}", topics[topic])
        return instruction if manner == 0 else f"{instruction} {manners[manner - 1]}"

    return [
        Prompt(f"{language}-{number:05d}", text(number), language)
        for number in order[start : start + count].tolist()
    ]


def _data(language: str) -> dict[str, list[str]]:
    if language not in LANGUAGES:
        raise EvidenceError(
            f"there are no instructions in {language!r}; use one of {', '.join(LANGUAGES)}."
        )
    found: dict[str, list[str]] = {"task": [], "form": [], "topic": [], "manner": []}
    file = importlib.resources.files("filigrane.study") / _DATA
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row.pop("language") == language:
            ((kind, text),) = row.items()
            found[kind].append(text)
    return found


def generate(
    loaded: LoadedModel,
    todo: Sequence[Prompt],
    key: MarkingKey | None,
    scheme: Scheme,
    out: str | os.PathLike[str],
    *,
    share: float = 1.0,
    sampling: Sampling = PUBLISHED,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    checks: Checks | None = None,
    report: Report | None = None,
) -> Written:
    """Let a model answer instructions in its chat template; one record per pair is appended to out.

    key: None leaves all unmarked; share: of the pairs that are marked, decided for each by its id
    and the seed. The private randomness comes from the seed, too, batch by batch, so a run that was
    killed goes on where it was and writes what it would have written. Pairs that `checks` refuse go
    to `<out>.rejected.jsonl`: they were written, so whoever keeps logs keeps them.

    Records: id, prompt, prompt_tokens (as the model saw them, template included), text, tokens,
    marked, n_marked, scheme, key, key_fingerprint (None if not marked), sampling, model,
    vocab_size, tokenizer_sha256, language, finish_reason.
    Raises UnsupportedDecoding if the mark cannot be carried, RecordError if `out` holds others.
    """
    from filigrane.adapters.models import chat_prompt
    from filigrane.adapters.transformers import TransformersModel

    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is from 0 to 1; got {share}.")
    if len({prompt.id for prompt in todo}) < len(todo):
        raise RecordError("two prompts have the same id; give each its own.")
    if key is not None and share > 0:
        refuse_unmarkable(scheme, sampling)
    checks = checks or Checks()
    facts: dict[str, Any] = {
        "sampling": {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_new_tokens": max_new_tokens,
            "chat_template": bool(getattr(loaded.tokenizer, "chat_template", None)),
        },
        "model": loaded.name,
        "vocab_size": loaded.vocab_size,
        "tokenizer_sha256": loaded.tokenizer_sha256,
    }
    mark = {
        "scheme": scheme.tag,
        "key": None if key is None else key.name,
        "key_fingerprint": getattr(key, "fingerprint", None),
    }
    path = Path(out)
    beside = path.with_name(path.name.removesuffix(".jsonl") + ".rejected.jsonl")
    lm = TransformersModel(loaded)
    # A chat model ends its turn with a token that its tokenizer knows and its weights may not.
    stop = tuple(sorted({loaded.tokenizer.eos_token_id, *lm.stop_ids} - {None}))
    with _Pairs(path, facts, mark) as kept, _Pairs(beside, facts, mark) as dropped:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            if report is not None:
                report(start, len(todo), "writing answers")
            missing = [
                prompt.id not in kept.done and prompt.id not in dropped.done for prompt in batch
            ]
            if not any(missing):
                continue
            # The whole batch even if some of it is there: the randomness is that of the batch.
            marked = [key is not None and _chosen(seed, prompt, share) for prompt in batch]
            asked = [chat_prompt(loaded, prompt.text) for prompt in batch]
            texts = embed_batch(
                lm,
                asked,
                max_new_tokens,
                [key if is_marked else None for is_marked in marked],
                scheme,
                rng=np.random.default_rng([seed, start]),
                sampling=sampling,
                stop=stop,
            )
            accepted: list[dict[str, Any]] = []
            refused: list[dict[str, Any]] = []
            for prompt, ids, text, is_marked, new in zip(
                batch, asked, texts, marked, missing, strict=True
            ):
                record = _record(prompt, ids.tolist(), text, loaded.tokenizer, stop)
                record |= {"marked": is_marked, **facts}
                record |= mark if is_marked else dict.fromkeys(_MARK)
                why = checks.reason(record["tokens"], record["text"])
                if new and why is None:
                    accepted.append(record)
                elif new:
                    refused.append(record | {"rejected": why})
            dropped.append(refused)
            kept.append(accepted)
        if report is not None:
            report(len(todo), len(todo), "writing answers")
        return Written(
            kept=len(kept.done),
            marked=kept.marked,
            dropped=dict(sorted(dropped.reasons.items())),
            tokens=kept.tokens,
        )


def _chosen(seed: int, prompt: Prompt, share: float) -> bool:
    """Whether a pair is marked: from its id alone, so that a larger share holds a smaller one."""
    entropy = [seed, 1, *prompt.id.encode()]
    return bool(np.random.default_rng(entropy).random() < share)


def _record(
    prompt: Prompt, ids: list[int], text: Generated, tokenizer: Any, stop: Sequence[int]
) -> dict[str, Any]:
    tokens = text.tokens.tolist()
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "prompt_tokens": ids,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "n_marked": text.n_marked,
        "language": prompt.language,
        "finish_reason": "stop" if tokens and tokens[-1] in stop else "length",
    }


class _Pairs:
    """A file of pairs that is appended to, and what it holds already."""

    def __init__(self, path: Path, facts: Mapping[str, Any], mark: Mapping[str, Any]) -> None:
        self.done: set[str] = set()
        self.marked = self.tokens = 0
        self.reasons: dict[str, int] = {}
        self._path, self._facts, self._mark = path, facts, mark
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_Pairs":
        keep = 0
        try:
            for line in self._lines():
                if not line.endswith(b"\n"):
                    break  # half a record, of a run that was killed
                self._take(line)
                keep += len(line)
            self._file = self._path.open("ab")
        except OSError as error:
            raise RecordError(f"{self._path} cannot be used: {error.strerror}.") from error
        self._file.truncate(keep)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not None:
            self._file.close()
        if not self.done and self._path.exists() and self._path.stat().st_size == 0:
            self._path.unlink()

    def _lines(self) -> Iterator[bytes]:
        if self._path.exists():
            with self._path.open("rb") as file:
                yield from file

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            held = {name: record[name] for name in (*_SETTINGS, *_MARK)}
            wanted = {**self._facts, **(self._mark if record["marked"] else dict.fromkeys(_MARK))}
            self._count(record)
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{self._path} holds something else than the pairs of instruct; choose another out."
            ) from error
        for name, value in held.items():
            if value != wanted[name]:
                raise RecordError(
                    f"{self._path} holds pairs made with {name} {json.dumps(value)}, now it is "
                    f"{json.dumps(wanted[name])}; choose another out."
                )

    def _count(self, record: Mapping[str, Any]) -> None:
        self.done.add(record["id"])
        self.marked += record["marked"]
        self.tokens += len(record["tokens"])
        if why := record.get("rejected"):
            self.reasons[why] = self.reasons.get(why, 0) + 1

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records so that they survive whatever comes next."""
        assert self._file is not None
        for record in records:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
            self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._count(record)
        self._file.flush()
        os.fsync(self._file.fileno())
