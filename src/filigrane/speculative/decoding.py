"""The loop that every method shares: draft, read once, verify, keep what stays.

It runs the models, owns the histories and the noise, and leaves every decision to the method. A
block costs one target call whatever the method; rows of a batch that are finished leave it.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from filigrane.contexts import History, TokenIds, as_token_ids
from filigrane.embedding import Generated, Sampling, refuse_unmarkable
from filigrane.errors import (
    DraftError,
    LogitsError,
    ModelError,
    SchemeError,
    TokenError,
    VocabularyMismatch,
)
from filigrane.keys import MarkingKey, SecretWords
from filigrane.prf import BLOCK_WORDS
from filigrane.speculative.base import Method, Noise, Position, Verdict
from filigrane.speculative.drafts import TEXT, Branch, Drafter, ModelDrafter, chain
from filigrane.speculative.laws import law_of
from filigrane.speculative.models import BlockModel, pad_left

MAX_DRAFT_LENGTH: Final = 64

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculated(Generated):
    """One written text, and how it came about, block by block.

    method: tag; emitted: tokens of each block that are in the text; accepted, proposed: draft
    tokens kept, and offered on the longest path; nodes: draft tokens that the target read; all
    (blocks,) int64. One target call per block. log_probs: (n,) float64, log P of each token under
    the target's law after temperature, top-k and top-p; seconds: (blocks,) float64, when each block
    was ready, of the time spent writing.
    """

    method: str
    emitted: Counts
    accepted: Counts
    proposed: Counts
    nodes: Counts
    log_probs: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]

    @property
    def tokens_per_call(self) -> float:
        """Tokens of this text per call of the target; 0.0 for an empty text."""
        return int(self.emitted.sum()) / max(1, self.emitted.size)


@dataclass(slots=True, repr=False)
class _Row:
    """A text being written."""

    number: int
    prompt: list[int]
    words: npt.NDArray[np.uint32] | None
    history: History
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    marked: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    counts: list[tuple[int, int, int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    done: bool = False


@dataclass(slots=True)
class _Tree:
    """What was drafted for a row: branches[i].token leads to places[i]."""

    root: Position
    branches: list[Branch] = field(default_factory=list)
    places: list[Position] = field(default_factory=list)
    depth: int = 0

    def path(self, verdict: Verdict) -> list[int]:
        """The branches that a verdict keeps."""
        found = []
        for here, token in zip(verdict.positions[:-1], verdict.tokens, strict=False):
            after = here.then[here.tokens.index(token)]
            found.append(next(i for i, place in enumerate(self.places) if place is after))
        return found


class Session:
    """A batch that is being written. Iterate for the new tokens of every block, as they come.

    Each step yields one (n_i,) int64 array per prompt, empty for texts that have ended; `results`
    says at any time what has been written so far, also when a step has failed. Iterating again goes
    on where the last time stopped. Arguments: see `generate`.
    """

    def __init__(
        self,
        target: BlockModel,
        draft: BlockModel | Drafter | None,
        prompts: Sequence[npt.ArrayLike],
        max_new_tokens: int,
        keys: Sequence[MarkingKey | None],
        method: Method,
        *,
        draft_length: int = 4,
        rng: np.random.Generator,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        slots: Sequence[int | None] | None = None,
        earlier: Sequence[npt.ArrayLike] = (),
    ) -> None:
        self.method = method
        self.sampling = sampling or Sampling()
        self._target = target
        _check(target, draft, method, draft_length)
        self._drafter = (
            ModelDrafter(draft, self.sampling) if isinstance(draft, BlockModel) else draft
        )
        self._depth = draft_length if method.drafted else 0
        self._limit = max_new_tokens
        self._stop = frozenset(stop)
        self._keys = list(keys)
        texts = [as_token_ids(prompt).tolist() for prompt in prompts]
        if not len(texts) == len(self._keys) == len(slots or texts):
            raise SchemeError(
                f"{len(texts)} prompts, {len(self._keys)} keys and {len(slots or texts)} slots; "
                "pass one of each per text."
            )
        if [] in texts:
            raise TokenError(
                f"prompt {texts.index([])} is empty; begin with the model's start token (BOS)."
            )
        if any(key is not None for key in self._keys):
            if not method.marks:
                raise SchemeError(
                    f"{method.name} leaves text unmarked; pass None for its keys, or choose a "
                    "method that marks, such as otmc."
                )
            refuse_unmarkable(method.scheme, self.sampling)
        width = method.scheme.context_width
        # A generator of its own for each row: what one draws does not depend on the others.
        self._rows = [
            _Row(number, text, self._words(key, slot, own), History(width, earlier), own)
            for number, (text, key, slot, own) in enumerate(
                zip(texts, keys, slots or [None] * len(texts), rng.spawn(len(texts)), strict=True)
            )
        ]
        for row in self._rows:
            row.done = self._limit <= 0

    def __repr__(self) -> str:
        return f"Session({self.method.tag!r}, rows={len(self._rows)})"

    def _words(
        self, key: MarkingKey | None, slot: int | None, rng: np.random.Generator
    ) -> npt.NDArray[np.uint32] | None:
        """The keys of the method's streams, (streams, 8) uint32."""
        if key is None:
            return None
        if slot is not None and slot not in range(key.slots):
            raise SchemeError(f"{key.name} has slots 0 to {key.slots - 1}, got {slot}.")
        chosen = int(rng.integers(key.slots)) if slot is None else slot
        label = self.method.scheme.label
        words = [key.prf_keys(label + suffix)[chosen] for suffix in self.method.streams]
        return np.stack(words).view(SecretWords)

    def __iter__(self) -> Iterator[list[TokenIds]]:
        """Write on, from wherever the texts stand."""
        before = max((row.seconds[-1] for row in self._rows if row.seconds), default=0.0)
        start = time.perf_counter() - before
        active = [row for row in self._rows if not row.done]
        if not active:
            return
        state = self._target.open(len(active))
        pending = [row.prompt + row.tokens for row in active]
        if self._drafter is not None and self._depth:
            self._drafter.begin(pending)
        while active:
            trees = self._draft(active)
            self._read(state, active, pending, trees)
            step: list[TokenIds] = [np.empty(0, dtype=np.int64) for _ in self._rows]
            paths = []
            for row, tree in zip(active, trees, strict=True):
                verdict = self.method.verify(tree.root, row.rng)
                paths.append(tree.path(verdict))
                step[row.number] = self._take(row, tree, verdict)
                row.seconds.append(time.perf_counter() - start)
            yield step
            stay = [at for at, row in enumerate(active) if not row.done]
            if not stay:
                return
            self._settle(state, active, pending, trees, paths)
            if len(stay) < len(active):
                self._target.select(state, np.asarray(stay, dtype=np.int64))
                if self._drafter is not None and self._depth:
                    self._drafter.select(stay)
                active = [active[at] for at in stay]
            pending = [row.tokens[-1:] for row in active]

    # ------------------------------------------------------------ drafting

    def _draft(self, active: list[_Row]) -> list[_Tree]:
        """Draft for every row, depth by depth."""
        trees = [_Tree(Position(self._noise(row, []))) for row in active]
        ends = [[TEXT] for _ in active]
        gaps = [{TEXT: 0.0} for _ in active]
        for depth in range(self._depth):
            for at, row in enumerate(active):
                # The target adds one token of its own, so the last one is never drafted.
                if depth >= self._limit - len(row.tokens) - 1:
                    ends[at] = []
            if not any(ends):
                break
            assert self._drafter is not None
            laws = self._drafter.extend([tree.branches for tree in trees], ends)
            for at, row in enumerate(active):
                offers = []
                for end, law in zip(ends[at], laws[at], strict=True):
                    if law is None:
                        continue
                    here = trees[at].root if end == TEXT else trees[at].places[end]
                    here.q = law
                    for token, gap in self.method.propose(law, here.noise, row.rng):
                        offers.append((gaps[at][end] + gap, end, token))
                # Stable: equal gaps (one draft) keep the order in which they were offered.
                offers.sort(key=lambda offer: offer[0])
                ends[at] = []
                for gap, end, token in offers[: self.method.branching]:
                    place = self._branch(row, trees[at], end, token)
                    gaps[at][place] = gap
                    if token not in self._stop:
                        ends[at].append(place)
        return trees

    def _branch(self, row: _Row, tree: _Tree, end: int, token: int) -> int:
        """Add a drafted token; returns its index."""
        path = [token]
        place = end
        while place != TEXT:
            path.append(tree.branches[place].token)
            place = tree.branches[place].parent
        here = tree.root if end == TEXT else tree.places[end]
        here.tokens.append(token)
        here.then.append(Position(self._noise(row, path[::-1])))
        tree.branches.append(Branch(token, end))
        tree.places.append(here.then[-1])
        tree.depth = max(tree.depth, len(path))
        return len(tree.branches) - 1

    def _noise(self, row: _Row, path: list[int]) -> Noise:
        """The noise of the position after the row's text and some drafted tokens."""
        from filigrane.kernels.prf import blocks

        streams = len(self.method.streams)
        if row.words is not None:
            for token in path:
                row.history.push(token)
            window = row.history.window() if row.history.fresh() else None
            row.history.rollback(len(path))
            if window is not None:
                windows = np.array([window] * streams, dtype=np.uint32)
                return Noise(blocks(np.asarray(row.words), windows), True)
        private = row.rng.integers(0, 2**32, size=(streams, BLOCK_WORDS), dtype=np.uint32)
        return Noise(private, False)

    # ------------------------------------------------------------ reading and keeping

    def _read(
        self, state: Any, active: list[_Row], pending: list[list[int]], trees: list[_Tree]
    ) -> None:
        """One call of the target: the law at every position of every tree."""
        tokens, valid = pad_left(pending)
        start, drafted = tokens.shape[1], max(len(tree.branches) for tree in trees)
        tokens = np.pad(tokens, ((0, 0), (0, drafted)))
        valid = np.pad(valid, ((0, 0), (0, drafted)))
        parents = chain(valid)
        straight = True
        for at, tree in enumerate(trees):
            for i, branch in enumerate(tree.branches):
                tokens[at, start + i], valid[at, start + i] = branch.token, True
                parents[at, start + i] = start + branch.parent  # TEXT is -1, the last one pending
                straight &= branch.parent == i - 1
        logits = self._target.read(
            state, tokens, valid, last=drafted + 1, parents=None if straight else parents
        )
        for at, (row, tree) in enumerate(zip(active, trees, strict=True)):
            try:
                for i, place in enumerate([tree.root, *tree.places]):
                    place.p = law_of(logits[at, i], self.sampling)
            except LogitsError as error:
                raise LogitsError(f"row {row.number}: the target's {error}") from None

    def _take(self, row: _Row, tree: _Tree, verdict: Verdict) -> TokenIds:
        """Append what was decided to a row, up to its end."""
        taken = verdict.tokens[: self._limit - len(row.tokens)]
        for at, token in enumerate(taken):
            if token in self._stop:
                taken = taken[: at + 1]
                row.done = True
                break
        row.done |= len(row.tokens) + len(taken) == self._limit
        if self.method.spends_discarded:
            drafted = [branch.token for branch in tree.branches]
            for token in drafted:
                row.history.push(token)
            row.history.rollback(len(drafted), spent=True)
        for token, here in zip(taken, verdict.positions, strict=False):
            row.history.push(token)
            row.marked.append(here.noise.marked)
            row.log_probs.append(math.log(max(here.target.probability(token), 1e-300)))
        row.tokens += taken
        kept = len(verdict.tokens) - 1
        row.counts.append((len(taken), kept, tree.depth, len(tree.branches)))
        return np.asarray(taken, dtype=np.int64)

    def _settle(
        self,
        state: Any,
        active: list[_Row],
        pending: list[list[int]],
        trees: list[_Tree],
        paths: list[list[int]],
    ) -> None:
        """Cut both models back to the text; its last token has not been read yet."""
        _, valid = pad_left(pending)
        start, drafted = valid.shape[1], max(len(tree.branches) for tree in trees)
        kept = np.pad(valid, ((0, 0), (0, drafted)))
        for at, path in enumerate(paths):
            kept[at, [start + place for place in path]] = True
        self._target.keep(state, kept)
        if self._drafter is not None and self._depth:
            self._drafter.settle(
                [row.prompt + row.tokens for row in active],
                [tree.branches for tree in trees],
                paths,
            )

    # ------------------------------------------------------------ what was written

    def results(self) -> list[Speculated]:
        """One record per prompt, of what has been written so far."""
        found = []
        for row, key in zip(self._rows, self._keys, strict=True):
            counts = np.array(row.counts, dtype=np.int64).reshape(-1, 4)
            found.append(
                Speculated(
                    tokens=np.array(row.tokens, dtype=np.int64),
                    marked=np.array(row.marked, dtype=np.bool_),
                    scheme=self.method.scheme.tag,
                    key=None if key is None else key.name,
                    method=self.method.tag,
                    emitted=counts[:, 0],
                    accepted=counts[:, 1],
                    proposed=counts[:, 2],
                    nodes=counts[:, 3],
                    log_probs=np.array(row.log_probs),
                    seconds=np.array(row.seconds),
                )
            )
        return found


