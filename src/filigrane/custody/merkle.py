"""Merkle trees of RFC 6962 (and 9162): one hash for a whole log, short proofs of what it holds.

    leaf    SHA-256(0x00 || data)        node    SHA-256(0x01 || left || right)
    root    of n leaves: the left tree has the largest power of two below n, the right tree the rest
    empty   SHA-256("")

An inclusion proof shows that a leaf is number i of the n leaves under a root; a consistency proof
shows that the first m leaves under one root are the first m of the n under another, so that nothing
was changed, only added. Proofs have about log2 n hashes of 32 bytes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from filigrane.errors import AuditError

__all__ = [
    "Tree",
    "consistency_proof",
    "inclusion_proof",
    "root",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES: Final = 32


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A growing tree that answers for every size it ever had, in O(log n) hashes.

    It keeps the hash of every complete subtree: 64 bytes per leaf. Not to be shared by threads
    while it grows.
    """

    __slots__ = ("__levels",)

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        # Level k holds the hashes of the complete subtrees of 2**k leaves, one after another.
        self.__levels: list[bytearray] = [bytearray()]
        for data in leaves:
            self.append(data)

    def __len__(self) -> int:
        return len(self.__levels[0]) // HASH_BYTES

    def __repr__(self) -> str:
        return f"<Tree of {len(self)} leaves>"

    def append(self, data: bytes) -> None:
        """Add a leaf."""
        made, position, level = _leaf(data), len(self), 0
        self.__levels[0] += made
        while position & 1:
            level, position = level + 1, position >> 1
            if level == len(self.__levels):
                self.__levels.append(bytearray())
            made = _node(self.__at(level - 1, 2 * position), made)
            self.__levels[level] += made

    def root(self, size: int | None = None) -> bytes:
        """The root over the first `size` leaves, or all. Raises AuditError if there are fewer."""
        size = self.__checked(size)
        return self.__span(0, size) if size else hashlib.sha256(b"").digest()

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The proof that leaf `index` is under `root(size)`. Raises AuditError outside."""
        size = self.__checked(size)
        if not 0 <= index < size:
            raise AuditError(f"there is no leaf {index} among {size}; use 0 to {size - 1}.")
        proof, start, stop = list[bytes](), 0, size
        while stop - start > 1:
            middle = start + _split(stop - start)
            if index < middle:
                proof.append(self.__span(middle, stop))
                stop = middle
            else:
                proof.append(self.__span(start, middle))
                start = middle
        return proof[::-1]

    def consistency(self, old: int, size: int | None = None) -> list[bytes]:
        """The proof that `root(size)` extends `root(old)`. Raises AuditError if old > size."""
        size = self.__checked(size)
        if not 0 <= old <= size:
            raise AuditError(f"a tree of {size} leaves does not extend one of {old}.")
        if old in (0, size):
            return []
        proof, start, stop, whole = list[bytes](), 0, size, True
        while old != stop:
            middle = start + _split(stop - start)
            if old <= middle:
                proof.append(self.__span(middle, stop))
                stop = middle
            else:
                proof.append(self.__span(start, middle))
                start, whole = middle, False
        # The old tree itself needs no proof: who checks has its root.
        if not whole:
            proof.append(self.__span(start, stop))
        return proof[::-1]

    def __checked(self, size: int | None) -> int:
        if size is None:
            return len(self)
        if not 0 <= size <= len(self):
            raise AuditError(f"this tree has {len(self)} leaves, not {size}.")
        return size

    def __at(self, level: int, position: int) -> bytes:
        start = position * HASH_BYTES
        return bytes(self.__levels[level][start : start + HASH_BYTES])

    def __span(self, start: int, stop: int) -> bytes:
        """The hash over leaves start to stop; start is a multiple of the span's largest power."""
        count = stop - start
        if count & (count - 1) == 0:
            level = count.bit_length() - 1
            return self.__at(level, start >> level)
        middle = start + _split(count)
        return _node(self.__span(start, middle), self.__span(middle, stop))


def _split(count: int) -> int:
    """The largest power of two below count, for count > 1."""
    return 1 << (count - 1).bit_length() - 1


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaves, 32 bytes."""
    return Tree(leaves).root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The proof that leaf `index` is under the root of all; AuditError if there is none."""
    return Tree(leaves).inclusion(index)


def consistency_proof(leaves: Sequence[bytes], old: int) -> list[bytes]:
    """The proof that the tree of all leaves extends that of the first `old`; or AuditError."""
    return Tree(leaves).consistency(old)


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Raise AuditError unless `leaf` (its data) is number `index` of the `size` under `root`."""
    if not 0 <= index < size:
        raise AuditError(f"there is no leaf {index} among {size}.")
    _require_hashes([*proof, root])
    made, last = _leaf(leaf), size - 1
    for step in proof:
        if last == 0:
            raise AuditError("this inclusion proof is too long for its tree.")
        if index & 1 or index == last:
            made = _node(step, made)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            made = _node(made, step)
        index, last = index >> 1, last >> 1
    if last or made != root:
        raise AuditError(
            "this inclusion proof does not lead to the root: the log holds no such record."
        )


def verify_consistency(
    old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Raise AuditError unless the tree of `size` leaves under `root` extends the old one."""
    if not 0 <= old <= size:
        raise AuditError(f"a log of {size} records does not extend one of {old}: it was cut.")
    _require_hashes([*proof, old_root, root])
    if old in (0, size):
        expected = old_root if old else hashlib.sha256(b"").digest()
        if proof or (old_root != expected) or (old == size and old_root != root):
            raise AuditError("these two roots are not of one log: it was forked or rewritten.")
        return
    steps = list(proof)
    # A complete old tree is itself the first node of the path.
    if old & (old - 1) == 0:
        steps.insert(0, old_root)
    if not steps:
        raise AuditError("this consistency proof is empty.")
    first, last = old - 1, size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    before = after = steps[0]
    for step in steps[1:]:
        if last == 0:
            raise AuditError("this consistency proof is too long for its trees.")
        if first & 1 or first == last:
            before, after = _node(step, before), _node(step, after)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            after = _node(after, step)
        first, last = first >> 1, last >> 1
    if last or before != old_root or after != root:
        raise AuditError("these two roots are not of one log: it was forked or rewritten.")


def _require_hashes(hashes: Iterable[bytes]) -> None:
    if any(len(item) != HASH_BYTES for item in hashes):
        raise AuditError(f"every hash of a proof has {HASH_BYTES} bytes.")
