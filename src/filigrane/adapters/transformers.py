"""Marks inside `model.generate` of transformers; and, from `causal_lm`, its models for our loops.

    generation_kwargs       dict for model.generate(**inputs, **kwargs, max_new_tokens=...)
    continuations           the texts in what generate returned
    TransformersModel       a causal language model for `filigrane.stream` and speculation
    without_layers          the same model without some layers, to draft for it
    DECODING_SUPPORT        what carries a mark and what is refused (docs/decoding.md), plain data

How a mark gets into `generate`: a green list biases raw logits, so it goes into `logits_processor`,
which transformers runs after penalties and before temperature and truncation. The other schemes
reweight what is finally drawn from, so they go in as a `watermarking_config`, whose processor
transformers makes anew for each call and runs last. Every scheme passes such a config: it starts
each run, and it is where a path that would drop the mark (continuous batching) is refused.
Processors keep no text: whether a window is new is computed from the ids of each row at each step,
because beam search moves rows. transformers copies and prints its configuration; secrets are in
none of what it can see.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Never, Self

import numpy as np

from filigrane.contexts import TokenIds
from filigrane.embedding import Sampling, refuse_unmarkable
from filigrane.errors import (
    MissingDependency,
    SecretLeakError,
    UnsupportedDecoding,
)
from filigrane.keys import MarkingKey
from filigrane.schemes import SCHEMES
from filigrane.schemes.base import Scheme

try:
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList
    from transformers.generation import BaseWatermarkingConfig
except ImportError as error:
    raise MissingDependency(
        "marking inside transformers needs more packages: pip install 'filigrane[transformers]'"
    ) from error

from filigrane.adapters.causal_lm import TransformersModel, without_layers
from filigrane.adapters.torch import block, fresh, reweight_logits, to_words

__all__ = [
    "DECODING_MODES",
    "DECODING_SUPPORT",
    "Support",
    "TransformersModel",
    "continuations",
    "decoding_table",
    "generation_kwargs",
    "without_layers",
]

_OWN: Final = "Use filigrane.stream with TransformersModel, or plain generate."


# ---------------------------------------------------------------- what is marked


@dataclass(frozen=True, slots=True)
class Support:
    """One cell of the table: whether text comes out marked; if not, nothing comes out, and why."""

    status: Literal["marked", "refused"]
    reason: str = ""


DECODING_MODES: Final[Mapping[str, str]] = {
    "greedy": "`generate`, greedy",
    "sampling": "`generate`, sampling",
    "warped sampling": "`generate`, temperature, top-k, top-p",
    "beam search": "`generate`, beam search",
    "beam sampling": "`generate`, beam sampling",
    "own": "`filigrane.stream`, sampling",
    "assisted": "`generate`, assisted or prompt lookup",
}
"""The columns: name and heading."""

_GREEDY: Final = "a certain token leaves nothing to choose"
_BEAMS: Final = "beams choose among whole texts, which undoes the choice of each token"
_ASSISTED: Final = "drafts are verified several positions at a time"


def _support(scheme: type[Scheme], mode: str) -> Support:
    if mode == "assisted":
        return Support("refused", _ASSISTED)
    if scheme.acts_on == "distribution":
        if mode == "greedy":
            return Support("refused", _GREEDY)
        if mode in ("beam search", "beam sampling"):
            return Support("refused", _BEAMS)
    return Support("marked")


DECODING_SUPPORT: Final[Mapping[str, Mapping[str, Support]]] = {
    name: {mode: _support(scheme, mode) for mode in DECODING_MODES}
    for name, scheme in SCHEMES.items()
}
"""Scheme name -> decoding mode -> Support. What is refused raises UnsupportedDecoding."""


def decoding_table() -> str:
    """DECODING_SUPPORT as the Markdown table of docs/decoding.md, with numbered reasons."""
    reasons: dict[str, int] = {}
    lines = [
        "| scheme | " + " | ".join(DECODING_MODES.values()) + " |",
        "|---" * (len(DECODING_MODES) + 1) + "|",
    ]
    for name, row in DECODING_SUPPORT.items():
        cells = [name]
        for support in row.values():
            note = ""
            if support.reason:
                note = f" ({reasons.setdefault(support.reason, len(reasons) + 1)})"
            cells.append(support.status + note)
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


# ---------------------------------------------------------------- marks inside generate


def generation_kwargs(
    scheme: Scheme,
    keys: MarkingKey | Sequence[MarkingKey | None],
    *,
    rng: np.random.Generator,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    num_return_sequences: int = 1,
) -> dict[str, Any]:
    """Arguments with which `model.generate(**inputs, **kwargs, max_new_tokens=...)` marks its text.

    keys: one for all texts, or one per prompt (None leaves its texts unmarked), for all beams and
    return sequences of that prompt. rng: which slot of a key marks which text; what `generate`
    draws itself still comes from torch's generator. The decoding options mean what they mean to
    transformers and are all passed on, so that a model's own defaults cannot change them (top_k is
    50 by default there; 0 is off). temperature 0 is greedy. Options that are not named here
    (penalties, min_p, stop strings, a streamer, ...) may be given to `generate` beside them.

    The dict serves any number of calls, left-padded batches, and encoder-decoder models. The marked
    text is what `generate` appends; `continuations` cuts it out.
    Raises UnsupportedDecoding, here or from `generate`, instead of letting text go unmarked
    (DECODING_SUPPORT says when). Keep `output_scores` to yourself: they show each step's mark.
    """
    shared = isinstance(keys, MarkingKey)
    owners: tuple[MarkingKey | None, ...]
    owners = (keys,) if isinstance(keys, MarkingKey) else tuple(keys)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if num_beams < 1 or num_return_sequences < 1:
        raise UnsupportedDecoding("num_beams and num_return_sequences must be at least 1.")
    if not do_sample and sampling != Sampling():
        raise UnsupportedDecoding(
            "temperature, top_k and top_p have no effect on greedy and beam search: "
            "leave them out, or pass do_sample=True."
        )
    if sampling.temperature == 0.0:
        do_sample = False
    if any(key is not None for key in owners):
        if num_beams > 1 and scheme.acts_on == "distribution":
            raise UnsupportedDecoding(
                f"{scheme.name} cannot mark beam search: {_BEAMS}. "
                "Sample without beams, or use greenlist, which can."
            )
        refuse_unmarkable(scheme, sampling if do_sample else Sampling(temperature=0.0))
    options: dict[str, Any] = {
        "do_sample": do_sample,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
    }
    if do_sample:
        options |= {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    plan = _Plan(scheme, owners, shared, rng, num_beams, num_return_sequences)
    start = _Marking(plan)
    options["watermarking_config"] = start
    if scheme.acts_on == "logits":
        options["logits_processor"] = LogitsProcessorList([_OnLogits(start)])
    return options


def continuations(
    sequences: torch.Tensor, prompt_length: int, stop_ids: Sequence[int] = ()
) -> list[TokenIds]:
    """The texts in what `generate` returned: each row without its prompt and final padding.

    sequences: (rows, n) ids; prompt_length: width of the (padded) input ids, for encoder-decoder
    models that of the decoder's, normally 1; stop_ids: end-of-sequence ids, the first of which ends
    a row and belongs to it.
    """
    texts = []
    for row in sequences[:, prompt_length:].cpu().numpy().astype(np.int64):
        ends = np.flatnonzero(np.isin(row, np.asarray(stop_ids, dtype=np.int64)))
        texts.append(row[: ends[0] + 1] if ends.size else row)
    return texts


@dataclass(frozen=True, slots=True, repr=False)
class _Plan:
    """What all runs of one generation_kwargs have in common."""

    scheme: Scheme
    keys: tuple[MarkingKey | None, ...]
    shared: bool
    rng: np.random.Generator
    num_beams: int
    num_return_sequences: int

    def key_words(self, rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For each row of a run: whether it has a key, (rows,) bool, and its words, (rows, 8)."""
        # transformers repeats each prompt this often; beams of one text must share a slot.
        repeats = max(self.num_beams, self.num_return_sequences)
        per_text = self.num_beams if self.num_beams > 1 else 1
        if rows % repeats or not (self.shared or rows == repeats * len(self.keys)):
            wanted = "any number of" if self.shared else str(len(self.keys))
            raise UnsupportedDecoding(
                f"generate runs {rows} rows, but {wanted} prompts with num_beams={self.num_beams} "
                f"and num_return_sequences={self.num_return_sequences} were announced. "
                "Pass generation_kwargs one key per prompt, and set both numbers there."
            )
        has_key = np.zeros(rows, dtype=np.bool_)
        words = np.zeros((rows, 8), dtype=np.uint32)
        slots: dict[int, np.ndarray[Any, Any]] = {}
        for first in range(0, rows, per_text):
            prompt = 0 if self.shared else first // repeats
            key = self.keys[prompt]
            if key is None:
                continue
            if prompt not in slots:
                slots[prompt] = key.prf_keys(self.scheme.label)
            has_key[first : first + per_text] = True
            words[first : first + per_text] = slots[prompt][self.rng.integers(key.slots)]
        return has_key, words


