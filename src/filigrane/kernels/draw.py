"""Drawing one token from logits, compiled: races, weighted quantiles, tournaments, truncation.

Every function works on candidates: `logits` (n,) float32 and `ids` (n,) uint32 ascending, with the
inverse temperature applied inside. Each returns an index into them, or NOT_FINITE when the logits
hold a NaN, +inf, or nothing but -inf. The laws are those of `schemes/*.py`; tests compare both.
"""

import math

import numpy as np
import numpy.typing as npt
from numba import float32, int32, njit, uint32

from filigrane.kernels.prf import mix

NOT_FINITE = -1
_BLOCK = 256
_LN2 = 0.6931471805599453


@njit(forceinline=True)
def _order(bits):
    """The bits of a float32 as an int32 that sorts as the floats do; its own inverse.

    Integer maxima vectorise; maxima of floats, which may be NaN, do not.
    """
    return int32(bits ^ int32(int32(bits >> int32(31)) & int32(0x7FFFFFFF)))


class Workspace:
    """Scratch memory for a vocabulary, kept between steps (fresh pages cost more than sums)."""

    __slots__ = ("biased", "weights", "words")

    def __init__(self, vocab_size: int) -> None:
        self.weights = np.empty(vocab_size, np.float64)
        self.words = np.empty(vocab_size, np.uint32)
        self.biased = np.empty(vocab_size, np.float32)


@njit(nogil=True, cache=True)
def drawable(logits):
    """Whether a token can be drawn: no NaN, no +inf, something above -inf."""
    bits = logits.view(np.int32)
    top = int32(-0x80000000)
    size = int32(0)
    for i in range(logits.shape[0]):
        key = bits[i]
        size = max(size, int32(key & int32(0x7FFFFFFF)))
        top = max(top, _order(key))
    # As such integers, -inf is -0x7F800001 and +inf 0x7F800000; NaNs are larger in size.
    return size <= int32(0x7F800000) and int32(-0x7F800001) < top < int32(0x7F800000)


@njit(nogil=True, cache=True)
def bias(logits, ids, s0, s1, s2, s3, threshold, delta, out):
    """Green list: out = logits + delta where field(token) < threshold."""
    for i in range(logits.shape[0]):
        green = mix(ids[i], s0, s1, s2, s3) < threshold
        out[i] = logits[i] + (delta if green else float32(0.0))


@njit(nogil=True, cache=True)
def _race_bounds(logits, ids, start, stop, scale, s0, s1, s2, s3, numbers, bounds):
    """Upper bounds of the race's scores in one block, and whether they hold a NaN."""
    lanes = stop - start
    for j in range(lanes):
        numbers[j] = float32(mix(ids[start + j], s0, s1, s2, s3)) + float32(0.5)
    bits = numbers.view(np.int32)
    for j in range(lanes):
        # The score is l - log(-log(1 - x)) <= l - log(x), for -log(1 - x) >= x. A float's bits,
        # read as an integer, are its log2 with the mantissa interpolated linearly, which is never
        # above log2 (concavity): a bound on -log(x) without a logarithm.
        bounds[j] = logits[start + j] * scale + float32(_LN2) * (
            float32(159.00002) - float32(bits[j]) * float32(2.0**-23)
        )
    keys = bounds.view(np.int32)
    top = int32(-0x80000000)
    size = int32(0)
    for j in range(lanes):
        key = keys[j]
        size = max(size, int32(key & int32(0x7FFFFFFF)))
        top = max(top, _order(key))
    return top, size > int32(0x7F800000)


