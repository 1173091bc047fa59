"""Re-derive every value of v1/keys.json with Python's standard library only.

    python vectors/verify_keys.py            exits 1 and names what differs, if anything does
    python vectors/verify_keys.py --write    writes the file anew from the cases below

Nothing here imports filigrane: this is a second implementation, as short as the text of the
derivation. Every prf key is 32 bytes in hex; as prf_keys words they are read little endian.
"""

import base64
import hashlib
import hmac
import json
import sys
from pathlib import Path

FILE = Path(__file__).parent / "v1" / "keys.json"

# (secret, name, slots, labels, user indices); none of these secrets may ever be used for a mark.
CASES = [
    (bytes(range(32)), "alpha", 8, ["gumbel/4", "greenlist/1", "é"], [0, 1, 255, 2**32 - 1]),
    (b"\xff" * 32, "Team_2.key@host-9", 1, ["tournament/4"], [0, 2**40, 2**64 - 1]),
    (hashlib.sha256(b"filigrane vectors").digest(), "z" * 64, 64, ["x" * 200], [123456789]),
]


def lp(data: bytes) -> bytes:
    """The data with its length as 2 big-endian bytes before it."""
    return len(data).to_bytes(2, "big") + data


def expand(key: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869 HKDF-Expand with SHA-256 for up to 32 bytes: the first block is all of it."""
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()[:length]


def derive(
    secret: bytes, name: str, slots: int, labels: list[str], indices: list[int]
) -> dict[str, object]:
    """One case of the file, all from its arguments."""
    head = b"filigrane/v1/key-text" + lp(name.encode()) + bytes([slots])
    body = base64.b32encode(secret + hashlib.sha256(head + secret).digest()[:4]).decode()
    marks = []
    for label in labels:
        info = b"filigrane/v1/mark" + lp(label.encode())
        scheme = [expand(secret, info + bytes([slot])) for slot in range(slots)]
        users = [
            {
                # A string: JSON readers that know only doubles would round an index of 64 bits.
                "index": str(index),
                "name": f"{name}/{index}",
                "keys": [
                    expand(key, b"filigrane/v1/user" + index.to_bytes(8, "big")).hex()
                    for key in scheme
                ],
            }
            for index in indices
        ]
        marks.append({"label": label, "scheme_keys": [k.hex() for k in scheme], "users": users})
    return {
        "secret": secret.hex(),
        "name": name,
        "slots": slots,
        "text": f"filigrane-key-1:{name}:{slots}:{body.rstrip('=').lower()}",
        "fingerprint": expand(secret, b"filigrane/v1/check", 8).hex(),
        "marks": marks,
    }


def differences(found: object, wanted: object, where: str) -> list[str]:
    """The places at which two JSON values differ."""
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        return [d for k in wanted for d in differences(found[k], wanted[k], f"{where}.{k}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (f, w) in pairs for d in differences(f, w, f"{where}[{i}]")]
    return [] if found == wanted else [f"{where}: the file has {found!r}, derived is {wanted!r}"]


def verify(path: Path = FILE) -> list[str]:
    """What in the file is not what its own secrets, labels and indices derive to."""
    cases = json.loads(path.read_text("utf-8"))["cases"]
    problems = [] if cases else ["the file has no cases"]
    for i, case in enumerate(cases):
        labels = [mark["label"] for mark in case["marks"]]
        indices = [int(user["index"]) for user in case["marks"][0]["users"]]
        secret = bytes.fromhex(case["secret"])
        wanted = derive(secret, case["name"], case["slots"], labels, indices)
        problems += differences(case, wanted, f"cases[{i}]")
    return problems


def main(arguments: list[str]) -> int:
    """Verify, or with --write write; the exit status."""
    if arguments == ["--write"]:
        about = (
            "Known answers for filigrane v1 keys. Each key is 32 bytes in hex. The secrets are "
            "public: never mark with them. vectors/verify_keys.py derives every value again."
        )
        content = {"about": about, "cases": [derive(*case) for case in CASES]}
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", "utf-8")
        return 0
    if arguments:
        print(__doc__)
        return 2
    problems = verify()
    for problem in problems:
        print(problem)
    print(f"{FILE.name}: {len(problems)} differences" if problems else f"{FILE.name}: ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
