"""Marks inside `model.generate` of transformers, and transformers models inside `filigrane.stream`.

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

import copy
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Never, Self

import numpy as np

from filigrane.contexts import TokenIds
from filigrane.embedding import Logits, Sampling, refuse_unmarkable
from filigrane.errors import (
    DraftError,
    LogitsError,
    MissingDependency,
    ModelError,
    SecretLeakError,
    TokenError,
    UnsupportedDecoding,
    VocabularyMismatch,
)
from filigrane.keys import MarkingKey
from filigrane.schemes import SCHEMES
from filigrane.schemes.base import Scheme
from filigrane.speculative.models import BlockModel, Mask

try:
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from transformers.generation import BaseWatermarkingConfig
except ImportError as error:
    raise MissingDependency(
        "marking inside transformers needs more packages: pip install 'filigrane[transformers]'"
    ) from error

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

_SLACK: Final = 32
"""Columns of padding that a cache may hold, besides a quarter of the text."""

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


# ---------------------------------------------------------------- models inside filigrane's loops


@dataclass(slots=True)
class _State:
    """A batch between two reads.

    ids and mask: (batch, n) int64, a column that is masked out was padding or has been forgotten;
    cache: the model's, None before the first read; whole: the cache cannot hold this state, so that
    all is read anew each time; parents: (batch, open columns) int64, see BlockModel.read.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    cache: Any
    parents: np.ndarray[Any, np.dtype[np.int64]]
    whole: bool = False
    tree: bool = False


