"""From a key and a context to numbers: the readable numpy reference of SPEC.md, section 2.

This module knows nothing of schemes, texts or where keys come from. It holds two functions:

    block(key, context) -> 8 words      a cryptographic PRF (ChaCha8) of the preceding tokens
    field(block, token) -> 1 word       a cheap expansion: one number per token

`filigrane.kernels.prf` computes the same bits many lanes at a time and `filigrane.adapters.torch`
computes them on any device; the golden vectors in `vectors/v1/prf.json` bind the three together.
Why this construction: docs/design/0001-prf.md.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

ROUNDS: Final = 8
WORDS_PER_CHUNK: Final = 4
"""Context tokens that enter one ChaCha block (its 128 bits of counter and nonce)."""
BLOCK_WORDS: Final = 8
"""Words kept of each ChaCha block: the first half of its 16."""
PADDING: Final = 0xFFFFFFFF
"""Fills the last chunk of a context; never a token id."""
MAX_TOKEN_ID: Final = 0xFFFFFFFE
CONSTANTS: Final = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
"""'expand 32-byte k', little endian: ChaCha's own constants (RFC 8439)."""

FIELD: Final = slice(0, 4)
"""The words of a block that seed the per-token field."""
COIN: Final = 4
"""The word of a block that is one uniform number for the whole context."""

_QUARTERS: Final = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),  # columns
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),  # diagonals
)  # fmt: skip


def _rotate_left(x: Words, n: int) -> Words:
    return (x << np.uint32(n)) | (x >> np.uint32(32 - n))


def chacha_block(key: Words, inputs: Words, rounds: int = ROUNDS) -> Words:
    """The ChaCha block function (RFC 8439 section 2.3) with `rounds` rounds, over leading axes.

    key: (..., 8) uint32, inputs: (..., 4) uint32 (state words 12 to 15); returns (..., 16) uint32.
    """
    shape = np.broadcast_shapes(key.shape[:-1], inputs.shape[:-1])
    x = [np.full(shape, c, dtype=np.uint32) for c in CONSTANTS]
    x += [np.broadcast_to(key[..., i], shape).copy() for i in range(8)]
    x += [np.broadcast_to(inputs[..., i], shape).copy() for i in range(4)]
    start = [word.copy() for word in x]
    for _ in range(rounds // 2):
        for a, b, c, d in _QUARTERS:
            x[a] += x[b]
            x[d] = _rotate_left(x[d] ^ x[a], 16)
            x[c] += x[d]
            x[b] = _rotate_left(x[b] ^ x[c], 12)
            x[a] += x[b]
            x[d] = _rotate_left(x[d] ^ x[a], 8)
            x[c] += x[d]
            x[b] = _rotate_left(x[b] ^ x[c], 7)
    return np.stack([word + first for word, first in zip(x, start, strict=True)], axis=-1)


def block(key: npt.ArrayLike, context: npt.ArrayLike) -> Words:
    """PRF of a context under a 256-bit key: 8 words, of which schemes use FIELD and COIN.

    key: (..., 8) uint32; context: (..., w) token ids, oldest first, w >= 1, each at most
    MAX_TOKEN_ID; leading axes broadcast. Returns (..., 8) uint32.

    Contexts of up to four tokens take one ChaCha8 block. Longer ones cascade: all chunks but the
    last turn the key into a new key (the 8 words of their output). The width is bound to the key by
    its derivation label, so inputs of different lengths never meet under one key and the cascade is
    a PRF (Bellare, Canetti and Krawczyk 1996).
    """
    key = np.asarray(key, dtype=np.uint32)
    context = np.asarray(context).astype(np.uint32)
    width = context.shape[-1]
    missing = -width % WORDS_PER_CHUNK
    padding = np.full((*context.shape[:-1], missing), PADDING, dtype=np.uint32)
    padded = np.concatenate([context, padding], axis=-1)
    for start in range(0, width - WORDS_PER_CHUNK, WORDS_PER_CHUNK):
        key = chacha_block(key, padded[..., start : start + WORDS_PER_CHUNK])[..., :BLOCK_WORDS]
    return chacha_block(key, padded[..., -WORDS_PER_CHUNK:])[..., :BLOCK_WORDS]


def field(seed: npt.ArrayLike, token: npt.ArrayLike) -> Words:
    """The keyed number of each token: a seeded, bijective 32-bit mixer (SPEC.md section 2.3).

    seed: (..., 4) uint32, words FIELD of a block; token: (...) ids, broadcast against seed's
    leading axes. Returns uint32. For one seed it is a bijection: no two tokens of a context share a
    number, so orders are strict and races have no ties. Every step exists for 32-bit lanes of CPUs
    and GPUs. The round structure and constants are those of the mixer `triple32` (C. Wellons,
    hash-prospector), with 32 bits of seed entering before each round.
    """
    seed = np.asarray(seed, dtype=np.uint32)
    with np.errstate(over="ignore"):  # wrapping is meant; numpy warns of it for scalars only
        h: Words = np.asarray(token).astype(np.uint32) + seed[..., 0]
        h = (h ^ (h >> np.uint32(17))) * np.uint32(0xED5AD4BB) ^ seed[..., 1]
        h = (h ^ (h >> np.uint32(11))) * np.uint32(0xAC4C1B51) ^ seed[..., 2]
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x31848BAB) ^ seed[..., 3]
    return h ^ (h >> np.uint32(14))


def open_uniform(words: Words) -> npt.NDArray[np.float64]:
    """(r + 1/2) / 2**32: strictly inside (0, 1), for drawing."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def upper_uniform(words: Words) -> npt.NDArray[np.float64]:
    """(r + 1) / 2**32 in (0, 1], for scoring.

    P(upper_uniform <= x) <= x for every x, with equality on the lattice: a p-value computed from it
    by a continuous law is exact up to the lattice and never too small.
    """
    return (words.astype(np.float64) + 1.0) * 2.0**-32
