"""Lists a page at a time, and the header by which a creation can be repeated safely."""

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Header, Query, Request

from filigrane.service.auth import office_of

__all__ = ["After", "IdempotencyKey", "Limit", "page"]

T = TypeVar("T")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[A-Za-z0-9._~-]{1,64}$",
        description="A name of your own for this request: sent again with it, it is carried out "
        "once, and answered alike.",
    ),
]
After = Annotated[
    str | None,
    Query(max_length=128, description="`next` of the page before; without it the first page."),
]
Limit = Annotated[int | None, Query(ge=1, le=1000, description="Most entries of a page.")]


def page(
    request: Request,
    entries: Sequence[T],
    name: Callable[[T], str],
    after: str | None,
    limit: int | None,
) -> tuple[list[T], str | None]:
    """The entries that follow the one named `after`, and the name to go on from, None at the end.

    entries: in the order of their list; an `after` that is not among them gives nothing.
    """
    most = min(limit or 1000, office_of(request).settings.limits.page)
    start = 0
    if after is not None:
        places = (place for place, entry in enumerate(entries) if name(entry) == after)
        start = next(places, len(entries)) + 1
    shown = list(entries[start : start + most])
    more = start + most < len(entries)
    return shown, name(shown[-1]) if more and shown else None
