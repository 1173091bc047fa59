"""What has to be done from time to time, whether anybody asks for it or not; knows no threads.

every minute   results past their time go, and with them what SQLite's write-ahead log kept
at the start   every tenant's log is held to the checkpoints that were signed over it
every hour     a log that has grown is signed, so that its end cannot be cut off unnoticed
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Final, final

from filigrane.errors import AuditError
from filigrane.service import telemetry

if TYPE_CHECKING:
    from filigrane.service.office import Office

__all__ = ["SIGN_EVERY", "Upkeep"]

SIGN_EVERY: Final = timedelta(hours=1)
"""How old the last checkpoint of a log that grows becomes, about."""
_EVERY_S: Final = 60.0
_LOOK_EVERY_S: Final = 600.0


@final
class Upkeep:
    """The upkeep of one process. `run` is called often; it does what is due."""

    def __init__(self, office: "Office", *, timer: Callable[[], float] = time.monotonic) -> None:
        """timer: seconds, of any origin; it never goes back."""
        self._office, self._timer = office, timer
        self._tidy_at = self._look_at = timer()
        self._verified: set[str] = set()

    def run(self) -> None:
        """Do what is due. Raises KmsError or StoreError; then it is due again in a while."""
        now = self._timer()
        if now >= self._tidy_at:
            self._tidy_at = now + _EVERY_S
            self._office.jobs.expire()
            self._office.database.erase()
        if now >= self._look_at:
            self._look_at = now + _EVERY_S
            for tenant in self._office.database.tenants():
                self._look(tenant)
            self._look_at = now + _LOOK_EVERY_S

    def _look(self, tenant: str) -> None:
        log = self._office.log
        try:
            if tenant not in self._verified:
                log.verify(tenant)
                self._verified.add(tenant)
            last = log.latest(tenant)
            first = log.records(tenant, 0, 1)
            since = last.at if last is not None else first[0].at if first else None
            if since is not None and _age(self._office, since) >= SIGN_EVERY:
                log.checkpoint(tenant)
        except AuditError:
            # Its words name the tenant; they are in the answers to those who ask for the log, and
            # /readyz is red.
            telemetry.event("log_damaged", {"error": "AuditError"}, level="error")


def _age(office: "Office", at: str) -> timedelta:
    from filigrane.store.database import moment

    return office.database.clock() - moment(at)