@njit(nogil=True, cache=True)
def race(logits, ids, scale, s0, s1, s2, s3):
    """argmax of scale * logits - log(-log(1 - x)), x = (field + 1/2) / 2**32; ties to the first.

    Exact: bounds only decide which few candidates are computed in full.
    """
    n = logits.shape[0]
    blocks = (n + _BLOCK - 1) // _BLOCK
    numbers = np.empty(_BLOCK, np.float32)
    bounds = np.empty(_BLOCK, np.float32)
    tops = np.empty(blocks, np.int32)
    first = 0
    fscale = float32(scale)
    for b in range(blocks):
        start = b * _BLOCK
        stop = min(n, start + _BLOCK)
        top, nan = _race_bounds(logits, ids, start, stop, fscale, s0, s1, s2, s3, numbers, bounds)
        if nan:
            return NOT_FINITE
        tops[b] = top
        if top > tops[first]:
            first = b
    if tops[first] >= int32(0x7F800000):  # +inf
        return NOT_FINITE
    # Scaled logits that float32 cannot hold say nothing: then everything is computed in full.
    blind = tops[first] <= int32(-0x7F800001)
    keys = np.empty(1, np.int32)
    best = -np.inf
    winner = NOT_FINITE
    for turn in range(-1, blocks):
        b = first if turn < 0 else turn
        if turn == first:
            continue
        keys[0] = _order(tops[b])
        # Bounds are float32: their rounding is far below this slack.
        limit = -np.inf
        if winner >= 0 and not blind:
            limit = best - (1e-4 + 1e-6 * (abs(best) + 30.0))
        if keys.view(np.float32)[0] < limit:
            continue
        start = b * _BLOCK
        stop = min(n, start + _BLOCK)
        _race_bounds(logits, ids, start, stop, fscale, s0, s1, s2, s3, numbers, bounds)
        for j in range(stop - start):
            if bounds[j] >= limit and logits[start + j] > -np.inf:
                x = (np.float64(mix(ids[start + j], s0, s1, s2, s3)) + 0.5) * 2.0**-32
                score = np.float64(logits[start + j]) * scale - math.log(-math.log1p(-x))
                if score > best or (score == best and start + j < winner):
                    best = score
                    winner = start + j
                    if not blind:
                        limit = best - (1e-4 + 1e-6 * (abs(best) + 30.0))
    return winner


@njit(nogil=True, cache=True)
def _weights(logits, scale, out):
    """out = exp(scale * (logits - max)); returns the sum, or -1.0 when the logits are not finite.

    exp is a polynomial in plain float64 arithmetic (relative error below 1e-15), so that it
    vectorises and gives the same bits on every machine.
    """
    n = logits.shape[0]
    bits = logits.view(np.int32)
    top = int32(-0x80000000)
    size = int32(0)
    for i in range(n):
        key = bits[i]
        size = max(size, int32(key & int32(0x7FFFFFFF)))
        top = max(top, _order(key))
    if size > int32(0x7F800000) or top >= int32(0x7F800000):
        return -1.0
    buffer = np.empty(1, np.int32)
    buffer[0] = _order(top)
    peak = np.float64(buffer.view(np.float32)[0])
    if peak == -np.inf:
        return -1.0
    powers = np.empty(_BLOCK, np.int64)
    scales = powers.view(np.float64)
    rest = np.empty(_BLOCK, np.float64)
    total = 0.0
    for start in range(0, n, _BLOCK):
        lanes = min(_BLOCK, n - start)
        for j in range(lanes):
            x = max((np.float64(logits[start + j]) - peak) * scale, -708.0)
            k = math.floor(x * 1.4426950408889634 + 0.5)
            rest[j] = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10
            powers[j] = (np.int64(k) + 1023) << 52
        for j in range(lanes):
            r = rest[j]
            p = 1.6059043836821613e-10
            p = p * r + 2.08767569878681e-09
            p = p * r + 2.505210838544172e-08
            p = p * r + 2.755731922398589e-07
            p = p * r + 2.7557319223985893e-06
            p = p * r + 2.48015873015873e-05
            p = p * r + 1.984126984126984e-04
            p = p * r + 1.388888888888889e-03
            p = p * r + 8.333333333333333e-03
            p = p * r + 4.1666666666666664e-02
            p = p * r + 0.16666666666666666
            p = p * r + 0.5
            p = p * r + 1.0
            p = p * r + 1.0
            inside = 1.0 if logits[start + j] > float32(-np.inf) else 0.0
            out[start + j] = p * scales[j] * inside
        part = 0.0
        for j in range(lanes):
            part += out[start + j]
        total += part
    return total


