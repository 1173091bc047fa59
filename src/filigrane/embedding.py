"""Writing marked text: the batched step that every generator uses, and a small loop around it.

This module knows nothing of frameworks or tokenizers: a language model is anything that turns token
ids into logits. `MarkedSampler` holds what one batch needs between steps (key and history of each
row) and is what engines call; `stream` and `embed` are the loop for everybody else.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Never

import numpy as np
import numpy.typing as npt

from filigrane import prf
from filigrane.contexts import History, TokenIds, as_token_ids
from filigrane.errors import (
    LogitsError,
    ModelError,
    SchemeError,
    SecretLeakError,
    UnsupportedDecoding,
    VocabularyMismatch,
)
from filigrane.keys import MarkingKey, SecretWords
from filigrane.schemes.base import Candidates, Scheme, require_scheme

Logits = npt.NDArray[np.float32]
"""Next-token logits, shape (batch, V)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a distribution is made of logits, in this order; the order and meaning of transformers.

    temperature: divides the logits, at least 1e-6; 0 is greedy. top_k: keep the k largest logits
    (and ties), 0 is off. top_p: keep the smallest set of most probable tokens whose mass reaches
    top_p, 1 is off. Raises UnsupportedDecoding for values outside their range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise UnsupportedDecoding(f"{name} must be a number, got {value!r}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer):
            raise UnsupportedDecoding(f"top_k must be an integer (0 is off), got {self.top_k!r}.")
        if self.temperature != 0.0 and not 1e-6 <= self.temperature < float("inf"):
            raise UnsupportedDecoding(
                f"temperature must be 0 (greedy) or between 1e-6 and infinity, "
                f"got {self.temperature}."
            )
        if self.top_k < 0:
            raise UnsupportedDecoding(f"top_k must be >= 0 (0 is off), got {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise UnsupportedDecoding(f"top_p must be in (0, 1] (1 is off), got {self.top_p}.")

    @property
    def greedy(self) -> bool:
        """Whether there is nothing random in a step."""
        return self.temperature == 0.0 or self.top_k == 1


def refuse_unmarkable(scheme: Scheme, sampling: Sampling) -> None:
    """Raise UnsupportedDecoding if this decoding would leave text of this scheme unmarked."""
    if sampling.greedy and scheme.acts_on == "distribution":
        raise UnsupportedDecoding(
            f"{scheme.name} cannot mark greedy decoding: with one certain token there is nothing "
            "to choose. Sample (temperature > 0, top_k != 1), or use greenlist, which can."
        )


def truncate(logits: npt.NDArray[np.float32], sampling: Sampling) -> npt.NDArray[np.int64] | None:
    """Indices, ascending, of the tokens that top-k and top-p leave of one row; None for all.

    logits: (V,) float32 before temperature.
    """
    from filigrane.kernels.draw import nucleus, top_k

    kept = None
    if 0 < sampling.top_k < logits.shape[0]:
        kept = top_k(logits, sampling.top_k)
    if sampling.top_p == 1.0:
        return kept
    pool = logits if kept is None else logits[kept]
    found = np.empty(pool.shape[0], np.int64)
    count = nucleus(
        pool, 1.0 / sampling.temperature, sampling.top_p, np.empty(pool.shape[0]), found
    )
    if count < 0:
        return kept  # NaN, +inf or nothing: whoever draws says so
    chosen: npt.NDArray[np.int64] = np.sort(found[:count])
    return chosen if kept is None else kept[chosen]


class MarkedSampler:
    """Draws the next token of every row of a batch, marking where the rule of `contexts` says so.

    keys: one per row; None leaves a row unmarked. slots: which slot of its key a row uses, one per
    row; None, or no slots at all, draws it from rng. earlier: texts whose windows count as used
    (for example, previous answers of a conversation), the same for every row; a detector must be
    given them too to agree. Each row is independent: it draws what it would draw alone, up to the
    private randomness of rng.
    """

    def __init__(
        self,
        scheme: Scheme,
        keys: Sequence[MarkingKey | None],
        *,
        sampling: Sampling | None = None,
        rng: np.random.Generator,
        slots: Sequence[int | None] | None = None,
        earlier: Sequence[npt.ArrayLike] = (),
    ) -> None:
        require_scheme(scheme)
        if slots is not None and len(slots) != len(keys):
            raise SchemeError(
                f"{len(slots)} slots for {len(keys)} keys; pass one per row, or None."
            )
        self.scheme = scheme
        self.sampling = sampling or Sampling()
        if any(key is not None for key in keys):
            refuse_unmarkable(scheme, self.sampling)
        self.histories = [History(scheme.context_width, earlier) for _ in keys]
        self.marked: list[list[bool]] = [[] for _ in keys]
        self.slots: list[int | None] = []
        self._rng = rng
        self._has_key = np.array([key is not None for key in keys], dtype=np.bool_)
        self._key_words = np.zeros((len(keys), 8), dtype=np.uint32).view(SecretWords)
        for row, (key, slot) in enumerate(zip(keys, slots or [None] * len(keys), strict=True)):
            if key is None:
                self.slots.append(None)
                continue
            if slot is not None and slot not in range(key.slots):
                raise SchemeError(f"{key.name} has slots 0 to {key.slots - 1}, got {slot}.")
            chosen = int(rng.integers(key.slots)) if slot is None else slot
            self.slots.append(chosen)
            self._key_words[row] = key.prf_keys(scheme.label)[chosen]
        self._workspace: Any = None
        self._ids = np.empty(0, dtype=np.uint32)

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError(
            "a MarkedSampler holds keys and cannot be pickled; make it where it is used."
        )

    def __repr__(self) -> str:
        return f"MarkedSampler({self.scheme.tag!r}, rows={len(self.histories)})"

    def blocks(self) -> tuple[npt.NDArray[np.bool_], prf.Words]:
        """For the next position of each row: whether it is to be marked, and its PRF block.

        Returns (batch,) bool and (batch, 8) uint32 (zero where unmarked).
        """
        from filigrane.kernels.prf import blocks

        marked = self._has_key & np.array([history.fresh() for history in self.histories])
        out = np.zeros((len(self.histories), prf.BLOCK_WORDS), dtype=np.uint32)
        rows = np.flatnonzero(marked)
        if rows.size:
            windows = np.array([self.histories[row].window() for row in rows], dtype=np.uint32)
            out[rows] = blocks(np.asarray(self._key_words)[rows], windows)
        return marked, out

    def sample(self, logits: npt.ArrayLike) -> TokenIds:
        """Draw one token per row and remember it.

        logits: (batch, V), raw (before temperature and truncation), numpy floats of any width (of
        a torch tensor: logits.float().cpu().numpy()). Returns (batch,) int64. Raises LogitsError
        for NaN, +inf or a row of -inf, and for a wrong shape; nothing is remembered then.
        """
        from filigrane.kernels.draw import Workspace, drawable

        try:
            array = np.asarray(logits)
        except (TypeError, RuntimeError) as error:
            raise LogitsError(
                "logits must be a numpy array; of a torch tensor pass "
                "logits.detach().float().cpu().numpy()."
            ) from error
        if array.dtype.kind not in "fiu":
            raise LogitsError(f"logits must be real numbers, got {array.dtype}.")
        with np.errstate(over="ignore"):  # what float32 cannot hold is an infinity, said below
            rows = np.ascontiguousarray(array, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[0] != len(self.histories) or rows.shape[1] == 0:
            raise LogitsError(
                f"logits must have shape ({len(self.histories)}, vocabulary), got {rows.shape}."
            )
        vocab_size = rows.shape[1]
        if self._ids.shape[0] != vocab_size:
            if self._ids.shape[0]:
                raise VocabularyMismatch(
                    f"logits are {vocab_size} wide, earlier steps had {self._ids.shape[0]}."
                )
            self._ids = np.arange(vocab_size, dtype=np.uint32)
            self._workspace = Workspace(vocab_size)
        marked, blocks = self.blocks()
        noise = self._rng.integers(0, 2**32, size=(rows.shape[0], 4), dtype=np.uint32)
        tokens = np.empty(rows.shape[0], dtype=np.int64)
        for row in range(rows.shape[0]):
            token = -1
            if drawable(rows[row]):
                token = self._draw(rows[row], bool(marked[row]), blocks[row], noise[row])
            if token < 0:
                raise LogitsError(
                    f"row {row}: logits hold NaN or +inf (perhaps after division by the "
                    "temperature), or nothing above -inf; no token can be drawn. Check the model's "
                    "dtype (float16 overflows) and your logit masks."
                )
            tokens[row] = token
        for row, token in enumerate(tokens.tolist()):
            self.push(row, token, marked=bool(marked[row]))
        return tokens

    def push(self, row: int, token: int, *, marked: bool = False) -> None:
        """Remember a token of a row that was not drawn here (forced by the caller)."""
        self.histories[row].push(token)
        self.marked[row].append(marked)

    def _draw(self, logits: Logits, marked: bool, block: prf.Words, noise: prf.Words) -> int:
        from filigrane.kernels.draw import race

        scheme = self.scheme
        if marked and scheme.acts_on == "logits":
            logits = bias_logits(scheme, logits, self._ids, block, self._workspace.biased)
        if self.sampling.greedy:
            return int(np.argmax(logits))
        kept = truncate(logits, self.sampling)
        scale = 1.0 / self.sampling.temperature
        if kept is None:
            candidates = Candidates(logits, self._ids, scale)
        else:
            candidates = Candidates(logits[kept], kept.astype(np.uint32), scale)
        if marked:
            index = scheme.draw(candidates, block, noise, self._workspace)
        else:
            index = int(race(*candidates, *noise))
        return index if kept is None or index < 0 else int(kept[index])


def bias_logits(
    scheme: Scheme,
    logits: Logits,
    ids: npt.NDArray[np.uint32],
    block: prf.Words,
    out: Logits,
) -> Logits:
    """Logits of one row with the scheme's bias, (V,) float32, written to out and returned.

    Raises SchemeError for a scheme that does not act on logits.
    """
    from filigrane.kernels.draw import bias
    from filigrane.schemes.greenlist import GreenList

    if not isinstance(scheme, GreenList):
        raise SchemeError(f"{scheme.name} does not act on logits.")
    threshold, delta = np.uint32(scheme.threshold), np.float32(scheme.delta)
    bias(logits, ids, *block[prf.FIELD], threshold, delta, out)
    return out


class LanguageModel(ABC):
    """What `stream` needs of a model: logits for the next token of every row, step by step."""

    @abstractmethod
    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Logits, Any]:
        """Start a batch: prompts (n_i,) int64 each -> logits (batch, V) and a state."""

    @abstractmethod
    def step(self, tokens: TokenIds, state: Any) -> tuple[Logits, Any]:
        """Append one token to every row: tokens (batch,) int64 -> logits (batch, V) and a state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One written text: what was drawn and where it is marked.

    tokens: (n,) int64 without the prompt; marked: (n,) bool; slot is not shown, because whoever
    can sort texts by slot can attack the slots one by one.
    """

    tokens: TokenIds
    marked: npt.NDArray[np.bool_]
    scheme: str
    key: str | None

    @property
    def n_marked(self) -> int:
        """Number of marked positions."""
        return int(self.marked.sum())


def stream(
    lm: LanguageModel,
    prompts: Sequence[npt.ArrayLike],
    max_new_tokens: int,
    sampler: MarkedSampler,
    *,
    stop: Sequence[int] = (),
) -> Iterator[TokenIds]:
    """Generate a batch and yield (batch,) int64 tokens per step; -1 for rows that have stopped.

    stop: ids that end a row (they are still yielded once). If the caller breaks off, what was drawn
    so far is in what was yielded; `sampler.marked` says which of it is marked, up to a row's end
    (a stopped row's place in the batch is drawn on until all have stopped).
    """
    if not isinstance(lm, LanguageModel):
        raise ModelError(
            f"{type(lm).__name__} is not a LanguageModel; wrap it, for example in "
            "filigrane.adapters.transformers.TransformersModel(model)."
        )
    rows = [as_token_ids(prompt) for prompt in prompts]
    if len(rows) != len(sampler.histories):
        raise LogitsError(f"{len(rows)} prompts for {len(sampler.histories)} keys; pass one each.")
    running = np.ones(len(rows), dtype=np.bool_)
    ends = frozenset(stop)
    if max_new_tokens <= 0 or not rows:
        return
    logits, state = lm.prefill(rows)
    for step in range(max_new_tokens):
        tokens = sampler.sample(logits)
        yield np.where(running, tokens, -1)
        running &= np.array([token not in ends for token in tokens.tolist()])
        if not running.any() or step == max_new_tokens - 1:
            return
        logits, state = lm.step(tokens, state)


def embed_batch(
    lm: LanguageModel,
    prompts: Sequence[npt.ArrayLike],
    max_new_tokens: int,
    keys: Sequence[MarkingKey | None],
    scheme: Scheme,
    *,
    rng: np.random.Generator,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    slots: Sequence[int | None] | None = None,
    earlier: Sequence[npt.ArrayLike] = (),
) -> list[Generated]:
    """Write one text per prompt, each under its own key (None leaves it unmarked).

    Arguments as `embed`, lists for prompt, key and slot. Raises UnsupportedDecoding before anything
    is generated if the mark cannot be carried.
    """
    sampler = MarkedSampler(scheme, keys, sampling=sampling, rng=rng, slots=slots, earlier=earlier)
    lengths = np.zeros(len(keys), dtype=np.int64)
    drawn: list[TokenIds] = []
    for tokens in stream(lm, prompts, max_new_tokens, sampler, stop=stop):
        drawn.append(tokens)
        lengths += tokens >= 0
    table = np.stack(drawn, axis=1) if drawn else np.empty((len(keys), 0), dtype=np.int64)
    return [
        Generated(
            tokens=table[row, : lengths[row]],
            marked=np.array(sampler.marked[row][: lengths[row]], dtype=np.bool_),
            scheme=scheme.tag,
            key=None if key is None else key.name,
        )
        for row, key in enumerate(keys)
    ]


def embed(
    lm: LanguageModel,
    prompt: npt.ArrayLike,
    max_new_tokens: int,
    key: MarkingKey | None,
    scheme: Scheme,
    *,
    rng: np.random.Generator,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    slot: int | None = None,
    earlier: Sequence[npt.ArrayLike] = (),
) -> Generated:
    """Write one marked text.

    prompt: (n,) token ids; key: whose mark, or None for none; rng: all private randomness (which
    slot, unmarked positions, draws inside a marked law); sampling: temperature and truncation;
    stop: ids that end the text; slot: fix the key's slot, for texts that will be tested together as
    one Corpus (evidence adds up within a slot); earlier: previous texts whose windows count as
    used. Raises UnsupportedDecoding if this scheme cannot mark this decoding.
    """
    return embed_batch(
        lm,
        [prompt],
        max_new_tokens,
        [key],
        scheme,
        rng=rng,
        sampling=sampling,
        stop=stop,
        slots=[slot],
        earlier=earlier,
    )[0]
