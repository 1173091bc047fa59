"""What an engine gets of a tenant's keys: a lease, sealed to the engine, good for a while.

An engine gets the versions of keys for the models that it is enrolled for, and of these only what
it may mark with now or soon: pre-active ones, to be proved before they are promoted, and active
ones. Retired keys stay here; reading is not an engine's work. It marks with a version when that is
active and the engine itself has proved that it has it.

Who got which version goes into the log the first time that it happens in a process.
"""

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Final, final

import numpy as np
import numpy.typing as npt

from filigrane.adapters.leases.sealing import Lease, LeasedKey, seal
from filigrane.custody.chain import Fact
from filigrane.errors import NotFound, StateError
from filigrane.foreign import ForeignKey
from filigrane.keys import _Secret

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from filigrane.store.access import Access
    from filigrane.store.keys import KeyBook
    from filigrane.store.log import Log
    from filigrane.store.records import EngineRecord, Principal, VersionRecord

__all__ = ["Leases"]

_MOST_KNOWN: Final = 10_000


@final
class Leases:
    """Issues leases and takes proofs. Thread-safe."""

    def __init__(
        self,
        keybook: "KeyBook",
        access: "Access",
        log: "Log",
        *,
        lifetime_s: float,
        clock: "Callable[[], datetime]",
    ) -> None:
        """lifetime_s: how long an engine may mark without asking again; clock: the time, UTC."""
        self._keybook, self._access, self._log = keybook, access, log
        self._lifetime = timedelta(seconds=lifetime_s)
        self._clock = clock
        self._told: dict[tuple[str, str], frozenset[str]] = {}
        self._turn = threading.Lock()

    def issue(self, who: "Principal", nonce: str) -> tuple[str, Lease]:
        """A sealed lease for the engine whose token was shown, and what it says.

        nonce: the request's own. Raises NotFound for an engine that is not enrolled or is revoked,
        KmsUnavailable if the keys cannot be had now; nothing half-made is sealed.
        """
        engine = self.engine_of(who)
        now = self._clock()
        keys = tuple(
            self._leased(version, engine.name)
            for version in self._keybook.for_engine(who.tenant, engine.name)
        )
        lease = Lease(
            tenant=who.tenant,
            engine=engine.name,
            nonce=nonce,
            issued_at=now,
            expires_at=now + self._lifetime,
            keys=keys,
        )
        sealed = seal(lease, engine.public_key)
        self._tell(lease)
        self._access.seen(who.tenant, engine.name)
        return sealed, lease

    def acknowledge(self, who: "Principal", version_id: str, proof: npt.NDArray[np.int64]) -> None:
        """Take an engine's proof that it has a version: token ids that it marked with it.

        Raises NotFound for a version that is not this engine's, StateError if the proof does not
        show the version's mark.
        """
        engine = self.engine_of(who)
        mine = {v.id: v for v in self._keybook.for_engine(who.tenant, engine.name)}
        version = mine.get(version_id)
        if version is None:
            raise NotFound("there is no such version for this engine; ask for a new lease.")
        if engine.name not in version.acknowledged:
            self._keybook.acknowledge(who.tenant, engine.name, version_id, proof)

    def engine_of(self, who: "Principal") -> "EngineRecord":
        """The engine that a token belongs to. NotFound if there is none, or it was revoked."""
        if who.engine is None:
            raise StateError(
                "this token has the role engine and names no engine; issue one for it "
                "(`filigrane access token --engine NAME`)."
            )
        engine = self._access.engine(who.tenant, who.engine)
        if engine.revoked_at is not None:
            raise NotFound(f"engine {engine.name} is revoked; enrol another one.")
        return engine

    def _leased(self, version: "VersionRecord", engine: str) -> LeasedKey:
        key = self._keybook.key_of(version)
        return LeasedKey(
            id=version.id,
            state="active" if version.marks_on(engine) else "staged",
            kind="profile" if isinstance(key, ForeignKey) else "scheme",
            mark=version.spec.mark,
            key=_Secret(key.export_text()),
            acknowledged=engine in version.acknowledged,
        )

    def _tell(self, lease: Lease) -> None:
        ids = frozenset(key.id for key in lease.keys)
        place = (lease.tenant, lease.engine)
        with self._turn:
            new = ids - self._told.get(place, frozenset())
        if new:
            # Before the lease leaves: what is not logged is not handed out.
            facts: dict[str, Fact] = {"engine": lease.engine, "versions": sorted(new)}
            self._log.append(lease.tenant, f"engine:{lease.engine}", "engine.lease", facts)
        with self._turn:
            if len(self._told) > _MOST_KNOWN:
                self._told.clear()
            self._told[place] = ids
