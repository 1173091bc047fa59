"""Summing scores, compiled: one key over a text, or very many keys over one text.

The statistic of a scheme is named by a `Statistic` (see `schemes/base.py`): a kind, a threshold and
a table. The laws live in the schemes, the PRF in `kernels.prf`; this file only walks over positions
and lanes. In `over_keys` a lane is a key, in `over_positions` a lane is a position of the text.
"""

import math

import numpy as np
from numba import njit, uint32

from filigrane.kernels.prf import BLOCK_WORDS, LANES, R4, chacha_lanes, field_lanes
from filigrane.kernels.wide import use_wide_vectors

GUMBEL, GREEN, TABLE, POSITION, DISTANCE = range(5)

# A product of so many factors of at least 2**-32 is still a normal double.
_FACTORS = 30


@njit(nogil=True, cache=True)
def _add(kind, threshold, table, numbers, coins, totals, products, lanes):
    """Add one score per lane to totals (or multiply it into products, for GUMBEL)."""
    use_wide_vectors()
    if kind == GUMBEL:
        for j in range(lanes):
            products[j] *= (np.float64(numbers[j]) + 1.0) * 2.0**-32
    elif kind == GREEN:
        for j in range(lanes):
            totals[j] += 1.0 if numbers[j] < threshold else 0.0
    elif kind == TABLE:
        for j in range(lanes):
            r = numbers[j]
            totals[j] += (
                table[r & uint32(0xFF)]
                + table[uint32(256) + ((r >> uint32(8)) & uint32(0xFF))]
                + table[uint32(512) + ((r >> uint32(16)) & uint32(0xFF))]
                + table[uint32(768) + (r >> uint32(24))]
            )
    elif kind == POSITION:
        for j in range(lanes):
            totals[j] += np.float64(numbers[j]) * 2.0**-32
    else:
        for j in range(lanes):
            rest = 4294967296.0 - abs(np.float64(numbers[j]) - np.float64(coins[j]))
            totals[j] += rest * (rest - 1.0) * 2.0**-64


@njit(nogil=True, cache=True)
def _drain(totals, products, lanes):
    for j in range(lanes):
        totals[j] -= math.log(products[j])
        products[j] = 1.0


@njit(nogil=True, cache=True)
def over_keys(keys, ids, positions, width, kind, threshold, table, out):
    """Statistic of one text under many keys.

    keys: (8, n) uint32; ids: (n_tokens,) uint32; positions: (n_scored,) int64; table: (1024,)
    float64; out: (n,) float64.
    """
    n = keys.shape[1]
    chunks = (width + 3) // 4
    fixed = np.empty(8 * LANES, np.uint32)
    key = np.empty(8 * LANES, np.uint32)
    inputs = np.empty(4 * LANES, np.uint32)
    words = np.empty(BLOCK_WORDS * LANES, np.uint32)
    tokens = np.empty(LANES, np.uint32)
    numbers = np.empty(LANES, np.uint32)
    coins = words[R4:]
    totals = np.empty(LANES, np.float64)
    products = np.empty(LANES, np.float64)
    for start in range(0, n, LANES):
        lanes = min(LANES, n - start)
        for i in range(8):
            for j in range(lanes):
                fixed[i * LANES + j] = keys[i, start + j]
        totals[:] = 0.0
        products[:] = 1.0
        for number in range(positions.shape[0]):
            t = positions[number]
            tokens[:] = ids[t]
            for chunk in range(chunks):
                for i in range(4):
                    column = 4 * chunk + i
                    word = ids[t - width + column] if column < width else uint32(0xFFFFFFFF)
                    for j in range(LANES):
                        inputs[i * LANES + j] = word
                if chunk == 0:
                    chacha_lanes(fixed, inputs, words, lanes)
                else:
                    key[:] = words
                    chacha_lanes(key, inputs, words, lanes)
            field_lanes(words, tokens, numbers, lanes)
            _add(kind, threshold, table, numbers, coins, totals, products, lanes)
            if kind == GUMBEL and number % _FACTORS == _FACTORS - 1:
                _drain(totals, products, lanes)
        if kind == GUMBEL:
            _drain(totals, products, lanes)
        for j in range(lanes):
            out[start + j] = totals[j]


@njit(nogil=True, cache=True)
def over_positions(key_words, ids, positions, width, kind, threshold, table):
    """Statistic of one text under one key: key_words (8,) uint32, the rest as in `over_keys`."""
    n = positions.shape[0]
    chunks = (width + 3) // 4
    fixed = np.empty(8 * LANES, np.uint32)
    key = np.empty(8 * LANES, np.uint32)
    inputs = np.empty(4 * LANES, np.uint32)
    words = np.empty(BLOCK_WORDS * LANES, np.uint32)
    tokens = np.empty(LANES, np.uint32)
    numbers = np.empty(LANES, np.uint32)
    coins = words[R4:]
    totals = np.zeros(LANES, np.float64)
    products = np.ones(LANES, np.float64)
    for i in range(8):
        for j in range(LANES):
            fixed[i * LANES + j] = key_words[i]
    for turn in range((n + LANES - 1) // LANES):
        start = turn * LANES
        lanes = min(LANES, n - start)
        for j in range(lanes):
            tokens[j] = ids[positions[start + j]]
        for chunk in range(chunks):
            for i in range(4):
                column = 4 * chunk + i
                for j in range(lanes):
                    if column < width:
                        inputs[i * LANES + j] = ids[positions[start + j] - width + column]
                    else:
                        inputs[i * LANES + j] = uint32(0xFFFFFFFF)
            if chunk == 0:
                chacha_lanes(fixed, inputs, words, lanes)
            else:
                key[:] = words
                chacha_lanes(key, inputs, words, lanes)
        field_lanes(words, tokens, numbers, lanes)
        _add(kind, threshold, table, numbers, coins, totals, products, lanes)
        if kind == GUMBEL and turn % _FACTORS == _FACTORS - 1:
            _drain(totals, products, LANES)
    if kind == GUMBEL:
        _drain(totals, products, LANES)
    total = 0.0
    for j in range(LANES):
        total += totals[j]
    return total
