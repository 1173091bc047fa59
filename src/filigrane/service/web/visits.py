"""Who stands before a page: a principal with a session, found by the cookie of a request.

What a visitor may do and see is decided elsewhere; nothing here makes a page.
"""

from dataclasses import dataclass

import anyio.to_thread
from fastapi import Request

from filigrane.service.auth import office_of
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.web.forms import Form
from filigrane.service.web.sessions import Session, Sessions, same_secret
from filigrane.store.records import Principal

__all__ = ["LoggedOut", "Visitor", "check_csrf", "cookie_name", "sessions_of", "visitor_of"]


class LoggedOut(Exception):
    """The page needs a session and there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Somebody who is logged in."""

    who: Principal
    session: Session


def sessions_of(request: Request) -> Sessions:
    """The sessions of this process."""
    state = request.app.state
    if not hasattr(state, "web_sessions"):
        office = office_of(request)
        state.web_sessions = Sessions(office.kms, office.settings.web.session_s)
    sessions: Sessions = state.web_sessions
    return sessions


def cookie_name(office: Office) -> str:
    """What the cookie of a session is called."""
    # The prefix makes browsers insist on Secure, this host and the whole path.
    return "__Host-filigrane" if office.settings.web.secure_cookie else "filigrane-session"


async def visitor_of(request: Request) -> Visitor:
    """Who sent a request. Raises LoggedOut; Problem or FiligraneError if nobody can say now."""
    office = office_of(request)
    cookie = request.cookies.get(cookie_name(office))
    if cookie is None:
        raise LoggedOut
    session = await anyio.to_thread.run_sync(sessions_of(request).open, cookie)
    if session is None:
        raise LoggedOut
    try:
        return Visitor(who=await office.gatekeeper.principal(session.token), session=session)
    except Problem as problem:
        if problem.status_code == 401:
            raise LoggedOut from None
        raise


def check_csrf(form: Form, visitor: Visitor) -> None:
    """Raise Problem 403 unless a form was made for this very session."""
    if not same_secret(form.line("csrf"), visitor.session.csrf):
        raise Problem(403, "csrf", "This form is of another session; open the page again.")