def generate(
    target: BlockModel,
    draft: BlockModel | Drafter | None,
    prompts: Sequence[npt.ArrayLike],
    max_new_tokens: int,
    keys: Sequence[MarkingKey | None],
    method: Method,
    *,
    draft_length: int = 4,
    rng: np.random.Generator,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    slots: Sequence[int | None] | None = None,
    earlier: Sequence[npt.ArrayLike] = (),
) -> list[Speculated]:
    """Write one text per prompt, several tokens per target call.

    target, draft: models of one vocabulary, or `NGram()` for drafts out of the text itself, or None
    with a method that takes none; prompts: (n_i,) token ids each, not empty; keys: one per prompt,
    None leaves a text unmarked; method: see `filigrane.speculative.METHODS`; draft_length: K,
    tokens drafted per block, 1 to 64; rng: all private randomness; sampling: applied to target and
    draft alike, before anything else; stop: ids that end a text; slots, earlier: as
    `filigrane.embed_batch`.

    Raises DraftError if target, draft and draft_length do not fit, VocabularyMismatch for models of
    different vocabularies, SchemeError and UnsupportedDecoding if no mark could be carried, all
    before anything is generated; LogitsError when a model's logits leave nothing to draw.
    """
    session = Session(
        target,
        draft,
        prompts,
        max_new_tokens,
        keys,
        method,
        draft_length=draft_length,
        rng=rng,
        sampling=sampling,
        stop=stop,
        slots=slots,
        earlier=earlier,
    )
    for _ in session:
        pass
    return session.results()


