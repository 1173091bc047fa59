"""The limit of the expert tier: by token, by the minute, and too cheap to be seen."""

import time
from pathlib import Path

import pytest

from filigrane.errors import BudgetSpent
from filigrane.service.pace import Pace
from filigrane.store.records import Principal, Role
from servicekit import OTHER, TENANT, prepare, problem, running, signed_in


def expert(name: str, tenant: str = "demo") -> Principal:
    return Principal(tenant=tenant, name=name, roles=frozenset({Role.DETECTOR_EXPERT}))


def test_a_minute_of_each() -> None:
    now = 1000.0
    pace = Pace(3, clock=lambda: now)
    for _ in range(3):
        pace.spend(expert("ann"))
    now += 20
    with pytest.raises(BudgetSpent, match="3 a minute") as caught:
        pace.spend(expert("ann"))
    assert (caught.value.reason, caught.value.retry_after_s) == ("expert", 40.0)
    # Others have their own: another name, and the same name of another tenant.
    pace.spend(expert("bob"))
    pace.spend(expert("ann", "other"))
    now += 40
    pace.spend(expert("ann"))
    # A batch is granted whole while anything is left, and counts whole.
    pace.spend(expert("ann"), 100)
    with pytest.raises(BudgetSpent):
        pace.spend(expert("ann"))


def test_it_remembers_nobody_for_longer() -> None:
    now = 0.0
    pace = Pace(3, clock=lambda: now)
    for number in range(1000):
        pace.spend(expert(f"n{number}"))
        now += 1
        assert len(pace._counts) <= 60


def test_it_costs_next_to_nothing() -> None:
    """Far below a request of a millisecond; the best of some runs, whatever else goes on."""
    pace, ann = Pace(10**9), expert("ann")
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            pace.spend(ann)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 20e-6, best


def test_over_http(tmp_path: Path) -> None:
    made = prepare(tmp_path, sections="[limits]\nexpert_per_minute = 4\n")
    body = {"tokens": [1, 2, 3]}
    key = {"name": "chat", "model": "toy", "scheme": "gumbel", "slots": 1}
    with running(made), made.client("detector-expert") as client:
        for tenant in (TENANT, OTHER):
            with made.client("key-admin", tenant) as admin:
                assert admin.post("/v1/keys", json=key).status_code == 201
        for _ in range(3):
            assert client.post("/v1/detect", json=body).status_code == 200
        batch = {"items": [body] * 5}
        assert client.post("/v1/detect/batch", json=batch).status_code == 200
        for path, sent in (("/v1/detect", body), ("/v1/detect/batch", batch)):
            answer = client.post(path, json=sent)
            said = problem(answer, 429, "budget_expert")
            assert 0 < int(answer.headers["retry-after"]) <= 61 and "4 a minute" in said["detail"]
        # Not even read any more.
        wrong = {"Content-Type": "application/json"}
        problem(client.post("/v1/detect", content=b"{", headers=wrong), 429)
        # Nor on the page.
        with signed_in(made, "detector-expert") as (browser, csrf):
            answer = browser.post("/expert", data={"text": "something", "csrf": csrf})
            assert answer.status_code == 429 and "4 a minute" in answer.text
        # Jobs are done one after another, and others are not concerned.
        assert client.post("/v1/jobs", json=[body]).status_code == 202
        with made.client("detector-expert", OTHER) as other:
            assert other.post("/v1/detect", json=body).status_code == 200
