"""Everything a process of the service holds open, made from settings in the order of dependence.

Knows nothing of HTTP: commands of the terminal open the same office.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from filigrane.service.settings import Settings

if TYPE_CHECKING:
    from filigrane.kms.base import KeyManagement
    from filigrane.service.coverage import Coverage
    from filigrane.service.detecting import Detector
    from filigrane.service.gatekeeper import Gatekeeper
    from filigrane.service.leases import Leases
    from filigrane.service.pace import Pace
    from filigrane.service.public import PublicLimits, PublicTier
    from filigrane.service.receipts import Receipts
    from filigrane.service.tokenizing import Tokenizers
    from filigrane.service.tracing import Tracer
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
    tokenizers: "Tokenizers"
    detector: "Detector"
    tracer: "Tracer"
    receipts: "Receipts"
    public: "PublicTier"
    pace: "Pace"
    leases: "Leases"
    coverage: "Coverage"
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
    from filigrane.service.coverage import Coverage
    from filigrane.service.detecting import Detector
    from filigrane.service.gatekeeper import Gatekeeper
    from filigrane.service.leases import Leases
    from filigrane.service.pace import Pace
    from filigrane.service.public import PublicTier
    from filigrane.service.receipts import Receipts
    from filigrane.service.tokenizing import Tokenizers
    from filigrane.service.tracing import Tracer
    from filigrane.store.access import Access
    from filigrane.store.database import Database
    from filigrane.store.jobs import Jobs
    from filigrane.store.keys import KeyBook
    from filigrane.store.log import Log

    lifetime_s = settings.limits.secret_lifetime_s
    with contextlib.ExitStack() as closing:
        database = Database.open(settings.database.open_url().reveal())
        closing.callback(database.close)
        kms = open_kms(settings.kms)
        closing.callback(kms.close)
        access, log = Access(database), Log(database, kms)
        keybook = KeyBook(database, kms, secret_lifetime_s=lifetime_s)
        closing.callback(keybook.forget)
        tokenizers = Tokenizers(settings.tokenizers)
        receipts = Receipts(log, kms, secret_lifetime_s=lifetime_s)
        detector = Detector(
            keybook,
            tokenizers,
            receipts=receipts,
            revalidate_s=settings.detector.revalidate_s,
            lifetime_s=lifetime_s,
            outage_s=settings.limits.outage_s,
        )
        closing.callback(detector.forget)
        tracer = Tracer(detector, access, log, receipts)
        closing.callback(tracer.close)
        office = Office(
            settings=settings,
            database=database,
            kms=kms,
            keybook=keybook,
            access=access,
            log=log,
            jobs=Jobs(database, kms),
            gatekeeper=Gatekeeper(access, settings),
            tokenizers=tokenizers,
            detector=detector,
            tracer=tracer,
            receipts=receipts,
            public=PublicTier(detector, _public_limits(settings)),
            pace=Pace(settings.limits.expert_per_minute),
            leases=Leases(
                keybook, access, log, lifetime_s=settings.engine.lease_s, clock=database.clock
            ),
            coverage=Coverage(log, clock=database.clock),
        )
        office._closing = closing.pop_all()
    return office


def _public_limits(settings: Settings) -> "PublicLimits":
    """Tokens of this tier exist without [public], which opens it to those who have none."""
    from filigrane.service.public import PublicLimits

    limits, public = PublicLimits(alpha=settings.detector.alpha), settings.public
    if public is None:
        return limits
    return dataclasses.replace(
        limits,
        min_tokens=public.min_tokens,
        per_identity=public.per_identity,
        per_network=public.per_network,
        near_duplicates=public.near_duplicates,
        max_characters=public.max_characters,
        receipts=public.receipts,
    )