class TransformersModel(BlockModel):
    """A causal language model of transformers for filigrane's own loops, on any device.

    model: the model, or what `adapters.models.load` returned. tokenizer: its tokenizer (a loaded
    model brings its own). Texts of different lengths are padded on the left and masked. Logits
    come out in float32, as wide as the model makes them; ids for which the tokenizer has no token
    (models pad their vocabulary) are -inf, so they are never drawn. Without a tokenizer nothing is
    masked.
    A state's cache grows in place, and is cut back in place where drafts are rejected. Models whose
    cache cannot be cut (sliding windows, recurrent layers), or that would count columns of padding
    between tokens, read everything again: slow, and right. Such models read no trees.
    Raises ModelError for encoder-decoder models, which `generation_kwargs` supports.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None) -> None:
        from filigrane.adapters.models import LoadedModel

        self._fingerprint: str | None = None
        if isinstance(model, LoadedModel):
            self._fingerprint = model.tokenizer_sha256
            model, tokenizer = model.model, tokenizer or model.tokenizer
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                "this model is an encoder-decoder: mark it with generation_kwargs and its generate."
            )
        self.model = model.eval()
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keeps_logits = "logits_to_keep" in accepted
        # Told where tokens stand and free to look anywhere, a model minds no gaps between them.
        self._minds_gaps = not (self._takes_positions and _full_attention(model.config))
        attention = str(getattr(model.config, "_attn_implementation", None))
        self._reads_trees = not self._minds_gaps and "flash" not in attention
        self._known = None if tokenizer is None else sorted(set(tokenizer.get_vocab().values()))
        self._unknown: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """See `BlockModel.vocab_size`."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return int(self.model.config.vocab_size if head is None else head.weight.shape[0])

    @property
    def vocabulary(self) -> str | None:
        """See `BlockModel.vocabulary`: the tokenizer's fingerprint, of a loaded model."""
        return self._fingerprint

    @property
    def reads_trees(self) -> bool:
        """See `BlockModel.reads_trees`: it takes full attention and masks of any shape."""
        return self._reads_trees

    @property
    def size(self) -> int:
        """See `BlockModel.size`."""
        return sum(weights.numel() for weights in self.model.parameters())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence ids, for `stream(..., stop=lm.stop_ids)`."""
        ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if ids is None:
            ids = getattr(self.model.config, "eos_token_id", None)
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Logits, Any]:
        """See `LanguageModel.prefill`. Raises TokenError for an empty prompt or unknown ids."""
        lengths = [prompt.shape[0] for prompt in prompts]
        if 0 in lengths:
            raise TokenError(
                f"prompt {lengths.index(0)} is empty; begin with the model's start token (BOS)."
            )
        return super().prefill(prompts)

    def open(self, rows: int) -> _State:
        """See `BlockModel.open`."""
        empty = torch.zeros((rows, 0), dtype=torch.int64, device=self.model.device)
        return _State(empty, empty.clone(), None, np.empty((rows, 0), dtype=np.int64))

    @torch.inference_mode()
    def read(
        self,
        state: _State,
        tokens: TokenIds,
        valid: Mask,
        *,
        last: int,
        parents: np.ndarray[Any, np.dtype[np.int64]] | None = None,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """See `BlockModel.read`. Raises VocabularyMismatch for ids that the model does not know."""
        self._refuse_unknown(tokens)
        if parents is not None and not self._reads_trees:
            raise ModelError(
                f"{type(self.model).__name__} cannot read a tree of drafts: that takes full "
                "attention, position_ids and a mask of any shape (no flash attention). Use a "
                "method with one draft per position."
            )
        device, columns = state.ids.device, tokens.shape[1]
        state.ids = torch.cat([state.ids, torch.from_numpy(np.asarray(tokens)).to(device)], dim=1)
        new = torch.from_numpy(np.asarray(valid, dtype=np.int64)).to(device)
        state.mask = torch.cat([state.mask, new], dim=1)
        before = state.parents.shape[1]
        state.tree |= parents is not None
        if parents is None:
            # Each valid column follows the last valid one before it.
            opened = state.mask[:, -(before + columns) :].cpu().numpy().astype(np.bool_)
            places = np.where(opened, np.arange(before + columns), -1)
            latest = np.maximum.accumulate(places, axis=1)
            parents = np.concatenate([np.full_like(latest[:, :1], -1), latest[:, :-1]], axis=1)
            parents = parents[:, before:]
        state.parents = np.concatenate([state.parents, parents], axis=1)
        logits = self._forward(state, columns, last)
        if self._known is not None:
            if self._unknown is None:
                unknown = np.ones(logits.shape[-1], dtype=np.bool_)
                unknown[[i for i in self._known if i < logits.shape[-1]]] = False
                if unknown.all():
                    raise LogitsError("the tokenizer has no token that this model can write.")
                self._unknown = torch.from_numpy(unknown).to(logits.device)
            logits = logits.masked_fill(self._unknown, -torch.inf)
        return logits.cpu().numpy()

    def _refuse_unknown(self, tokens: TokenIds) -> None:
        embeddings = getattr(self.model, "get_input_embeddings", None)
        highest = int(tokens.max(initial=0))
        if embeddings is not None and highest >= (known := embeddings().weight.shape[0]):
            raise VocabularyMismatch(
                f"prompt holds token id {highest}, but the model knows {known} ids: "
                "was it encoded by another model's tokenizer?"
            )

    def _forward(self, state: _State, columns: int, last: int) -> torch.Tensor:
        """Logits (batch, last, V) float32 of the newest columns."""
        if self._minds_gaps and bool((state.mask[:, 1:] < state.mask[:, :-1]).any()):
            state.whole, state.cache = True, None
        if state.whole:
            return self._anew(state, last)
        # Models that return no cache read everything again.
        first = 0 if state.cache is None else state.ids.shape[1] - columns
        attention, positions = state.mask, _positions(state.mask)[:, first:]
        if state.tree:
            sees = self._sees(state, first)
            positions = (sees.sum(dim=2) - 1).clamp_min(0)
            # Additive, because every attention takes it; finite, because padding sees nothing.
            dtype = self.model.dtype
            attention = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
            attention = attention.masked_fill(~sees, torch.finfo(dtype).min)[:, None]
        output = self._call(state.ids[:, first:], attention, positions, last, state.cache, True)
        state.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -last:].to(torch.float32)

    def _anew(self, state: _State, last: int) -> torch.Tensor:
        """Logits (batch, last, V) float32, from texts without gaps and without a cache."""
        order = state.mask.argsort(dim=1, stable=True)  # padding first, the text in its order
        width = max(1, int(state.mask.sum(dim=1).max()))
        ids = state.ids.gather(1, order)[:, -width:]
        mask = state.mask.gather(1, order)[:, -width:]
        kept = min(last, width)
        output = self._call(ids, mask, _positions(mask), kept, None, False)
        logits = output.logits[:, -kept:].to(torch.float32)
        # A column stands before as many ends as there are valid columns from it on.
        newest = state.mask[:, -last:]
        from_end = newest.flip(1).cumsum(dim=1).flip(1)
        places = (kept - from_end).clamp(0, kept - 1)
        return logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[2]))

    def _call(
        self,
        ids: torch.Tensor,
        attention: torch.Tensor,
        positions: torch.Tensor,
        last: int,
        cache: Any,
        use_cache: bool,
    ) -> Any:
        arguments: dict[str, Any] = {"use_cache": use_cache, "return_dict": True}
        if self._keeps_logits:  # the rest of the logits would only fill memory
            arguments["logits_to_keep"] = last
        if self._takes_positions:
            arguments["position_ids"] = positions
        return self.model(
            input_ids=ids, attention_mask=attention, past_key_values=cache, **arguments
        )

    def _sees(self, state: _State, first: int) -> torch.Tensor:
        """What columns from `first` on attend to: settled text, ancestors, itself.

        (batch, n - first, n) bool.
        """
        batch, length = state.ids.shape
        opened = state.parents.shape[1]
        start = length - opened
        seen = np.zeros((batch, opened, opened), dtype=np.bool_)
        rows = np.arange(batch)
        for column in range(opened):
            parent = state.parents[:, column]
            inherited = seen[rows, parent] & (parent >= 0)[:, None]
            seen[:, column] = inherited
            seen[:, column, column] = True
        columns = torch.arange(length, device=state.ids.device)
        sees = (columns <= columns[first:, None]).expand(batch, -1, -1).clone()
        since = max(first, start)
        newest = torch.from_numpy(seen[:, since - start :])
        sees[:, since - first :, start:] = newest.to(sees.device)
        return sees & state.mask.bool()[:, None, :]

    @torch.inference_mode()
    def keep(self, state: _State, kept: Mask) -> None:
        """See `BlockModel.keep`."""
        opened = kept.shape[1]
        start = state.ids.shape[1] - opened
        state.parents = np.empty((kept.shape[0], 0), dtype=np.int64)
        valid = state.mask[:, start:].cpu().numpy().astype(np.bool_)
        tree, state.tree = state.tree, False
        if np.array_equal(valid, kept):
            return
        if not state.whole and not (
            isinstance(state.cache, DynamicCache)
            and all(type(layer) is DynamicLayer for layer in state.cache.layers)
        ):
            state.whole, state.cache = True, None
        counts = np.flatnonzero(kept.any(axis=0))
        end = int(counts[-1]) + 1 if counts.size else 0
        mask = torch.from_numpy(kept.astype(np.int64)).to(state.mask.device)
        if tree:
            # A path through a tree is not contiguous: move it together.
            order = np.argsort(~kept, axis=1, kind="stable")
            mask = torch.from_numpy(np.take_along_axis(kept, order, axis=1).astype(np.int64))
            mask = mask.to(state.mask.device)
            end = int(kept.sum(axis=1).max())
            moved = torch.from_numpy(order).to(state.ids.device)
            state.ids[:, start:] = state.ids[:, start:].gather(1, moved)
            for layer in [] if state.whole else state.cache.layers:
                index = moved[:, None, :, None].expand(
                    -1, layer.keys.shape[1], -1, layer.keys.shape[3]
                )
                layer.keys[:, :, start:] = layer.keys[:, :, start:].gather(2, index)
                index = index[..., :1].expand(-1, -1, -1, layer.values.shape[3])
                layer.values[:, :, start:] = layer.values[:, :, start:].gather(2, index)
        state.ids = state.ids[:, : start + end]
        state.mask = torch.cat([state.mask[:, :start], mask[:, :end]], dim=1)
        if state.whole or end == opened:
            return
        if start + end:
            state.cache.crop(end - opened)
            self._close_gaps(state)
        else:  # a cache of no columns would still insist on its number of rows
            state.cache = None

    def _close_gaps(self, state: _State) -> None:
        """Move texts together where much of a batch is gaps: rows keep different numbers of drafts.

        Keys know their positions, so they can stand in any column. Moving costs what a read costs
        that appends to the cache, and is done once in many reads.
        """
        columns, longest = state.mask.shape[1], int(state.mask.sum(dim=1).max())
        if columns <= 1.25 * longest + _SLACK:
            return
        order = state.mask.argsort(dim=1, stable=True)[:, -longest:]
        state.ids, state.mask = state.ids.gather(1, order), state.mask.gather(1, order)
        index = order[:, None, :, None]
        for layer in state.cache.layers:
            layer.keys = torch.take_along_dim(layer.keys, index, dim=2)
            layer.values = torch.take_along_dim(layer.values, index, dim=2)

    @torch.inference_mode()
    def select(self, state: _State, rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """See `BlockModel.select`."""
        chosen = torch.from_numpy(rows).to(state.ids.device)
        state.ids, state.mask = state.ids[chosen], state.mask[chosen]
        state.parents = state.parents[rows]
        if state.cache is not None:
            state.cache.batch_select_indices(chosen)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Where tokens stand in their texts: (batch, n) -> (batch, n) int64; padding is anywhere."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def _full_attention(config: Any) -> bool:
    """Whether every layer keeps the keys and values of the whole text, column by column."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError):  # not known to transformers: assume nothing
        return False
    return all(type(layer) is DynamicLayer for layer in layers)


