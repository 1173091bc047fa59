"""Marks of three_bricks and radioactive-watermark: `maryland` and `openai`, read and written.

Knows their one hash, their payloads, and how both count. The hash of the last `ngram` tokens is

    seed = key; for each token, oldest first: seed = (seed * 35317 + token) mod (2**64 - 1)

and its low half seeds a CPU torch generator (`foreign.mersenne`). maryland takes the front of a
permutation as green list, openai a uniform per token, r, scored by -log(1 - r). Payload m uses the
entry (t + m) mod V for token t.

The p-value here: every draw (seed, entry) counts once. maryland: see `foreign.greenlists`. openai:
1 - r is one of 1 .. 2**24 over 2**24, equally likely, so that -log(1 - r), taken in double
precision, never exceeds the exponential of a real uniform that rounds up to it: the gamma tail is
an upper bound. Measured, it is too large by a factor of 1.00 at 100 positions and p = 1e-9 and 1.01
at p = 1e-12; at 10 positions 1.11 and 1.34, because no score exceeds 24 log 2. Several payloads are
corrected for by their number.

`compat` follows the tools: scoring starts at token ngram + 1, scores are single precision, p-values
are floored at 1e-200. three_bricks takes the maryland tail in single precision (0.0 below about
1e-38); `compat` has the double precision of radioactive-watermark.

Keys and windows alias, because the hash is affine: key k and window (a, ...) give the seed of key
k + 1 and (a - 35317, ...). Nothing here resists anybody who tries.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import TokenIds, as_token_ids
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError, TokenError
from filigrane.foreign.base import ForeignResult, Writable, Written, check_vocab
from filigrane.foreign.drawing import candidates, pick, softmax
from filigrane.foreign.greenlists import CPU_ONLY, MODULUS, check_ratio, gather, unique_draws
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.windows import first_of
from filigrane.schemes.base import check_integer, check_number

__all__ = ["ThreeBricks", "ThreeBricksMaryland", "ThreeBricksOpenai", "corpus_mask", "read_corpus"]

FLOOR: Final = 1e-200
MAX_NGRAM: Final = 64
RULES: Final = ("none", "v1", "v2")
"""Which positions the tools score: all; new windows; new windows with their token."""


def window_seeds(
    windows: npt.NDArray[np.int64], number: int, salt_key: int
) -> npt.NDArray[np.uint64]:
    """The tools' hash: windows (n, k), oldest token first -> (n,) uint64.

    Products of 64 and 31 bits in two halves; 2**64 is 1 modulo 2**64 - 1, so what stands above 64
    bits is added below.
    """
    low_half = np.uint64(0xFFFFFFFF)
    seeds = np.full(windows.shape[0], number % MODULUS, dtype=np.uint64)
    salt = np.uint64(salt_key)
    for column in range(windows.shape[1]):
        low = (seeds & low_half) * salt + windows[:, column].astype(np.uint64)
        high = (seeds >> np.uint64(32)) * salt + (low >> np.uint64(32))
        above = high >> np.uint64(32)
        seeds = (high << np.uint64(32) | low & low_half) + above
        seeds += (seeds < above).astype(np.uint64)
        seeds[seeds == np.uint64(MODULUS)] = 0
    return seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreeBricks(Writable):
    """What both methods share.

    vocab_size: V as the generator had it, the width of the logits (the tools' detectors take the
    tokenizer's size, which is another number for many models and then finds nothing); ngram: tokens
    that seed a position; salt_key: the hash's multiplier; payloads: how many payloads, 0 .. this
    minus 1, are tried when reading; payload: the one that is written.
    """

    reference: ClassVar[str] = "Fernandez et al. 2023, arXiv 2308.00113; Sander et al. 2024"
    key_form: ClassVar[KeyForm] = KeyForm.INTEGER
    key_bits: ClassVar[int] = 63
    needs_vocab: ClassVar[bool] = True

    vocab_size: int
    ngram: int = 1
    salt_key: int = 35317
    payloads: int = 1
    payload: int = 0

    def __post_init__(self) -> None:
        """Raise SchemeError for parameters outside their range."""
        check_vocab(self.name, self.vocab_size)
        check_integer(self.name, "ngram", self.ngram, 1, MAX_NGRAM)
        check_integer(self.name, "salt_key", self.salt_key, 1, 2**31 - 1)
        check_integer(self.name, "payloads", self.payloads, 1, self.vocab_size)
        check_integer(self.name, "payload", self.payload, 0, self.vocab_size - 1)

    # ------------------------------------------------------------------------ scores

    @abstractmethod
    def draw_scores(
        self, seeds: npt.NDArray[np.uint32], entries: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Scores of draws in double precision: seeds (n,), entries (n,) -> (n,) float64."""

    @abstractmethod
    def log_sf(self, total: float, n: int) -> float:
        """log P(sum of n scores >= total) without a mark, natural; n >= 1."""

    @abstractmethod
    def tool_scores(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Scores as the tool rounds them."""

    @abstractmethod
    def tool_report(self, total: float, n: int) -> Mapping[str, float]:
        """The tool's numbers about a sum of n scores, but for the score itself."""

    @property
    @abstractmethod
    def tail(self) -> str:
        """The law of the sum, for `ForeignResult.method`."""

    def seed(self, window: npt.ArrayLike, key: ForeignKey) -> int:
        """The generator's seed after a window of at least `ngram` tokens, oldest first."""
        self.require_key(key)
        ids = np.asarray(window, dtype=np.int64)
        if ids.ndim != 1 or ids.shape[0] < self.ngram:
            raise TokenError(f"{self.name}: a position is seeded by {self.ngram} tokens.")
        (number,) = key.reveal()
        return int(window_seeds(ids[None, ids.shape[0] - self.ngram :], number, self.salt_key)[0])

    def scores(
        self, windows: npt.ArrayLike, tokens: npt.ArrayLike, key: ForeignKey, *, payload: int = 0
    ) -> npt.NDArray[np.float64]:
        """The tool's score of each token: windows (n, ngram), tokens (n,) -> (n,) float64."""
        self.require_key(key)
        (number,) = key.reveal()
        rows = np.asarray(windows, dtype=np.int64).reshape(-1, self.ngram)
        seeds = window_seeds(rows, number, self.salt_key)
        entries = (np.asarray(tokens, dtype=np.int64) + payload) % self.vocab_size
        return self.tool_scores(self.draw_scores(_low(seeds), entries))

    # ------------------------------------------------------------------------ reading

    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        (number,) = key.reveal()
        grams = gather(texts, self.ngram + 1)
        rows, inside = grams.rows, grams.inside
        seeds = window_seeds(rows[:, :-1], number, self.salt_key)
        compat: dict[str, float] = {}
        claim, table = self._claim(seeds, rows[:, -1])
        if len(texts) == 1:
            # n-grams inside the text come last; the tools leave the first of them out
            later = np.flatnonzero(inside)[1:]
            for rule in RULES:
                kept = later[_first_seen(rows[later], rule)]
                for payload, scores in enumerate(table):
                    suffix = f"_{rule}" if self.payloads == 1 else f"_{rule}_payload_{payload}"
                    compat |= self._reported(scores[kept], suffix)
        return self.result(
            texts,
            key,
            log_pvalue=claim.log_pvalue,
            statistic=claim.statistic,
            n_scored=claim.n,
            dropped={
                "incomplete context": grams.missing,
                "draw counted before": rows.shape[0] - claim.n,
            },
            compat=compat,
            method=self._method,
            warnings=(f"best payload of {self.payloads}: {claim.payload}",)
            if self.payloads > 1
            else (),
        )

    @property
    def _method(self) -> str:
        corrected = f"; best of {self.payloads} payloads, Bonferroni" if self.payloads > 1 else ""
        return f"{self.tail} over distinct draws (seed, entry){corrected}"

    def _claim(
        self, seeds: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int64]
    ) -> tuple["_Claim", list[npt.NDArray[np.float64]]]:
        """Our verdict on some positions, and their scores under each payload."""
        first, inverse = unique_draws(seeds, tokens)
        low, distinct = _low(seeds[first]), tokens[first]
        best = _Claim(0.0, 0.0, first.shape[0], 0)
        table = []
        for payload in range(self.payloads):
            scores = self.draw_scores(low, (distinct + payload) % self.vocab_size)
            table.append(scores[inverse])
            if first.shape[0]:
                total = math.fsum(scores.tolist())
                log_p = stats.bonferroni(self.log_sf(total, first.shape[0]), self.payloads)
                if payload == 0 or log_p < best.log_pvalue:
                    best = _Claim(log_p, total, first.shape[0], payload)
        return best, table

    def _reported(self, scores: npt.NDArray[np.float64], suffix: str) -> dict[str, float]:
        rounded = self.tool_scores(scores)
        total = float(rounded.sum())
        report = {"num_scored": float(rounded.shape[0]), "score": total}
        report |= self.tool_report(total, rounded.shape[0])
        return {f"{name}{suffix}": value for name, value in report.items()}

    def default_warnings(self, key: ForeignKey) -> tuple[str, ...]:
        """See `Profile.default_warnings`."""
        public = key.reveal() == (0,)
        return (
            *(("this is the tool's public default key: anybody can write this mark",) * public),
            CPU_ONLY,
            "vocab_size must be the width of the logits; the tools' detectors take the "
            "tokenizer's size",
        )

    # ------------------------------------------------------------------------ writing

    def _seed_of(self, prompt: TokenIds, output: Sequence[int], key: ForeignKey) -> int | None:
        """The seed of the next position, or None while there are fewer than `ngram` tokens."""
        last = np.asarray(output[-self.ngram :], dtype=np.int64)
        window = np.concatenate([prompt[-self.ngram :], last])
        return self.seed(window, key) if window.shape[0] >= self.ngram else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreeBricksMaryland(ThreeBricks):
    """Green lists; the bias is added to raw logits, before the temperature.

    Fields of `ThreeBricks`, and gamma: share of green tokens; delta: bias.
    """

    name: ClassVar[str] = "maryland"
    tool: ClassVar[str] = "three_bricks ee9c7a2 and radioactive-watermark 19c6dc9, 'maryland'"

    gamma: float = 0.5
    delta: float = 1.0

    def __post_init__(self) -> None:
        """Raise SchemeError for parameters outside their range."""
        ThreeBricks.__post_init__(self)
        check_ratio(self.name, "gamma", self.gamma, self.vocab_size)
        check_number(self.name, "delta", self.delta, 0.0, 1000.0)

    @property
    def list_size(self) -> int:
        """G: green tokens in every list."""
        return int(self.gamma * self.vocab_size)

    def green(self, window: npt.ArrayLike, key: ForeignKey) -> npt.NDArray[np.bool_]:
        """The list after a window as a mask, (V,) bool, for payload 0."""
        from filigrane.kernels.mersenne import front

        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        mask[front(self.seed(window, key), self.vocab_size, self.list_size)] = True
        return mask

    def draw_scores(
        self, seeds: npt.NDArray[np.uint32], entries: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """1 for a green token, else 0."""
        from filigrane.kernels.mersenne import in_front

        return in_front(seeds, entries, self.vocab_size, self.list_size).astype(np.float64)

    def log_sf(self, total: float, n: int) -> float:
        """The binomial tail with the list's true share."""
        return stats.log_sf_binomial(round(total), n, self.list_size / self.vocab_size)

    def tool_scores(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Nothing to round."""
        return scores

    def tool_report(self, total: float, n: int) -> Mapping[str, float]:
        """The binomial tail with gamma itself, and what the detectors' z variant says."""
        if n == 0:
            return {"p_value": 1.0}
        p = math.exp(stats.log_sf_binomial(round(total), n, self.gamma))
        z = (total - self.gamma * n) / math.sqrt(self.gamma * (1 - self.gamma) * n)
        z_p = 0.5 * math.erfc(z / math.sqrt(2))
        return {"p_value": max(p, FLOOR), "z_score": z, "z_p_value": max(z_p, FLOOR)}

    @property
    def tail(self) -> str:
        """See `ThreeBricks.tail`."""
        return (
            f"exact binomial tail with p = {self.list_size}/{self.vocab_size}, the list's true "
            f"share (the tool takes {self.gamma:g}); an upper bound where draws share a seed,"
        )

    def choose(
        self,
        logits: npt.NDArray[np.float32],
        prompt: TokenIds,
        output: Sequence[int],
        key: ForeignKey,
        *,
        state: Any,
        rng: np.random.Generator,
        sampling: Sampling,
    ) -> int:
        """See `Writable.choose`."""
        self.require_width(logits)
        seed = self._seed_of(prompt, output, key)
        if seed is not None:
            from filigrane.kernels.mersenne import front

            green = front(seed, self.vocab_size, self.list_size).astype(np.int64)
            logits = logits.copy()
            logits[(green - self.payload) % self.vocab_size] += np.float32(self.delta)
        ids, scaled = candidates(logits, sampling)
        return pick(ids, scaled, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreeBricksOpenai(ThreeBricks):
    """Gumbel-max by uniforms, r**(1/p); after Aaronson 2022. Fields of `ThreeBricks`."""

    name: ClassVar[str] = "openai"
    tool: ClassVar[str] = "three_bricks ee9c7a2 and radioactive-watermark 19c6dc9, 'openai'"

    def uniforms(self, window: npt.ArrayLike, key: ForeignKey) -> npt.NDArray[np.float32]:
        """r of every token after a window, (V,) float32, for payload 0."""
        return self._uniforms(self.seed(window, key))

    def _uniforms(self, seed: int) -> npt.NDArray[np.float32]:
        from filigrane.kernels.mersenne import outputs

        mantissas = outputs(seed, self.vocab_size) & np.uint32(0xFFFFFF)
        return mantissas.astype(np.float32) * np.float32(2.0**-24)

    def draw_scores(
        self, seeds: npt.NDArray[np.uint32], entries: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """-log(1 - r) in double precision."""
        from filigrane.kernels.mersenne import outputs_at

        mantissas = outputs_at(seeds, entries) & np.uint32(0xFFFFFF)
        scores: npt.NDArray[np.float64] = -np.log((2.0**24 - mantissas) * 2.0**-24)
        return scores + 0.0  # -log(1) is -0.0

    def log_sf(self, total: float, n: int) -> float:
        """The gamma tail."""
        return stats.log_sf_gamma(total, n)

    def tool_scores(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Rounded to single precision."""
        return scores.astype(np.float32).astype(np.float64)

    def tool_report(self, total: float, n: int) -> Mapping[str, float]:
        """The gamma tail. The z variant divides by a standard deviation that is wrong."""
        p = math.exp(stats.log_sf_gamma(total, n)) if n else 1.0
        return {"p_value": max(p, FLOOR)}

    @property
    def tail(self) -> str:
        """See `ThreeBricks.tail`."""
        return (
            "gamma tail, an upper bound because 1 - r is rounded up to a multiple of 2**-24 "
            "(too large by 1 % at 100 positions and p = 1e-12, by a third at 10),"
        )

    def choose(
        self,
        logits: npt.NDArray[np.float32],
        prompt: TokenIds,
        output: Sequence[int],
        key: ForeignKey,
        *,
        state: Any,
        rng: np.random.Generator,
        sampling: Sampling,
    ) -> int:
        """See `Writable.choose`."""
        self.require_width(logits)
        seed = self._seed_of(prompt, output, key)
        ids, scaled = candidates(logits, sampling)
        if seed is None or ids.shape[0] == 1:
            return pick(ids, scaled, rng)
        r = self._uniforms(seed)[(ids + self.payload) % self.vocab_size].astype(np.float64)
        with np.errstate(divide="ignore"):  # r = 0 never wins
            race = np.log(r) / softmax(scaled)
        return int(ids[np.argmax(race)])


@dataclass(frozen=True, slots=True)
class _Claim:
    log_pvalue: float
    statistic: float
    n: int
    payload: int


def _low(seeds: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    return (seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _first_seen(rows: npt.NDArray[np.int64], rule: str) -> npt.NDArray[np.bool_]:
    """Which n-grams (n, k + 1) one of RULES scores, (n,) bool."""
    if rule == "none":
        return np.ones(rows.shape[0], dtype=np.bool_)
    return first_of(rows[:, :-1] if rule == "v1" else rows)


# ---------------------------------------------------------------------------- whole corpora


def _walk(
    texts: Sequence[Written],
    width: int,
    rule: str,
    windows: Collection[tuple[int, ...]] | None,
    *,
    start: int,
    last_prompt_gram: bool,
) -> Iterator[tuple[bool, list[int]]]:
    """Position by position: whether the corpus rule scores it, and its n-gram."""
    seen: set[tuple[int, ...]] = set()
    allowed = None if windows is None else frozenset(tuple(int(x) for x in w) for w in windows)
    for text in texts:
        prompt = [] if text.prompt is None else text.prompt.tolist()
        ends = range(width, len(prompt) + last_prompt_gram)
        own = {tuple(prompt[end - width : end]) for end in ends}
        ids = text.tokens.tolist()
        for t in range(start, len(ids)):
            window = tuple(ids[t - width : t])
            identity = window if rule == "v1" else (*window, ids[t])
            scored = not (
                identity in seen or window in own or (allowed is not None and window not in allowed)
            )
            if scored:
                seen.add(identity)
            yield scored, ids[t - width : t + 1]


def corpus_mask(
    texts: Sequence[Written],
    profile: ThreeBricks,
    rule: str = "v2",
    windows: Collection[tuple[int, ...]] | None = None,
) -> npt.NDArray[np.bool_]:
    """Which positions radioactive-watermark's corpus test scores, all texts in a row.

    Of each text the positions from ngram + 1 on. rule: v1 or v2, one memory over all texts;
    windows: score only these, or None for all. A text's own prompt, where known, takes out the
    windows that occur in it, all but the last one of the prompt: so the tool counts.
    """
    _check_rule(rule)
    walk = _walk(
        texts, profile.ngram, rule, windows, start=profile.ngram + 1, last_prompt_gram=False
    )
    return np.array([scored for scored, _ in walk], dtype=np.bool_)


def read_corpus(
    texts: Sequence[Written],
    key: ForeignKey,
    profile: ThreeBricks,
    *,
    windows: Collection[tuple[int, ...]] | None = None,
) -> ForeignResult:
    """Test a corpus as the radioactivity test does: what repeats its own prompt is no evidence.

    windows: score only these windows of `ngram` tokens (the filter of the training data), or None.
    The p-value is ours: positions from `ngram` on, without the windows of the text's own prompt
    (all of them), each draw once over all texts. `compat` has the tool's own counts for v1 and v2.
    """
    profile.require_key(key)
    claim = tuple(texts)
    for text in claim:
        if not isinstance(text, Written):
            raise TokenError(f"pass Written(tokens=ids) objects, not {type(text).__name__}.")
        as_token_ids(text.tokens, profile.vocab_size)
    (number,) = key.reveal()
    width = profile.ngram
    ours = [
        row
        for scored, row in _walk(claim, width, "v2", windows, start=width, last_prompt_gram=True)
        if scored
    ]
    rows = np.array(ours, dtype=np.int64).reshape(-1, width + 1)
    verdict, _ = profile._claim(window_seeds(rows[:, :-1], number, profile.salt_key), rows[:, -1])
    compat: dict[str, float] = {}
    for rule in RULES[1:]:
        walk = _walk(claim, width, rule, windows, start=width + 1, last_prompt_gram=False)
        kept = np.array([row for scored, row in walk if scored], np.int64).reshape(-1, width + 1)
        scores = profile.scores(kept[:, :-1], kept[:, -1], key)
        compat |= profile._reported(scores, f"_{rule}")
    n_tokens = sum(text.tokens.shape[0] for text in claim)
    return profile.result(
        claim,
        key,
        log_pvalue=verdict.log_pvalue,
        statistic=verdict.statistic,
        n_scored=verdict.n,
        dropped={
            "no context, own prompt, not in the filter, or counted before": n_tokens - verdict.n
        },
        compat=compat,
        method=f"{profile._method}, windows of the own prompt left out",
    )


def _check_rule(rule: str) -> None:
    if rule not in RULES[1:]:
        raise SchemeError(f"the corpus rule is v1 or v2, not {rule!r}.")
