"""Asking a service for leases, for one engine: fetch, prove, report; again and again.

    Service   one service and one token: `lease`, `acknowledge`, `report`
    renew     one round: a tenant's lease fetched, written into the folder, its new keys proved

Keys are in memory and in the folder's private files, in no URL, header, log or error. When the
service cannot be asked, nothing is changed: engines mark on until what they have expires.
"""

import json
import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from filigrane.adapters.leases.folder import LeaseFolder
from filigrane.adapters.leases.metrics import Counts
from filigrane.adapters.leases.proof import prove
from filigrane.adapters.leases.sealing import Identity, Lease, new_nonce, unseal
from filigrane.errors import EndpointError, FiligraneError, MissingDependency
from filigrane.keys import _Secret
from filigrane.private_files import open_to_others
from filigrane.serving.orders import now

try:
    import httpx2
except ImportError as error:
    raise MissingDependency("leases need more packages: pip install 'filigrane[lease]'") from error

__all__ = ["Renewed", "Service", "TurnedAway", "read_token", "renew"]

LOCAL: Final = ("localhost", "127.0.0.1", "::1")
_LEASE: Final = "/v1/engine/lease"
_TIMEOUT_S: Final = 20.0
_MOST_BYTES: Final = 8 * 2**20
_TENANT: Final = re.compile(r"fgt_([a-z0-9][a-z0-9-]{0,23})_.*")
_GONE: Final = {401: "token", 404: "not_found"}
"""What a service answers whose engine or token is revoked: status and code of the problem. A proxy
that answers for it has other words, and takes no key away.
"""


class TurnedAway(EndpointError):
    """The service knows this engine or its token no more."""