def without_layers(model: Any, layers: Sequence[int]) -> Any:
    """The same model without some of its layers: a draft that costs no memory for weights.

    layers: numbers of the layers to leave out, from 0. Which ones can be missed differs from model
    to model (of SmolLM2-135M: 5, 12, 17 and 26); the first and the last hardly ever. Returns a
    transformers model; raises DraftError if the model has no list of layers or none like these.
    """
    total = len(getattr(getattr(model, "model", None), "layers", ()))
    if not total:
        raise DraftError(
            f"{type(model).__name__} has no list of layers at model.layers. Pass a transformers "
            "model that has one (of a loaded model, its .model), or another model as the draft."
        )
    out = set(layers)
    if not out or not out < set(range(total)):
        raise DraftError(
            f"{type(model).__name__} has layers 0 to {total - 1}; name some of them, not all, to "
            f"leave out: got {sorted(out)}."
        )
    # Parameters and buffers are in the memo already, so the copy points to the same ones.
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    small = copy.deepcopy(model, shared)
    keep = [number for number in range(total) if number not in out]
    small.model.layers = torch.nn.ModuleList([small.model.layers[i] for i in keep])
    for number, layer in enumerate(small.model.layers):
        for part in layer.modules():  # some families ask the layer, some its attention
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    small.config.num_hidden_layers = len(keep)
    kinds = getattr(small.config, "layer_types", None)
    if kinds is not None:
        small.config.layer_types = [kinds[i] for i in keep]
    return small
