"""Write vectors/v1/custody.json: keys of a provider from root to version, and its log.

    python vectors/generate_custody.py

Derived here with hmac and hashlib alone; vectors/verify.py derives it again from its own lines.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "v1" / "custody.json"


def lp(text: str) -> bytes:
    """UTF-8 with its length as 2 big-endian bytes before it."""
    data = text.encode("utf-8")
    return len(data).to_bytes(2, "big") + data


def expand(key: bytes, info: bytes) -> bytes:
    """RFC 5869 HKDF-Expand with SHA-256, 32 bytes."""
    return hmac.digest(key, info + b"\x01", "sha256")


def sealed(inputs: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """A case: inputs, results, and a hash that shows a mistyped input."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return {**inputs, **results, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def tenant(root: bytes, name: str) -> bytes:
    """A tenant's secret."""
    return hmac.digest(root, b"filigrane/v1/tenant" + lp(name), "sha256")


def version(root: bytes, case: Mapping[str, Any]) -> dict[str, Any]:
    """One version of a key."""
    parts = (case["name"], case["model"], case["tokenizer"], case["mark"])
    info = b"filigrane/v1/tenant-key" + b"".join(map(lp, parts))
    info += case["version"].to_bytes(4, "big") + bytes.fromhex(case["salt"])
    above = tenant(root, case["tenant"])
    secret = expand(above, info)
    return {
        "tenant_secret": above.hex(),
        "secret": secret.hex(),
        "id": f"{case['tenant']}.{case['name']}@{case['version']}",
        "commitment": expand(secret, b"filigrane/v1/commitment").hex(),
        "fingerprint": expand(secret, b"filigrane/v1/check")[:8].hex(),
    }


def merkle(leaves: list[bytes]) -> bytes:
    """The root of RFC 6962, section 2.1."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    both = merkle(leaves[:half]) + merkle(leaves[half:])
    return hashlib.sha256(b"\x01" + both).digest()


def log(case: Mapping[str, Any]) -> dict[str, Any]:
    """Chain, root, the text of a checkpoint and the seed of the key that signs it."""
    name, records = case["tenant"], case["records"]
    head = hashlib.sha256(b"filigrane/v1/audit/genesis" + lp(name)).digest()
    hashes = []
    for record in records:
        # RFC 8785 sorts by UTF-16 units; these names are ASCII.
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        head = hashlib.sha256(b"filigrane/v1/audit/record" + head + text.encode()).digest()
        hashes.append(head)
    root = merkle(hashes)
    lines = [f"filigrane/{name}", str(len(records)), base64.b64encode(root).decode()]
    lines += [f"head {head.hex()}", f"at {case['at']}"]
    seed = hmac.digest(bytes.fromhex(case["root"]), b"filigrane/v1/sign/log", "sha256")
    return {
        "hashes": [value.hex() for value in hashes],
        "checkpoint": "".join(f"{line}\n" for line in lines),
        "seed": seed.hex(),
    }


def records(tenant: str, count: int) -> list[dict[str, Any]]:
    """Records with every kind of fact."""
    return [
        {
            "tenant": tenant,
            "index": index,
            "at": f"2026-11-02T09:30:{index:02d}.{index:03d}Z",
            "actor": ["marie", "engine:gpu-1", 'Zoë "1" €'][index % 3],
            "kind": ["key.create", "key.promote", "receipt.issue"][index % 3],
            "facts": {
                "key": f"{tenant}.chat@{index + 1}",
                "none": None,
                "yes": index % 2 == 0,
                "number": (-1) ** index * (2**53 - 1 - index),
                "who": ["b", "a"][: index % 3],
            },
        }
        for index in range(count)
    ]


def content() -> dict[str, Any]:
    """The whole file."""
    roots = [bytes(range(32)), hashlib.sha256(b"another root of the vectors").digest()]
    model, digest = "meta/tiny-1:v2", hashlib.sha256(b"a tokenizer").hexdigest()
    gumbel, vllm = (
        "gumbel:context_width=4",
        "vllm-gumbel:context_width=4,deduplicate_contexts=single_turn,deduplicate_contexts_max_history=8192",
    )
    rows = [
        ("acme", "chat", model, digest, gumbel, 1, bytes(32)),
        ("acme", "chat", model, digest, gumbel, 2, bytes(32)),
        ("acme", "chat", model, digest, gumbel, 2, bytes(range(32))),
        ("acme", "chat", model, "", gumbel, 2, bytes(range(32))),
        ("acme", "chat", "other", "", vllm, 2, bytes(range(32))),
        ("a", "0", "m", "", "delta:context_width=1", 999_999, b"\xff" * 32),
        ("tenant-with-24-character", "key-of-twenty-eight-letters-", "M" * 128, digest, gumbel, 7,
         hashlib.sha256(b"salt").digest()),
    ]  # fmt: skip
    names = ("tenant", "name", "model", "tokenizer", "mark", "version", "salt")
    versions = []
    for root in roots:
        for row in rows:
            case = {"root": root.hex(), **dict(zip(names, (*row[:6], row[6].hex()), strict=True))}
            versions.append(sealed(case, version(root, case)))
    imported = []
    for opening, key in [(bytes(32), "42"), (b"\x01" * 32, "42"), (bytes(32), "5, 7, 9")]:
        data = b"filigrane/v1/imported-commitment" + opening + lp(key)
        value = hashlib.sha256(data).hexdigest()
        imported.append(sealed({"opening": opening.hex(), "key": key}, {"commitment": value}))
    hashes = []
    for text in ("", "The sea in winter", "日本語のテキスト"):
        above, plain = tenant(roots[0], "acme"), hashlib.sha256(text.encode()).digest()
        keyed = hmac.digest(expand(above, b"filigrane/v1/content"), plain, "sha256").hex()
        inputs = {"tenant_secret": above.hex(), "content_sha256": plain.hex()}
        hashes.append(sealed(inputs, {"content_hash": keyed}))
    logs = []
    for name, count in [("acme", 0), ("acme", 1), ("acme", 2), ("acme", 7), ("zeta-9", 8)]:
        case = {"root": roots[0].hex(), "tenant": name, "at": "2026-11-02T10:00:00.000Z"}
        case |= {"records": records(name, count)}
        logs.append(sealed(case, log(case)))
    about = "Keys and logs of a provider: SPEC.md 1.3, 1.4. Public secrets: never mark with them."
    return {
        "about": about,
        "versions": versions,
        "imported": imported,
        "content": hashes,
        "logs": logs,
    }


if __name__ == "__main__":
    text = json.dumps(content(), indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
