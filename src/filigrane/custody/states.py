"""What may become of a version of a key.

    pre-active ──► active ──► retired ──► compromised ──► destroyed
        │            └────────────┴──────────▲               ▲
        └──► retired, compromised, destroyed └── retired ────┘

A leak can turn out to be older than was thought: compromised follows compromised.

A version is pre-active until every engine has it, marks while it is active, and reads for as long
as it is not destroyed. (NIST SP 800-57 part 1, section 7, has the states and their names; the order
add, distribute, promote is Tink's.)
"""

import enum
from typing import Final

from filigrane.errors import StateError

__all__ = ["MOVES", "State", "require_move"]


class State(enum.StrEnum):
    """The state of one version of a key."""

    PRE_ACTIVE = "pre-active"
    ACTIVE = "active"
    RETIRED = "retired"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"

    @property
    def marks(self) -> bool:
        """Whether text may be marked with it."""
        return self is State.ACTIVE

    @property
    def reads(self) -> bool:
        """Whether text may be tested with it; what a compromised one finds proves less."""
        return self is not State.DESTROYED


MOVES: Final = {
    State.PRE_ACTIVE: {State.ACTIVE, State.RETIRED, State.COMPROMISED, State.DESTROYED},
    State.ACTIVE: {State.RETIRED, State.COMPROMISED},
    State.RETIRED: {State.COMPROMISED, State.DESTROYED},
    State.COMPROMISED: {State.COMPROMISED, State.DESTROYED},
    State.DESTROYED: set[State](),
}
"""State -> the states that may follow it."""


def require_move(key_id: str, now: State, to: State) -> None:
    """Raise StateError, saying what is possible instead, unless `to` may follow `now`."""
    if to in MOVES[now]:
        return
    if to is now:
        raise StateError(f"{key_id} is {now} already.")
    allowed = ", ".join(sorted(MOVES[now])) or "nothing any more"
    raise StateError(f"{key_id} is {now}, from which it cannot become {to}; possible: {allowed}.")
