# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Marked sampling on a GPU, in the Triton language: the kernels that `adapters.fused` launches.

    window_seeds                           ChaCha8 of the windows of all rows
    race_partials, race_winners            gumbel, greenlist, unmarked and greedy rows
    law_peaks, law_masses, law_digits,     delta, gamma and tournament rows
    law_chunks, law_tokens

Nothing here is as large as the logits: a row leaves three numbers per part of its vocabulary, and a
row of the second kind three tables of 2,048 counters. No kernel reads what another program of the
same launch wrote, and what programs add up together they add as integers, so a result does not
depend on their order. Why so, and how exact it is: docs/design/0009-fused-kernel.md.

`table` is (batch, columns) int32, one row of it per row of logits; its columns are named below.
Words are uint32 with the arithmetic of `prf`. A part of a row is `span` tokens, whole BLOCKs.
"""

from typing import Final

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))

UNMARKED: tl.constexpr = tl.constexpr(0)
GUMBEL: tl.constexpr = tl.constexpr(1)
GREENLIST: tl.constexpr = tl.constexpr(2)
DELTA: tl.constexpr = tl.constexpr(3)
GAMMA: tl.constexpr = tl.constexpr(4)
TOURNAMENT: tl.constexpr = tl.constexpr(5)

KIND: tl.constexpr = tl.constexpr(0)
CHUNKS: tl.constexpr = tl.constexpr(1)
"""Groups of four tokens in the row's window; 0 where it is not marked."""
THRESHOLD: tl.constexpr = tl.constexpr(2)
BIAS: tl.constexpr = tl.constexpr(3)
"""Green list: delta, the bits of a float32."""
DEPTH: tl.constexpr = tl.constexpr(4)
SCALE: tl.constexpr = tl.constexpr(6)
"""1 / temperature, the bits of a float64, low word first; 0.0 is greedy."""
KEY: tl.constexpr = tl.constexpr(8)
NOISE: tl.constexpr = tl.constexpr(16)
WINDOW: tl.constexpr = tl.constexpr(20)

NOT_FINITE: tl.constexpr = tl.constexpr(-1)
NOBODY: tl.constexpr = tl.constexpr(0x7FFFFFFF)

DIGIT: tl.constexpr = tl.constexpr(11)
"""Bits of a token's number that one sweep resolves; the third and last has ten left."""
BUCKETS: tl.constexpr = tl.constexpr(2048)
LAYERS: tl.constexpr = tl.constexpr(32)

SLACK: tl.constexpr = tl.constexpr(1e-4)
RELATIVE_SLACK: tl.constexpr = tl.constexpr(1e-6)
"""Two float32 scores (in bits, see `_fast_score`) further apart than SLACK + RELATIVE_SLACK * (|the
larger| + 64) are in the right order; measured and bounded in the tests."""

TABLE_HEAD: Final = WINDOW.value
"""Columns of the table before the window."""


# --- words: prf.block and prf.field ---------------------------------------------------------------


@triton.jit
def _rotated(x, LEFT: tl.constexpr):
    return (x << LEFT) | (x >> (32 - LEFT))


@triton.jit
def _quarter(a, b, c, d):
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(address):
    return tl.load(address).to(tl.uint32, bitcast=True)