@njit(nogil=True, cache=True)
def quantile(logits, ids, scale, s0, s1, s2, s3, v, weights, words):
    """Weighted quantile in the order of the field: first token whose cumulative probability > v.

    The order is never sorted as a whole: probabilities are summed by the top 12 bits of the field,
    and only the bucket that holds the quantile is put in order.
    """
    n = logits.shape[0]
    weights, words = weights[:n], words[:n]
    total = _weights(logits, scale, weights)
    if total < 0.0:
        return NOT_FINITE
    for i in range(n):
        words[i] = mix(ids[i], s0, s1, s2, s3)
    sums = np.zeros(4096, np.float64)
    for i in range(n):
        sums[words[i] >> uint32(20)] += weights[i]
    mass = 0.0
    for b in range(4096):
        mass += sums[b]
    target = v * mass
    before = 0.0
    chosen = -1
    for b in range(4096):
        if sums[b] > 0.0:
            chosen = b
            if before + sums[b] > target:
                break
            before += sums[b]
    if before + sums[chosen] <= target:  # rounding at the very end: the last bucket it is
        before -= sums[chosen]
    count = 0
    members = np.empty(n, np.int64)
    for i in range(n):
        if words[i] >> uint32(20) == uint32(chosen) and weights[i] > 0.0:
            members[count] = i
            count += 1
    order = np.argsort(words[members[:count]])
    for position in order:
        before += weights[members[position]]
        if before > target:
            return members[position]
    return members[order[count - 1]]


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _layer(weights, words, layer, zero, one):
    """Apply the factors of the previous layer and return this layer's mass of ones (fused)."""
    ones = 0.0
    previous = uint32(layer - 1)
    current = uint32(layer)
    for i in range(weights.shape[0]):
        w = weights[i] * (one if (words[i] >> previous) & uint32(1) else zero)
        weights[i] = w
        ones += w if (words[i] >> current) & uint32(1) else 0.0
    return ones


@njit(nogil=True, cache=True)
def tournament(logits, ids, scale, s0, s1, s2, s3, depth, v, weights, words):
    """Draw from the tournament's law: `depth` two-candidate layers, then the quantile v by id."""
    n = logits.shape[0]
    weights, words = weights[:n], words[:n]
    total = _weights(logits, scale, weights)
    if total < 0.0:
        return NOT_FINITE
    ones = 0.0
    for i in range(n):
        words[i] = mix(ids[i], s0, s1, s2, s3)
        weights[i] /= total
        if words[i] & uint32(1):
            ones += weights[i]
    for layer in range(1, depth):
        ones = _layer(weights, words, layer, 1.0 - ones, 2.0 - ones)
    # The last layer has no mass to compute, only its factors to apply.
    for i in range(n):
        one = (words[i] >> uint32(depth - 1)) & uint32(1)
        weights[i] *= 2.0 - ones if one else 1.0 - ones
    return _by_id(weights, v)


@njit(nogil=True, cache=True)
def _by_id(weights, v):
    """First index whose cumulative weight exceeds v times the sum."""
    n = weights.shape[0]
    blocks = (n + _BLOCK - 1) // _BLOCK
    sums = np.zeros(blocks, np.float64)
    total = 0.0
    for b in range(blocks):
        for i in range(b * _BLOCK, min(n, (b + 1) * _BLOCK)):
            sums[b] += weights[i]
        total += sums[b]
    target = v * total
    before = 0.0
    last = 0
    for b in range(blocks):
        if before + sums[b] <= target and b < blocks - 1:
            before += sums[b]
            continue
        for i in range(b * _BLOCK, min(n, (b + 1) * _BLOCK)):
            before += weights[i]
            if weights[i] > 0.0:
                last = i
                if before > target:
                    return i
    # Rounding left the target a hair above the last sum.
    for i in range(n - 1, -1, -1):
        if weights[i] > 0.0:
            last = i
            break
    return last


