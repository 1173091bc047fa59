"""What was gathered about a suspect, in the two shapes that can be tested; no key is known here.

    Reading    what the suspect expects after the windows of a text (open, semi-open)
    Exchange   what it answered (closed)

    Tuples     (window, token) pairs, each once: counted, exact p-value     argmax, answers
    Weighted   windows with weights on tokens: summed, saddlepoint p-value  soft, differential

Weights are computed without the key, so every choice made here is valid; a poor one costs power.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import EvidenceError
from filigrane.radioactivity.filter import WindowFilter
from filigrane.radioactivity.rules import Ledger, add, answered, first_rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Document:
    """One text to read.

    tokens: (n,) ids, everything the suspect is to see, prompt first; start: index at which the text
    to score begins; earlier: other sequences that its writer could attend to.
    """

    tokens: TokenIds
    start: int = 0
    earlier: Sequence[TokenIds] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What a suspect expects after the windows of a corpus.

    windows: (n, width) uint32, oldest token first; documents: (n,) int64, which text each is from;
    starts: (n + 1,) int64, the slice of each in the next three; tokens: (m,) uint32, by falling
    probability, so that tokens[starts[i]] is the suspect's argmax; suspect: (m,) float32, P_B;
    base: (m,) float32, P_B0 of the presumed base model, or None; vocab_size: of the tokens, None if
    not known; ledger: positions dropped on the way. Probabilities that are not listed count as
    zero.
    """

    windows: npt.NDArray[np.uint32]
    documents: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    suspect: npt.NDArray[np.float32]
    base: npt.NDArray[np.float32] | None
    vocab_size: int | None
    ledger: Ledger

    def __post_init__(self) -> None:
        n, m = self.windows.shape[0], self.tokens.shape[0]
        fits = self.documents.shape == (n,) and self.starts.shape == (n + 1,)
        fits &= self.suspect.shape == (m,) and (self.base is None or self.base.shape == (m,))
        if not fits or (n and (self.starts[0] != 0 or self.starts[-1] != m)):
            raise EvidenceError("the arrays of a Reading do not fit together; read the text anew.")
        if n and (np.diff(self.starts) < 1).any():
            raise EvidenceError("a position of a Reading lists no token; read the text anew.")

    @property
    def width(self) -> int:
        """Tokens per window."""
        return int(self.windows.shape[1])

    def __len__(self) -> int:
        return int(self.windows.shape[0])

    @classmethod
    def join(cls, parts: Sequence["Reading"]) -> "Reading":
        """Several readings as one, in this order. Raises EvidenceError if they do not match."""
        if not parts:
            raise EvidenceError("there is nothing to join: no text has been read.")
        if len({(part.width, part.base is None, part.vocab_size) for part in parts}) > 1:
            raise EvidenceError(
                "these readings differ in window width, vocabulary or whether they have a base "
                "model; test them one by one and combine the p-values."
            )
        ends = np.cumsum([0] + [part.tokens.shape[0] for part in parts])
        bases = [part.base for part in parts if part.base is not None]
        return cls(
            windows=np.concatenate([part.windows for part in parts]),
            documents=np.concatenate([part.documents for part in parts]),
            starts=np.concatenate(
                [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
                + [ends[-1:]]
            ),
            tokens=np.concatenate([part.tokens for part in parts]),
            suspect=np.concatenate([part.suspect for part in parts]),
            base=np.concatenate(bases) if bases else None,
            vocab_size=parts[0].vocab_size,
            ledger=add([part.ledger for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exchange:
    """One request to a suspect and its answer, as token ids of the model whose mark is tested.

    prompt: (p,) everything that was sent; answer: (a,) what came back.
    """

    prompt: TokenIds
    answer: TokenIds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuples:
    """Windows and the one token that followed each; no pair twice.

    rows: (n, width + 1) uint32, window then token; name: the statistic; ledger: what was dropped;
    n_documents: texts or requests they come from.
    """

    rows: npt.NDArray[np.uint32]
    name: str
    ledger: Ledger
    n_documents: int

    @property
    def width(self) -> int:
        """Tokens per window."""
        return int(self.rows.shape[1]) - 1

    def __len__(self) -> int:
        return int(self.rows.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weighted:
    """Windows and weights on tokens after each; no window twice.

    windows: (n, width) uint32; starts: (n + 1,) int64, the slice of each in tokens and weights;
    tokens: (m,) uint32; weights: (m,) float64, any sign; name: the statistic; n_candidates:
    positions that were summed into these windows; ledger; n_documents.
    """

    windows: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float64]
    name: str
    n_candidates: int
    ledger: Ledger
    n_documents: int

    @property
    def width(self) -> int:
        """Tokens per window."""
        return int(self.windows.shape[1])

    def __len__(self) -> int:
        return int(self.windows.shape[0])

    @property
    def concentration(self) -> float:
        """Largest share of one window in the sum of squared weights: near 1 / n is good."""
        squares = np.add.reduceat(self.weights**2, self.starts[:-1])
        return float(squares.max() / squares.sum())


def argmax(reading: Reading) -> Tuples:
    """The published statistic: the suspect's most likely token after each window, each pair once.

    Sander et al. 2024, section 4.2 (reading mode with de-duplication of tuples).
    """
    best = reading.tokens[reading.starts[:-1]]
    rows = np.concatenate([reading.windows, best[:, None]], axis=1)
    return _once(rows, reading.ledger, "argmax count", _count(reading.documents))


def soft(reading: Reading) -> Weighted:
    """Weights are the suspect's whole law, as far as it is listed: P_B."""
    return _weighted(reading, reading.suspect.astype(np.float64), "soft")


def differential(reading: Reading) -> Weighted:
    """Weights are what training has changed, P_B - P_B0: preferences that the base had cancel.

    A base model that is not the true one costs power and nothing else, as long as it is chosen
    before anything is looked at. Raises EvidenceError for a reading without a base model.
    """
    if reading.base is None:
        raise EvidenceError(
            "this text was read without a base model; read it again with one (--base), "
            "or use the statistic argmax or soft."
        )
    change = reading.suspect.astype(np.float64) - reading.base.astype(np.float64)
    return _weighted(reading, change, "differential")


def answers(
    exchanges: Iterable[Exchange],
    width: int,
    *,
    window_filter: WindowFilter | None = None,
    prompt_rule: bool = True,
    tuple_rule: bool = True,
) -> Tuples:
    """What a suspect wrote, by the rules of closed mode (Sander et al. 2024, section 4.3).

    Windows of the request itself are left out; with a filter, also those that it does not hold; a
    pair counts once. prompt_rule, tuple_rule: False shows what the rules are for, never for a
    p-value. Raises EvidenceError if nothing is left or the filter has another width.
    """
    parts: list[npt.NDArray[np.uint32]] = []
    ledgers: list[Ledger] = []
    for exchange in exchanges:
        rows, ledger = answered(exchange.prompt, exchange.answer, width, prompt_rule=prompt_rule)
        parts.append(rows)
        ledgers.append(ledger)
    if not parts:
        raise EvidenceError("there are no answers to test; collect some first.")
    rows, ledger = np.concatenate(parts), add(ledgers)
    if window_filter is not None:
        held = window_filter.holds(rows[:, :-1])
        ledger["not in the filter"] = int((~held).sum())
        rows = rows[held]
        ledger["scored"] = ledger.pop("scored") - ledger["not in the filter"]
    name = "answer count" if window_filter is None else "answer count, filtered"
    return _once(rows, ledger, name, len(parts), tuple_rule)


def exchange(prompt: npt.ArrayLike, answer: npt.ArrayLike, vocab_size: int | None) -> Exchange:
    """An Exchange of checked ids. Raises TokenError, VocabularyMismatch."""
    return Exchange(
        prompt=as_token_ids(prompt, vocab_size), answer=as_token_ids(answer, vocab_size)
    )


def _once(
    rows: npt.NDArray[np.uint32], ledger: Ledger, name: str, n_documents: int, rule: bool = True
) -> Tuples:
    kept = first_rows(rows) if rule else np.arange(rows.shape[0])
    if not kept.size:
        raise EvidenceError(
            "nothing is left to score: "
            + ", ".join(f"{count} {rule}" for rule, count in ledger.items())
            + ". Give longer or more texts, or another filter."
        )
    after = {rule: count for rule, count in ledger.items() if rule != "scored"}
    after["pair scored before"] = rows.shape[0] - kept.size
    after["scored"] = int(kept.size)
    return Tuples(
        rows=np.ascontiguousarray(rows[kept]), name=name, ledger=after, n_documents=n_documents
    )


def _weighted(reading: Reading, weights: npt.NDArray[np.float64], name: str) -> Weighted:
    """Sum the weights of all positions that share a window."""
    if not len(reading):
        raise EvidenceError("nothing is left to score; give longer or more texts.")
    windows, group = np.unique(reading.windows, axis=0, return_inverse=True)
    lengths = np.diff(reading.starts)
    cells = np.repeat(group.reshape(-1).astype(np.uint64), lengths) << np.uint64(32)
    cells |= reading.tokens.astype(np.uint64)
    distinct, place = np.unique(cells, return_inverse=True)
    sums = np.zeros(distinct.shape[0])
    np.add.at(sums, place.reshape(-1), weights)
    owners = (distinct >> np.uint64(32)).astype(np.int64)
    if not math.isfinite(float(np.abs(sums).sum())):
        raise EvidenceError("the suspect's probabilities hold NaN; read the text anew in float32.")
    if not sums.any():
        raise EvidenceError(
            "all weights are zero: suspect and base model are the same model; name another base."
        )
    return Weighted(
        windows=np.ascontiguousarray(windows),
        starts=np.searchsorted(owners, np.arange(windows.shape[0] + 1)).astype(np.int64),
        tokens=(distinct & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        weights=sums,
        name=name,
        n_candidates=len(reading),
        ledger=dict(reading.ledger),
        n_documents=_count(reading.documents),
    )


def _count(documents: npt.NDArray[np.int64]) -> int:
    return int(np.unique(documents).shape[0])
