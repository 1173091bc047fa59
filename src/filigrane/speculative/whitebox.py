"""Published scores of unbiased reweights, two of which know the model's law of every position.

    detect_u         Chernoff's bound on a sum of uniforms (Hu et al. 2023, appendix D)
    detect_llr       likelihood ratio of the marked law over the model's
    detect_maximin   the same, made robust against a perturbed model (Hu et al. 2023, section 5.3)

Hu et al. 2023 is arXiv 2310.10669; Hu and Huang 2024 (arXiv 2410.20418) use the scores for
speculative sampling. All three p-values are bounds, kept so that published numbers can be compared;
`filigrane.detect` has an exact tail, needs no laws and is what to use on text. Each function states
its null hypothesis, and they are not the same. All are for methods of one key stream.

This module knows token ids, a key, a scheme and laws; it does not know where laws come from.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Corpus, Evidence
from filigrane.detection import DetectionResult, totals
from filigrane.errors import LogitsError, SchemeError
from filigrane.keys import MarkingKey
from filigrane.prf import FIELD, Words, field, upper_uniform
from filigrane.schemes.base import Scheme
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.unbiased import DeltaReweight, GammaReweight
from filigrane.speculative.detectors import blocks_of, evidence_for, result_of

Array = npt.NDArray[np.float64]

Laws = Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]
"""One (ids, probs) per token: the law it was drawn from, after temperature, top-k and top-p."""

BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Total variation by which the marked law may be off, in the published settings."""


def u_scores(block: Words, tokens: npt.ArrayLike, scheme: Scheme) -> Array:
    """The U score of each position: block (..., 8), tokens (...) -> (...), uniform without a mark.

    gumbel: 1 - x of the token's number, as exp(-exp(-G)) of its keyed Gumbel G; gamma: its place in
    the keyed order (here the number itself, so that no vocabulary is needed and the law is uniform
    and not discrete); delta: the alignment score of the scheme. Rounded down to the lattice, never
    above a uniform variable in law.
    """
    if isinstance(scheme, Gumbel):
        return 1.0 - upper_uniform(field(block[..., FIELD], tokens))
    if isinstance(scheme, GammaReweight | DeltaReweight):
        return scheme.score(block, tokens)
    raise SchemeError(f"{scheme.name} has no U score; use gumbel, gamma or delta.")


def detect_u(
    tokens: npt.ArrayLike | Corpus,
    key: MarkingKey,
    scheme: Scheme,
    *,
    vocab_size: int | None = None,
) -> DetectionResult:
    """The published U score: log p <= n min over t >= 0 of log((exp(t) - 1)/t) - t mean(U).

    Null hypothesis: the key is random and independent of the text; the text is fixed and arbitrary.
    No laws are needed. The bound is loose by about log(n)/2 + 1 nats; for gamma and delta
    `filigrane.detect` has the exact tail of this very sum, for gumbel a better sum with an exact
    tail.

    tokens: (n,) ids of one text without its prompt, or a Corpus. Raises SchemeError for a scheme
    without this score, and what `detect` raises.
    """
    evidence = evidence_for(tokens, key, scheme, vocab_size)
    words = key.prf_keys(scheme.label)
    if isinstance(scheme, Gumbel):
        sums = [
            float(u_scores(blocks_of(evidence, w), evidence.tokens, scheme).sum()) for w in words
        ]
    elif isinstance(scheme, GammaReweight | DeltaReweight):
        sums = totals(evidence, words, scheme)
    else:
        raise SchemeError(f"{scheme.name} has no U score; use gumbel, gamma or delta.")
    logs = [stats.log_chernoff_irwin_hall(total, evidence.n_scored) for total in sums]
    method = "Chernoff bound on a sum of uniforms; null: random key, any text"
    return result_of(evidence, key, scheme, sums, logs, method)


def _law(laws: Laws, position: int) -> tuple[npt.NDArray[np.uint32], Array]:
    ids, probs = laws[position]
    tokens, p = np.asarray(ids), np.asarray(probs, dtype=np.float64)
    if tokens.ndim != 1 or p.shape != tokens.shape or tokens.dtype.kind not in "iu":
        raise LogitsError(
            f"law {position} must be (ids (s,), probs (s,)), got shapes {tokens.shape}, {p.shape}."
        )
    if not (p >= 0.0).all() or not math.isclose(float(p.sum()), 1.0, rel_tol=1e-6):
        raise LogitsError(
            f"probabilities of law {position} must be at least 0 and sum to one, their sum is "
            f"{float(p.sum()):g}; apply temperature, top-k and top-p and renormalise."
        )
    return tokens.astype(np.uint32), p / p.sum()


def _ratios(
    evidence: Evidence, laws: Laws, words: Words, scheme: Scheme
) -> list[tuple[Array, Array, int]]:
    """Per position (p, marked / p, index of the text's token), over tokens with p > 0.

    Positions whose token the law excludes are left out: their score is 0 under every key.
    """
    found = []
    blocks = blocks_of(evidence, words)
    for block, token, position in zip(
        blocks, evidence.tokens, evidence.positions.tolist(), strict=True
    ):
        ids, p = _law(laws, position)
        ids, p = ids[p > 0.0], p[p > 0.0]
        here = np.flatnonzero(ids == token)
        if here.size:
            # Thirty rounds of a tournament may leave -1e-17.
            marked = np.maximum(scheme.reweight(p, block, ids), 0.0)
            found.append((p, marked / p, int(here[0])))
    return found


