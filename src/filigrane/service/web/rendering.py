"""Templates, static files, and the headers of every page.

Templates escape everything they are given. The policy allows this origin's own files and nothing
else: no inline script, no inline style, no other host.
"""

import hashlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response

from filigrane.service.web import words

__all__ = ["STATIC", "page", "static_file"]

_HERE: Final = Path(__file__).parent
STATIC: Final = {
    "filigrane.css": "text/css; charset=utf-8",
    "filigrane.js": "text/javascript; charset=utf-8",
    "htmx-2.0.11.min.js": "text/javascript; charset=utf-8",
    "htmx-LICENSE.txt": "text/plain; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Every file that may be asked for, and its type."""

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    # Not no-referrer: browsers would then send forms with "Origin: null".
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=()",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@cache
def _content(name: str) -> bytes:
    return (_HERE / "static" / name).read_bytes()


@cache
def _address(name: str) -> str:
    """Where a static file is; the address changes with its content."""
    return f"/static/{name}?v={hashlib.sha256(_content(name)).hexdigest()[:12]}"


@lru_cache(maxsize=1)
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["static"] = _address
    templates.filters["chance"] = words.chance
    templates.filters["count"] = words.count
    templates.filters["day"] = words.day
    templates.filters["moment"] = words.moment
    templates.filters["short"] = words.short
    return templates


def page(template: str, status: int, values: dict[str, Any]) -> Response:
    """A page: template name, HTTP status, and what the template shows."""
    return Response(
        _templates().get_template(template).render(values),
        status_code=status,
        headers=HEADERS,
        media_type="text/html; charset=utf-8",
    )


def static_file(name: str) -> Response | None:
    """A file of STATIC, which may be kept for ever because its address changes with it."""
    if name not in STATIC:
        return None
    headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_content(name), headers=headers, media_type=STATIC[name])