@final
class Service:
    """A service and the token of an engine; closed by `with`."""

    def __init__(
        self,
        url: str,
        token: _Secret[str],
        identity: Identity,
        *,
        ca: str | os.PathLike[str] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """Nothing is sent yet. ca: authorities to trust instead of the system's, a PEM file.

        Raises EndpointError for an address that is none, or would send the token in the open.
        """
        self._base = _address(url)
        self._identity = identity
        named = _TENANT.fullmatch(token.reveal())
        self.tenant = None if named is None else named[1]
        """Whose token it is; None if it does not say so."""
        self._client = httpx2.Client(
            headers={
                "User-Agent": "filigrane",
                "Authorization": f"Bearer {token.reveal()}",
                "Accept-Encoding": "identity",
            },
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            verify=_trusted(self._base, ca),
            # A redirection would carry the token to wherever somebody likes.
            follow_redirects=False,
            # Nor does a proxy of the environment get to see it.
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"<Service {self._base} for {self._identity.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def lease(self) -> tuple[Lease, datetime]:
        """A fresh lease, opened, and when it expires by this machine's clock.

        The time runs from before the request, for as long as the service says: clocks that differ
        make it neither longer nor shorter. Raises EndpointError, TurnedAway if there is not going
        to be one.
        """
        nonce, asked = new_nonce(), now()
        answer = self._post(_LEASE, {"nonce": nonce})
        sealed = answer.get("lease")
        if not isinstance(sealed, str):
            raise EndpointError(f"{self._base} answered with something else than a lease.")
        lease = unseal(sealed, self._identity, nonce=nonce)
        return lease, asked + lease.lifetime

    def acknowledge(self, version: str, proof: list[int]) -> None:
        """Show that this engine has a version. Raises EndpointError."""
        self._post("/v1/engine/ack", {"version": version, "proof": proof})

    def report(self, counts: Counts, *, since: datetime, until: datetime) -> None:
        """Say what was counted between two moments. Raises EndpointError."""
        body = {
            "since": since.astimezone(UTC).isoformat(),
            "until": until.astimezone(UTC).isoformat(),
            "counts": [
                {"outcome": outcome, "reason": reason, "requests": number}
                for (outcome, reason), number in sorted(counts.requests.items())
            ],
            "marked_tokens": counts.marked_tokens,
            "unmarked_tokens": counts.unmarked_tokens,
        }
        self._post("/v1/engine/coverage", body)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with self._client.stream("POST", self._base + path, json=body) as answer:
                content = bytearray()
                for part in answer.iter_raw():
                    content += part
                    if len(content) > _MOST_BYTES:
                        raise EndpointError(f"{self._base} sends more than a lease can be.")
                status = answer.status_code
        except (httpx2.HTTPError, ssl.SSLError) as error:
            raise EndpointError(
                f"{self._base} does not answer ({type(error).__name__}); keys that are here stay "
                "good until they expire."
            ) from None
        if status == 204:
            return {}
        try:
            parsed = json.loads(bytes(content))
        except (ValueError, RecursionError):
            parsed = None
        if status == 200 and isinstance(parsed, dict):
            return parsed
        said = f"{self._base}{path} answered {status}: {_words(parsed)}"
        code = parsed.get("code") if isinstance(parsed, dict) else None
        if path == _LEASE and status in _GONE and code == _GONE[status]:
            raise TurnedAway(said)
        raise EndpointError(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """What one round did.

    acknowledged: ids newly proved; foreign: ids of keys for other tools' marks, which a keyring has
    no place for; problems: what else went wrong, in words.
    """

    lease: Lease
    expires: datetime
    acknowledged: tuple[str, ...]
    foreign: tuple[str, ...]
    problems: tuple[str, ...]


def renew(
    service: Service,
    folder: LeaseFolder,
    *,
    rng: np.random.Generator,
    everybody: bool = False,
    told: Callable[[str], object] = lambda _: None,
) -> Renewed:
    """Fetch a tenant's lease, write it, and prove what has not been proved.

    A version that is active elsewhere marks here once it is proved: then the lease is fetched once
    more. rng: for proofs; told: called with a line for each thing that happens. Raises
    EndpointError if there is no lease, KeyringError if it cannot be written; a proof that fails is
    one of the answer's problems.
    """
    lease, expires = service.lease()
    foreign = folder.put(lease, expires=expires, everybody=everybody, at=now())
    done, problems = list[str](), list[str]()
    for key in lease.keys:
        if key.acknowledged:
            continue
        try:
            proof = prove(key.id, key.kind, key.mark, key.key, rng=rng)
            service.acknowledge(key.id, proof.tolist())
        except FiligraneError as error:
            problems.append(f"{key.id} is not acknowledged: {error}")
        else:
            done.append(key.id)
            told(f"{key.id} is here, and the service knows it.")
    if done:
        lease, expires = service.lease()
        folder.put(lease, expires=expires, everybody=everybody, at=now())
    return Renewed(
        lease=lease,
        expires=expires,
        acknowledged=tuple(done),
        foreign=foreign,
        problems=tuple(problems),
    )


def read_token(path: str | os.PathLike[str]) -> _Secret[str]:
    """The token in a file that only its owner can read. Raises EndpointError."""
    shown = os.fspath(path)
    try:
        about = os.stat(path)
        text = _Secret(Path(path).read_text("ascii").strip())
    except (OSError, UnicodeDecodeError):
        raise EndpointError(
            f"the token file {shown} cannot be read: write the engine's token into it."
        ) from None
    exposed = open_to_others(path, about)
    if exposed is not None:
        raise EndpointError(
            f"{shown}: {exposed}; and if somebody may have read the token, take out another."
        )
    if not text.reveal() or not text.reveal().isprintable() or " " in text.reveal():
        raise EndpointError(f"the token file {shown} does not hold one token.")
    return text


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in url:
        raise EndpointError(
            "the service's address is a URL without a user or a query, such as "
            "https://filigrane.example."
        )
    if parts.scheme == "http" and parts.hostname not in LOCAL:
        raise EndpointError(
            "the service's address must begin with https://: over http the token could be read on "
            "the way, and another could play the service."
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def _trusted(base: str, ca: str | os.PathLike[str] | None) -> Any:
    if base.startswith("http://"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and is not used
    if ca is None:
        return httpx2.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=os.fspath(ca))
    except (OSError, ssl.SSLError):
        raise EndpointError(f"{os.fspath(ca)} holds no certificates in PEM.") from None


def _words(parsed: object) -> str:
    """What a problem says of itself, as far as it may be shown."""
    detail = parsed.get("detail") if isinstance(parsed, dict) else None
    if not isinstance(detail, str) or not detail.isprintable():
        return "nothing that this program understands."
    return detail if len(detail) <= 300 else detail[:297] + "..."
