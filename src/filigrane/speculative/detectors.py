"""Testing a text that was written with two or three key streams, with exact p-values.

Like `filigrane.detect` this module knows token ids, a key and a scheme, and no model. It does not
know which stream made a token: it weighs both, or reads the keyed coin. What the p-values claim is
what `detect` claims: if text and key are independent, a value this small comes up with at most this
probability over the choice of the key, whatever the text. All streams of slot s of the key belong
together; slots are paid for by Sidak's formula.

    label of the scheme + "/draft"     what was drafted and kept
    label of the scheme + "/target"    what the target wrote: residuals and bonus tokens
    label of the scheme + "/coin"      the acceptance coin, where it is keyed
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.bayes import BayesianScore
from filigrane.contexts import Corpus, Evidence, collect
from filigrane.detection import DetectionResult, totals
from filigrane.errors import FiligraneError, SchemeError
from filigrane.keys import MarkingKey
from filigrane.prf import COIN, Words, open_uniform
from filigrane.schemes.base import Scheme, require_scheme
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.tournament import Tournament
from filigrane.schemes.unbiased import DeltaReweight, GammaReweight

DRAFT, TARGET, COIN_STREAM = "/draft", "/target", "/coin"

_GRAIN = 100
"""Shares of a tournament are rounded to 1/100, so that fused weights are integers."""


def blocks_of(evidence: Evidence, words: Words) -> Words:
    """The block of every scored position under one stream: words (8,) -> (n_scored, 8) uint32."""
    from filigrane.kernels.prf import blocks

    # subok: the words stay an array that does not show itself.
    rows = np.broadcast_to(words, (evidence.n_scored, words.shape[0]), subok=True)
    return blocks(rows, evidence.windows)


def evidence_for(
    tokens: npt.ArrayLike | Corpus, key: MarkingKey, scheme: Scheme, vocab_size: int | None
) -> Evidence:
    """The scored positions, after the checks that every detector here makes.

    Raises SchemeError for what is not an unbiased scheme, FiligraneError for what is not one key,
    and what `collect` raises.
    """
    require_scheme(scheme)
    if not scheme.unbiased:
        raise SchemeError(
            f"{scheme.name} changes the law of the text, so no speculative method carries it; "
            "use gumbel, tournament, gamma or delta."
        )
    if not isinstance(key, MarkingKey):
        raise FiligraneError(
            f"this tests one key: pass a Key or key.user(i), not {type(key).__name__}."
        )
    return collect(tokens, scheme.context_width, vocab_size=vocab_size)


def result_of(
    evidence: Evidence,
    key: MarkingKey,
    scheme: Scheme,
    statistics: list[float],
    logs: list[float],
    method: str,
    correct: Callable[[float, int], float] = stats.sidak,
) -> DetectionResult:
    """The best slot, corrected for all of them; `method` gets the correction's name."""
    best = int(np.argmin(logs))
    if len(logs) > 1:
        name = "Sidak" if correct is stats.sidak else "Bonferroni"
        method += f", {name} over {len(logs)} slots"
    return DetectionResult(
        statistic=statistics[best],
        log_pvalue=correct(logs[best], len(logs)),
        n_scored=evidence.n_scored,
        n_tokens=evidence.n_tokens,
        n_repeated=evidence.n_repeated,
        scheme=scheme.tag,
        key=key.name,
        slot=best,
        slot_log_pvalues=tuple(logs),
        method=method,
    )


def _share(draft_share: float) -> float:
    share = float(draft_share)
    if not 0.0 <= share <= 1.0:
        raise SchemeError(
            f"draft_share must lie in [0, 1], got {draft_share}; it is the guessed share of tokens "
            "that were drafted, chosen without the text."
        )
    return share


def _fused_law(scheme: Scheme, share: float) -> tuple[float, Callable[[float, int], float]]:
    """The share that is used, and log P(share A + (1 - share) B >= total) of n positions."""
    if isinstance(scheme, Gumbel):
        return share, lambda total, n: stats.log_sf_two_gammas(total, n, share)
    if isinstance(scheme, Tournament):
        drafted = round(_GRAIN * share)
        parts = [part for part in (drafted, _GRAIN - drafted) if part]
        weights = [part * weight for part in parts for weight in scheme.weights]

        def bits(total: float, n: int) -> float:
            return stats.log_sf_weighted_bits(round(_GRAIN * total), n, weights)

        return drafted / _GRAIN, bits
    if isinstance(scheme, DeltaReweight | GammaReweight):
        if share in (0.0, 1.0):
            return share, stats.log_sf_irwin_hall
        if share == 0.5:
            return share, lambda total, n: stats.log_sf_irwin_hall(2.0 * total, 2 * n)
        raise SchemeError(
            f"{scheme.name} scores are uniform, and the exact law of their sum with weights "
            f"{share:g} and {1.0 - share:g} is not here; use draft_share=0.5 (or 0 or 1)."
        )
    raise SchemeError(f"no fused law is known for {scheme.name}; use gumbel or tournament.")


