"""Summing scores, compiled: one key over a text, or very many keys over one text.

The statistic of a scheme is named by a `Statistic` (see `schemes/base.py`): a kind, a threshold and
a table. The laws live in the schemes, the PRF in `kernels.prf`; this file only walks over positions
and lanes. In `over_keys` a lane is a key, in `over_positions` a lane is a position of the text.
"""

import math

import numpy as np
from numba import njit, uint32

from filigrane.kernels.prf import BLOCK_WORDS, LANES, chacha_lanes, number_lanes
from filigrane.kernels.wide import use_wide_vectors

GUMBEL, GREEN, TABLE, POSITION, DISTANCE = range(5)

# Rounds between two drains: a product of so many factors of at least 2**-32 is a normal double, and
# so many scores of TABLE stay below 2**32.
_ROUNDS = 30
_DIGITS = 9


@njit(forceinline=True)
def _ones(x):
    """Number of ones among the bits; LLVM turns it into one instruction where there is one."""
    x = uint32(x - uint32(uint32(x >> uint32(1)) & uint32(0x55555555)))
    x = uint32(uint32(x & uint32(0x33333333)) + uint32(uint32(x >> uint32(2)) & uint32(0x33333333)))
    x = uint32(uint32(x + uint32(x >> uint32(4))) & uint32(0x0F0F0F0F))
    return uint32(uint32(x * uint32(0x01010101)) >> uint32(24))


