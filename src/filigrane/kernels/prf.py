"""`filigrane.prf`, lane-parallel: the same bits, compiled.

Buffers are flat and words first: word i of lane j is at i * LANES + j, so that the inner loop runs
over lanes. Three things make LLVM turn it into vector instructions, each measured: unsigned offsets
that are constants (else it gives up on proving that rows do not overlap), no inner loop over
rounds, and 32-bit types only (one 64-bit value would halve the number of lanes).
"""

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

from filigrane.kernels.wide import use_wide_vectors
from filigrane.prf import CONSTANTS

LANES = 256
"""Lanes per call: their keys, inputs and outputs (20 words each) stay in a first-level cache."""
BLOCK_WORDS = 8

# Offsets of the rows of a buffer. Unsigned, so that numba does not add its check for negative
# indices.
R1, R2, R3, R4, R5, R6, R7 = (np.uint64(i * LANES) for i in range(1, 8))


K0, K1, K2, K3 = (np.uint32(word) for word in CONSTANTS)


@njit(forceinline=True)
def _rotl(x, n):
    return uint32(uint32(x << uint32(n)) | uint32(x >> uint32(32 - n)))


@njit(forceinline=True)
def _quarter(a, b, c, d):
    a = uint32(a + b)
    d = _rotl(uint32(d ^ a), 16)
    c = uint32(c + d)
    b = _rotl(uint32(b ^ c), 12)
    a = uint32(a + b)
    d = _rotl(uint32(d ^ a), 8)
    c = uint32(c + d)
    b = _rotl(uint32(b ^ c), 7)
    return a, b, c, d


@njit(forceinline=True)
def _double_round(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3):
    a0, b0, c0, d0 = _quarter(a0, b0, c0, d0)
    a1, b1, c1, d1 = _quarter(a1, b1, c1, d1)
    a2, b2, c2, d2 = _quarter(a2, b2, c2, d2)
    a3, b3, c3, d3 = _quarter(a3, b3, c3, d3)
    a0, b1, c2, d3 = _quarter(a0, b1, c2, d3)
    a1, b2, c3, d0 = _quarter(a1, b2, c3, d0)
    a2, b3, c0, d1 = _quarter(a2, b3, c0, d1)
    a3, b0, c1, d2 = _quarter(a3, b0, c1, d2)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3


@njit(forceinline=True)
def _rounds(b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3):
    """Eight rounds on one lane: key words b and c, inputs d; the state without feed-forward.

    Four double rounds, written out: a loop here would keep LLVM from vectorising over lanes.
    """
    a0, a1, a2, a3 = K0, K1, K2, K3
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = _double_round(
        a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3
    )
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = _double_round(
        a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3
    )
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = _double_round(
        a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3
    )
    return _double_round(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3)


@njit(forceinline=True)
def mix(token, s0, s1, s2, s3):
    """`prf.field` for one lane."""
    h = uint32(token + s0)
    h = uint32(uint32(uint32(h ^ uint32(h >> uint32(17))) * uint32(0xED5AD4BB)) ^ s1)
    h = uint32(uint32(uint32(h ^ uint32(h >> uint32(11))) * uint32(0xAC4C1B51)) ^ s2)
    h = uint32(uint32(uint32(h ^ uint32(h >> uint32(15))) * uint32(0x31848BAB)) ^ s3)
    return uint32(h ^ uint32(h >> uint32(14)))


@njit(nogil=True, cache=True)
def chacha_lanes(key, inputs, out, lanes):
    """One chunk of `prf.block`: key (8 rows of LANES), inputs (4) -> out (8), flat uint32."""
    use_wide_vectors()
    for j in range(uint64(lanes)):
        b0, b1, b2, b3 = key[j], key[R1 + j], key[R2 + j], key[R3 + j]
        c0, c1, c2, c3 = key[R4 + j], key[R5 + j], key[R6 + j], key[R7 + j]
        d0, d1, d2, d3 = inputs[j], inputs[R1 + j], inputs[R2 + j], inputs[R3 + j]
        x = _rounds(b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3)
        out[j] = uint32(x[0] + K0)
        out[R1 + j] = uint32(x[1] + K1)
        out[R2 + j] = uint32(x[2] + K2)
        out[R3 + j] = uint32(x[3] + K3)
        out[R4 + j] = uint32(x[4] + b0)
        out[R5 + j] = uint32(x[5] + b1)
        out[R6 + j] = uint32(x[6] + b2)
        out[R7 + j] = uint32(x[7] + b3)


@njit(nogil=True, cache=True)
def number_lanes(key, inputs, tokens, numbers, coins, lanes):
    """The last chunk of `prf.block` and `prf.field` in one: what scores need, and nothing else.

    key (8 rows of LANES), inputs (4 rows), tokens (LANES,) -> numbers and coins, (LANES,) each.
    """
    use_wide_vectors()
    for j in range(uint64(lanes)):
        b0, b1, b2, b3 = key[j], key[R1 + j], key[R2 + j], key[R3 + j]
        c0, c1, c2, c3 = key[R4 + j], key[R5 + j], key[R6 + j], key[R7 + j]
        d0, d1, d2, d3 = inputs[j], inputs[R1 + j], inputs[R2 + j], inputs[R3 + j]
        x = _rounds(b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3)
        s0, s1 = uint32(x[0] + K0), uint32(x[1] + K1)
        s2, s3 = uint32(x[2] + K2), uint32(x[3] + K3)
        numbers[j] = mix(tokens[j], s0, s1, s2, s3)
        coins[j] = uint32(x[4] + b0)


@njit(nogil=True, cache=True)
def field_row(s0, s1, s2, s3, tokens, out):
    """`prf.field` of many tokens under one seed: tokens (n,) -> out (n,), all uint32."""
    use_wide_vectors()
    for j in range(tokens.shape[0]):
        out[j] = mix(tokens[j], s0, s1, s2, s3)


@njit(nogil=True, cache=True)
def _blocks(keys, contexts, out):
    n, width = contexts.shape
    chunks = (width + 3) // 4
    key = np.empty(8 * LANES, np.uint32)
    inputs = np.empty(4 * LANES, np.uint32)
    words = np.empty(BLOCK_WORDS * LANES, np.uint32)
    for start in range(0, n, LANES):
        lanes = min(LANES, n - start)
        for j in range(uint64(lanes)):
            for i in range(8):
                key[i * LANES + j] = keys[start + j, i]
        for chunk in range(chunks):
            for i in range(4):
                column = 4 * chunk + i
                for j in range(uint64(lanes)):
                    inputs[i * LANES + j] = (
                        contexts[start + j, column] if column < width else 0xFFFFFFFF
                    )
            chacha_lanes(key, inputs, words, lanes)
            if chunk < chunks - 1:
                key[:] = words
        for j in range(uint64(lanes)):
            for i in range(BLOCK_WORDS):
                out[start + j, i] = words[i * LANES + j]


def blocks(
    keys: npt.NDArray[np.uint32], contexts: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """`prf.block` row by row: keys (n, 8) and contexts (n, w), uint32 -> (n, 8) uint32."""
    out = np.empty((contexts.shape[0], BLOCK_WORDS), np.uint32)
    _blocks(np.ascontiguousarray(keys), np.ascontiguousarray(contexts), out)
    return out