@triton.jit
def _seed(entry, chunks, most):
    """Words FIELD and COIN of the block of a row's window: `prf.block`, all in registers.

    entry: the row's line of the table, or lines of several rows; chunks: groups of four tokens in
    its window, at most `most`. Without any, the words mean nothing.
    """
    k0, k1, k2, k3 = _word(entry + 8), _word(entry + 9), _word(entry + 10), _word(entry + 11)
    k4, k5, k6, k7 = _word(entry + 12), _word(entry + 13), _word(entry + 14), _word(entry + 15)
    for chunk in range(most):
        window = entry + WINDOW + 4 * chunk
        a0 = k0 * 0 + 0x61707865
        a1 = k0 * 0 + 0x3320646E
        a2 = k0 * 0 + 0x79622D32
        a3 = k0 * 0 + 0x6B206574
        b0, b1, b2, b3, c0, c1, c2, c3 = k0, k1, k2, k3, k4, k5, k6, k7
        d0, d1 = _word(window), _word(window + 1)
        d2, d3 = _word(window + 2), _word(window + 3)
        for _ in range(4):  # four double rounds; a loop, not 384 instructions
            a0, b0, c0, d0 = _quarter(a0, b0, c0, d0)
            a1, b1, c1, d1 = _quarter(a1, b1, c1, d1)
            a2, b2, c2, d2 = _quarter(a2, b2, c2, d2)
            a3, b3, c3, d3 = _quarter(a3, b3, c3, d3)
            a0, b1, c2, d3 = _quarter(a0, b1, c2, d3)
            a1, b2, c3, d0 = _quarter(a1, b2, c3, d0)
            a2, b3, c0, d1 = _quarter(a2, b3, c0, d1)
            a3, b0, c1, d2 = _quarter(a3, b0, c1, d2)
        more = chunk < chunks
        k4, k5 = tl.where(more, b0 + k0, k4), tl.where(more, b1 + k1, k5)
        k6, k7 = tl.where(more, b2 + k2, k6), tl.where(more, b3 + k3, k7)
        k0, k1 = tl.where(more, a0 + 0x61707865, k0), tl.where(more, a1 + 0x3320646E, k1)
        k2, k3 = tl.where(more, a2 + 0x79622D32, k2), tl.where(more, a3 + 0x6B206574, k3)
    return k0, k1, k2, k3, k4


@triton.jit
def _field(token, s0, s1, s2, s3):
    h = token + s0
    h = ((h ^ (h >> 17)) * 0xED5AD4BB) ^ s1
    h = ((h ^ (h >> 11)) * 0xAC4C1B51) ^ s2
    h = ((h ^ (h >> 15)) * 0x31848BAB) ^ s3
    return h ^ (h >> 14)


@triton.jit
def _token_of(number, s0, s1, s2, s3):
    """The token whose `_field` this is; the factors are the inverses of those above."""
    h = number ^ (number >> 14) ^ (number >> 28)
    h = (h ^ s3) * 0x32B21703
    h = h ^ (h >> 15) ^ (h >> 30)
    h = (h ^ s2) * 0x469E0DB1
    h = h ^ (h >> 11) ^ (h >> 22)
    h = (h ^ s1) * 0x79A85073
    return (h ^ (h >> 17)) - s0


@triton.jit
def _double(entry):
    """A float64 from two words, low word first."""
    low, high = _word(entry).to(tl.uint64), _word(entry + 1).to(tl.uint64)
    return ((high << 32) | low).to(tl.float64, bitcast=True)


@triton.jit
def _private_uniform(entry):
    """53 private bits in [0, 1): `schemes.base.private_uniform`."""
    high = (_word(entry + NOISE) >> 5).to(tl.int64)
    low = (_word(entry + NOISE + 1) >> 6).to(tl.int64)
    return ((high << 26) | low).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def window_seeds(table, columns, rows, count, most, blocks, LANES: tl.constexpr):
    """Words FIELD and COIN of the window of each of these rows: blocks (count, 8) int32.

    Grid: LANES rows per program. rows (count,) int32; most: the largest CHUNKS in the table.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < count
    row = tl.load(rows + lane, mask=inside, other=0).to(tl.int64)
    entry = table + row * columns
    s0, s1, s2, s3, coin = _seed(entry, tl.load(entry + CHUNKS), most)
    seed = blocks + lane * 8
    tl.store(seed, s0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(seed + 1, s1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(seed + 2, s2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(seed + 3, s3.to(tl.int32, bitcast=True), mask=inside)
    tl.store(seed + 4, coin.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _seed_words(blocks, place):
    seed = blocks + place * 8
    return _word(seed), _word(seed + 1), _word(seed + 2), _word(seed + 3)


# --- races ----------------------------------------------------------------------------------------


@triton.jit
def _log2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)  # one instruction; its error is part of SLACK


@triton.jit
def _biased(logit, token, kind, s0, s1, s2, s3, threshold, bias):
    """Logits (float32) with the bonus of green tokens."""
    if kind == GREENLIST:
        logit = logit + tl.where(_field(token, s0, s1, s2, s3) < threshold, bias, 0.0)
    return logit


@triton.jit
def _fast_score(logit, number, scale):
    """A race's score in bits, (l / T - log(-log(1 - x))) / log 2 and a constant, in float32.

    number: the clock's word r, x = (r + 1/2) / 2**32; scale: log2(e) / T; 0 is greedy.
    """
    small = number < 0x10000000
    # Whichever of x and 1 - x is rounded least: below 1/16 a series in x, else one in log(1 - x).
    z = tl.where(small, number, ~number).to(tl.float32)
    z = tl.fma(z, 2.3283064e-10, 1.1641532e-10)
    series = tl.fma(z, 0.288539, 0.36067376)
    series = tl.fma(z, series, 0.48089835)
    series = tl.fma(z, series, 0.7213475)
    series = tl.fma(z, series, 1.442695)
    clock = tl.where(small, z * series, -_log2(z))
    score = tl.fma(logit, scale, -_log2(clock))
    return tl.where(scale == 0.0, logit, score)


@triton.jit
def _exact_score(logit, number, scale):
    """A race's score in nats, in float64 (number is uint32, scale 1 / T)."""
    rest = (4294967295.5 - number.to(tl.float64)) * 2.3283064365386963e-10  # 1 - x, exact
    if scale == 0.0:
        score = logit.to(tl.float64)
    else:
        score = logit.to(tl.float64) * scale - tl.log(-tl.log(rest))
    return score


