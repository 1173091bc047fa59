"""HKDF-Expand with SHA-256 for long runs of user indices: many lanes of one hash at a time.

A user key is one block of RFC 5869 HKDF-Expand, that is HMAC-SHA-256(parent,
"filigrane/v1/user" || u64be(index) || 0x01). RFC 2104 lets the two key-only compressions of the
HMAC be done once per parent, and the message fits one block, so each index costs exactly two
SHA-256 compressions (FIPS 180-4, section 6.2.2). LANES indices go through them side by side.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from filigrane.kernels.wide import use_wide_vectors

LANES = 32
"""Indices hashed side by side: two AVX-512 or four AVX2 registers per word, so that the latency
of one register's round hides behind the others."""

_INFO = b"filigrane/v1/user"  # 17 bytes; _load_info spells out where each of them falls
_INFO_WORDS = np.frombuffer(_INFO + bytes(3), dtype=">u4").astype(np.uint32)
_INNER_BITS = np.uint32((64 + len(_INFO) + 8 + 1) * 8)
_OUTER_BITS = np.uint32((64 + 32) * 8)

_IV = np.array(
    [
        0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
        0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
    ],
    dtype=np.uint32,
)  # fmt: skip

_K = np.array(
    [
        0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4,
        0xAB1C5ED5, 0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE,
        0x9BDC06A7, 0xC19BF174, 0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F,
        0x4A7484AA, 0x5CB0A9DC, 0x76F988DA, 0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7,
        0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967, 0x27B70A85, 0x2E1B2138, 0x4D2C6DFC,
        0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85, 0xA2BFE8A1, 0xA81A664B,
        0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070, 0x19A4C116,
        0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
        0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7,
        0xC67178F2,
    ],
    dtype=np.uint32,
)  # fmt: skip

# One flat array holds everything the lanes touch: LANES values for each of 8 state words, then for
# each of 16 schedule words. Every offset into it is then a constant multiple of LANES, which is
# what lets LLVM prove the lane loops free of overlap and turn them into vector code.
_A, _B, _C, _D, _E, _F, _G, _H = (j * LANES for j in range(8))
_W = 8 * LANES


# The casts are there because numba widens uint32 (+) uint32 to uint64; with them LLVM narrows
# every operation back to 32 bits and finds the rotates.
@njit(nogil=True)
def _big_sigma0(x: np.uint32) -> np.uint32:
    u = np.uint32
    return u(
        u(u(x >> u(2)) | u(x << u(30)))
        ^ u(u(x >> u(13)) | u(x << u(19)))
        ^ u(u(x >> u(22)) | u(x << u(10)))
    )


@njit(nogil=True)
def _big_sigma1(x: np.uint32) -> np.uint32:
    u = np.uint32
    return u(
        u(u(x >> u(6)) | u(x << u(26)))
        ^ u(u(x >> u(11)) | u(x << u(21)))
        ^ u(u(x >> u(25)) | u(x << u(7)))
    )


@njit(nogil=True)
def _small_sigma0(x: np.uint32) -> np.uint32:
    u = np.uint32
    return u(u(u(x >> u(7)) | u(x << u(25))) ^ u(u(x >> u(18)) | u(x << u(14))) ^ u(x >> u(3)))


@njit(nogil=True)
def _small_sigma1(x: np.uint32) -> np.uint32:
    u = np.uint32
    return u(u(u(x >> u(17)) | u(x << u(15))) ^ u(u(x >> u(19)) | u(x << u(13))) ^ u(x >> u(10)))


@njit(nogil=True)
def _step(
    a: np.uint32,
    b: np.uint32,
    c: np.uint32,
    d: np.uint32,
    e: np.uint32,
    f: np.uint32,
    g: np.uint32,
    h: np.uint32,
    kw: np.uint32,
) -> tuple[np.uint32, np.uint32]:
    """One round of FIPS 180-4, section 6.2.2, step 3: the new values of d and h."""
    u = np.uint32
    t1 = u(u(h + _big_sigma1(e)) + u(u(g ^ u(e & u(f ^ g))) + kw))
    t2 = u(_big_sigma0(a) + u(u(a & b) | u(c & u(a | b))))
    return u(d + t1), u(t1 + t2)


@njit(nogil=True)
def _next(w0: np.uint32, w1: np.uint32, w9: np.uint32, w14: np.uint32) -> np.uint32:
    """One schedule word from the ones 16, 15, 7 and 2 places before it."""
    u = np.uint32
    return u(u(w0 + _small_sigma0(w1)) + u(w9 + _small_sigma1(w14)))


