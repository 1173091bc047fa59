"""The keyring that a folder holds now: looked at while a server runs, so that keys change under it.

    LiveKeyring   a folder; `now()` is its Keyring, read again when keyring.toml has changed
    current       of a Keyring, a LiveKeyring or nothing, what counts at this moment

Whoever writes the folder replaces keyring.toml last and as a whole (rename); key files that change
without it are not noticed. A folder that cannot be read any more, or contradicts itself, changes
nothing: the server goes on with what it has read, until that expires.

Each request takes one Keyring and keeps to it. What was admitted under a version that is gone since
is finished under it: `known` finds keys that were there before, too.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, final

from filigrane.errors import FiligraneError
from filigrane.serving.keyring import ENVIRONMENT, FILE, Entry, Keyring

__all__ = ["Keys", "LiveKeyring", "current", "require_live"]

REMEMBERED_S: Final = 86_400.0
"""How long `known` finds a key that is not in the folder any more; no text takes as long."""

_log: Final = logging.getLogger("filigrane.keyring")


@final
class LiveKeyring:
    """The keyring of a folder as it is now. May be used from several threads."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_s: float = 1.0,
        accept: Callable[[Keyring], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read it. Raises KeyringError, and what `accept` raises.

        every_s: how often the file is looked at, at most; accept: called with each keyring before
        it counts; whatever FiligraneError it raises later on leaves the keyring as it was.
        """
        self._folder = Path(folder)
        self._every_s, self._accept, self._clock = every_s, accept, clock
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._ring = Keyring.load(folder)
        if accept is not None:
            accept(self._ring)
        self._looked = clock()
        self._complaint = ""
        self._gone: dict[tuple[str, str], tuple[float, Entry]] = {}

    @classmethod
    def from_environment(
        cls, *, accept: Callable[[Keyring], object] | None = None
    ) -> "LiveKeyring | None":
        """That of the folder which FILIGRANE_KEYRING names; None if it names none."""
        folder = os.environ.get(ENVIRONMENT)
        return cls(folder, accept=accept) if folder else None

    def __repr__(self) -> str:
        return f"<LiveKeyring {self._folder} {self._ring.digest}>"

    def now(self) -> Keyring:
        """The keyring that counts at this moment."""
        if self._clock() - self._looked >= self._every_s:
            self.look()
        return self._ring

    def look(self) -> Keyring:
        """Look at the file at once, whenever that was done last."""
        with self._lock:
            self._looked = self._clock()
            stamp = self._look()
            if stamp != self._stamp:
                self._read(stamp)
        return self._ring

    def known(self, id: str, fingerprint: str) -> Entry | None:
        """A key by its id and fingerprint, whatever its state, or None.

        Of the keyring as it was read last, one that was there within the last day, or of the folder
        if that is newer than all of these.
        """
        found = self._of(self._ring, id, fingerprint)
        if found is None:
            found = self._gone.get((id, fingerprint), (0.0, None))[1]
        return found or self._of(self.look(), id, fingerprint)

    @staticmethod
    def _of(ring: Keyring, id: str, fingerprint: str) -> Entry | None:
        entry = ring.entries.get(id)
        return entry if entry is not None and entry.key.fingerprint == fingerprint else None

    def _look(self) -> tuple[int, ...] | None:
        try:
            seen = os.stat(self._folder / FILE)
        except OSError:
            return None
        return (seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino)

    def _read(self, stamp: tuple[int, ...] | None) -> None:
        try:
            ring = Keyring.load(self._folder)
            if self._accept is not None:
                self._accept(ring)
        except FiligraneError as error:
            # Tried again at the next look: a key file may come a moment after it is named.
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.error("the keyring is left as it was: %s", error)
            return
        self._complaint = ""
        if self._look() == stamp:
            # Else it has changed again while it was being read, and is read once more.
            self._stamp = stamp
        before, self._ring = self._ring, ring
        self._remember(before)
        if before.digest != ring.digest:
            _log.info(
                "the keyring has changed: %s", ", ".join(_changes(before, ring)) or "its policy"
            )

    def _remember(self, before: Keyring) -> None:
        at = self._clock()
        for entry in before.entries.values():
            self._gone[entry.id, entry.key.fingerprint] = (at, entry)
        self._gone = {k: v for k, v in self._gone.items() if at - v[0] < REMEMBERED_S}


Keys = Keyring | LiveKeyring | None
"""What servers are started with: a keyring that stays, one that is looked at, or none."""


def current(keys: Keys) -> Keyring | None:
    """What counts at this moment."""
    return keys.now() if isinstance(keys, LiveKeyring) else keys


def _changes(before: Keyring, after: Keyring) -> list[str]:
    """What a log says of a change: ids and states."""
    was = {entry.id: entry.state for entry in before.entries.values()}
    now = {entry.id: entry.state for entry in after.entries.values()}
    changed = [f"{id} {state}" for id, state in now.items() if was.get(id) != state]
    return changed + [f"{id} gone" for id in was if id not in now]


def require_live(*, accept: Callable[[Keyring], object] | None = None) -> LiveKeyring:
    """`LiveKeyring.from_environment`, or FiligraneError saying that the variable has to be set."""
    keys = LiveKeyring.from_environment(accept=accept)
    if keys is None:
        raise FiligraneError(f"set {ENVIRONMENT} to the folder of the server's keyring.")
    return keys
