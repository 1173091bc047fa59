"""Merkle trees: the published vectors, a plain twin straight from RFC 6962, and forged proofs."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filigrane.custody.merkle import (
    Tree,
    consistency_proof,
    inclusion_proof,
    root,
    verify_consistency,
    verify_inclusion,
)
from filigrane.errors import AuditError

# Leaves, roots and proofs of the reference tests of Certificate Transparency.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSIONS = {
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
}
CONSISTENCIES = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
}


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def plain_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, word for word."""
    if not leaves:
        return sha()
    if len(leaves) == 1:
        return sha(b"\x00", leaves[0])
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return sha(b"\x01", plain_root(leaves[:k]), plain_root(leaves[k:]))


def plain_path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    if m < k:
        return [*plain_path(m, leaves[:k]), plain_root(leaves[k:])]
    return [*plain_path(m - k, leaves[k:]), plain_root(leaves[:k])]


def plain_subproof(m: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of section 2.1.2."""
    if m == len(leaves):
        return [] if whole else [plain_root(leaves)]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    if m <= k:
        return [*plain_subproof(m, leaves[:k], whole), plain_root(leaves[k:])]
    return [*plain_subproof(m - k, leaves[k:], False), plain_root(leaves[:k])]


def numbered(count: int) -> list[bytes]:
    return [f"leaf {n}".encode() for n in range(count)]


def test_published_roots() -> None:
    for size, expected in enumerate(ROOTS):
        assert root(LEAVES[:size]).hex() == expected
        assert plain_root(LEAVES[:size]).hex() == expected
        assert Tree(LEAVES).root(size).hex() == expected


def test_published_proofs() -> None:
    for (index, size), expected in INCLUSIONS.items():
        proof = inclusion_proof(LEAVES[:size], index)
        assert [step.hex() for step in proof] == expected
        verify_inclusion(LEAVES[index], index, size, proof, bytes.fromhex(ROOTS[size]))
    for (old, size), expected in CONSISTENCIES.items():
        proof = consistency_proof(LEAVES[:size], old)
        assert [step.hex() for step in proof] == expected
        roots = bytes.fromhex(ROOTS[old]), bytes.fromhex(ROOTS[size])
        verify_consistency(old, roots[0], size, roots[1], proof)


def test_every_proof_of_small_trees_is_the_twins_and_verifies() -> None:
    leaves = numbered(20)
    tree = Tree(leaves)
    for size in range(21):
        assert tree.root(size) == plain_root(leaves[:size])
        for index in range(size):
            proof = tree.inclusion(index, size)
            assert proof == plain_path(index, leaves[:size])
            verify_inclusion(leaves[index], index, size, proof, tree.root(size))
        for old in range(1, size + 1):
            proof = tree.consistency(old, size)
            assert proof == plain_subproof(old, leaves[:size], True)
            verify_consistency(old, tree.root(old), size, tree.root(size), proof)
        verify_consistency(0, tree.root(0), size, tree.root(size), [])


@settings(max_examples=25)
@given(st.integers(1, 300), st.data())
def test_proofs_of_any_tree(size: int, data: st.DataObject) -> None:
    leaves = numbered(size)
    tree = Tree(leaves)
    index = data.draw(st.integers(0, size - 1))
    old = data.draw(st.integers(1, size))
    verify_inclusion(leaves[index], index, size, tree.inclusion(index), tree.root())
    verify_consistency(old, tree.root(old), size, tree.root(), tree.consistency(old))


@settings(max_examples=25)
@given(st.integers(2, 65), st.data())
def test_a_forged_inclusion_fails(size: int, data: st.DataObject) -> None:
    leaves = numbered(size)
    tree = Tree(leaves)
    index = data.draw(st.integers(0, size - 1))
    proof, top = tree.inclusion(index), tree.root()
    other = data.draw(st.integers(0, size - 1).filter(lambda n: n != index))
    step = data.draw(st.integers(0, len(proof) - 1))
    bit = data.draw(st.integers(0, 255))
    flipped = bytearray(proof[step])
    flipped[bit // 8] ^= 1 << bit % 8
    for forged in (
        (leaves[other], index, size, proof, top),
        (leaves[index], other, size, proof, top),
        (leaves[index], index, size, proof[:-1], top),
        (leaves[index], index, size, proof[1:], top),
        (leaves[index], index, size, [*proof, top], top),
        (leaves[index], index, size, [*proof[:step], bytes(flipped), *proof[step + 1 :]], top),
        (leaves[index], index, size, proof, tree.root(size - 1)),
        (leaves[index], index, index, proof, top),
        (leaves[index], -1, size, proof, top),
    ):
        with pytest.raises(AuditError):
            verify_inclusion(*forged)


@settings(max_examples=25)
@given(st.integers(2, 65), st.data())
def test_a_fork_is_not_consistent(size: int, data: st.DataObject) -> None:
    leaves = numbered(size)
    old = data.draw(st.integers(1, size - 1))
    changed = data.draw(st.integers(0, old - 1))
    forked = [*leaves[:changed], b"another", *leaves[changed + 1 :]]
    before, after = Tree(leaves), Tree(forked)
    for proof in (after.consistency(old), before.consistency(old)):
        with pytest.raises(AuditError, match=r"forked|too"):
            verify_consistency(old, before.root(old), size, after.root(), proof)
        with pytest.raises(AuditError):
            verify_consistency(old, after.root(old), size, before.root(), proof)


@settings(max_examples=25)
@given(st.integers(2, 65), st.data())
def test_a_forged_consistency_fails(size: int, data: st.DataObject) -> None:
    tree = Tree(numbered(size))
    old = data.draw(st.integers(1, size - 1))
    proof, before, after = tree.consistency(old), tree.root(old), tree.root()
    step = data.draw(st.integers(0, len(proof) - 1))
    for forged in (
        (old, before, size, after, proof[:-1]),
        (old, before, size, after, proof[1:]),
        (old, before, size, after, [*proof, after]),
        (old, before, size, after, [*proof[:step], bytes(32), *proof[step + 1 :]]),
        (old, after, size, after, proof),
        (old, before, size, before, proof),
        (size, before, old, after, proof),
        (old, before, old, after, []),
        (0, before, size, after, []),
        (old, before, size, after, []),
        (old, before[:31], size, after, proof),
    ):
        with pytest.raises(AuditError):
            verify_consistency(*forged)


def test_a_leaf_is_no_node() -> None:
    # Second preimages: two hashes side by side must not pass for a leaf of the smaller tree.
    left, right = (sha(b"\x00", leaf) for leaf in (b"a", b"b"))
    assert root([b"a", b"b"]) != root([left + right])


def test_outside_a_tree() -> None:
    tree = Tree(numbered(3))
    assert len(tree) == 3 and repr(tree) == "<Tree of 3 leaves>"
    for call in (
        lambda: tree.root(4),
        lambda: tree.root(-1),
        lambda: tree.inclusion(3),
        lambda: tree.inclusion(2, 2),
        lambda: tree.consistency(3, 2),
        lambda: tree.consistency(-1),
    ):
        with pytest.raises(AuditError):
            call()


def test_proofs_stay_short() -> None:
    tree = Tree(n.to_bytes(4, "big") for n in range(1 << 14))
    assert len(tree.inclusion(12345)) == 14
    assert len(tree.consistency(12345)) <= 15


def test_a_proof_of_a_smaller_tree_does_not_serve_a_larger_one() -> None:
    tree = Tree(numbered(8))
    with pytest.raises(AuditError):
        verify_inclusion(b"leaf 0", 0, 8, [], tree.root(1))
    with pytest.raises(AuditError):
        verify_inclusion(b"leaf 1", 1, 8, tree.inclusion(1, 4), tree.root(4))
    with pytest.raises(AuditError):
        verify_consistency(2, tree.root(2), 8, tree.root(4), tree.consistency(2, 4))
