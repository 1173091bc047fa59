"""Causal models of transformers for filigrane's own loops: `stream`, `embed`, `speculative`.

    TransformersModel   one model, any batch: cache, masks, positions, trees of drafts, taking back
    without_layers      the same model without some layers, to draft for it

This module knows nothing of keys or schemes.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from filigrane.contexts import TokenIds
from filigrane.embedding import Logits
from filigrane.errors import (
    DraftError,
    LogitsError,
    MissingDependency,
    ModelError,
    TokenError,
    VocabularyMismatch,
)
from filigrane.speculative.models import BlockModel, Mask

try:
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer
except ImportError as error:
    raise MissingDependency(
        "models of transformers need more packages: pip install 'filigrane[transformers]'"
    ) from error

__all__ = ["TransformersModel", "without_layers"]

_SLACK: Final = 32
"""Columns of padding that a cache may hold, besides a quarter of the text."""


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