@njit(nogil=True, cache=True)
def _column_maxima(keys, out):
    """Maximum of each column when keys are read as rows of out's length (the last may be short).

    Columns, because maxima of columns are vector instructions and those of rows are not.
    """
    for start in range(0, keys.shape[0], out.shape[0]):
        row = keys[start : start + out.shape[0]]
        for c in range(row.shape[0]):
            key = _order(row[c])
            out[c] = max(out[c], key)


@njit(nogil=True, cache=True)
def _at_least(keys, maxima, threshold, out):
    """Indices of the keys that reach the threshold, column by column; returns their number."""
    count = 0
    for c in range(maxima.shape[0]):
        if maxima[c] >= threshold:
            for i in range(c, keys.shape[0], maxima.shape[0]):
                key = keys[i]
                if _order(key) >= threshold:
                    out[count] = i
                    count += 1
    return count


_BUCKETS = 4096
_PER_NAT = 16.0


@njit(nogil=True, cache=True)
def nucleus(logits, scale, share, weights, out):
    """Top-p: indices, ascending, of the most probable tokens whose mass reaches share; how many.

    Keeps a token while the mass before it, in falling order (ties by index), is below share of
    all. Nothing is sorted but the tokens within a sixteenth of a nat of the border: masses are
    summed by the logit's distance from the highest. Returns -1 when the logits are not finite.
    """
    n = logits.shape[0]
    total = _weights(logits, scale, weights)
    if total < 0.0:
        return NOT_FINITE
    peak = np.float64(logits.max())
    sums = np.zeros(_BUCKETS, np.float64)
    # Tokens so small that all of them together do not reach from the end to the border.
    least = 0.5 * (1.0 - share) * total / n
    candidates = np.empty(n, np.int64)
    m = 0
    for i in range(n):
        if weights[i] > least:
            candidates[m] = i
            m += 1
    buckets = np.empty(m, np.int64)
    for j in range(m):
        i = candidates[j]
        gap = min((peak - np.float64(logits[i])) * scale * _PER_NAT, _BUCKETS - 1.0)
        buckets[j] = np.int64(gap)
        sums[buckets[j]] += weights[i]
    target = share * total
    before = 0.0
    border = _BUCKETS - 1
    for b in range(_BUCKETS):
        if before + sums[b] >= target:
            border = b
            break
        before += sums[b]
    members = np.empty(m, np.int64)
    inside = 0
    count = 0
    for j in range(m):
        if buckets[j] < border:
            out[count] = candidates[j]
            count += 1
        elif buckets[j] == border:
            members[inside] = candidates[j]
            inside += 1
    order = np.argsort(-logits[members[:inside]], kind="mergesort")
    for position in order:
        if before >= target:
            break
        out[count] = members[position]
        count += 1
        before += weights[members[position]]
    return count


def top_k(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Indices, ascending, of the logits no smaller than the k-th largest (ties are all kept).

    Sorting keys are the float bits as signed integers. The k-th largest maximum of many small
    groups is a lower bound of the k-th largest logit, so only groups that reach it are looked at
    again.
    """
    n = logits.shape[0]
    if k >= n:
        return np.arange(n)
    keys = logits.view(np.int32)
    rows = max(1, min(64, n // (2 * k)))
    maxima = np.full(-(-n // rows), np.iinfo(np.int32).min, np.int32)
    _column_maxima(keys, maxima)
    threshold = np.partition(maxima, maxima.shape[0] - k)[maxima.shape[0] - k]
    found = np.empty(n, np.int64)
    found = np.sort(found[: _at_least(keys, maxima, threshold, found)])
    values = logits[found]
    return found[values >= np.partition(values, values.shape[0] - k)[values.shape[0] - k]]
