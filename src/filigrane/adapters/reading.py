"""Reading mode: what a causal model of transformers expects after the windows of texts.

    read         documents -> Readings, batch by batch, for `filigrane.radioactivity`
    losses       how badly a model predicts each text (the baseline without a mark needs it)
    chosen_rows  a model's forward pass that computes logits for some positions only

This module knows nothing of keys or schemes. Which positions count is decided by
`radioactivity.rules`, on whole documents: a text longer than the model's context is shown to the
model in overlapping pieces, but the tape never starts anew at their borders.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from filigrane.adapters.alignment import Alignment
from filigrane.adapters.models import LoadedModel
from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import MissingDependency, ModelError, TooShort, VocabularyMismatch
from filigrane.radioactivity.evidence import Document, Reading
from filigrane.radioactivity.membership import calibrated
from filigrane.radioactivity.rules import Ledger, add, read_positions, windows_of

try:
    import torch
except ImportError as error:
    raise MissingDependency(
        "reading with a model needs more packages: pip install 'filigrane[transformers]'"
    ) from error

__all__ = ["Report", "calibrated_losses", "chosen_rows", "losses", "read"]

Report = Callable[[int, int | None, str], None]
"""Takes what is done, what there is to do (None if unknown) and a few words."""

_CELLS: Final = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Probabilities that are held at once, (rows times V); four bytes each, and some copies."""

NO_BORDER: Final = "no token border of the suspect there"
"""The rule under which an alignment's losses stand in a ledger."""


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """What the model is shown at once: ids (n,) and the rows (k,) whose predictions count.

    places: (k,) where those predictions belong among all of the batch.
    """

    ids: TokenIds
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


def read(
    model: Any,
    documents: Sequence[Document],
    width: int,
    *,
    base: Any = None,
    alignment: Alignment | None = None,
    vocab_size: int | None = None,
    tokenizer_sha256: str | None = None,
    top: int = 64,
    batch_size: int = 8,
    context: int | None = None,
    attention_rule: bool = True,
    first: int = 0,
    report: Report | None = None,
) -> Iterator[Reading]:
    """Read texts with a suspect, and perhaps a presumed base model; one Reading per batch.

    model, base: models of transformers, or what `adapters.models.load` returned, on any device.
    width: tokens of a window. vocab_size: of the documents' ids (default: the width of the
    suspect's logits); tokenizer_sha256: fingerprint of the documents' tokenizer, compared with a
    loaded model's. alignment: needed if the suspect has another tokenizer; its `require` is called
    here unless the caller has done so, with all the texts of a run that goes on. top: how many
    tokens a position keeps, of P_B and, with a base, also of |P_B - P_B0|. context: longest input
    (default: what the model was made for); longer texts are read in pieces that overlap by a
    quarter.
    attention_rule: see `read_positions`. first: number of the first document, so that a caller can
    store each Reading and go on where it stopped: read(model, documents[n:], ..., first=n).

    Probabilities are those of a float32 softmax. Raises VocabularyMismatch if ids and models do not
    belong together, EvidenceError if too few positions can be aligned.
    """
    if top < 1 or batch_size < 1:
        raise ValueError(f"top and batch_size must be at least 1; got {top} and {batch_size}.")
    suspect = _Laws(model, context)
    reference = None if base is None else _Laws(base, suspect.context)
    if reference is not None:  # both see the same
        suspect.context = reference.context
    _refuse_strangers(suspect, reference, alignment, tokenizer_sha256)
    if alignment is not None:
        if vocab_size not in (None, alignment.vocab_size):
            raise VocabularyMismatch(
                f"the documents have a vocabulary of {vocab_size}, the alignment was made for "
                f"{alignment.vocab_size}; make it with that vocab_size."
            )
        vocab_size = alignment.vocab_size
        if not alignment.summary().positions:
            alignment.require([document.tokens for document in documents])
    size = vocab_size or suspect.width
    mapping = None if alignment is None else torch.from_numpy(alignment.mapping)

    def batches() -> Iterator[Reading]:
        for start in range(0, len(documents), batch_size):
            if report is not None:
                report(start, len(documents), "reading")
            batch = documents[start : start + batch_size]
            yield _read(
                batch, width, first + start, suspect, reference, alignment, mapping, size,
                top, attention_rule,
            )  # fmt: skip
        if report is not None:
            report(len(documents), len(documents), "reading")

    return batches()