@njit(nogil=True)
def _compress(x: NDArray[np.uint32], state: NDArray[np.uint32]) -> None:
    """SHA-256's compression of the 16 words of every lane, from one common state (8,).

    FIPS 180-4, section 6.2.2: 4 times 16 rounds, the schedule renewed in place between them.
    """
    use_wide_vectors()
    u = np.uint32
    for j in range(8):
        for i in range(LANES):
            x[j * LANES + i] = state[j]
    for t in range(4):
        k = _K[16 * t : 16 * t + 16]
        for i in range(LANES):
            a, b, c, d = x[_A + i], x[_B + i], x[_C + i], x[_D + i]
            e, f, g, h = x[_E + i], x[_F + i], x[_G + i], x[_H + i]
            d, h = _step(a, b, c, d, e, f, g, h, u(x[_W + i] + k[0]))
            c, g = _step(h, a, b, c, d, e, f, g, u(x[_W + 1 * LANES + i] + k[1]))
            b, f = _step(g, h, a, b, c, d, e, f, u(x[_W + 2 * LANES + i] + k[2]))
            a, e = _step(f, g, h, a, b, c, d, e, u(x[_W + 3 * LANES + i] + k[3]))
            h, d = _step(e, f, g, h, a, b, c, d, u(x[_W + 4 * LANES + i] + k[4]))
            g, c = _step(d, e, f, g, h, a, b, c, u(x[_W + 5 * LANES + i] + k[5]))
            f, b = _step(c, d, e, f, g, h, a, b, u(x[_W + 6 * LANES + i] + k[6]))
            e, a = _step(b, c, d, e, f, g, h, a, u(x[_W + 7 * LANES + i] + k[7]))
            d, h = _step(a, b, c, d, e, f, g, h, u(x[_W + 8 * LANES + i] + k[8]))
            c, g = _step(h, a, b, c, d, e, f, g, u(x[_W + 9 * LANES + i] + k[9]))
            b, f = _step(g, h, a, b, c, d, e, f, u(x[_W + 10 * LANES + i] + k[10]))
            a, e = _step(f, g, h, a, b, c, d, e, u(x[_W + 11 * LANES + i] + k[11]))
            h, d = _step(e, f, g, h, a, b, c, d, u(x[_W + 12 * LANES + i] + k[12]))
            g, c = _step(d, e, f, g, h, a, b, c, u(x[_W + 13 * LANES + i] + k[13]))
            f, b = _step(c, d, e, f, g, h, a, b, u(x[_W + 14 * LANES + i] + k[14]))
            e, a = _step(b, c, d, e, f, g, h, a, u(x[_W + 15 * LANES + i] + k[15]))
            x[_A + i], x[_B + i], x[_C + i], x[_D + i] = a, b, c, d
            x[_E + i], x[_F + i], x[_G + i], x[_H + i] = e, f, g, h
        if t == 3:
            break
        for i in range(LANES):
            w0, w1 = x[_W + i], x[_W + LANES + i]
            w2, w3 = x[_W + 2 * LANES + i], x[_W + 3 * LANES + i]
            w4, w5 = x[_W + 4 * LANES + i], x[_W + 5 * LANES + i]
            w6, w7 = x[_W + 6 * LANES + i], x[_W + 7 * LANES + i]
            w8, w9 = x[_W + 8 * LANES + i], x[_W + 9 * LANES + i]
            w10, w11 = x[_W + 10 * LANES + i], x[_W + 11 * LANES + i]
            w12, w13 = x[_W + 12 * LANES + i], x[_W + 13 * LANES + i]
            w14, w15 = x[_W + 14 * LANES + i], x[_W + 15 * LANES + i]
            w0 = _next(w0, w1, w9, w14)
            w1 = _next(w1, w2, w10, w15)
            w2 = _next(w2, w3, w11, w0)
            w3 = _next(w3, w4, w12, w1)
            w4 = _next(w4, w5, w13, w2)
            w5 = _next(w5, w6, w14, w3)
            w6 = _next(w6, w7, w15, w4)
            w7 = _next(w7, w8, w0, w5)
            w8 = _next(w8, w9, w1, w6)
            w9 = _next(w9, w10, w2, w7)
            w10 = _next(w10, w11, w3, w8)
            w11 = _next(w11, w12, w4, w9)
            w12 = _next(w12, w13, w5, w10)
            w13 = _next(w13, w14, w6, w11)
            w14 = _next(w14, w15, w7, w12)
            w15 = _next(w15, w0, w8, w13)
            x[_W + i] = w0
            x[_W + LANES + i] = w1
            x[_W + 2 * LANES + i] = w2
            x[_W + 3 * LANES + i] = w3
            x[_W + 4 * LANES + i] = w4
            x[_W + 5 * LANES + i] = w5
            x[_W + 6 * LANES + i] = w6
            x[_W + 7 * LANES + i] = w7
            x[_W + 8 * LANES + i] = w8
            x[_W + 9 * LANES + i] = w9
            x[_W + 10 * LANES + i] = w10
            x[_W + 11 * LANES + i] = w11
            x[_W + 12 * LANES + i] = w12
            x[_W + 13 * LANES + i] = w13
            x[_W + 14 * LANES + i] = w14
            x[_W + 15 * LANES + i] = w15
    for j in range(8):
        for i in range(LANES):
            x[j * LANES + i] = u(x[j * LANES + i] + state[j])