def _check_laws(evidence: Evidence, laws: Laws) -> None:
    if len(laws) != evidence.n_tokens:
        raise LogitsError(
            f"{len(laws)} laws for {evidence.n_tokens} tokens; pass one (ids, probs) per token, "
            "the law that the token was drawn from."
        )


def detect_llr(
    tokens: npt.ArrayLike | Corpus,
    laws: Laws,
    key: MarkingKey,
    scheme: Scheme,
    *,
    vocab_size: int | None = None,
) -> DetectionResult:
    """Log-likelihood ratio: log p <= -sum of log R(P)(y) / P(y) over the scored positions y.

    Null hypothesis, either of two: (a) the key is random and independent of text and laws, the text
    arbitrary; because E[R(P)(y)] = P(y) over the key for every y, laws of another model or prompt
    cost power only. (b) Every token was drawn from its law, the key fixed. Under both the ratio has
    mean one and Markov's inequality gives the bound. For a one-hot reweight (gumbel, delta) a
    single token that is not the marked one puts the sum to minus infinity: that is what
    `detect_maximin` repairs.

    tokens: (n,) ids of one text, or a Corpus; laws: (ids (s,), probs (s,)) for each of its tokens,
    after temperature, top-k and top-p. A token that its law excludes scores 0. Slots are corrected
    by Bonferroni, because under (b) they share their randomness. Raises LogitsError for laws that
    do not fit, SchemeError for a biased scheme, and what `detect` raises.
    """
    evidence = evidence_for(tokens, key, scheme, vocab_size)
    _check_laws(evidence, laws)
    sums = []
    for words in key.prf_keys(scheme.label):
        ratios = [ratio[index] for _, ratio, index in _ratios(evidence, laws, words, scheme)]
        with np.errstate(divide="ignore"):
            sums.append(float(np.log(ratios).sum()))
    logs = [min(0.0, -total) for total in sums]
    method = "Markov bound on a likelihood ratio; null: random key, or text drawn from the laws"
    return result_of(evidence, key, scheme, sums, logs, method, stats.bonferroni)


def clamps(p: Array, ratio: Array, budgets: npt.ArrayLike = BUDGETS) -> tuple[Array, Array]:
    """Bounds (low, high) of the robust likelihood ratio for each budget, (budgets,) each.

    p: (s,) > 0, the model's law; ratio: (s,) = marked law / p. Huber's least favourable pair for a
    marked law known up to total variation a (Huber 1965, "A robust version of the probability ratio
    test"; Hu et al. 2023, appendix B.5, with the model's law exact): among all laws within a of the
    marked one, the least favourable is p clip(ratio, low, high) with

        sum (ratio - high)+ p = a = sum (low - ratio)+ p.

    Over any set B, (Q(B) - a)/P(B) <= high, with equality for {ratio > high}; so high is the
    largest such quotient over the tokens sorted by ratio, and low the smallest (Q(B) + a)/P(B) from
    the other end. Where low >= high the marked law cannot be told from p: both are then 1.
    """
    order = np.argsort(-ratio, kind="stable")
    p, q = p[order], (p * ratio)[order]
    a = np.asarray(budgets, dtype=np.float64)[:, None]
    high = ((np.cumsum(q) - a) / np.cumsum(p)).max(axis=1)
    low = ((np.cumsum(q[::-1]) + a) / np.cumsum(p[::-1])).min(axis=1)
    # A hair of slack, so that rounding does not make a ratio of an unmarked law.
    same = low >= high * (1.0 - 1e-12)
    return np.where(same, 1.0, low), np.where(same, 1.0, high)


def detect_maximin(
    tokens: npt.ArrayLike | Corpus,
    laws: Laws,
    key: MarkingKey,
    scheme: Scheme,
    *,
    budgets: Sequence[float] = BUDGETS,
    vocab_size: int | None = None,
) -> DetectionResult:
    """Maximin LLR: log p <= log(number of budgets) - largest sum of clamped log ratios.

    Per token the log-likelihood ratio is clamped to the interval of `clamps` for the budget a. Null
    hypothesis: EVERY TOKEN WAS DRAWN FROM ITS LAW, whatever the key. Then each clamped ratio, being
    the ratio of a law to the model's, has mean one given the past. It is not the null hypothesis of
    `detect`: for text of another origin, or with other laws than the text was drawn from (another
    prompt, temperature or model), the bound says nothing. Over budgets and over slots Bonferroni's
    correction is paid.

    tokens, laws and errors as in `detect_llr`; budgets: numbers in [0, 1), fixed without the text.
    """
    if len(budgets) == 0 or not all(0.0 <= a < 1.0 for a in budgets):
        raise SchemeError(f"budgets must be numbers in [0, 1), at least one; got {budgets!r}.")
    evidence = evidence_for(tokens, key, scheme, vocab_size)
    _check_laws(evidence, laws)
    sums = []
    for words in key.prf_keys(scheme.label):
        total = np.zeros(len(budgets))
        for p, ratio, index in _ratios(evidence, laws, words, scheme):
            low, high = clamps(p, ratio, budgets)
            with np.errstate(divide="ignore"):
                total += np.log(np.clip(ratio[index], low, high))
        sums.append(float(total.max()))
    logs = [min(0.0, math.log(len(budgets)) - total) for total in sums]
    method = f"Markov bound, best of {len(budgets)} budgets; null: text drawn from the laws"
    return result_of(evidence, key, scheme, sums, logs, method, stats.bonferroni)
