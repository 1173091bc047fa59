"""How fast and how much to ask: a budget, and a pace that several threads share."""

import math
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from filigrane.errors import EndpointError


class Stopped(EndpointError):
    """No further try is made: the budget is spent, or somebody said stop."""


class Budget:
    """What may be spent in one run; safe to use from several threads.

    A request is begun only if its longest answer still fits, so that max_output_tokens holds
    whatever the answers turn out to be.
    """

    def __init__(
        self, max_requests: int | None = None, max_output_tokens: int | None = None
    ) -> None:
        self._most = (
            math.inf if max_requests is None else max_requests,
            math.inf if max_output_tokens is None else max_output_tokens,
        )
        self._lock = threading.Lock()
        self.requests = 0
        self.output_tokens = 0

    def has_room(self, max_tokens: int) -> bool:
        """Whether one more request fits."""
        with self._lock:
            return self._fits(max_tokens)

    def _fits(self, max_tokens: int) -> bool:
        return (
            self.requests + 1 <= self._most[0] and self.output_tokens + max_tokens <= self._most[1]
        )

    def begin(self, max_tokens: int) -> None:
        """Count a request and the longest answer it may get. Raises Stopped if it does not fit."""
        with self._lock:
            if not self._fits(max_tokens):
                raise Stopped("the budget of this run is spent.")
            self.requests += 1
            self.output_tokens += max_tokens

    def settle(self, max_tokens: int, used: int) -> None:
        """Give back what an answer did not use."""
        with self._lock:
            self.output_tokens -= max(0, max_tokens - used)


class Pace:
    """Lets requests through no faster than so many a minute, and not while all are told to wait."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock = threading.Lock()
        self._next = 0.0
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Wait for a turn. Raises Stopped."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    break
                delay = self._next - now
            self.sleep(delay)
        self.sleep(0)

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long: the endpoint has told one of us, and means all."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait for so long. Raises Stopped, at once."""
        if self._stopped.wait(seconds):
            raise Stopped("stopped while waiting.")

    def stop(self) -> None:
        """End every wait, now and later."""
        self._stopped.set()


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or a date; None for neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
