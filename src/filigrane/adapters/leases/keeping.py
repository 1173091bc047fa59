"""Rounds of renewal, for as long as an engine runs: what is leased, and what has gone wrong.

    Keeper   several services and tokens, one folder; `round` renews all of them
    Ledger   reports what the engine has counted since the last report that arrived

A round never raises because a service is down: the folder stays as it is, and the next one tries
again. When the service knows the engine or its token no more, the tenant's keys are removed; and so
are those whose lease has been over for a day. Knows nothing of terminals and signals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import final

import numpy as np

from filigrane.adapters.leases import metrics
from filigrane.adapters.leases.client import Renewed, Service, TurnedAway, renew
from filigrane.adapters.leases.folder import LeaseFolder
from filigrane.adapters.leases.metrics import Counts
from filigrane.errors import FiligraneError
from filigrane.serving.orders import now

__all__ = ["Keeper", "Ledger", "Round"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round brought: leases by the order of their services, and problems in words."""

    renewed: tuple[Renewed, ...]
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether every lease was renewed and every key proved."""
        return not self.problems


@final
class Keeper:
    """Keeps one folder in step with its services."""

    def __init__(
        self,
        services: Sequence[Service],
        folder: LeaseFolder,
        *,
        rng: np.random.Generator,
        everybody: bool = False,
    ) -> None:
        """rng: for proofs; everybody: the keys serve all requests, not only their tenants'."""
        self._services, self._folder = tuple(services), folder
        self._rng, self._everybody = rng, everybody

    def round(self, told: Callable[[str], object] = lambda _: None) -> Round:
        """Renew every lease once. told: called with a line for each key that is proved."""
        renewed, problems = list[Renewed](), list[str]()
        for service in self._services:
            try:
                done = renew(
                    service, self._folder, rng=self._rng, everybody=self._everybody, told=told
                )
            except FiligraneError as error:
                problems.append(str(error))
                if isinstance(error, TurnedAway) and service.tenant is not None:
                    problems += self._remove(partial(self._folder.drop, service.tenant))
            else:
                renewed.append(done)
                problems += done.problems
        problems += self._remove(partial(self._folder.sweep, now()))
        try:
            # What the operator has changed, and what somebody has put back, counts from here on.
            self._folder.compose()
        except FiligraneError as error:
            problems.append(str(error))
        return Round(renewed=tuple(renewed), problems=tuple(dict.fromkeys(problems)))

    @staticmethod
    def _remove(some: Callable[[], tuple[str, ...]]) -> list[str]:
        """Remove keys; what to say of it."""
        try:
            gone = some()
        except FiligraneError as error:
            return [str(error)]
        return [f"removed from this host: {', '.join(gone)}."] if gone else []


@final
class Ledger:
    """What an engine has counted, told to one service from time to time."""

    def __init__(self, service: Service, url: str) -> None:
        """url: of the engine's metrics; what it counted before the first look is not reported."""
        self._service, self._url = service, url
        self._before: Counts | None = None
        self._since: datetime | None = None

    def report(self) -> bool:
        """Report what has come since the last report; whether there was anything.

        Raises EndpointError if engine or service cannot be asked: the next report then tells it.
        """
        counts, until = metrics.read(self._url), now()
        if self._before is None or self._since is None:
            self._before, self._since = counts, until
            return False
        new = metrics.since(self._before, counts)
        if not new:
            self._since = until
            return False
        self._service.report(new, since=self._since, until=until)
        self._before, self._since = counts, until
        return True
