"""Numbers of other engines for one context and many candidates, compiled.

Twins of `foreign.vllm.philox_words` and `foreign.sglang.token_hashes`, which are the definitions;
knows their arithmetic and nothing of contexts, keys' names or scores. One pass over a vocabulary
per written token, which is what the array forms are slow at.
"""

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

from filigrane.kernels.wide import use_wide_vectors

_LOW = np.uint64(0xFFFFFFFF)


@njit(forceinline=True)
def _philox(c0, c1, c2, c3, k0, k1):
    for step in range(10):
        first = uint64(0xD2511F53) * uint64(c0)
        second = uint64(0xCD9E8D57) * uint64(c2)
        c0 = uint32(uint32(second >> uint64(32)) ^ c1 ^ k0)
        c1 = uint32(second & _LOW)
        c2 = uint32(uint32(first >> uint64(32)) ^ c3 ^ k1)
        c3 = uint32(first & _LOW)
        if step < 9:
            k0 = uint32(k0 + uint32(0x9E3779B9))
            k1 = uint32(k1 + uint32(0xBB67AE85))
    return c0, c1, c2, c3


@njit(nogil=True, cache=True)
def _philox_row(key, context, ids, out):
    use_wide_vectors()
    k0, k1 = uint32(key & _LOW), uint32(key >> uint64(32))
    width = context.shape[0]
    s0, s1, s2, s3 = uint32(0x574D4358), uint32(width), uint32(0), uint32(0)
    block = np.empty(4, np.uint32)
    for offset in range(0, width, 4):
        for i in range(4):
            inside = offset + i < width
            block[i] = context[offset + i] if inside else uint32(0xFFFFFFFF - i)
        s0, s1, s2, s3 = _philox(
            s0 ^ block[0], s1 ^ block[1], s2 ^ block[2], s3 ^ block[3], k0 ^ uint32(offset), k1
        )
    t0, t1 = uint32(k0 ^ s3), uint32(k1 ^ uint32(0x574D544B))
    last = uint32(0xFFFFFFFF)
    w0 = w1 = w2 = w3 = uint32(0)
    for j in range(ids.shape[0]):
        four = uint32(ids[j] >> uint32(2))
        # Neighbouring candidates share a call.
        if j == 0 or four != last:
            w0, w1, w2, w3 = _philox(four, s0, s1, s2, t0, t1)
            last = four
        lane = ids[j] & uint32(3)
        if lane == 0:
            out[j] = w0
        elif lane == 1:
            out[j] = w1
        elif lane == 2:
            out[j] = w2
        else:
            out[j] = w3


def philox_row(
    key: int, context: npt.NDArray[np.uint32], ids: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """`philox_words` of one context (w,) and candidates (n,), all uint32 -> (n,)."""
    out = np.empty(ids.shape[0], np.uint32)
    _philox_row(np.uint64(key), np.ascontiguousarray(context), np.ascontiguousarray(ids), out)
    return out


@njit(forceinline=True)
def _mix(s, word):
    v = uint32(word * uint32(0xCC9E2D51))
    v = uint32(uint32(v << uint32(15)) | uint32(v >> uint32(17)))
    s = uint32(s ^ uint32(v * uint32(0x1B873593)))
    s = uint32(uint32(s << uint32(13)) | uint32(s >> uint32(19)))
    return uint32(uint32(s * uint32(5)) + uint32(0xE6546B64))


@njit(nogil=True, cache=True)
def _murmur_row(key, context, ids, out):
    use_wide_vectors()
    head = _mix(uint32(0), uint32(key & _LOW))
    head = _mix(head, uint32(key >> uint64(32)))
    head = _mix(head, context)
    for j in range(ids.shape[0]):
        s = uint32(_mix(head, ids[j]) ^ uint32(16))
        s = uint32(uint32(s ^ uint32(s >> uint32(16))) * uint32(0x85EBCA6B))
        s = uint32(uint32(s ^ uint32(s >> uint32(13))) * uint32(0xC2B2AE35))
        out[j] = uint32(s ^ uint32(s >> uint32(16)))


def murmur_row(key: int, context: int, ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """`token_hashes` of one context hash and candidates (n,) uint32 -> (n,)."""
    out = np.empty(ids.shape[0], np.uint32)
    _murmur_row(np.uint64(key), np.uint32(context), np.ascontiguousarray(ids), out)
    return out
