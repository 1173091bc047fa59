"""Whose text is it? Every candidate is tested, the number of candidates is paid for, and if nobody
fits nobody is named.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Corpus, Evidence, collect
from filigrane.detection import scanned, totals
from filigrane.errors import FiligraneError
from filigrane.keys import MarkingKey, SecretWords, UserKeys
from filigrane.schemes.base import Scheme, require_scheme

_CHUNK = 1 << 14
"""Candidates per piece of work: small enough to show progress and to stay in a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One key and its evidence; log_pvalue includes the price of all candidates (family-wise)."""

    name: str
    index: int
    log_pvalue: float
    statistic: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceResult:
    """The most likely keys, best first. It has no truth value: ask `named(alpha)`.

    candidates: the best few, with Holm-Sidak adjusted log p; n_candidates: keys tested; n_tests:
    keys times slots, the number that was corrected for; n_scored, n_tokens, n_repeated and scheme
    as in DetectionResult.
    """

    candidates: tuple[Candidate, ...]
    n_candidates: int
    n_tests: int
    n_scored: int
    n_tokens: int
    n_repeated: int
    scheme: str
    method: str

    def named(self, alpha: float) -> tuple[str, ...]:
        """Reported candidates significant at family-wise level alpha; empty if nobody fits.

        With probability at least 1 - alpha over the keys, no innocent candidate is among them.
        """
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must be inside (0, 1), got {alpha}.")
        limit = math.log(alpha)
        return tuple(c.name for c in self.candidates if c.log_pvalue <= limit)

    def __bool__(self) -> NoReturn:
        raise TypeError("a TraceResult is not true or false; ask result.named(alpha).")


def _scan(
    evidence: Evidence,
    words: Callable[[int, int, int], npt.NDArray[np.uint32]],
    n: int,
    slots: int,
    scheme: Scheme,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> npt.NDArray[np.float64]:
    """Summed scores, (slots, n) float64; words(slot, a, b) gives the keys of a..b-1, (8, b - a)."""
    from filigrane.kernels.scan import over_keys

    rest = scanned(evidence, scheme)
    out = np.empty((slots, n), dtype=np.float64)

    def piece(start: int) -> int:
        stop = min(n, start + _CHUNK)
        for slot in range(slots):
            over_keys(words(slot, start, stop), *rest, out[slot, start:stop])
        return stop - start

    done = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            for count in pool.map(piece, range(0, n, _CHUNK)):
                done += count
                if progress is not None:
                    progress(done, n)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def trace(
    tokens: npt.ArrayLike | Corpus,
    keys: UserKeys | Sequence[MarkingKey],
    scheme: Scheme,
    *,
    top: int = 10,
    vocab_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TraceResult:
    """Find who, among the candidates, the text was written for.

    tokens: (n,) ids of one text, or a Corpus; keys: `key.users(n)` or any sequence of keys; top:
    how many candidates to report; workers: threads, all processors by default; progress(done,
    total) is called as the scan goes on. All keys see the same positions, so their p-values are
    ordered as their sums; exact p-values are computed for the best, and corrected for every key and
    slot that was tried. Raises TooShort, TokenError, VocabularyMismatch; FiligraneError for an
    empty list or mixed slots.
    """
    require_scheme(scheme)
    if isinstance(keys, MarkingKey):
        raise FiligraneError(
            f"trace looks among many keys: pass {keys.name}.users(n) or a list of keys; "
            "for one key there is detect."
        )
    if top < 1 or (workers is not None and workers < 1):
        raise FiligraneError(f"top and workers must be at least 1, got {top} and {workers}.")
    evidence = collect(tokens, scheme.context_width, vocab_size=vocab_size)
    n = len(keys)
    if n == 0:
        raise FiligraneError("there is nobody to trace among: pass at least one key.")
    label = scheme.label
    if isinstance(keys, UserKeys):
        users = keys
        slots = users.slots

        def words(slot: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
            return users.prf_key_words(label, slot, start, stop)
    else:
        if any(key.slots != keys[0].slots for key in keys):
            # Unequal slots would give unequal prices; Sidak over all tests wants one number.
            raise FiligraneError(
                "all keys of one trace must have the same number of slots; trace them in groups."
            )
        slots = keys[0].slots
        table = np.stack([key.prf_keys(label) for key in keys]).view(SecretWords)

        def words(slot: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
            return np.ascontiguousarray(table[start:stop, slot].T).view(SecretWords)

    threads = workers or os.cpu_count() or 1
    sums = _scan(evidence, words, n, slots, scheme, threads, progress)
    best = sums.max(axis=0)
    count = min(top, n)
    leaders = np.argpartition(-best, count - 1)[:count]
    leaders = leaders[np.argsort(-best[leaders], kind="stable")]
    candidates: list[Candidate] = []
    floor = -math.inf
    for rank, index in enumerate(leaders.tolist()):
        key = keys[index]
        # The scan's float sums are rounded; the reported ones come from the single-key path.
        slot = int(sums[:, index].argmax())
        exact = totals(evidence, key.prf_keys(label)[slot : slot + 1], scheme)[0]
        raw = scheme.log_sf(exact, evidence.n_scored)
        # Holm-Sidak: the best candidate pays for all, the second for all but the first, and so on.
        floor = max(floor, stats.sidak(raw, (n - rank) * slots))
        candidates.append(Candidate(name=key.name, index=index, log_pvalue=floor, statistic=exact))
    return TraceResult(
        candidates=tuple(candidates),
        n_candidates=n,
        n_tests=n * slots,
        n_scored=evidence.n_scored,
        n_tokens=evidence.n_tokens,
        n_repeated=evidence.n_repeated,
        scheme=scheme.tag,
        method=f"exact tail, Holm-Sidak over {n} keys x {slots} slots",
    )