class _Private:
    """Copies are the object itself, and there is no pickling."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError(
            "what marks text holds keys and cannot be pickled or sent to another process; "
            "call generation_kwargs there, with a key loaded there."
        )


class _Run(_Private):
    """The mark of one call of generate: the rule of `contexts` and the scheme, step by step."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._rows = self._prompt = self._length = -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows, length = input_ids.shape
        if self._length < 0:
            self._begin(rows, length, scores.device)
        elif (rows, length) != (self._rows, self._length + 1):
            raise UnsupportedDecoding(
                f"this way of generating cannot carry a mark: after {self._rows} rows of "
                f"{self._length} tokens came {rows} of {length}. Assisted generation and prompt "
                f"lookup do that: {_ASSISTED}. Use filigrane.speculative.generate."
            )
        self._length = length
        scheme = self._plan.scheme
        outputs = input_ids[:, self._prompt :].to(scores.device)
        if outputs.shape[1] < scheme.context_width:
            return scores
        marked = fresh(outputs, scheme.context_width) & self._has_key
        windows = outputs[:, -scheme.context_width :]
        return torch.where(
            marked[:, None], reweight_logits(scheme, scores, self._blocks(windows)), scores
        )

    def _begin(self, rows: int, length: int, device: Any) -> None:
        has_key, words = self._plan.key_words(rows)
        self._rows, self._prompt = rows, length
        self._has_key = torch.from_numpy(has_key).to(device)
        self._words = words
        self._device_words = to_words(words, device)

    def _blocks(self, windows: torch.Tensor) -> torch.Tensor:
        if windows.device.type != "cpu":
            return block(self._device_words, windows)
        from filigrane.kernels.prf import blocks

        return to_words(blocks(self._words, windows.numpy().astype(np.uint32)))


