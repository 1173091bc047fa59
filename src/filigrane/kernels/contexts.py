"""`filigrane.contexts.scored_positions`, compiled: first occurrences of windows by a hash table.

The table only finds candidates; windows are compared token by token, so a collision costs time and
never a wrong answer.
"""

import os

import numpy as np
import numpy.typing as npt
from numba import njit, uint64


@njit(nogil=True, cache=True)
def _first_windows(ids, starts, width, seed, table, positions):
    mask = uint64(table.shape[0] - 1)
    found = 0
    complete = 0
    for text in range(starts.shape[0] - 1):
        for t in range(starts[text] + width, starts[text + 1]):
            complete += 1
            h = uint64(seed)
            for i in range(t - width, t):
                h = uint64((h ^ uint64(ids[i])) * uint64(0xD6E8FEB86659FD93))
                h = uint64(h ^ (h >> uint64(32)))
            slot = h & mask
            new = True
            while table[slot] >= 0:
                other = positions[table[slot]]
                same = True
                for i in range(1, width + 1):
                    if ids[t - i] != ids[other - i]:
                        same = False
                        break
                if same:
                    new = False
                    break
                slot = (slot + uint64(1)) & mask
            if new:
                table[slot] = found
                positions[found] = t
                found += 1
    return found, complete


def first_windows(
    ids: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], width: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Positions whose complete window is new, and the number of positions with a complete window.

    ids: all texts, concatenated; starts: (texts + 1,) borders.
    """
    size = 1 << (2 * ids.shape[0] - 1).bit_length()
    table = np.full(size, -1, dtype=np.int32)
    positions = np.empty(ids.shape[0], dtype=np.int64)
    # A secret seed, so that nobody can write a text whose windows all collide; it changes no
    # result.
    seed = np.uint64(int.from_bytes(os.urandom(8), "little"))
    found, complete = _first_windows(ids, starts, width, seed, table, positions)
    return positions[:found].copy(), int(complete)
