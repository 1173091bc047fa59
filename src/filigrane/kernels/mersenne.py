"""`filigrane.foreign.mersenne`, compiled: MT19937, and permutations that are never built.

A green list is the front of a Fisher-Yates shuffle. Whether one token is in it needs no shuffle:
follow that token's place. It is found the moment the swap partner of a front place is where the
token stands, and it moves only when the shuffle reaches it, so that all other steps are one
comparison each, without a branch, and run in vector registers. Remainders are taken in float64:
(x + 1/2) / n is at least 1 / (2 n) away from every integer and the rounding error is below
2**-18 / n, so the truncated quotient is exact for every 32-bit x and n.

Nothing here keeps state between calls; all functions release the interpreter's lock, and work is
shared out over threads by groups of equal seeds.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

from filigrane.kernels.wide import use_wide_vectors

N = 624
_M = 397
_GROUP = 8  # From so many tokens under one seed on, building the list is cheaper than following.
_SHARE = 1 << 24  # Numbers to draw per task handed to a thread: some tens of milliseconds.


@njit(forceinline=True)
def _mixed(high, low):
    """One step of the recurrence without the far word."""
    y = uint32((high & uint32(0x80000000)) | (low & uint32(0x7FFFFFFF)))
    return uint32(uint32(y >> uint32(1)) ^ uint32(uint32(-uint32(y & uint32(1))) & 0x9908B0DF))


@njit(nogil=True, cache=True)
def _seed(state, seed):
    """init_genrand."""
    x = uint32(seed)
    state[uint64(0)] = x
    for i in range(uint64(1), uint64(N)):
        x = uint32(uint32(uint32(1812433253) * uint32(x ^ uint32(x >> uint32(30)))) + uint32(i))
        state[i] = x


@njit(nogil=True, cache=True)
def _twist(state):
    """The next 624 words, in place; each loop reads only what no step of it has to write first."""
    use_wide_vectors()
    one, far = uint64(1), uint64(_M)
    near = uint64(N - _M)
    for i in range(uint64(0), near):
        state[i] = uint32(state[i + far] ^ _mixed(state[i], state[i + one]))
    for i in range(near, near + near):
        state[i] = uint32(state[i - near] ^ _mixed(state[i], state[i + one]))
    for i in range(near + near, uint64(N - 1)):
        state[i] = uint32(state[i - near] ^ _mixed(state[i], state[i + one]))
    last = uint64(N - 1)
    state[last] = uint32(state[far - one] ^ _mixed(state[last], state[uint64(0)]))


@njit(forceinline=True)
def _tempered(y):
    y = uint32(y ^ uint32(y >> uint32(11)))
    y = uint32(y ^ uint32(uint32(y << uint32(7)) & uint32(0x9D2C5680)))
    y = uint32(y ^ uint32(uint32(y << uint32(15)) & uint32(0xEFC60000)))
    return uint32(y ^ uint32(y >> uint32(18)))


@njit(nogil=True, cache=True)
def _fill(seed, state, out):
    """The first outputs of a generator: out (n,) uint32."""
    use_wide_vectors()
    _seed(state, seed)
    n = out.shape[0]
    for start in range(0, n, N):
        _twist(state)
        for i in range(uint64(min(N, n - start))):
            out[uint64(start) + i] = _tempered(state[i])


@njit(nogil=True, cache=True)
def _hits(state, front, start, stop, vocab, inverses):
    """How many steps start..stop of a shuffle meet a token that stands at place `front`."""
    use_wide_vectors()
    count = uint32(0)
    base = float(vocab - start)
    want = float(front - start)
    for i in range(uint32(0), uint32(stop - start)):
        x = float(_tempered(state[uint64(i)]))
        step = float(i)
        n = base - step
        quotient = math.floor((x + 0.5) * inverses[uint64(start) + uint64(i)])
        count += uint32(x - quotient * n == want - step)
    return count


@njit(nogil=True, cache=True)
def _in_front(seed, token, vocab, size, inverses, state):
    """Whether `token` is among the first `size` of the permutation of `seed`."""
    place = token
    last = min(size, vocab - 1)  # the last step of a whole shuffle draws nothing
    _seed(state, seed)
    for start in range(0, last, N):
        stop = min(start + N, last)
        _twist(state)
        if place >= stop:
            if _hits(state, place, start, stop, vocab, inverses) != 0:
                return True
            continue
        for i in range(start, stop):
            partner = i + int(_tempered(state[i - start])) % (vocab - i)
            if partner == place:
                return True
            if i == place:
                place = partner
    return size == vocab


@njit(nogil=True, cache=True)
def _partners(numbers, last, vocab):
    """Turn outputs into swap partners, in place; apart from the swaps, so that it vectorises."""
    use_wide_vectors()
    for i in range(uint32(0), uint32(last)):
        x = float(numbers[uint64(i)])
        step = float(i)
        n = float(vocab) - step
        numbers[uint64(i)] = uint32(x - math.floor((x + 0.5) / n) * n + step)


@njit(nogil=True, cache=True)
def _shuffle(seed, vocab, size, order, state, numbers):
    """The first `size` entries of order (V,) int32, which must hold 0 .. V-1, are those of perm."""
    last = min(size, vocab - 1)
    _fill(seed, state, numbers[:last])
    _partners(numbers, last, vocab)
    for i in range(last):
        partner = numbers[i]
        order[i], order[partner] = order[partner], order[i]


@njit(nogil=True, cache=True)
def _green(seeds, tokens, order, starts, first, stop, vocab, size, out):
    """Membership for the groups first..stop: starts (groups + 1,) into order (n,)."""
    state = np.empty(N, np.uint32)
    inverses = np.empty(size, np.float64)
    for i in range(size):
        inverses[i] = 1.0 / float(vocab - i)
    row = np.empty(0, np.int32)
    mask = np.empty(0, np.bool_)
    numbers = np.empty(0, np.uint32)
    for group in range(first, stop):
        low, high = starts[group], starts[group + 1]
        seed = seeds[order[low]]
        if high - low < _GROUP:
            for i in range(low, high):
                out[order[i]] = _in_front(seed, tokens[order[i]], vocab, size, inverses, state)
            continue
        if row.shape[0] == 0:
            row = np.empty(vocab, np.int32)
            mask = np.empty(vocab, np.bool_)
            numbers = np.empty(size, np.uint32)
        for i in range(vocab):
            row[i] = i
        mask[:] = False
        _shuffle(seed, vocab, size, row, state, numbers)
        for i in range(size):
            mask[row[i]] = True
        for i in range(low, high):
            out[order[i]] = mask[tokens[order[i]]]


@njit(nogil=True, cache=True)
def _outputs(seeds, indices, order, starts, first, stop, out):
    """x[indices[i]] of MT(seeds[i]); within a group, indices ascend along `order`."""
    state = np.empty(N, np.uint32)
    for group in range(first, stop):
        _seed(state, seeds[order[starts[group]]])
        done = 0
        for i in range(starts[group], starts[group + 1]):
            index = indices[order[i]]
            while done <= index // N:
                _twist(state)
                done += 1
            out[order[i]] = _tempered(state[index % N])


def _groups(seeds: npt.NDArray[np.uint32], order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Borders of runs of equal seeds along `order`, (groups + 1,)."""
    ordered = seeds[order]
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return np.concatenate(([0], changes, [seeds.shape[0]])).astype(np.int64)