@njit(nogil=True)
def _swap(v: np.uint32) -> np.uint32:
    """The same four bytes read in the other order: SHA-256 is big endian, our words little."""
    u = np.uint32
    return u(
        u(u(v << u(24)) | u(u(v << u(8)) & u(0xFF0000)))
        | u(u(u(v >> u(8)) & u(0xFF00)) | u(v >> u(24)))
    )


# The three messages of an HMAC with a 32-byte key, written into the schedule of all lanes. Plain
# loops rather than slice assignments: numba takes ten times as long to compile those.
@njit(nogil=True)
def _load_pads(x: NDArray[np.uint32], key: NDArray[np.uint32]) -> None:
    """Lane 0 the key with the inner pad, lane 1 with the outer; nobody reads the other lanes."""
    for j in range(16):
        word = _swap(key[j]) if j < 8 else np.uint32(0)
        x[_W + j * LANES] = np.uint32(word ^ np.uint32(0x36363636))
        x[_W + j * LANES + 1] = np.uint32(word ^ np.uint32(0x5C5C5C5C))


@njit(nogil=True)
def _load_info(x: NDArray[np.uint32], first: np.uint64) -> None:
    """In lane i: the info string of user first + i, the block counter 1, SHA-256's padding."""
    u = np.uint32
    for j in range(16):
        for i in range(LANES):
            index = first + np.uint64(i)
            if j < 4:
                word = _INFO_WORDS[j]
            elif j == 4:  # the 17th byte of the prefix, then the index begins
                word = u(_INFO_WORDS[4] | u(index >> np.uint64(40)))
            elif j == 5:
                word = u(index >> np.uint64(8))
            elif j == 6:
                word = u(u(index << np.uint64(24)) | u(0x00018000))
            else:
                word = _INNER_BITS if j == 15 else u(0)
            x[_W + j * LANES + i] = word


@njit(nogil=True)
def _load_digest(x: NDArray[np.uint32]) -> None:
    """In every lane: the inner hash that the state words hold, and SHA-256's padding."""
    u = np.uint32
    for j in range(16):
        for i in range(LANES):
            if j < 8:
                word = x[j * LANES + i]
            else:
                word = u(0x80000000) if j == 8 else _OUTER_BITS if j == 15 else u(0)
            x[_W + j * LANES + i] = word


# The signature is spelled out so that one compilation serves every layout of out.
@njit("void(uint32[:, ::1], uint64, uint32[:, :, :])", nogil=True, cache=True)
def expand_users(keys: NDArray[np.uint32], start: np.uint64, out: NDArray[np.uint32]) -> None:
    """Write the user keys of indices start, start + 1, ... for every slot.

    keys: (slots, 8) uint32, C order, the users' parents as 8 little-endian words each.
    start: uint64, the first index; start + n - 1 must not pass 2**64 - 1 (it would wrap).
    out: (n, slots, 8) uint32, written in full; its shape says how many indices. Any strides do: a
    scan that wants one slot's words as rows allocates rows of (8, n), passes rows.T[:, None, :].
    Nothing is checked here. The GIL is released.
    """
    x = np.empty(24 * LANES, np.uint32)
    state = np.empty((3, 8), np.uint32)  # SHA-256's own start, then HMAC's inner and outer one
    for j in range(8):
        state[0, j] = _IV[j]
    n = out.shape[0]
    for slot in range(keys.shape[0]):
        _load_pads(x, keys[slot])
        _compress(x, state[0])
        for j in range(8):
            state[1, j] = x[j * LANES]
            state[2, j] = x[j * LANES + 1]
        for low in range(0, n, LANES):
            _load_info(x, start + np.uint64(low))
            _compress(x, state[1])
            _load_digest(x)
            _compress(x, state[2])
            for i in range(min(LANES, n - low)):
                for j in range(8):
                    out[low + i, slot, j] = _swap(x[j * LANES + i])