def losses(
    model: Any,
    texts: Sequence[npt.ArrayLike],
    *,
    batch_size: int = 8,
    report: Report | None = None,
) -> npt.NDArray[np.float64]:
    """Mean negative log-probability (nats per token) of each text under a model, (n,) float64.

    texts: (n_i,) ids each, at least two and no more than the model's context; the first token of
    each is not predicted. Raises TooShort, ModelError for longer ones, VocabularyMismatch.
    """
    laws = _Laws(model, None)
    ids = [as_token_ids(text) for text in texts]
    if any(text.shape[0] < 2 for text in ids):
        raise TooShort("a text of one token has no loss; pass pieces of at least two (of 256).")
    longest = max((text.shape[0] for text in ids), default=0)
    if longest > laws.context:
        raise ModelError(
            f"a text has {longest} tokens, the model sees {laws.context}; cut it into pieces first."
        )
    found = np.empty(len(ids), dtype=np.float64)
    order = np.argsort([text.shape[0] for text in ids], kind="stable")
    for start in range(0, len(ids), batch_size):
        if report is not None:
            report(start, len(ids), "measuring the loss")
        batch = order[start : start + batch_size]
        ends = np.cumsum([0] + [ids[i].shape[0] - 1 for i in batch])
        pieces = [
            _Piece(ids[i], np.arange(ids[i].shape[0] - 1), np.arange(begin, end))
            for i, begin, end in zip(batch, ends, ends[1:], strict=False)
        ]
        wanted = torch.from_numpy(np.concatenate([ids[i][1:] for i in batch]))
        surprise = np.empty(int(ends[-1]), dtype=np.float64)
        for places, logits in laws.logits(pieces, _block([laws])):
            truth = wanted[torch.from_numpy(places)].to(logits.device)
            surprise[places] = (
                torch.nn.functional.cross_entropy(logits, truth, reduction="none").cpu().numpy()
            )
        found[batch] = [surprise[begin:end].mean() for begin, end in itertools.pairwise(ends)]
    if report is not None:
        report(len(ids), len(ids), "measuring the loss")
    return found


def calibrated_losses(
    loaded: LoadedModel,
    pieces: Sequence[TokenIds],
    *,
    batch_size: int = 8,
    report: Report | None = None,
) -> npt.NDArray[np.float64]:
    """`membership.calibrated` of pieces of text, (n_i,) ids each: what the baseline compares."""
    mean = losses(loaded, pieces, batch_size=batch_size, report=report)
    sums = [float(value) * (piece.shape[0] - 1) for value, piece in zip(mean, pieces, strict=True)]
    return calibrated(sums, [loaded.tokenizer.decode(piece.tolist()) for piece in pieces])