@triton.jit
def _clock(entry, kind, s0, s1, s2, s3):
    """Seeds of the race's clocks: the mark's, or private ones."""
    keyed = kind == GUMBEL
    n0, n1 = _word(entry + NOISE), _word(entry + NOISE + 1)
    n2, n3 = _word(entry + NOISE + 2), _word(entry + NOISE + 3)
    return (
        tl.where(keyed, s0, n0),
        tl.where(keyed, s1, n1),
        tl.where(keyed, s2, n2),
        tl.where(keyed, s3, n3),
    )


@triton.jit
def race_partials(
    logits, stride, vocab, table, columns, rows, span, blocks, tops, lanes, seconds,
    HASH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each part: the highest fast score, its lane, and the highest score of another lane.

    Grid (races, parts). logits (batch, vocab) of any float type, rows `stride` apart; rows (races,)
    int32; tops, lanes, seconds (races, parts) float32, int32, float32. Token t has lane
    (t - first of its part) % BLOCK. A part with a NaN has top +inf. HASH: every program hashes its
    row's window itself; else blocks (races, 8) int32 come from `window_seeds`.
    """
    race = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows + race).to(tl.int64)
    entry = table + row * columns
    base = logits + row * stride
    kind = tl.load(entry + KIND)
    threshold = _word(entry + THRESHOLD)
    bias = tl.load(entry + BIAS).to(tl.float32, bitcast=True)
    scale = (_double(entry + SCALE) * 1.4426950408889634).to(tl.float32)
    if HASH:
        s0, s1, s2, s3, _ = _seed(entry, tl.load(entry + CHUNKS), tl.load(entry + CHUNKS))
    else:
        s0, s1, s2, s3 = _seed_words(blocks, race)
    c0, c1, c2, c3 = _clock(entry, kind, s0, s1, s2, s3)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    start = part * span
    for first in range(start, tl.minimum(start + span, vocab), BLOCK):
        index = first + lane
        token = index.to(tl.uint32)
        logit = tl.load(base + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        logit = _biased(logit, token, kind, s0, s1, s2, s3, threshold, bias)
        score = _fast_score(logit, _field(token, c0, c1, c2, c3), scale)
        best = tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
    best = tl.where(best == best, best, float("inf"))
    top, winner = tl.max(best, axis=0, return_indices=True)
    second = tl.max(tl.where(lane == winner, float("-inf"), best), axis=0)
    place = race * tl.num_programs(1) + part
    tl.store(tops + place, top)
    tl.store(lanes + place, winner)
    tl.store(seconds + place, second)


@triton.jit
def _exact_scores(
    base, index, stop, kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3, scale
):  # fmt: skip
    """Exact scores of some tokens, whether they can be drawn at all, and whether none can.

    The last is for NaN and for what is +inf in float32 after the temperature.
    """
    logit = tl.load(base + index, mask=index < stop, other=float("-inf")).to(tl.float32)
    able = logit > float("-inf")
    token = index.to(tl.uint32)
    logit = _biased(logit, token, kind, s0, s1, s2, s3, threshold, bias)
    score = _exact_score(logit, _field(token, c0, c1, c2, c3), scale)
    scaled = logit * tl.where(scale == 0.0, 1.0, scale).to(tl.float32)
    return score, able, (scaled != scaled) | (scaled == float("inf"))


@triton.jit
def _first_highest(score, able, index):
    """The lowest index among the highest scores, or NOT_FINITE; int64."""
    highest = tl.max(tl.where(able, score, float("-inf")), axis=0)
    tied = tl.where(able & (score == highest), index, NOBODY)
    lowest = tl.min(tied, axis=0)
    return tl.where(lowest < NOBODY, lowest, NOT_FINITE).to(tl.int64)


@triton.jit
def _in_one_lane(
    base, first, stop, kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3, scale,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    index = first + tl.arange(0, TILES) * BLOCK
    score, able, _ = _exact_scores(
        base, index, stop, kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3, scale
    )
    return _first_highest(score, able, index)


@triton.jit
def _in_many_parts(
    base, tops, limit, parts, span, vocab, kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3,
    scale, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    record = tl.full([BLOCK], float("-inf"), tl.float64)
    holder = tl.full([BLOCK], NOBODY, tl.int32)
    poison = tl.zeros([BLOCK], tl.int32)
    for part in range(parts):
        if tl.load(tops + part) >= limit:
            stop = tl.minimum((part + 1) * span, vocab)
            for first in range(part * span, stop, BLOCK):
                index = first + lane
                score, able, bad = _exact_scores(
                    base, index, stop, kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3, scale
                )
                better = able & ((score > record) | (holder == NOBODY))
                record = tl.where(better, score, record)
                holder = tl.where(better, index, holder)
                poison = tl.where(bad, 1, poison)
    token = _first_highest(record, holder < NOBODY, holder)
    return tl.where(tl.max(poison, axis=0) > 0, NOT_FINITE, token)


@triton.jit
def race_winners(
    logits, stride, vocab, table, columns, rows, span, blocks, tops, lanes, seconds, parts, out,
    HASH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token with the highest exact score of each race, or NOT_FINITE.

    Grid (races,). Arguments as `race_partials`; out (batch,) int64; PARTS and TILES are powers of
    two, at least `parts` and span / BLOCK. If one lane of one part alone is within the slack of the
    top, its few tokens are compared; otherwise all tokens of the parts that are.
    """
    race = tl.program_id(0)
    row = tl.load(rows + race).to(tl.int64)
    entry = table + row * columns
    base = logits + row * stride
    kind = tl.load(entry + KIND)
    threshold = _word(entry + THRESHOLD)
    bias = tl.load(entry + BIAS).to(tl.float32, bitcast=True)
    scale = _double(entry + SCALE)
    if HASH:
        s0, s1, s2, s3, _ = _seed(entry, tl.load(entry + CHUNKS), tl.load(entry + CHUNKS))
    else:
        s0, s1, s2, s3 = _seed_words(blocks, race)
    c0, c1, c2, c3 = _clock(entry, kind, s0, s1, s2, s3)

    part = tl.arange(0, PARTS)
    here = part < parts
    places = race * parts + part
    best = tl.load(tops + places, mask=here, other=float("-inf"))
    second = tl.load(seconds + places, mask=here, other=float("-inf"))
    top, first_part = tl.max(best, axis=0, return_indices=True)
    sound = top < float("inf")
    # A part with +inf has a NaN, or a logit that is +inf or almost: it is looked at again.
    limit = tl.where(sound, top - (SLACK + RELATIVE_SLACK * (tl.abs(top) + 64.0)), top)
    # All lanes but the winner's must stay below the limit, in its own part and in all others.
    others = tl.maximum(tl.where(part == first_part, float("-inf"), best), second)
    rival = tl.max(others, axis=0)

    token = tl.full((), NOT_FINITE, tl.int64)
    if sound & (rival < limit):
        token = _in_one_lane(
            base, first_part * span + tl.load(lanes + race * parts + first_part),
            tl.minimum((first_part + 1) * span, vocab),
            kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3, scale, BLOCK, TILES,
        )  # fmt: skip
    else:
        token = _in_many_parts(
            base, tops + race * parts, limit, parts, span, vocab,
            kind, s0, s1, s2, s3, threshold, bias, c0, c1, c2, c3, scale, BLOCK,
        )  # fmt: skip
    tl.store(out + row, token)


# --- laws -----------------------------------------------------------------------------------------


@triton.jit
def law_peaks(
    logits, stride, vocab, table, columns, rows, span, peaks, sums, BLOCK: tl.constexpr
):  # fmt: skip
    """Of each part: its highest logit, and about the sum of exp((l - that) / T) in float32.

    Grid (laws, parts); peaks, sums (laws, parts) float32. A part with a NaN has peak +inf, one
    without a token that can be drawn has -inf and sum 0. The second loop finds the part in a cache.
    """
    law = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows + law).to(tl.int64)
    base = logits + row * stride
    scale = (_double(table + row * columns + SCALE) * 1.4426950408889634).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    start = part * span
    stop = tl.minimum(start + span, vocab)
    for first in range(start, stop, BLOCK):
        index = first + lane
        logit = tl.load(base + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, logit, propagate_nan=tl.PropagateNan.ALL)
    peak = tl.max(tl.where(best == best, best, float("inf")), axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    if (peak > float("-inf")) & (peak < float("inf")):
        for first in range(start, stop, BLOCK):
            index = first + lane
            logit = tl.load(base + index, mask=index < vocab, other=float("-inf"))
            total += tl.exp2((logit.to(tl.float32) - peak) * scale)
    place = law * tl.num_programs(1) + part
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(total, axis=0))