def _over_groups(work, groups: int, cost: int) -> None:
    """Run work(first, stop) over all groups, in threads if there is enough to do."""
    share = max(1, min(groups, _SHARE // max(1, cost)))
    starts = range(0, groups, share)
    if len(starts) < 2:
        work(0, groups)
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda first: work(first, min(groups, first + share)), starts))


def outputs(seed: int, n: int) -> npt.NDArray[np.uint32]:
    """The first n outputs of MT19937 after init_genrand(seed mod 2**32)."""
    out = np.empty(n, np.uint32)
    _fill(np.uint32(seed & 0xFFFFFFFF), np.empty(N, np.uint32), out)
    return out


def outputs_at(
    seeds: npt.NDArray[np.uint32], indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint32]:
    """Output number indices[i] of the generator of seeds[i]: (n,) and (n,) -> (n,) uint32."""
    out = np.empty(seeds.shape[0], np.uint32)
    if seeds.shape[0] == 0:
        return out
    order = np.lexsort((indices, seeds))
    starts = _groups(seeds, order)

    def work(first: int, stop: int) -> None:
        _outputs(seeds, indices, order, starts, first, stop, out)

    _over_groups(work, starts.shape[0] - 1, N + int(indices.max()) + 1)
    return out


def in_front(
    seeds: npt.NDArray[np.uint32], tokens: npt.NDArray[np.int64], vocab_size: int, size: int
) -> npt.NDArray[np.bool_]:
    """Whether tokens[i] is among the first `size` entries of perm(seeds[i], vocab_size).

    seeds (n,) uint32, tokens (n,) int64 in [0, vocab_size), 0 <= size <= vocab_size -> (n,) bool.
    """
    out = np.zeros(seeds.shape[0], np.bool_)
    if seeds.shape[0] == 0 or size == 0:
        return out
    order = np.argsort(seeds, kind="stable")
    starts = _groups(seeds, order)

    def work(first: int, stop: int) -> None:
        _green(seeds, tokens, order, starts, first, stop, vocab_size, size, out)

    _over_groups(work, starts.shape[0] - 1, N + size)
    return out


def front(seed: int, vocab_size: int, size: int) -> npt.NDArray[np.int32]:
    """The first `size` entries of perm(seed, vocab_size), (size,) int32."""
    row = np.arange(vocab_size, dtype=np.int32)
    state, numbers = np.empty(N, np.uint32), np.empty(max(size, 1), np.uint32)
    _shuffle(np.uint32(seed & 0xFFFFFFFF), vocab_size, size, row, state, numbers)
    return row[:size]
