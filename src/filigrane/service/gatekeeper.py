"""From a token to who holds it: tokens of our own, and JWTs of an identity provider.

A principal is believed for at most a few seconds without asking again (`limits.token_cache_s`), and
while the database does not answer for `limits.outage_s`: detection goes on then, and a revocation
could not be stored in that time either. Tokens are kept as their SHA-256 only. Knows nothing of
requests.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio.to_thread

from filigrane.errors import NotFound, StoreError
from filigrane.keys import _Secret
from filigrane.service.oidc import Verifier
from filigrane.service.problems import Problem, unauthorized
from filigrane.service.settings import Settings

if TYPE_CHECKING:
    from filigrane.store.access import Access
    from filigrane.store.records import Principal

__all__ = ["Gatekeeper"]

API_TOKEN: Final = "fgt_"
_MOST_CACHED: Final = 4096
_LONGEST_TOKEN: Final = 8192


@dataclass(frozen=True, slots=True)
class _Known:
    principal: "Principal"
    fresh_until: float
    usable_until: float


class Gatekeeper:
    """Turns credentials into principals, and remembers answers for a moment.

    clock: seconds, monotonic.
    """

    def __init__(
        self,
        access: "Access",
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access
        self._limits = settings.limits
        self._oidc = Verifier(settings.oidc) if settings.oidc is not None else None
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def __repr__(self) -> str:
        return "<Gatekeeper>"

    async def principal(self, token: _Secret[str]) -> "Principal":
        """Who holds this token. Raises Problem: 401, or 503 if nobody can say."""
        text = token.reveal()
        if len(text) > _LONGEST_TOKEN:
            raise unauthorized("the token is too long to be one.")
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and self._clock() < known.fresh_until:
            return known.principal
        try:
            principal, lifetime = await anyio.to_thread.run_sync(self._ask, token)
        except StoreError:
            if known is not None and self._clock() < known.usable_until:
                return known.principal
            raise
        except Problem:
            self._known.pop(digest, None)
            raise
        now = self._clock()
        self._known[digest] = _Known(
            principal,
            now + min(self._limits.token_cache_s, lifetime),
            now + min(self._limits.outage_s, lifetime),
        )
        self._known.move_to_end(digest)
        while len(self._known) > _MOST_CACHED:
            self._known.popitem(last=False)
        return principal

    def _ask(self, token: _Secret[str]) -> tuple["Principal", float]:
        """The principal and for how many seconds the token is going to be valid."""
        text = token.reveal()
        if text.startswith(API_TOKEN) or self._oidc is None:
            try:
                return self._access.authenticate(text), float("inf")
            except NotFound:
                raise unauthorized("the token is unknown, expired or revoked.") from None
        return self._oidc.principal(token)
