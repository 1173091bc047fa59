"""Everything a process of the service holds open, made from settings in the order of dependence.

Knows nothing of HTTP: commands of the terminal open the same office.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filigrane.service.settings import Settings

if TYPE_CHECKING:
    from filigrane.kms.base import KeyManagement
    from filigrane.service.gatekeeper import Gatekeeper
    from filigrane.store.access import Access
    from filigrane.store.database import Database
    from filigrane.store.jobs import Jobs
    from filigrane.store.keys import KeyBook
    from filigrane.store.log import Log

__all__ = ["Office", "open_office"]


@dataclass(slots=True, kw_only=True)
class Office:
    """What routes and commands work with. Closing it lets go of secrets and connections."""

    settings: Settings
    database: "Database"
    kms: "KeyManagement"
    keybook: "KeyBook"
    access: "Access"
    log: "Log"
    jobs: "Jobs"
    gatekeeper: "Gatekeeper"
    tokenizers: Any = None
    detector: Any = None
    tracer: Any = None
    receipts: Any = None
    public: Any = None
    leases: Any = None
    coverage: Any = None
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def close(self) -> None:
        """Close everything, the last opened first; a second time does nothing."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_office(settings: Settings) -> Office:
    """Open what the settings describe.

    Raises KmsError, StoreError or FiligraneError, saying what to do; nothing stays open then.
    """
    from filigrane.kms.opening import open_kms
    from filigrane.service.gatekeeper import Gatekeeper
    from filigrane.store.access import Access
    from filigrane.store.database import Database
    from filigrane.store.jobs import Jobs
    from filigrane.store.keys import KeyBook
    from filigrane.store.log import Log

    with contextlib.ExitStack() as closing:
        database = Database.open(settings.database.open_url().reveal())
        closing.callback(database.close)
        kms = open_kms(settings.kms)
        closing.callback(kms.close)
        access = Access(database)
        log = Log(database, kms)
        keybook = KeyBook(database, kms, secret_lifetime_s=settings.limits.secret_lifetime_s)
        office = Office(
            settings=settings,
            database=database,
            kms=kms,
            keybook=keybook,
            access=access,
            log=log,
            jobs=Jobs(database, kms),
            gatekeeper=Gatekeeper(access, settings),
        )
        _open_rest(office, closing)
        office._closing = closing.pop_all()
    return office


def _open_rest(office: Office, closing: contextlib.ExitStack) -> None:
    """Detector and what stands on it."""
    from filigrane.service.detecting import Detector
    from filigrane.service.public import PublicLimits, PublicTier
    from filigrane.service.receipts import Receipts
    from filigrane.service.tokenizing import Tokenizers
    from filigrane.service.tracing import Tracer

    settings = office.settings
    lifetime_s, public = settings.limits.secret_lifetime_s, settings.public
    office.tokenizers = Tokenizers(settings.tokenizers)
    office.receipts = Receipts(office.log, office.kms, secret_lifetime_s=lifetime_s)
    office.detector = Detector(
        office.keybook,
        office.tokenizers,
        receipts=office.receipts,
        revalidate_s=settings.detector.revalidate_s,
        lifetime_s=lifetime_s,
        outage_s=settings.limits.outage_s,
    )
    office.tracer = Tracer(office.detector, office.access, office.log, office.receipts)
    closing.callback(office.tracer.close)
    # Tokens of this tier exist without [public], which opens it to those who have none.
    limits = PublicLimits(alpha=settings.detector.alpha)
    if public is not None:
        limits = dataclasses.replace(
            limits,
            min_tokens=public.min_tokens,
            per_identity=public.per_identity,
            per_network=public.per_network,
            near_duplicates=public.near_duplicates,
        )
    office.public = PublicTier(office.detector, limits)
