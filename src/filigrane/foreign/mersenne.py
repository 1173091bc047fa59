"""MT19937 and what torch makes of it on CPUs: permutations and uniforms, in readable numpy.

Knows nothing of keys, texts or marks. Several tools seed `torch.Generator()` with a hash of the
context and let it draw a green list (`torch.randperm`) or uniforms (`torch.rand`). On a CPU both
are plain functions of MT19937's raw outputs x0, x1, ... after init_genrand(seed mod 2**32):

    perm(seed, V):  start from 0 .. V-1; for i = 0 .. V-2 swap entry i with entry i + x_i mod (V-i)
    rand(seed, V):  entry i is (x_i mod 2**24) * 2**-24

so the high half of a 64-bit seed is lost. A CUDA generator is another one altogether: what it drew
cannot be read here. This module is the definition; `kernels.mersenne` computes the same, compiled,
and asks for membership without building a permutation.

Source: Matsumoto and Nishimura 1998, "Mersenne Twister"; the two rules as observed of torch 2.13.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["in_front", "outputs", "perm", "rand"]

_N, _M = 624, 397
_MASK = 0xFFFFFFFF


def _seeded(seed: int) -> npt.NDArray[np.uint32]:
    """init_genrand: the first state, (624,)."""
    words = [seed & _MASK]
    for i in range(1, _N):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + i) & _MASK)
    return np.array(words, dtype=np.uint32)


def _twisted(state: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The next state. Entry i needs entries i, i + 1 and i + 397 of the sequence, hence pieces."""
    long = np.concatenate([state, np.empty(_N, dtype=np.uint32)])
    for start, stop in ((0, _N - _M), (_N - _M, 2 * (_N - _M)), (2 * (_N - _M), _N)):
        i = np.arange(start, stop)
        y = long[i] & np.uint32(0x80000000) | long[i + 1] & np.uint32(0x7FFFFFFF)
        twist = np.where(y & np.uint32(1), np.uint32(0x9908B0DF), np.uint32(0))
        long[_N + i] = long[i + _M] ^ y >> np.uint32(1) ^ twist
    return long[_N:]


def outputs(seed: int, n: int) -> npt.NDArray[np.uint32]:
    """The first n outputs of a generator, (n,) uint32."""
    state = _seeded(seed)
    blocks = [np.empty(0, dtype=np.uint32)]
    for _ in range(-(-n // _N)):
        state = _twisted(state)
        y = state ^ state >> np.uint32(11)
        y ^= y << np.uint32(7) & np.uint32(0x9D2C5680)
        y ^= y << np.uint32(15) & np.uint32(0xEFC60000)
        blocks.append(y ^ y >> np.uint32(18))
    return np.concatenate(blocks)[:n]


def perm(seed: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """`torch.randperm(vocab_size)` of a CPU generator with this seed, (V,) int64."""
    order = np.arange(vocab_size)
    for i, x in enumerate(outputs(seed, vocab_size - 1).tolist()):
        partner = i + x % (vocab_size - i)
        order[i], order[partner] = order[partner], order[i]
    return order


def rand(seed: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """`torch.rand(vocab_size)` of a CPU generator with this seed, (V,) float32 in [0, 1)."""
    mantissas = outputs(seed, vocab_size) & np.uint32(0xFFFFFF)
    return mantissas.astype(np.float32) * np.float32(2.0**-24)


def in_front(seed: int, token: int, vocab_size: int, size: int) -> bool:
    """Whether `token` is among the first `size` entries of perm(seed, vocab_size).

    Follows the token's place through the shuffle instead of shuffling: an entry that has been
    passed is final.
    """
    place = token
    for i, x in enumerate(outputs(seed, min(size, vocab_size - 1)).tolist()):
        partner = i + x % (vocab_size - i)
        if partner == place:
            return True
        if i == place:
            place = partner
    return size == vocab_size
