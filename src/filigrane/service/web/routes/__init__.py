"""What each address of the web page does, one module for each of its pages.

Pages under a role need a session; the first page is for everybody and sets no cookie. Every form is
answered by the whole page, or, where htmx asks, by the part that changed. After a change the
browser is sent on to a page that can be loaded again.
"""

from fastapi import APIRouter

from filigrane.service.web.routes import expert, keys, public, session, trace

__all__ = ["router"]

router = APIRouter(include_in_schema=False)
for _page in (public, session, expert, trace, keys):
    router.include_router(_page.router)
