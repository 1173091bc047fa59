"""Where an endpoint is: what to send requests to, and what of it may be shown and kept."""

from typing import Final
from urllib.parse import urlsplit, urlunsplit

from filigrane.adapters.endpoints.keys import KEY_VARIABLE
from filigrane.errors import EndpointError

PATHS: Final = {"chat": "chat/completions", "completions": "completions"}
"""What comes behind the base address, by API."""

_EXAMPLE: Final = "pass one like http://localhost:8000/v1."


def address(url: str) -> tuple[str, str, str]:
    """What comes before a path, the query behind it, and the part that may be shown and kept.

    The path of an API at the end of `url` is cut off; without any path /v1 is meant. Raises
    EndpointError, which never repeats a URL that may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise EndpointError(f"the endpoint's address is not a URL; {_EXAMPLE}") from None
    if "@" in parts.netloc:
        raise EndpointError(
            f"the endpoint's address holds a user or a password; put the key into {KEY_VARIABLE} "
            "instead."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(
            f"the endpoint's address does not begin with http:// or https://; {_EXAMPLE}"
        )
    path = parts.path.rstrip("/")
    # Longest first: one ends in the other.
    for ending in sorted(PATHS.values(), key=len, reverse=True):
        path = path.removesuffix(f"/{ending}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port is None else f"{host}:{port}"
    shown = urlunsplit((parts.scheme, place, path or "/v1", "", ""))
    return shown, f"?{parts.query}" if parts.query else "", shown