class _Marking(_Private, BaseWatermarkingConfig):
    """Starts a run for each call of generate.

    transformers copies it, shows it and writes it to JSON by way of __dict__, which holds the
    scheme's tag alone; what is in slots is not part of that.
    """

    __slots__ = ("_current", "_plan")

    def __init__(self, plan: _Plan) -> None:
        self.scheme = plan.scheme.tag
        self._plan = plan
        self._current = threading.local()

    def __repr__(self) -> str:
        return f"<mark of {self.scheme}>"

    def validate(self) -> None:
        """Nothing: `generation_kwargs` has checked."""

    def construct_processor(self, vocab_size: int, device: Any = None) -> "_Last":
        """Called by transformers once per generate, in its thread; device: that of the inputs."""
        if device is None:  # continuous batching, where rows are not texts
            raise UnsupportedDecoding(f"continuous batching cannot carry a mark. {_OWN}")
        run = _Run(self._plan)
        if self._plan.scheme.acts_on == "distribution":
            return _Last(run)
        self._current.run = run
        return _Last(None)

    def current(self) -> _Run:
        """The run of the generate call that this thread is in."""
        run: _Run | None = getattr(self._current, "run", None)
        if run is None:
            raise UnsupportedDecoding(
                "the mark was not started: pass everything that generation_kwargs returned to "
                "generate, not the logits_processor alone."
            )
        return run


class _Last(_Private, LogitsProcessor):
    """After all warpers: marks schemes that act on the distribution, is idle for others."""

    supports_continuous_batching = False

    def __init__(self, run: _Run | None) -> None:
        self._run = run

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if self._run is None else self._run(input_ids, scores)


class _OnLogits(_Private, LogitsProcessor):
    """Before all warpers: marks schemes that act on logits."""

    supports_continuous_batching = False

    def __init__(self, start: _Marking) -> None:
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._start.current()(input_ids, scores)
