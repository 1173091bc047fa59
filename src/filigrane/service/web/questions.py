"""What forms that ask about a text have in common: keys to choose from, and what they ask for."""

from filigrane.service.detecting import Query
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.web.forms import Form
from filigrane.store.records import KeyRecord, Principal

__all__ = ["query_of", "readable"]


def readable(office: Office, who: Principal) -> list[KeyRecord]:
    """Keys of somebody's tenant with a version that reads."""
    return [
        key
        for key in office.keybook.keys(who.tenant)
        if any(version.state.reads for version in key.versions)
    ]


def query_of(office: Office, form: Form, *, alpha: float, evidence: bool = False) -> Query:
    """What the fields text, key, tokenizer and receipt of a form ask for.

    alpha: p-value at most, in (0, 0.1]; evidence: whether spans and heat are wanted. Raises Problem
    422 without a text, 413 for one that is longer than the service reads, FiligraneError for
    another alpha.
    """
    text = form.some_text()
    if len(text) > 4 * office.settings.limits.text_tokens:
        raise Problem(413, "too_long", "This text is too long; send parts of it.")
    return Query(
        text=text,
        key=form.line("key") or None,
        tokenizer=form.line("tokenizer") or None,
        receipt=form.line("receipt") or None,
        alpha=alpha,
        evidence=evidence,
    )
