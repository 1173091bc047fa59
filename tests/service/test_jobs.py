"""Jobs over HTTP: every item gets an answer or a reason, once, and nobody else sees them."""

import json
import sqlite3
from typing import Any

import numpy as np
import pytest

from filigrane.service.jobs import read_items
from filigrane.service.problems import Problem
from servicekit import OTHER, Service, job_done, job_results, marked_ids, problem

CANARY = "zq7xjobcanary"


def test_every_item_is_answered(service: Service) -> None:
    marked = marked_ids(service, "demo.chat@1", 200, 1).tolist()
    plain = np.random.default_rng(2).integers(0, 256, 200).tolist()
    items: list[dict[str, Any]] = [
        {"id": f"item {n}", "tokens": marked if n % 3 == 0 else plain} for n in range(10)
    ]
    items.append({"tokens": [1, 2]})
    items.append({"id": "text", "text": CANARY * 30})
    with service.client("detector-expert") as client:
        made = client.post("/v1/jobs", json=items, params={"key": "chat", "alpha": 1e-6})
        assert made.status_code == 202 and made.json()["n_items"] == 12
        done = job_done(client, made.json()["id"])
        assert (done["state"], done["n_done"]) == ("done", 12)
        found = job_results(client, made.json()["id"], limit=5)
        assert [r["index"] for r in found] == list(range(12))
        assert [r["id"] for r in found[:10]] == [item["id"] for item in items[:10]]
        # What a single request says of the same ids, the job says too.
        single = client.post("/v1/detect", json={"tokens": marked, "key": "chat"}).json()
        for n in range(10):
            answer = found[n]["answer"]
            assert answer["verdict"] == ("detected" if n % 3 == 0 else "inconclusive")
            if n % 3 == 0:
                assert answer["log10_pvalue"] == single["log10_pvalue"] < -9
        assert found[10]["answer"]["verdict"] == "too_short"
        assert CANARY not in json.dumps(found)
        assert client.delete(f"/v1/jobs/{made.json()['id']}").status_code == 204
        problem(client.get(f"/v1/jobs/{made.json()['id']}"), 404, "not_found")


def test_one_item_a_line(service: Service) -> None:
    lines = b'{"tokens": [1, 2, 3]}\n\n{"id": "b", "text": "abc"}\n'
    with service.client("detector-expert") as client:
        made = client.post(
            "/v1/jobs", content=lines, headers={"Content-Type": "application/x-ndjson"}
        )
        assert made.json()["n_items"] == 2
        job_done(client, made.json()["id"])


def test_what_cannot_be_tested_gets_a_reason_and_no_verdict(service: Service) -> None:
    with service.client("detector-expert") as client:
        made = client.post("/v1/jobs", json=[{"text": "abc"}], params={"key": "no-such-key"})
        job_done(client, made.json()["id"])
        (found,) = job_results(client, made.json()["id"])
    assert found["state"] == "failed" and found["answer"] is None
    assert found["problem"] == "not_found" and found["detail"]


@pytest.mark.parametrize(
    "body",
    [
        [],
        [{}],
        [{"text": ""}],
        [{"text": "a", "tokens": [1]}],
        [{"tokens": []}],
        [{"tokens": [-1]}],
        [{"tokens": [2**32]}],
        [{"tokens": [1.5]}],
        [{"tokens": ["1"]}],
        [{"text": 5}],
        [{"text": "a", CANARY: 1}],
        [{"text": "a", "id": "x" * 200}],
        {"text": "a"},
        CANARY,
    ],
)
def test_items_of_another_form(service: Service, body: object) -> None:
    with service.client("detector-expert") as client:
        answer = client.post("/v1/jobs", json=body)
        problem(answer, 422)
        assert CANARY not in answer.text


