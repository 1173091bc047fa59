"""Addresses of key management servers: what may be said of one, and which are refused."""

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from filigrane.errors import KmsError

__all__ = ["checked_address", "host_of"]

_LOOPBACK: Final = frozenset({"localhost"})


def checked_address(address: str) -> str:
    """The address without a last slash; raises KmsError, showing none of it, if it is not usable.

    Tokens and MACs travel in these requests, so it is https, or http within this machine, and
    holds neither user nor password.
    """
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError:
        host, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise KmsError("a key management server's address is https://host:port.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise KmsError(
            "a key management server's address holds no user, password or query; put the token "
            "into a file and name that."
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise KmsError(
            f"{host} would be asked over plain HTTP, and secrets are in the answers; use https."
        )
    return address.rstrip("/")


def host_of(address: str) -> str:
    """What messages say of an address: host and port."""
    return urlsplit(address).netloc.rpartition("@")[2]


def _is_loopback(host: str) -> bool:
    if host in _LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
