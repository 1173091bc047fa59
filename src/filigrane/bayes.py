"""SynthID-Text's Bayesian score for tournament text: trained on marked texts, with honest p-values.

A tournament of two candidates leaves bit l of its winner at one with probability 1/2 + psi/4, where
psi is the probability that two different tokens met in layer l: after the earlier layers' bits,
psi_l = sigmoid(beta_l + sum over j < l of delta_lj g_j) (Dathathri et al. 2024, Nature 634:818,
supplement). The fitted law of a marked token's bits over that of fair coins is

    exp(L),  L = sum_l log(1 + (2 g_l - 1) psi_l / 2),

a likelihood ratio whatever beta and delta are: without a mark the bits are fair coins, so its mean
is one. Training therefore decides the power of the test and never its validity, as long as the
tested text is not among the training texts.

This module knows token ids, a key and a tournament, and no model.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Corpus, Evidence, collect
from filigrane.detection import DetectionResult
from filigrane.errors import FiligraneError, RecordError, SchemeError
from filigrane.keys import MarkingKey
from filigrane.prf import Words
from filigrane.schemes.tournament import MAX_DEPTH, Tournament

Array = npt.NDArray[np.float64]

_FORMAT: Final = "filigrane-bayesian-score-1"
_TILTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of psi under which texts are simulated: from no mark to the full one."""
_CHUNK: Final = 20_000
"""Positions simulated at once: their bits stay in the cache."""


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