@njit(nogil=True, cache=True)
def _planes(table):
    """For TABLE: bit l of number k is binary digit k of the weight of bit l.

    A sum of weighted bits is then sum_k 2**k ones(number & plane_k), which needs no look-ups: those
    cost more than all other steps of a score but the PRF. Weights are integers below 2**_DIGITS.
    """
    planes = np.zeros(_DIGITS, np.uint32)
    for bit in range(32):
        weight = int(table[256 * (bit // 8) + (1 << (bit % 8))])
        for k in range(_DIGITS):
            if (weight >> k) & 1:
                planes[k] |= uint32(1) << uint32(bit)
    return planes


@njit(nogil=True, cache=True)
def _add(kind, threshold, planes, numbers, coins, totals, counts, products, lanes):
    """Add one score per lane to totals, or to counts, or multiply it into products (GUMBEL)."""
    use_wide_vectors()
    if kind == GUMBEL:
        for j in range(lanes):
            products[j] *= (np.float64(numbers[j]) + 1.0) * 2.0**-32
    elif kind == GREEN:
        for j in range(lanes):
            counts[j] = uint32(counts[j] + uint32(numbers[j] < threshold))
    elif kind == TABLE:
        p = planes
        p = (p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8])  # a tuple stays in registers
        for j in range(lanes):
            score = uint32(0)
            for k in range(_DIGITS):
                score = uint32(score + uint32(_ones(uint32(numbers[j] & p[k])) << uint32(k)))
            counts[j] = uint32(counts[j] + score)
    elif kind == POSITION:
        for j in range(lanes):
            totals[j] += np.float64(numbers[j]) * 2.0**-32
    else:
        for j in range(lanes):
            rest = 4294967296.0 - abs(np.float64(numbers[j]) - np.float64(coins[j]))
            totals[j] += rest * (rest - 1.0) * 2.0**-64


@njit(nogil=True, cache=True)
def _drain(kind, totals, counts, products, lanes):
    """Move counts and products into totals."""
    if kind == GUMBEL:
        for j in range(lanes):
            totals[j] -= math.log(products[j])
            products[j] = 1.0
    else:
        for j in range(lanes):
            totals[j] += np.float64(counts[j])
            counts[j] = uint32(0)


@njit(nogil=True, cache=True)
def over_keys(keys, ids, positions, width, kind, threshold, table, out):
    """Statistic of one text under many keys.

    keys: (8, n) uint32; ids: (n_tokens,) uint32; positions: (n_scored,) int64; table: (1024,)
    float64; out: (n,) float64.
    """
    n = keys.shape[1]
    chunks = (width + 3) // 4
    fixed = np.empty(8 * LANES, np.uint32)
    key = np.empty(8 * LANES, np.uint32) if chunks > 1 else fixed
    inputs = np.empty(4 * LANES, np.uint32)
    words = np.empty(BLOCK_WORDS * LANES, np.uint32)
    tokens = np.empty(LANES, np.uint32)
    numbers = np.empty(LANES, np.uint32)
    coins = np.empty(LANES, np.uint32)
    totals = np.empty(LANES, np.float64)
    counts = np.zeros(LANES, np.uint32)
    products = np.ones(LANES, np.float64)
    planes = _planes(table)
    for start in range(0, n, LANES):
        lanes = min(LANES, n - start)
        for i in range(8):
            for j in range(lanes):
                fixed[i * LANES + j] = keys[i, start + j]
        totals[:] = 0.0
        for number in range(positions.shape[0]):
            t = positions[number]
            tokens[:] = ids[t]
            if chunks > 1:  # the cascade overwrites the key
                key[:] = fixed
            for chunk in range(chunks):
                for i in range(4):
                    column = 4 * chunk + i
                    word = ids[t - width + column] if column < width else uint32(0xFFFFFFFF)
                    for j in range(LANES):
                        inputs[i * LANES + j] = word
                if chunk < chunks - 1:
                    chacha_lanes(key, inputs, words, lanes)
                    key[:] = words
            number_lanes(key, inputs, tokens, numbers, coins, lanes)
            _add(kind, threshold, planes, numbers, coins, totals, counts, products, lanes)
            if number % _ROUNDS == _ROUNDS - 1:
                _drain(kind, totals, counts, products, lanes)
        _drain(kind, totals, counts, products, lanes)
        for j in range(lanes):
            out[start + j] = totals[j]


@njit(nogil=True, cache=True)
def _walk(key_words, ids, positions, width, kind, threshold, table, out):
    """The sum of all scores if out is empty; else each score into out, and zero."""
    n = positions.shape[0]
    chunks = (width + 3) // 4
    fixed = np.empty(8 * LANES, np.uint32)
    key = np.empty(8 * LANES, np.uint32) if chunks > 1 else fixed
    inputs = np.empty(4 * LANES, np.uint32)
    words = np.empty(BLOCK_WORDS * LANES, np.uint32)
    tokens = np.empty(LANES, np.uint32)
    numbers = np.empty(LANES, np.uint32)
    coins = np.empty(LANES, np.uint32)
    totals = np.zeros(LANES, np.float64)
    counts = np.zeros(LANES, np.uint32)
    products = np.ones(LANES, np.float64)
    planes = _planes(table)
    for i in range(8):
        for j in range(LANES):
            fixed[i * LANES + j] = key_words[i]
    for turn in range((n + LANES - 1) // LANES):
        start = turn * LANES
        lanes = min(LANES, n - start)
        for j in range(lanes):
            tokens[j] = ids[positions[start + j]]
        if chunks > 1:  # the cascade overwrites the key
            key[:] = fixed
        for chunk in range(chunks):
            for i in range(4):
                column = 4 * chunk + i
                for j in range(lanes):
                    if column < width:
                        inputs[i * LANES + j] = ids[positions[start + j] - width + column]
                    else:
                        inputs[i * LANES + j] = uint32(0xFFFFFFFF)
            if chunk < chunks - 1:
                chacha_lanes(key, inputs, words, lanes)
                key[:] = words
        number_lanes(key, inputs, tokens, numbers, coins, lanes)
        _add(kind, threshold, planes, numbers, coins, totals, counts, products, lanes)
        if out.shape[0] > 0:
            _drain(kind, totals, counts, products, lanes)
            for j in range(lanes):
                out[start + j] = totals[j]
                totals[j] = 0.0
        elif turn % _ROUNDS == _ROUNDS - 1:
            _drain(kind, totals, counts, products, LANES)
    _drain(kind, totals, counts, products, LANES)
    total = 0.0
    for j in range(LANES):
        total += totals[j]
    return total


@njit(nogil=True, cache=True)
def over_positions(keys, ids, positions, width, kind, threshold, table, out):
    """Statistic of one text under some keys, such as the slots of one.

    keys: (k, 8) uint32; out: (k,) float64; the rest as in `over_keys`.
    """
    none = np.empty(0, np.float64)
    for k in range(keys.shape[0]):
        out[k] = _walk(keys[k], ids, positions, width, kind, threshold, table, none)


@njit(nogil=True, cache=True)
def each_position(keys, ids, positions, width, kind, threshold, table, out):
    """What `over_positions` adds up, one score per position: out (k, n_scored) float64."""
    for k in range(keys.shape[0]):
        _walk(keys[k], ids, positions, width, kind, threshold, table, out[k])
