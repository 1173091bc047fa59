"""Keys with a chosen secret, for tests only: through the text form, as SPEC.md writes it."""

import base64
import hashlib

import numpy as np

from filigrane import Key


def key_of(secret: bytes, name: str = "test", slots: int = 1) -> Key:
    label = name.encode()
    data = len(label).to_bytes(2, "big") + label + bytes([slots]) + secret
    body = secret + hashlib.sha256(b"filigrane/v1/key-text" + data).digest()[:4]
    text = base64.b32encode(body).decode().rstrip("=").lower()
    return Key.from_text(f"filigrane-key-1:{name}:{slots}:{text}")


def keys_from_seed(seed: int, count: int, slots: int = 1) -> list[Key]:
    rng = np.random.default_rng(seed)
    return [key_of(rng.bytes(32), f"k{i}", slots) for i in range(count)]
