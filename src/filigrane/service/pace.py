"""How much one holder of a token may have tested in a minute; knows nothing of requests.

A plain count in memory, of this process alone: with n processes the limit is up to n times as
large. It stands before tests of which one takes less than a millisecond, so it has to cost next to
nothing, and may be coarse: minutes begin at the same moment for all, and what is asked for at once
(a batch) is granted whole as long as anything is left.
"""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, final

from filigrane.errors import BudgetSpent

if TYPE_CHECKING:
    from filigrane.store.records import Principal

__all__ = ["Pace"]

_MINUTE_S: Final = 60.0


@final
class Pace:
    """Counts texts by tenant and name of the token. Thread-safe.

    most: texts a minute; clock: seconds, monotonic.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._ends = clock() + _MINUTE_S
        self._counts: dict[tuple[str, str], int] = {}
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        return f"<Pace {self._most} a minute>"

    def spend(self, who: "Principal", texts: int = 1) -> None:
        """Count texts that somebody asks about. Raises BudgetSpent if his minute is used up."""
        now = self._clock()
        with self._turn:
            if now >= self._ends:
                self._ends = now + _MINUTE_S
                # Nobody's count outlives its minute, so that this cannot grow.
                self._counts.clear()
            name = (who.tenant, who.name)
            count = self._counts.get(name, 0)
            if count < self._most:
                self._counts[name] = count + texts
                return
            wait = self._ends - now
        raise BudgetSpent(
            f"too many texts; the limit is {self._most} a minute for one token. Wait a little, or "
            "make a job of many texts.",
            reason="expert",
            retry_after_s=wait,
        )
