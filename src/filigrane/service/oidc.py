"""JWTs of an identity provider: signature, issuer, audience, times, tenant and roles.

Only asymmetric algorithms are taken, and only from the configured list, whatever a token's header
says: neither "none" nor a MAC under the provider's public key passes. Knows nothing of HTTP routes.
"""

import hashlib
import json
import math
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from filigrane.custody.hierarchy import check_name
from filigrane.errors import FiligraneError, KeyFormatError
from filigrane.keys import _Secret
from filigrane.service.problems import Problem, unauthorized
from filigrane.service.settings import Oidc

if TYPE_CHECKING:
    from filigrane.store.records import Principal

__all__ = ["Verifier"]

_SUBJECT: Final = re.compile(r"[A-Za-z0-9._@+-]{1,58}")
_FETCH_S: Final = 5.0
_MOST_BYTES: Final = 1_000_000
_AGAIN_S: Final = 15.0
"""An unknown key id asks the provider again, but not more often than this."""
_OUTAGE_S: Final = 86_400.0
"""For how long keys are used while the provider does not answer."""


class Verifier:
    """One provider: its keys, kept for a while, and what its tokens must say."""

    def __init__(self, settings: Oidc) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._keys: dict[str, Any] = {}
        self._asked_at = -math.inf
        self._read_at = -math.inf

    def __repr__(self) -> str:
        return "<Verifier>"

    def principal(self, token: _Secret[str]) -> "tuple[Principal, float]":
        """Who a token speaks for, and for how many seconds it is still good.

        Raises Problem: 401 in words, or 503 if the provider's keys cannot be had.
        """
        from joserfc import jwt
        from joserfc.errors import JoseError

        key = self._key_for(token)
        try:
            claims = jwt.decode(
                token.reveal(), key, algorithms=list(self._settings.algorithms)
            ).claims
        except (JoseError, ValueError, TypeError, RecursionError):
            raise unauthorized("the token's signature is not one of its provider's.") from None
        left = self._check_times(claims)
        if claims.get("iss") != self._settings.issuer:
            raise unauthorized("the token is of another issuer.")
        audience = claims.get("aud")
        if self._settings.audience not in (audience if isinstance(audience, list) else [audience]):
            raise unauthorized("the token is meant for another audience.")
        return self._principal(claims), left

    def _check_times(self, claims: dict[str, Any]) -> float:
        now, leeway = time.time(), self._settings.leeway_s
        times = {}
        for name in ("exp", "nbf", "iat"):
            value = claims.get(name)
            if value is None and name != "exp":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise unauthorized(f"the token has no usable time {name}.")
            if not math.isfinite(value):
                raise unauthorized(f"the token has no usable time {name}.")
            times[name] = float(value)
        if now >= times["exp"] + leeway:
            raise unauthorized("the token is expired.")
        if "nbf" in times and now < times["nbf"] - leeway:
            raise unauthorized("the token is not valid yet.")
        if "iat" in times and now < times["iat"] - leeway:
            raise unauthorized("the token is from the future; set the clocks.")
        return times["exp"] + leeway - now

    def _principal(self, claims: dict[str, Any]) -> "Principal":
        from filigrane.store.records import Principal, Role

        tenant, subject = claims.get(self._settings.tenant_claim), claims.get("sub")
        if not isinstance(tenant, str) or not isinstance(subject, str) or not subject:
            raise unauthorized("the token names no tenant or no subject.")
        try:
            check_name("tenant", tenant)
        except KeyFormatError:
            raise unauthorized("the token names a tenant that cannot exist.") from None
        named = claims.get(self._settings.roles_claim, [])
        known = {str(role): role for role in Role}
        roles = frozenset(
            known[name]
            for name in (named if isinstance(named, list) else [])
            if isinstance(name, str) and name in known
        )
        # An engine is enrolled by name and key; a person's token cannot stand for one.
        roles -= {Role.ENGINE}
        return Principal(tenant=tenant, name=_name_of(subject), roles=roles)

    def _key_for(self, token: _Secret[str]) -> Any:
        from joserfc import jws
        from joserfc.errors import JoseError

        try:
            header = jws.extract_compact(token.reveal().encode("ascii")).headers()
        except (JoseError, ValueError, TypeError, RecursionError):
            raise unauthorized("the token is neither an API token nor a JWT.") from None
        if header.get("alg") not in self._settings.algorithms:
            raise unauthorized("the token's algorithm is not one that this service takes.")
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise unauthorized("the token's key id is not a text.")
        keys = self._current()
        if kid is not None and kid not in keys:
            keys = self._current(again=True)
        if kid is None and len(keys) == 1:
            return next(iter(keys.values()))
        if kid is None or kid not in keys:
            raise unauthorized(
                "the token is signed with a key that the identity provider does not list."
            )
        return keys[kid]

    def _current(self, *, again: bool = False) -> dict[str, Any]:
        with self._lock:
            now = time.monotonic()
            age = now - self._read_at
            due = age > self._settings.jwks_lifetime_s or again
            pause = min(_AGAIN_S, self._settings.jwks_lifetime_s) if self._keys else 1.0
            if due and now - self._asked_at > pause:
                self._asked_at = now
                try:
                    self._keys = _keys_of(self._fetch())
                    self._read_at = now
                except (FiligraneError, OSError):
                    if age > _OUTAGE_S:
                        self._keys = {}
            if not self._keys:
                raise Problem(
                    503,
                    "identity_provider",
                    "The keys of the identity provider cannot be had now; try again later.",
                )
            return self._keys

    def _fetch(self) -> bytes:
        if self._settings.jwks_file is not None:
            return self._settings.jwks_file.read_bytes()
        import httpx2

        assert self._settings.jwks_url is not None
        try:
            answer = httpx2.get(self._settings.jwks_url, timeout=_FETCH_S, follow_redirects=False)
        except httpx2.HTTPError as error:
            raise FiligraneError("the identity provider does not answer.") from error
        if answer.status_code != 200 or len(answer.content) > _MOST_BYTES:
            raise FiligraneError("the identity provider answers no key set.")
        return bytes(answer.content)


def _name_of(subject: str) -> str:
    """What a person of the identity provider is called in the log and in approvals.

    Never two people alike: a subject that cannot stand in a name is named by its digest.
    """
    if _SUBJECT.fullmatch(subject):
        return f"oidc.{subject}"
    return "oidc@" + hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _keys_of(text: bytes) -> dict[str, Any]:
    """Key id -> public key; symmetric keys are left out, whoever lists them."""
    from joserfc.errors import JoseError
    from joserfc.jwk import import_key

    try:
        listed = json.loads(text)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FiligraneError("this is no JSON Web Key Set.") from None
    keys = {}
    for number, entry in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC", "OKP"):
            continue
        if entry.get("use", "sig") != "sig":
            continue
        try:
            keys[str(entry.get("kid", f"#{number}"))] = import_key(entry)
        except (JoseError, ValueError, TypeError):
            continue
    return keys