def _check(
    target: BlockModel, draft: BlockModel | Drafter | None, method: Method, draft_length: int
) -> None:
    """Raise unless target, draft and draft length fit together."""
    if not isinstance(target, BlockModel):
        raise ModelError(
            f"{type(target).__name__} cannot be a target; wrap it, for example in "
            "filigrane.adapters.transformers.TransformersModel(model)."
        )
    if not method.drafted:
        return
    for model in (target, draft) if method.branching > 1 else ():
        if isinstance(model, BlockModel) and not model.reads_trees:
            raise DraftError(
                f"{method.form} drafts several tokens per position, and one of the models cannot "
                "read them together (it takes full attention to do that); use a method with one "
                "draft per position, such as otmc."
            )
    if draft is None:
        raise DraftError(f"{method.name} needs a draft: a smaller model, or NGram().")
    if not 1 <= draft_length <= MAX_DRAFT_LENGTH:
        raise DraftError(
            f"draft_length must be an integer in 1..{MAX_DRAFT_LENGTH}, got {draft_length!r}. "
            "For one target call per token use the method watermark, or autoregressive."
        )
    if isinstance(draft, Drafter):
        return
    if not hasattr(draft, "read"):
        raise DraftError(
            f"{type(draft).__name__} cannot draft; pass a BlockModel or NGram(), for example "
            "filigrane.adapters.transformers.TransformersModel(model)."
        )
    known = target.vocabulary is not None and draft.vocabulary is not None
    same = target.vocabulary == draft.vocabulary if known else target.vocab_size == draft.vocab_size
    if not same:
        raise VocabularyMismatch(
            f"target ({target.vocab_size} ids) and draft ({draft.vocab_size} ids) do not share a "
            "vocabulary: their ids mean different tokens. Choose a draft of the same family."
        )
    if target.size is not None and draft.size is not None and draft.size > target.size:
        raise DraftError(
            f"the draft ({draft.size:,} parameters) is larger than the target ({target.size:,}): "
            "it would only slow things down. Did you swap them?"
        )