def detect_two_key(
    tokens: npt.ArrayLike | Corpus,
    key: MarkingKey,
    scheme: Scheme,
    *,
    draft_share: float = 0.5,
    vocab_size: int | None = None,
) -> DetectionResult:
    """Was this text written by the two-key method under this key?

    The statistic is S = draft_share sum a_draft + (1 - draft_share) sum a_target over all scored
    positions, with the scheme's score a under either stream (SynthID-Text's fast variant, Dathathri
    et al. 2024, supplement I.5; the fused score of engines with two keys). Its tail is exact:
    gumbel, two weighted Gamma sums (`stats.log_sf_two_gammas`); tournament, weighted bits, for
    which the share is rounded to 1/100; gamma and delta, 2n uniforms, with draft_share 1/2 only (or
    0 or 1, one stream alone).

    tokens: (n,) ids of one text without its prompt, or a Corpus; draft_share: in [0, 1], best near
    the share of tokens that were drafted and kept. It has to be fixed without looking at the text:
    trying several and keeping the best is not covered by the p-value. vocab_size: refuse ids at or
    above it. Raises SchemeError for a biased scheme or such a share, and what `detect` raises.
    """
    share = _share(draft_share)
    evidence = evidence_for(tokens, key, scheme, vocab_size)
    share, log_sf = _fused_law(scheme, share)
    drafted = totals(evidence, key.prf_keys(scheme.label + DRAFT), scheme)
    written = totals(evidence, key.prf_keys(scheme.label + TARGET), scheme)
    sums = [share * d + (1.0 - share) * t for d, t in zip(drafted, written, strict=True)]
    logs = [log_sf(total, evidence.n_scored) for total in sums]
    method = f"exact tail of two keys fused with draft share {share:g}"
    return result_of(evidence, key, scheme, sums, logs, method)


def detect_keyed_coin(
    tokens: npt.ArrayLike | Corpus,
    key: MarkingKey,
    scheme: Scheme,
    *,
    threshold: float,
    vocab_size: int | None = None,
) -> DetectionResult:
    """Was this text written by the keyed-coin method under this key?

    He et al. 2026 (arXiv 2602.01428), "Ars-tau": a small acceptance coin suggests that the draft
    was kept, so a position is scored under the draft's stream if its coin r <= threshold and under
    the target's otherwise; r = (COIN word + 1/2) / 2**32 of the block under the coin's stream.
    Without a mark the coin is independent of both scores, so each position has the law of one score
    of the scheme, and the tail is exact.

    tokens: (n,) ids of one text without its prompt, or a Corpus; threshold: tau in [0, 1], for
    example the expected acceptance. IT HAS TO BE FIXED WITHOUT LOOKING AT THE TEXT: a tau fitted to
    the tested text, or the best of several, makes the p-value too small. vocab_size: refuse ids at
    or above it. Raises SchemeError for a biased scheme or such a threshold, and what `detect`
    raises.
    """
    tau = float(threshold)
    if not 0.0 <= tau <= 1.0:
        raise SchemeError(
            f"threshold must lie in [0, 1], got {threshold}; pass the acceptance rate expected "
            "of the two models, fixed without the text."
        )
    evidence = evidence_for(tokens, key, scheme, vocab_size)
    sums, logs = [], []
    for draft, target, coin in zip(
        key.prf_keys(scheme.label + DRAFT),
        key.prf_keys(scheme.label + TARGET),
        key.prf_keys(scheme.label + COIN_STREAM),
        strict=True,
    ):
        kept = open_uniform(blocks_of(evidence, coin)[:, COIN]) <= tau
        scores = np.where(
            kept,
            scheme.score(blocks_of(evidence, draft), evidence.tokens),
            scheme.score(blocks_of(evidence, target), evidence.tokens),
        )
        sums.append(float(scores.sum()))
        logs.append(scheme.log_sf(sums[-1], evidence.n_scored))
    method = f"exact tail, route read from the keyed coin at {tau:g}"
    return result_of(evidence, key, scheme, sums, logs, method)


def detect_two_key_bayes(
    tokens: npt.ArrayLike | Corpus,
    key: MarkingKey,
    scheme: Tournament,
    score: BayesianScore,
    *,
    draft_share: float = 0.5,
    vocab_size: int | None = None,
) -> DetectionResult:
    """The two-key method with a trained score: Bayes over the unknown route of each position.

    Per position the statistic is log(share exp(L_draft) + (1 - share) exp(L_target)), L the score's
    log-likelihood ratio of the token's bits in that stream. Without a mark the bits of both streams
    are fair coins and both ratios have mean one, so their mixture has, and Markov's inequality
    gives log p <= -sum whatever the score was fitted on (but not on the tested text). The published
    form share L_draft + (1 - share) L_target is at most this one at every position (Jensen).

    tokens, draft_share, vocab_size, errors: as in `detect_two_key`, and SchemeError if the scheme
    is no tournament or not of the score's depth.
    """
    share = _share(draft_share)
    score.check_scheme(scheme)
    evidence = evidence_for(tokens, key, scheme, vocab_size)
    sums = []
    for draft, target in zip(
        key.prf_keys(scheme.label + DRAFT), key.prf_keys(scheme.label + TARGET), strict=True
    ):
        ratios = [
            np.exp(score.log_likelihood_ratio(scheme.bits(blocks_of(evidence, w), evidence.tokens)))
            for w in (draft, target)
        ]
        mixed = np.log(share * ratios[0] + (1.0 - share) * ratios[1])
        sums.append(float(mixed.sum()))
    logs = [min(0.0, -total) for total in sums]
    method = f"Markov bound on two keys' likelihood ratios mixed with draft share {share:g}"
    return result_of(evidence, key, scheme, sums, logs, method)
