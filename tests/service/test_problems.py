"""What is said of an error: by its class, each with a code and words of its own."""

import pytest

from filigrane import errors
from filigrane.service.problems import as_problem, headers_of, no_token, validation_problem

SECRET = "zq7xproblem"
STORE = {
    errors.StoreUnavailable: ("store_unavailable", "Try again later", "5"),
    errors.StoreVersionError: ("store_version", "keys migrate", "60"),
    errors.StoreFull: ("store_full", "free some room", "60"),
    errors.StoreReadOnly: ("store_read_only", "takes no changes", "60"),
    errors.StoreDamaged: ("store_damaged", "backup", "60"),
    errors.StoreError: ("store", "operator", "60"),
}


@pytest.mark.parametrize("kind", STORE, ids=lambda kind: kind.__name__)
def test_a_database_that_cannot_be_used(kind: type[errors.StoreError]) -> None:
    code, words, later = STORE[kind]
    found = as_problem(kind(f"sqlite /var/lib/{SECRET}: no"))
    assert (found.status_code, found.code) == (503, code)
    assert words in found.detail and SECRET not in found.detail
    assert headers_of(found)["Retry-After"] == later


def test_every_kind_of_store_error_is_told_apart() -> None:
    assert set(errors.StoreError.__subclasses__()) | {errors.StoreError} == set(STORE)
    assert len({as_problem(kind("x")).detail for kind in STORE}) == len(STORE)


def test_what_is_too_much() -> None:
    busy = as_problem(errors.Busy("too many traces wait already; try again in a minute."))
    assert (busy.status_code, busy.code) == (503, "busy") and "traces" in busy.detail
    assert headers_of(busy)["Retry-After"] == "30"
    spent = as_problem(errors.BudgetSpent("too often.", reason="network", retry_after_s=7.2))
    assert (spent.status_code, spent.code) == (429, "budget_network")
    assert headers_of(spent)["Retry-After"] == "8" and spent.detail == "Too often."
    long = as_problem(errors.BudgetSpent("a text is.", reason="length", retry_after_s=0.0))
    assert (long.status_code, long.code) == (413, "too_large")


def test_no_token_has_a_challenge_without_an_error() -> None:
    found = no_token()
    assert (found.status_code, found.code) == (401, "no_token")
    assert headers_of(found)["WWW-Authenticate"] == 'Bearer realm="filigrane"'


def test_a_long_unknown_name_is_neither_repeated_nor_costly() -> None:
    item = {"type": "extra_forbidden", "loc": ("body", SECRET * 100_000)}
    (entry,) = validation_problem([item], frozenset({"body", "text"})).more["errors"]
    assert entry == {
        "where": "body",
        "problem": "extra_forbidden",
        "hint": "No such field here.",
    }