@contextlib.contextmanager
def chosen_rows(model: Any, rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """While it is open, the model computes logits for some positions only.

    rows: (n,) int64, indices into the batch's positions, batch * length of them in reading order.
    The logits come out as (1, n, V), everything a model does to them after its head included. What
    is yielded holds the hidden states of those rows, (n, d), once the model has run; it stays empty
    if the model has no head that can be reached, and then its logits are those of all positions.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    caught: list[torch.Tensor] = []
    if not isinstance(head, torch.nn.Module):
        yield caught
        return

    def select(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0].flatten(0, -2)[rows]
        caught.append(hidden)
        return (hidden[None], *arguments[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield caught
    finally:
        hook.remove()


class _Laws:
    """A model that is asked for its logits at chosen positions of many texts."""

    def __init__(self, model: Any, context: int | None) -> None:
        self.fingerprint = model.tokenizer_sha256 if isinstance(model, LoadedModel) else None
        self.model = (model.model if isinstance(model, LoadedModel) else model).eval()
        config = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError("this model is an encoder-decoder; reading mode needs a causal model.")
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        self.width = int(config.vocab_size if head is None else head.weight.shape[0])
        self._known = int(self.model.get_input_embeddings().weight.shape[0])
        self._head: Any = head
        self._plain: bool | None = None if isinstance(head, torch.nn.Module) else False
        accepted = inspect.signature(self.model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}
        limit = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.context = int(limit if context is None else min(limit, context))
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens; got {self.context}.")

    @property
    def device(self) -> Any:
        return self.model.device

    def pieces(
        self, ids: TokenIds, rows: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> Iterator[_Piece]:
        """One text in pieces the model can see; every row is in one, with what precedes it."""
        highest = int(ids.max(initial=0))
        if highest >= self._known:
            raise VocabularyMismatch(
                f"a document holds token id {highest}, but the model knows {self._known} ids: it "
                "was encoded by another tokenizer; pass an alignment."
            )
        stride = max(1, self.context - self.context // 4)
        begin = 0
        while rows.size:
            if rows[0] >= begin + self.context:
                begin += stride * -(-int(rows[0] + 1 - begin - self.context) // stride)
            inside = int(np.searchsorted(rows, begin + self.context))
            # Nothing after the last row that counts can change what comes before it.
            shown = ids[begin : rows[inside - 1] + 1]
            yield _Piece(shown, rows[:inside] - begin, places[:inside])
            rows, places = rows[inside:], places[inside:]

    @torch.inference_mode()
    def logits(
        self, pieces: Sequence[_Piece], block: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
        """Places (k,) and the float32 logits (k, V) that belong there, `block` at a time."""
        if not pieces:
            return
        length = max(piece.ids.shape[0] for piece in pieces)
        # Padding on the right: nothing in a causal model looks at it, so no mask is needed.
        table = np.zeros((len(pieces), length), dtype=np.int64)
        for row, piece in enumerate(pieces):
            table[row, : piece.ids.shape[0]] = piece.ids
        flat = np.concatenate([row * length + piece.rows for row, piece in enumerate(pieces)])
        places = np.concatenate([piece.places for piece in pieces])
        ids = torch.from_numpy(table).to(self.device)
        rows = torch.from_numpy(flat).to(self.device)
        if self._plain is not False:
            # One row goes through the whole model and shows whether its logits are what the head
            # gives; if so, the head runs block by block and no logits fill the memory.
            with self._narrow(rows) as caught:
                shown = self.model(input_ids=ids, **self._options).logits
            if self._plain is None:
                self._plain = bool(caught) and torch.equal(self._head(caught[0][None, :1]), shown)
            if self._plain:
                for start in range(0, len(places), block):
                    out = self._head(caught[0][start : start + block])
                    yield places[start : start + block], out.float()
                return
        with chosen_rows(self.model, rows) as caught:
            out = self.model(input_ids=ids, **self._options).logits
        out = out[0] if caught else out.flatten(0, 1)[rows]
        for start in range(0, len(places), block):
            yield places[start : start + block], out[start : start + block].float()

    @contextlib.contextmanager
    def _narrow(self, rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """As `chosen_rows`, but the head itself sees only the first of them."""
        with chosen_rows(self.model, rows) as caught:
            hook = self._head.register_forward_pre_hook(
                lambda module, arguments: (arguments[0][:, :1], *arguments[1:])
            )
            try:
                yield caught
            finally:
                hook.remove()


def _block(models: Sequence[_Laws]) -> int:
    """How many positions' laws are held at once."""
    cells = _CELLS.get(models[0].device.type, _CELLS["cpu"])
    return max(1, cells // max(laws.width for laws in models))


def _refuse_strangers(
    suspect: _Laws, base: _Laws | None, alignment: Alignment | None, fingerprint: str | None
) -> None:
    """Raise VocabularyMismatch for models and ids that do not belong together."""
    mine, theirs = suspect.fingerprint, None if base is None else base.fingerprint
    if mine and theirs and mine != theirs:
        raise VocabularyMismatch(
            "suspect and base model have different tokenizers: their probabilities cannot be "
            "subtracted. Name a base model of the suspect's own family, or none."
        )
    if alignment is not None:
        if mine and mine != alignment.suspect_sha256:
            raise VocabularyMismatch(
                "this alignment was made for another tokenizer than the suspect's; "
                "make one from the suspect's own tokenizer."
            )
        if fingerprint and fingerprint != alignment.writer_sha256:
            raise VocabularyMismatch(
                "this alignment was made for another tokenizer than the documents'; "
                "make one from the tokenizer of the model that wrote them."
            )
    elif fingerprint and mine and mine != fingerprint:
        raise VocabularyMismatch(
            "the suspect's tokenizer is not the one the documents were encoded with; its ids mean "
            "other strings. Pass an alignment (filigrane.adapters.alignment), or test its answers "
            "(closed mode), re-tokenised with the documents' tokenizer."
        )


def _read(
    batch: Sequence[Document],
    width: int,
    first: int,
    suspect: _Laws,
    base: _Laws | None,
    alignment: Alignment | None,
    mapping: torch.Tensor | None,
    vocab_size: int,
    top: int,
    attention_rule: bool,
) -> Reading:
    windows: list[npt.NDArray[np.uint32]] = []
    numbers: list[npt.NDArray[np.int64]] = []
    ledgers: list[Ledger] = []
    pieces: list[_Piece] = []
    count = 0
    for number, document in enumerate(batch, start=first):
        ids = as_token_ids(document.tokens, vocab_size)
        positions, ledger = read_positions(
            ids, document.start, width, earlier=document.earlier, attention_rule=attention_rule
        )
        shown, rows = ids, positions
        places = np.arange(count, count + positions.shape[0])
        if alignment is not None:
            shown, prefixes = _aligned(ids, positions, alignment)
            positions = np.array([t for t, _ in prefixes], dtype=np.int64)
            ledger[NO_BORDER] = ledger.pop("scored") - positions.shape[0]
            ledger["scored"] = positions.shape[0]
            common: list[tuple[int, int]] = []
            for place, (_, seen) in enumerate(prefixes, start=count):
                row = seen.shape[0] - 1
                if np.array_equal(seen, shown[: row + 1]):
                    common.append((row, place))
                else:  # the whole text is cut otherwise here: shown on its own
                    pieces += suspect.pieces(seen, np.array([row]), np.array([place]))
            rows, places = np.array(common, dtype=np.int64).reshape(-1, 2).T
        ledgers.append(ledger)
        windows.append(windows_of(ids, width)[positions - (width - 1)])
        numbers.append(np.full(positions.shape, number, dtype=np.int64))
        pieces += suspect.pieces(shown, rows, places)
        count += positions.shape[0]
    models = [suspect] if base is None else [suspect, base]
    found: list[_Picked] = []
    # Texts of about the same length together, as many at once as there are documents in a batch.
    pieces.sort(key=lambda piece: piece.ids.shape[0])
    for start in range(0, len(pieces), len(batch)):
        group = pieces[start : start + len(batch)]
        streams = [laws.logits(group, _block(models)) for laws in models]
        for answers in zip(*streams, strict=True):
            places = answers[0][0]
            laws = [_law(logits.to(suspect.device), mapping, vocab_size) for _, logits in answers]
            if alignment is not None:
                alignment.count(places.shape[0], float(laws[0].sum()))
            found.append(_pick(places, laws[0], None if base is None else laws[1], top))
    starts, tokens, chances, before = _in_order(found, count)
    return Reading(
        windows=np.concatenate(windows),
        documents=np.concatenate(numbers),
        starts=starts,
        tokens=tokens,
        suspect=chances,
        base=None if base is None else before,
        vocab_size=vocab_size,
        ledger=add(ledgers),
    )


def _aligned(
    ids: TokenIds, positions: npt.NDArray[np.int64], alignment: Alignment
) -> tuple[TokenIds, list[tuple[int, TokenIds]]]:
    """A text in the suspect's tokens, and each position that counts with what precedes its guess.

    What the suspect sees before a guess is tokenised without what follows. Cutting the whole text
    and taking the borders that fit would choose positions by the text's next token, which the mark
    has chosen: on two thousand tokens that is enough for a clean model to look guilty.
    """
    whole = alignment.align(ids).tokens
    prefixes = []
    for t in positions.tolist():
        before = alignment.align(ids[: t + 1])
        row = int(before.rows[-1])
        if row >= 0:
            prefixes.append((t, before.tokens[: row + 1]))
    return whole, prefixes


def _law(logits: torch.Tensor, mapping: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """Probabilities (k, vocab_size) float32 on the documents' ids, of logits (k, V)."""
    law = logits.log_softmax(dim=-1).exp_()
    if mapping is not None:
        # One column more takes what has no counterpart.
        mapped = law.new_zeros(law.shape[0], vocab_size + 1)
        known = mapping.to(law.device)[: law.shape[1]]
        return mapped.index_add_(1, known, law[:, : known.shape[0]])[:, :vocab_size]
    if law.shape[1] < vocab_size:  # models of one family pad their vocabulary differently
        return torch.nn.functional.pad(law, (0, vocab_size - law.shape[1]))
    return law[:, :vocab_size]


@dataclass(frozen=True, slots=True, eq=False)
class _Picked:
    """What is kept of some positions: places (k,), lengths (k,), and per token the three others."""

    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    suspect: npt.NDArray[np.float32]
    base: npt.NDArray[np.float32]


def _pick(
    places: npt.NDArray[np.int64], law: torch.Tensor, base: torch.Tensor | None, top: int
) -> _Picked:
    """The `top` largest of P_B and of |P_B - P_B0|: law and base (k, V), by falling P_B."""
    top = min(top, law.shape[1])
    chosen = law.topk(top, sorted=False).indices
    if base is not None:
        changed = (law - base).abs_().topk(top, sorted=False).indices
        chosen = torch.cat([chosen, changed], dim=1)
    chosen = chosen.sort(dim=1).values
    again = torch.zeros_like(chosen, dtype=torch.bool)
    again[:, 1:] = chosen[:, 1:] == chosen[:, :-1]
    # Stable, after sorting by id: of equal probabilities, which bfloat16 makes often, the lowest id
    # comes first, a rule that knows no key.
    chances, order = (
        law.gather(1, chosen).masked_fill_(again, -1.0).sort(dim=1, descending=True, stable=True)
    )
    chosen = chosen.gather(1, order)
    before = torch.zeros_like(chances) if base is None else base.gather(1, chosen)
    kept = (chances >= 0) & ((chances > 0) | (before > 0))
    kept[:, 0] = True  # every position lists its argmax, even if nothing of the law could be mapped
    return _Picked(
        places=places,
        lengths=kept.sum(dim=1).cpu().numpy(),
        tokens=chosen[kept].cpu().numpy().astype(np.uint32),
        suspect=chances[kept].cpu().numpy(),
        base=before[kept].cpu().numpy(),
    )


def _in_order(
    found: Sequence[_Picked], count: int
) -> tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.uint32],
    npt.NDArray[np.float32],
    npt.NDArray[np.float32],
]:
    """starts (count + 1,), tokens, suspect, base: the positions in the order of their places."""
    starts = np.zeros(count + 1, dtype=np.int64)
    for part in found:
        starts[part.places + 1] = part.lengths
    starts = np.cumsum(starts)
    tokens = np.empty(starts[-1], dtype=np.uint32)
    chances = np.empty(starts[-1], dtype=np.float32)
    before = np.empty(starts[-1], dtype=np.float32)
    for part in found:
        offsets = np.cumsum(part.lengths) - part.lengths
        target = np.repeat(starts[part.places] - offsets, part.lengths)
        target += np.arange(part.tokens.shape[0])
        tokens[target], chances[target], before[target] = part.tokens, part.suspect, part.base
    return starts, tokens, chances, before
