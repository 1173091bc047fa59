"""Servers of vLLM for tests, in an environment of their own.

FILIGRANE_VLLM names that environment's `vllm` program (default: .vllm/bin/vllm beside the
Makefile); what is run is the Python beside it.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import servers
from filigrane.keys import Key

PROGRAM = Path(os.environ.get("FILIGRANE_VLLM") or Path(__file__).parents[1] / ".vllm/bin/vllm")
# The program itself looks for a distribution named vllm; the builds for CPUs have other names.
PYTHON = PROGRAM.with_name("python")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

marks = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no vLLM: `make vllm`, or name its program in FILIGRANE_VLLM",
    ),
]


@contextmanager
def serve(
    model: str, log: Path, options: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A server of this model folder; yields its base address."""
    port = servers.free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--model", model, "--served-model-name", "smollm2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += options
    with servers.server(command, port, log, ENVIRONMENT | (env or {}), patience=500) as base:
        yield base


def token(tenant: str) -> str:
    return f"the bearer token of {tenant}"


def keyring(
    folder: Path, head: str, tenants: Sequence[str], *, tokens: bool = True
) -> dict[str, Key]:
    """A keyring with one key per tenant, and one that is retired; returns the keys by tenant."""
    text, keys = head, {}
    for tenant in (*tenants, "retired"):
        keys[tenant] = Key.generate(f"key-{tenant}", slots=4)
        keys[tenant].save(folder / f"key-{tenant}.key")
        text += f"\n[keys.key-{tenant}]\n"
    text += f'state = "retired"\ntenant = "{tenants[0]}"\n' if tokens else 'state = "retired"\n'
    for tenant in tenants if tokens else ():
        text = text.replace(f"[keys.key-{tenant}]\n", f'[keys.key-{tenant}]\ntenant = "{tenant}"\n')
        digest = hashlib.sha256(token(tenant).encode()).hexdigest()
        text += f'\n[tenants.{tenant}]\ndefault = "key-{tenant}"\ntokens_sha256 = ["{digest}"]\n'
    (folder / "keyring.toml").write_text(text)
    return keys


def secrets_of(keys: Mapping[str, Key]) -> list[str]:
    """What must not be found in any log: each key's text, and its bytes as hex digits."""
    import base64

    found = []
    for key in keys.values():
        body = key.export_text().rpartition(":")[2]
        padded = body.upper() + "=" * (-len(body) % 8)
        found += [body, base64.b32decode(padded)[:32].hex()]
    return found