@triton.jit
def _unit(law, scale, peaks, sums, parts, PARTS: tl.constexpr):
    """The row's peak, and the power of two that makes weights integers of sum below 2**62.

    The unit is 0.0 for a row from which nothing can be drawn.
    """
    part = tl.arange(0, PARTS)
    here = part < parts
    local = tl.load(peaks + law * parts + part, mask=here, other=float("-inf"))
    share = tl.load(sums + law * parts + part, mask=here, other=0.0)
    peak = tl.max(local, axis=0)
    finite = (peak > float("-inf")) & (peak < float("inf"))
    safe = tl.where(finite, peak, 0.0)
    factor = tl.exp2(
        (tl.where(finite, local, 0.0) - safe) * (scale * 1.4426950408889634).to(tl.float32)
    )
    total = tl.sum(tl.where(share > 0.0, share * factor, 0.0), axis=0)
    total = tl.where(finite, total, 1.0)
    exponent = (total.to(tl.int32, bitcast=True) >> 23) - 127
    unit = ((1023 + 60 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return safe.to(tl.float64), tl.where(finite, unit, 0.0)


@triton.jit
def _weights(base, index, vocab, peak, scale, unit):
    """exp((l - peak) / T) * unit in float64, 0.0 outside the vocabulary and for -inf."""
    logit = tl.load(base + index, mask=index < vocab, other=float("-inf")).to(tl.float64)
    able = (logit > float("-inf")) & (index < vocab)
    power = tl.maximum((tl.where(able, logit, peak) - peak) * scale, -708.0)
    return tl.where(able, tl.exp(power) * unit, 0.0)


@triton.jit
def _played(weight, number, factors, rounds):
    """Weights after the first rounds of a tournament."""
    # Not unrolled: the factors of all rounds would fill the registers.
    for layer in range(rounds):
        zero = tl.load(factors + 2 * layer)
        one = tl.load(factors + 2 * layer + 1)
        bit = (number >> layer) & 1
        weight = weight * tl.where(bit != 0, one, zero)
    return weight


@triton.jit
def law_masses(
    logits, stride, vocab, table, columns, rows, span, parts, blocks, peaks, sums, prefixes,
    factors, counters, SWEEP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up weights by one digit of the tokens' numbers: sweep 0, 1 or 2 over the row.

    Grid (laws, parts). counters (laws, BUCKETS) int64, zero before. delta and gamma take the
    digits from the top (11, 11, 10 bits) and look at tokens that share the digits found so far
    (prefixes, (laws,) int32); a tournament takes them from the bottom and looks at all tokens after
    the rounds played so far (factors, (laws, LAYERS, 2) float64).
    """
    law = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows + law).to(tl.int64)
    entry = table + row * columns
    base = logits + row * stride
    kind = tl.load(entry + KIND)
    scale = _double(entry + SCALE)
    s0, s1, s2, s3 = _seed_words(blocks, law)
    peak, unit = _unit(law, scale, peaks, sums, parts, PARTS)
    prefix = _word(prefixes + law)
    rounds = tl.minimum(tl.load(entry + DEPTH), SWEEP * DIGIT)
    mine = counters + law.to(tl.int64) * BUCKETS
    lane = tl.arange(0, BLOCK)
    start = part * span
    stop = tl.minimum(start + span, vocab)
    if unit == 0.0:
        stop = start  # nothing to add up
    for first in range(start, stop, BLOCK):
        index = first + lane
        number = _field(index.to(tl.uint32), s0, s1, s2, s3)
        if kind == TOURNAMENT:
            weight = _weights(base, index, vocab, peak, scale, unit)
            weight = _played(weight, number, factors + law * (2 * LAYERS), rounds)
            bucket = (number >> (SWEEP * DIGIT)) & (BUCKETS - 1)
            count = (weight + 0.5).to(tl.int64)
            tl.atomic_add(mine + bucket, count, mask=count > 0, sem="relaxed")
        else:
            if SWEEP == 0:
                bucket = number >> 21
                inside = index < vocab
            elif SWEEP == 1:
                bucket = (number >> 10) & (BUCKETS - 1)
                inside = (number >> 21) == prefix
            else:
                bucket = number & 1023
                inside = (number >> 10) == prefix
            if tl.max(inside.to(tl.int32), axis=0) > 0:
                weight = _weights(base, index, vocab, peak, scale, unit)
                count = (weight + 0.5).to(tl.int64)
                tl.atomic_add(mine + bucket, count, mask=inside & (count > 0), sem="relaxed")


@triton.jit
def law_digits(
    table, columns, rows, blocks, counters, prefixes, targets, factors, out, SWEEP: tl.constexpr
):  # fmt: skip
    """What a sweep's counters say: the next digit of the drawn number, or the next rounds' factors.

    Grid (laws,). targets (laws,) int64. After the last sweep delta and gamma know the number they
    draw, hence the token: out (batch,) int64.
    """
    law = tl.program_id(0)
    row = tl.load(rows + law).to(tl.int64)
    entry = table + row * columns
    bucket = tl.arange(0, BUCKETS)
    count = tl.load(counters + law.to(tl.int64) * BUCKETS + bucket)
    mass = tl.sum(count, axis=0)
    kind = tl.load(entry + KIND)
    if kind == TOURNAMENT:
        depth = tl.load(entry + DEPTH)
        share = count.to(tl.float64) / tl.maximum(mass, 1).to(tl.float64)
        for layer in tl.static_range(DIGIT):
            if SWEEP * DIGIT + layer < LAYERS:
                ones = ((bucket >> layer) & 1) != 0
                heavy = tl.sum(tl.where(ones, share, 0.0), axis=0)
                live = SWEEP * DIGIT + layer < depth
                zero = tl.where(live, 1.0 - heavy, 1.0)
                one = tl.where(live, 2.0 - heavy, 1.0)
                place = factors + law * (2 * LAYERS) + 2 * (SWEEP * DIGIT + layer)
                tl.store(place, zero)
                tl.store(place + 1, one)
                share = share * tl.where(ones, one, zero)
    else:
        if SWEEP == 0:
            coin = (_word(blocks + law * 8 + 4).to(tl.float64) + 0.5) * 2.3283064365386963e-10
            half = 0.5 + 0.5 * _private_uniform(entry)
            target = (tl.where(kind == DELTA, coin, half) * mass.to(tl.float64)).to(tl.int64)
            prefix = tl.zeros((), tl.uint32)
        else:
            target = tl.load(targets + law)
            prefix = _word(prefixes + law)
        target = tl.minimum(target, mass - 1)
        below = tl.cumsum(count, axis=0) <= target
        digit = tl.sum(below.to(tl.int32), axis=0)
        target -= tl.sum(tl.where(below, count, 0), axis=0)
        if SWEEP < 2:
            prefix = (prefix << DIGIT) | digit.to(tl.uint32)
            tl.store(targets + law, target)
            tl.store(prefixes + law, prefix.to(tl.int32, bitcast=True))
        else:
            number = (prefix << 10) | digit.to(tl.uint32)
            s0, s1, s2, s3 = _seed_words(blocks, law)
            token = _token_of(number, s0, s1, s2, s3).to(tl.int64)
            tl.store(out + row, tl.where(mass > 0, token, NOT_FINITE))


@triton.jit
def law_chunks(
    logits, stride, vocab, table, columns, rows, span, parts, blocks, peaks, sums, factors, chunks,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tournament: the sum of each part's weights after the last round, chunks (laws, parts) int64.

    Grid (laws, parts); rows of other kinds leave 0.
    """
    law = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows + law).to(tl.int64)
    entry = table + row * columns
    base = logits + row * stride
    scale = _double(entry + SCALE)
    s0, s1, s2, s3 = _seed_words(blocks, law)
    peak, unit = _unit(law, scale, peaks, sums, parts, PARTS)
    rounds = tl.load(entry + DEPTH)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    start = part * span
    stop = tl.minimum(start + span, vocab)
    if (unit == 0.0) | (tl.load(entry + KIND) != TOURNAMENT):
        stop = start  # nothing to add up
    for first in range(start, stop, BLOCK):
        index = first + lane
        number = _field(index.to(tl.uint32), s0, s1, s2, s3)
        weight = _weights(base, index, vocab, peak, scale, unit)
        weight = _played(weight, number, factors + law * (2 * LAYERS), rounds)
        total += (weight + 0.5).to(tl.int64)
    tl.store(chunks + law * tl.num_programs(1) + part, tl.sum(total, axis=0))


@triton.jit
def law_tokens(
    logits, stride, vocab, table, columns, rows, span, parts, blocks, peaks, sums, factors, chunks,
    out, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tournament: the private quantile of the weights in the order of ids; out (batch,) int64.

    Grid (laws,); rows of other kinds are left alone.
    """
    law = tl.program_id(0)
    row = tl.load(rows + law).to(tl.int64)
    entry = table + row * columns
    base = logits + row * stride
    if tl.load(entry + KIND) == TOURNAMENT:
        scale = _double(entry + SCALE)
        s0, s1, s2, s3 = _seed_words(blocks, law)
        peak, unit = _unit(law, scale, peaks, sums, parts, PARTS)
        part = tl.arange(0, PARTS)
        chunk = tl.load(chunks + law * parts + part, mask=part < parts, other=0)
        mass = tl.sum(chunk, axis=0)
        target = (_private_uniform(entry) * mass.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, mass - 1)
        below = tl.cumsum(chunk, axis=0) <= target
        chosen = tl.sum((below & (part < parts)).to(tl.int32), axis=0)
        before = tl.sum(tl.where(below, chunk, 0), axis=0)
        token = tl.full((), NOT_FINITE, tl.int64)
        if mass > 0:
            rounds = tl.load(entry + DEPTH)
            lane = tl.arange(0, BLOCK)
            start = chosen * span
            for first in range(start, tl.minimum(start + span, vocab), BLOCK):
                index = first + lane
                number = _field(index.to(tl.uint32), s0, s1, s2, s3)
                weight = _weights(base, index, vocab, peak, scale, unit)
                weight = _played(weight, number, factors + law * (2 * LAYERS), rounds)
                sums_here = before + tl.cumsum((weight + 0.5).to(tl.int64), axis=0)
                passed = tl.sum((sums_here <= target).to(tl.int32), axis=0)
                found = (token == NOT_FINITE) & (passed < BLOCK)
                token = tl.where(found, (first + passed).to(tl.int64), token)
                before = tl.max(sums_here, axis=0)
        tl.store(out + row, token)
