"""Approvals as the pages of those who need one show and give them."""

from datetime import datetime

from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.web.forms import Form
from filigrane.store.records import Approval, Principal

__all__ = ["agree", "repeatable", "usable"]


def agree(office: Office, who: Principal, form: Form, kind: str) -> str:
    """Agree as the second person to a request of this kind; answers with a code of words.DONE.

    Raises NotFound and StateError as `Access.approve` does, Problem 404 for another kind.
    """
    found = office.access.approval(who.tenant, form.line("approval"))
    if found.kind != kind:
        raise Problem(404, "not_found", "There is no such request here.")
    office.access.approve(who.tenant, found.id, who)
    return "approved"


def usable(approval: Approval, now: datetime) -> bool:
    """Whether it can still be given or used."""
    return approval.used_at is None and approval.expires_at > now


def repeatable(approval: Approval, who: Principal, now: datetime) -> bool:
    """Whether somebody used it to trace and can still have the same answer again."""
    used = approval.kind == "trace" and approval.used_by == who.name
    return used and approval.expires_at > now