@dataclass(frozen=True, slots=True, eq=False)
class BayesianScore:
    """A fitted law of the bits of marked tokens.

    depth: layers m, 1 to 32; beta: (m,) float64; delta: (m, m) float64, strictly lower triangular:
    row l says how the earlier layers' bits move layer l. Made by `fit` or `load`.
    """

    depth: int
    beta: Array
    delta: Array

    def __post_init__(self) -> None:
        """Raise SchemeError for other shapes, values that are not finite, and later layers."""
        m = self.depth
        for name, shape in (("beta", (m,)), ("delta", (m, m))):
            values = np.array(getattr(self, name), dtype=np.float64)
            if not 1 <= m <= MAX_DEPTH or values.shape != shape or not np.isfinite(values).all():
                raise SchemeError(
                    f"{name} of a Bayesian score of depth {m} must be finite numbers of shape "
                    f"{shape} (depth 1 to {MAX_DEPTH}), got shape {values.shape}."
                )
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        if np.triu(self.delta).any():
            raise SchemeError(
                "delta must be strictly lower triangular: a layer knows earlier ones."
            )

    @classmethod
    def fit(cls, bits: npt.ArrayLike, *, penalty: float = 1.0) -> Self:
        """Penalised maximum likelihood on the bits of marked texts.

        bits: (n, m), 0 or 1, the scored positions of all training texts under their key
        (`keyed_bits`), a few thousand or more; penalty > 0: weight of (sum beta**2 + sum
        delta**2)/2 against the log-likelihood. Layers are fitted apart, by Fisher scoring with step
        halving; 20,000 positions of 30 layers take seconds. Raises SchemeError for other shapes or
        values.
        """
        g = np.asarray(bits, dtype=np.float64)
        if g.ndim != 2 or not 1 <= g.shape[1] <= MAX_DEPTH or g.shape[0] < 1:
            raise SchemeError(f"bits must have shape (n, depth), got {g.shape}; see keyed_bits.")
        if not np.isin(g, (0.0, 1.0)).all():
            raise SchemeError("bits must be 0 or 1; pass what keyed_bits returns.")
        if not penalty > 0.0:
            raise SchemeError(f"penalty must be above 0, got {penalty}; 1.0 is a good start.")
        depth = g.shape[1]
        beta, delta = np.zeros(depth), np.zeros((depth, depth))
        features = np.concatenate([np.ones((g.shape[0], 1)), g], axis=1)
        for layer in range(depth):
            weights = _fit_layer(features[:, : layer + 1], g[:, layer], penalty)
            beta[layer], delta[layer, :layer] = weights[0], weights[1:]
        return cls(depth, beta, delta)

    def probabilities(self, bits: npt.ArrayLike) -> Array:
        """psi of every layer given the earlier bits: bits (..., m) -> (..., m)."""
        return _sigmoid(self.beta + np.asarray(bits, dtype=np.float64) @ self.delta.T)

    def log_likelihood_ratio(self, bits: npt.ArrayLike) -> Array:
        """L of every position, in nats: bits (..., m), 0 or 1 -> (...) float64."""
        g = np.asarray(bits, dtype=np.float64)
        # A product of up to 32 factors in [1/2, 3/2] neither over- nor underflows: one logarithm.
        factors = 1.0 + (g - 0.5) * self.probabilities(g)
        ratio: Array = np.log(factors.prod(axis=-1))
        return ratio

    def check_scheme(self, scheme: object) -> None:
        """Raise SchemeError unless this is a tournament of the score's depth."""
        if not isinstance(scheme, Tournament) or scheme.depth != self.depth:
            raise SchemeError(
                f"this score belongs to tournament:depth={self.depth}, not to "
                f"{getattr(scheme, 'tag', scheme)!s}; fit one on bits of that scheme."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the score as JSON, replacing what is there; OSError if that cannot be done."""
        content = {
            "format": _FORMAT,
            "depth": self.depth,
            "beta": self.beta.tolist(),
            "delta": [row[:layer].tolist() for layer, row in enumerate(self.delta)],
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, digit for digit. Raises RecordError for anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            depth = content["depth"]
            if type(depth) is not int or [len(row) for row in content["delta"]] != [*range(depth)]:
                raise ValueError("delta is not the lower triangle of its depth")
            delta = np.zeros((depth, depth))
            for layer, row in enumerate(content["delta"]):
                delta[layer, :layer] = row
            return cls(depth, np.array(content["beta"], dtype=np.float64), delta)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RecordError(
                f"{os.fspath(path)} holds no Bayesian score ({error}); write one with save()."
            ) from error


def _fit_layer(features: Array, ones: Array, penalty: float) -> Array:
    """Weights w of psi = sigmoid(features w) for P(one) = 1/2 + psi/4: Fisher scoring."""
    weights = np.zeros(features.shape[1])

    def objective(candidate: Array) -> float:
        half = 0.5 * _sigmoid(features @ candidate)
        likelihood = np.log1p(np.where(ones == 1.0, half, -half)).sum()
        return float(likelihood - 0.5 * penalty * candidate @ candidate)

    value = objective(weights)
    for _ in range(50):
        psi = _sigmoid(features @ weights)
        p = 0.5 + 0.25 * psi
        rate = 0.25 * psi * (1.0 - psi)
        gradient = features.T @ ((ones - p) / (p * (1.0 - p)) * rate) - penalty * weights
        information = features.T @ (features * (rate * rate / (p * (1.0 - p)))[:, None])
        step = np.linalg.solve(information + penalty * np.eye(weights.size), gradient)
        following = -math.inf
        for _ in range(12):
            following = objective(weights + step)
            if following >= value:
                break
            step *= 0.5
        if following < value:
            break
        weights = weights + step
        done = following - value < 1e-3  # nats: nothing a test could see
        value = following
        if done:
            break
    return weights


def _bits_under(evidence: Evidence, words: Words, scheme: Tournament) -> npt.NDArray[np.uint32]:
    from filigrane.kernels.prf import blocks

    # subok: the words stay an array that does not show itself.
    rows = np.broadcast_to(words, (evidence.n_scored, words.shape[0]), subok=True)
    return scheme.bits(blocks(rows, evidence.windows), evidence.tokens)


def keyed_bits(
    tokens: npt.ArrayLike | Corpus, key: MarkingKey, scheme: Tournament, *, slot: int = 0
) -> npt.NDArray[np.uint32]:
    """The bits of a text's scored positions under one slot of a key: (n_scored, depth) uint32.

    tokens: (n,) ids of one text, or a Corpus; for training, texts marked with this slot. Raises
    SchemeError for another scheme than a tournament, IndexError for a slot that the key lacks, and
    what `detect` raises.
    """
    if not isinstance(scheme, Tournament):
        raise SchemeError(f"only a tournament has layers of bits; got {scheme!r}.")
    words = key.prf_keys(scheme.label)
    if not 0 <= slot < key.slots:
        raise IndexError(f"slot {slot} of a key with slots 0 to {key.slots - 1}")
    return _bits_under(collect(tokens, scheme.context_width), words[slot], scheme)


def _simulated(score: BayesianScore, n: int, draws: int, rng: np.random.Generator) -> Array:
    """Log ratios of every tilt, of texts of n positions written at the tilts in turn.

    Returns (tilts, draws); the last row, full strength, is the statistic L.
    """
    ratios = np.zeros((len(_TILTS), draws))
    tilts = np.array(_TILTS)
    for start in range(0, n * draws, _CHUNK):
        text = np.arange(start, min(start + _CHUNK, n * draws)) // n
        tilt = tilts[text % tilts.size]
        bits = np.empty((score.depth, text.size))
        odds = np.ones((tilts.size, text.size))
        for layer in range(score.depth):
            # psi/4 of this layer, by the bits drawn for the layers before it.
            lift = 0.25 * _sigmoid(score.beta[layer] + score.delta[layer, :layer] @ bits[:layer])
            bits[layer] = rng.random(text.size) < 0.5 + tilt * lift
            odds *= 1.0 + tilts[:, None] * np.where(bits[layer] == 1.0, 2.0 * lift, -2.0 * lift)
        for row, log_odds in zip(ratios, np.log(odds), strict=True):
            row += np.bincount(text, weights=log_odds, minlength=draws)
    return ratios


def importance_log_pvalues(
    totals: list[float],
    mixed: list[float],
    score: BayesianScore,
    n: int,
    n_simulations: int,
    rng: np.random.Generator,
) -> list[float]:
    """Log p-values of observed sums L, by importance sampling that is valid for every sample size.

    totals: L of each observation; mixed: its log ratio of the proposal to the null law; both over n
    positions. With weights w = null/proposal and draws Z_i from the proposal, p = (w(x) + sum_i
    w(Z_i) 1[L(Z_i) >= L(x)]) / (1 + N): the observation's own weight is what makes P(p <= a) <= a
    exact (Harrison 2012, Biometrika 99:57, "Conservative hypothesis tests and confidence intervals
    using importance sampling"). The proposal is the mean of the fitted law at five strengths from
    no mark to the full one, so weights are at most 5.
    """
    ratios = _simulated(score, n, n_simulations, rng)
    top = ratios.max(axis=0)
    log_weights = -top - np.log(np.exp(ratios - top).mean(axis=0))
    found = []
    for total, own in zip(totals, mixed, strict=True):
        # Rounding must not part what is equal; counting a neighbour only makes p larger.
        reached = ratios[-1] >= total - 1e-9 * (1.0 + abs(total))
        terms = np.append(log_weights[reached], -own)
        found.append(min(0.0, stats.logsumexp(terms) - math.log1p(n_simulations)))
    return found


def _mixed_log_ratio(score: BayesianScore, bits: npt.ArrayLike) -> float:
    """Log of the proposal over the null law at observed bits (n, m)."""
    g = np.asarray(bits, dtype=np.float64)
    signed = (g - 0.5) * score.probabilities(g)
    ratios = [float(np.log((1.0 + tilt * signed).prod(axis=-1)).sum()) for tilt in _TILTS]
    return stats.logsumexp(ratios) - math.log(len(_TILTS))


def detect_bayes(
    tokens: npt.ArrayLike | Corpus,
    key: MarkingKey,
    scheme: Tournament,
    score: BayesianScore,
    *,
    n_simulations: int = 0,
    rng: np.random.Generator | None = None,
    vocab_size: int | None = None,
) -> DetectionResult:
    """Was this text written under this key? By the sum of the trained log-likelihood ratios.

    Valid for every score, well or badly trained, if the tested text was not in its training.
    n_simulations = 0: Markov's bound, log p = -L, without any randomness. Otherwise importance
    sampling with that many simulated texts (see `importance_log_pvalues`): valid at every size and
    sharper from some 200 on; a thousand texts of 200 tokens
    take a fraction of a second. Slots
    share the simulated texts, so they are corrected by Bonferroni.

    tokens: (n,) ids of one text without its prompt, or a Corpus; vocab_size: refuse ids at or above
    it. Raises SchemeError if the score was fitted for another scheme, FiligraneError if simulations
    are asked for without rng, and what `detect` raises.
    """
    score.check_scheme(scheme)
    if not isinstance(key, MarkingKey):
        raise FiligraneError(
            f"this tests one key: pass a Key or key.user(i), not {type(key).__name__}."
        )
    if n_simulations < 0 or (n_simulations and rng is None):
        raise FiligraneError(
            "simulations need n_simulations >= 1 and rng=numpy.random.default_rng(seed); "
            "n_simulations=0 gives the bound without them."
        )
    evidence = collect(tokens, scheme.context_width, vocab_size=vocab_size)
    sums, mixed = [], []
    for words in key.prf_keys(scheme.label):
        bits = _bits_under(evidence, words, scheme)
        sums.append(float(score.log_likelihood_ratio(bits).sum()))
        mixed.append(_mixed_log_ratio(score, bits))
    n = evidence.n_scored
    if n_simulations and rng is not None:
        logs = importance_log_pvalues(sums, mixed, score, n, n_simulations, rng)
        method = f"importance sampling, {n_simulations} simulated texts"
    else:
        logs = [min(0.0, -total) for total in sums]
        method = "Markov bound on a likelihood ratio"
    best = int(np.argmin(logs))
    if len(logs) > 1:
        method += f", Bonferroni over {len(logs)} slots"
    return DetectionResult(
        statistic=sums[best],
        log_pvalue=stats.bonferroni(logs[best], len(logs)),
        n_scored=n,
        n_tokens=evidence.n_tokens,
        n_repeated=evidence.n_repeated,
        scheme=scheme.tag,
        key=key.name,
        slot=best,
        slot_log_pvalues=tuple(logs),
        method=method,
    )
