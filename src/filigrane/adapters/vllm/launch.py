"""What the processes of one vLLM server share: a folder that shows which engines mark with what.

vLLM loads logits processors in the processes that run the model and checks requests in the one that
talks to clients, and there are ways of starting it in which the first does not happen (speculative
decoding with the older interface) while the second does. So engines say in this folder that they
are ready, which keys they have read, and count there what they mark. Without such a sign no request
is taken for marking, and none with a key that an engine has not read (yet, or at all: it may have
another folder).
"""

import atexit
import functools
import json
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane.serving.keyring import ENVIRONMENT, Keyring

RUN: Final = "FILIGRANE_VLLM_RUN"
"""Names the folder to all processes of a server. Set by `prepare`; where engines run on other
machines, set it to a folder that they share, a new one for every start."""
STATES: Final = ("marked", "unmarked")
"""What engines count: positions of marked texts that carry the mark; those that by the rule do not
(the first of a text, repeated windows)."""

_KEYS: Final = ".keys."

_log = logging.getLogger("vllm.filigrane")


def prepare() -> None:
    """Entry point `vllm.general_plugins`: called by vLLM in each of its processes, the first first.

    Raises KeyringError if FILIGRANE_KEYRING names a folder that is no keyring: nothing starts.
    """
    if not os.environ.get(ENVIRONMENT):
        _log.info("filigrane: %s is not set; text is not marked.", ENVIRONMENT)
        return
    keyring = Keyring.load(os.environ[ENVIRONMENT])
    if os.environ.get(RUN):
        return
    made = tempfile.mkdtemp(prefix="filigrane-vllm-")
    os.environ[RUN] = made
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # children inherit this function, not the folder
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    _log.info(
        "filigrane: %d keys, policy %s, schemes %s.",
        len(keyring.entries),
        keyring.policy,
        ", ".join(scheme.tag for scheme in keyring.schemes),
    )


def folder() -> Path | None:
    """The folder of this run, or None if `prepare` was not called."""
    name = os.environ.get(RUN)
    return Path(name) if name else None


def publish(keyring: Keyring) -> None:
    """Say which keys this engine process has read: ids and fingerprints."""
    run = folder()
    if run is None:
        return
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    said = {entry.id: entry.key.fingerprint for entry in keyring.entries.values()}
    path = run / f"{_KEYS}{os.getpid()}"
    hidden = path.with_name(f"{path.name}.new")
    hidden.write_text(json.dumps(said))
    hidden.replace(path)


def has_read(id: str, fingerprint: str) -> bool:
    """Whether all engine processes of this run have read this key."""
    run = folder()
    said = [] if run is None else [path for path in run.glob(f"{_KEYS}*") if path.suffix != ".new"]
    # One id with two secrets: engines on other machines with another folder.
    return bool(said) and all(
        _read(path, path.stat().st_mtime_ns).get(id) == fingerprint for path in said
    )


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> dict[str, str]:
    content: dict[str, str] = json.loads(path.read_text())
    return content


class Sign:
    """An engine's sign that it marks, and its counts; one file of two numbers of 64 bits."""

    def __init__(self, stage: str) -> None:
        """Say that this process marks what acts at `stage` ("logits" or "distribution")."""
        run = folder()
        if run is None:
            # Processors were loaded and `prepare` was not: admission says so to every request.
            self.counts: npt.NDArray[np.int64] = np.zeros(len(STATES), np.int64)
            return
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{stage}-{os.getpid()}-{secrets.token_hex(4)}"
        hidden = run / f".{name}"
        hidden.write_bytes(bytes(8 * len(STATES)))
        self.counts = np.memmap(hidden, dtype=np.int64, mode="r+")
        # Whole or not there: a reader must not find an empty file.
        hidden.rename(run / name)


def ready(stage: str) -> bool:
    """Whether an engine of this run marks what acts at this stage."""
    run = folder()
    return run is not None and next(run.glob(f"{stage}-*"), None) is not None


def counts() -> dict[str, int]:
    """What all engines of this run have counted, by STATES."""
    total = np.zeros(len(STATES), np.int64)
    run = folder()
    for path in run.glob("[!.]*-*") if run is not None else ():
        content = np.fromfile(path, dtype=np.int64)
        if content.shape == total.shape:
            total += content
    return {state: int(count) for state, count in zip(STATES, total, strict=True)}