def test_limits() -> None:
    body = json.dumps([{"tokens": [1, 2, 3]}] * 3).encode()
    assert len(read_items(body, lines=False, most=3, longest=3)) == 3
    for most, longest in ((2, 3), (3, 2)):
        with pytest.raises(Problem):
            read_items(body, lines=False, most=most, longest=longest)
    with pytest.raises(Problem):
        read_items(b'[{"text": "123456789"}]', lines=False, most=1, longest=2)
    with pytest.raises(Problem):
        read_items(b"[" * 100_000, lines=False, most=1, longest=2)


def test_an_error_names_its_line() -> None:
    good = b'{"tokens": [1]}\n\n'
    for bad, status, words in (
        (b'{"tokens": [1', 400, "Line 3 of"),
        (b'{"tokens": "' + CANARY.encode() + b'"}', 422, None),
        (b'{"tokens": [1, 2, 3, 4]}', 422, "line 3"),
    ):
        with pytest.raises(Problem) as caught:
            read_items(good + bad, lines=True, most=9, longest=3)
        said = caught.value
        assert said.status_code == status and CANARY not in str((said.detail, said.more))
        if words is None:
            assert [entry["line"] for entry in said.more["errors"]] == [3]
        else:
            assert words in said.detail
    with pytest.raises(Problem, match="item 1"):
        read_items(b'[{"tokens": [1]}, {"tokens": [1, 2, 3, 4]}]', lines=False, most=9, longest=3)


def test_a_repeated_request_makes_one_job(service: Service) -> None:
    again = {"Idempotency-Key": "job-1"}
    with service.client("detector-expert") as client:
        first = client.post("/v1/jobs", json=[{"text": "abc"}], headers=again).json()
        assert (
            client.post("/v1/jobs", json=[{"text": "abc"}], headers=again).json()["id"]
            == (first["id"])
        )
        other = client.post("/v1/jobs", json=[{"text": "abd"}], headers=again)
        problem(other, 409, "exists")
        problem(client.post("/v1/jobs", json=[], headers={"Idempotency-Key": "a b"}), 422)


def test_cancelling_leaves_results_and_erases_texts(service: Service) -> None:
    tokens = np.random.default_rng(3).integers(0, 256, 20_000).tolist()
    with service.client("detector-expert") as client:
        made = client.post("/v1/jobs", json=[{"tokens": tokens}] * 100).json()
        gone = client.post(f"/v1/jobs/{made['id']}/cancel")
        assert gone.json()["state"] == "cancelled"
        problem(client.post(f"/v1/jobs/{made['id']}/cancel"), 409, "state")
        found = job_results(client, made["id"])
        assert len(found) == 100 and found[-1]["state"] == "cancelled"
        assert {r["state"] for r in found} <= {"done", "cancelled"}


def test_other_tenants_see_no_job(service: Service) -> None:
    with service.client("detector-expert") as client:
        made = client.post("/v1/jobs", json=[{"text": "abc"}]).json()["id"]
    with service.client("detector-expert", OTHER) as client:
        for answer in (
            client.get(f"/v1/jobs/{made}"),
            client.get(f"/v1/jobs/{made}/results"),
            client.post(f"/v1/jobs/{made}/cancel"),
            client.delete(f"/v1/jobs/{made}"),
        ):
            assert problem(answer, 404) == client.get("/v1/jobs/0123456789abcdef").json()
        assert made not in {job["id"] for job in client.get("/v1/jobs").json()["jobs"]}


def test_texts_are_not_in_the_database(service: Service) -> None:
    with service.client("detector-expert") as client:
        made = client.post("/v1/jobs", json=[{"text": CANARY * 5}] * 50).json()["id"]
        job_done(client, made)
    for file in service.config.parent.glob("filigrane.db*"):
        assert CANARY.encode() not in file.read_bytes(), file
    with sqlite3.connect(service.config.parent / "filigrane.db") as database:
        left = database.execute(
            "SELECT count(*) FROM items WHERE job = ? AND content IS NOT NULL", (made,)
        ).fetchone()
        database.rollback()
    database.close()
    assert left == (0,)
