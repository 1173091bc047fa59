"""What is lost when something dies: nothing that was acknowledged, and no text passes untested."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

import kmskit
import pgkit
from filigrane.custody.hierarchy import KeySpec
from filigrane.service.office import open_office
from filigrane.service.settings import Settings
from servicekit import (
    OTHER,
    PATIENCE,
    Service,
    job_done,
    job_results,
    marked_ids,
    prepare,
    problem,
    running,
)

ITEMS = int(os.environ.get("FILIGRANE_FAULT_ITEMS", "300"))
KEY = {"name": "chat", "model": "toy", "scheme": "gumbel", "slots": 1}


def make_key(service: Service) -> list[int]:
    """A promoted key, and a text of 200 ids that carries its mark."""
    with service.client("key-admin") as client:
        assert client.post("/v1/keys", json=KEY).status_code == 201
        assert client.post("/v1/keys/chat/versions/1/promote").status_code == 200
    return marked_ids(service, "demo.chat@1", 200, 1).tolist()


def verdict(service: Service, tokens: list[int]) -> str:
    with service.client("detector-expert") as client:
        answer = client.post("/v1/detect", json={"tokens": tokens})
    return answer.json()["verdict"] if answer.status_code == 200 else str(answer.status_code)


def eventually(check: Callable[[], bool], *, patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not check():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_job_goes_on_after_kill_9(tmp_path: Path) -> None:
    """Everything that was acknowledged before the kill is there after it, and comes out right."""
    service = prepare(tmp_path, sections="[limits]\njob_lease_s = 1\njob_chunk = 4\n")
    rng = np.random.default_rng(5)
    service.start()
    try:
        marked = make_key(service)
        items = [
            {"id": str(n), "tokens": marked if n % 2 else rng.integers(0, 256, 200).tolist()}
            for n in range(ITEMS)
        ]
        with service.client("detector-expert") as client:
            job = client.post("/v1/jobs", json=items).json()["id"]
            # In the middle, twice, so that items are lost in every stage of their work.
            for part in (0.1, 0.5):
                eventually(
                    lambda part=part: client.get(f"/v1/jobs/{job}").json()["n_done"] >= part * ITEMS
                )
                before = client.get(f"/v1/jobs/{job}").json()["n_done"]
                service.stop(signal.SIGKILL)
                service.start()
                assert client.get(f"/v1/jobs/{job}").json()["n_done"] >= before
            done = job_done(client, job)
            assert (done["n_done"], done["n_failed"]) == (ITEMS, 0)
            found = job_results(client, job)
        assert [r["id"] for r in found] == [str(n) for n in range(ITEMS)]
        for n, result in enumerate(found):
            expected = "detected" if n % 2 else "inconclusive"
            assert result["answer"]["verdict"] == expected, n
    finally:
        service.stop(signal.SIGKILL)


def test_keys_that_were_acknowledged_survive_kill_9(tmp_path: Path) -> None:
    service = prepare(tmp_path)
    service.start()
    acknowledged: list[str] = []

    def create() -> None:
        with service.client("key-admin") as client:
            for number in range(1000):
                try:
                    answer = client.post("/v1/keys", json=KEY | {"name": f"k{number}"})
                except httpx2.HTTPError:
                    return
                if answer.status_code == 201:
                    acknowledged.append(answer.json()["id"])

    writer = threading.Thread(target=create)
    try:
        writer.start()
        eventually(lambda: len(acknowledged) >= 20)
        service.stop(signal.SIGKILL)
        writer.join()
        service.start()
        with service.client("key-admin") as client, service.client("auditor") as auditor:
            there = {
                version["id"]
                for page in pages(client, "/v1/keys", "keys")
                for version in page["versions"]
            }
            assert set(acknowledged) <= there and len(there) <= len(acknowledged) + 1
            records = pages(auditor, "/v1/log/records", "records", "start")
            logged = {r["facts"]["key"] for r in records if r["kind"] == "key.create"}
            assert logged == there
    finally:
        service.stop(signal.SIGKILL)


def pages(client: httpx2.Client, path: str, name: str, cursor: str = "after") -> list[dict]:
    found: list[dict] = []
    params: dict[str, object] = {}
    while True:
        page = client.get(path, params=params).json()
        found += page[name]
        if page["next"] is None:
            return found
        params = {cursor: page["next"]}


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    service = prepare(tmp_path)
    with running(service):
        marked = make_key(service)
        supervisor = service.pids()[0]
        with httpx2.Client() as client:
            before = [pid for pid in service.pids() if pid != supervisor]
            for pid in before:
                os.kill(pid, signal.SIGKILL)

            def healthy() -> bool:
                try:
                    return client.get(f"{service.url}/healthz").status_code == 200
                except httpx2.HTTPError:
                    return False

            eventually(healthy)
        assert verdict(service, marked) == "detected"


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kmskit.System]:
    with kmskit.running("transit", tmp_path_factory.mktemp("faults-kms")) as system:
        yield system


def test_key_management_dies_and_comes_back(tmp_path: Path, bao: kmskit.System) -> None:
    settings, _ = bao.fresh()
    service = prepare(
        tmp_path,
        kms=settings,
        sections="[limits]\nsecret_lifetime_s = 6\n[detector]\nrevalidate_s = 0.1\n",
    )
    with running(service):
        marked = make_key(service)
        assert verdict(service, marked) == "detected"
        # A key of another process, whose tenant's secret the service has never had in memory.
        with open_office(Settings.load(service.config)) as office:
            spec = KeySpec(tenant=OTHER, name="chat", model="toy", scheme="gumbel", slots=1)
            office.keybook.create(spec, actor="test")
        bao.stop()
        try:
            died = time.monotonic()
            # Keys in memory go on; keys that are not are no "inconclusive".
            while time.monotonic() - died < 2:
                assert verdict(service, marked) in ("detected", "503")
            with service.client("detector-expert", OTHER) as client:
                problem(client.post("/v1/detect", json={"tokens": marked}), 503, "kms_unavailable")
            with service.client("key-admin") as client:
                new = client.post("/v1/keys", json=KEY | {"name": "late"})
                problem(new, 503, "kms_unavailable")
                assert int(new.headers["retry-after"]) > 0
                # Nothing of it was kept.
                names = [key["name"] for key in client.get("/v1/keys").json()["keys"]]
                assert names == ["chat"]
                ready = client.get("/readyz")
                assert ready.status_code == 503
                states = {c["name"]: c["ok"] for c in ready.json()["components"]}
                assert states["database"] and states["detection"] and not states["kms"]
            with service.client("detector-expert") as client:
                problem(client.post("/v1/jobs", json=[{"tokens": marked}]), 503)
            # The secret's time in memory ends, and with it detection; it never says "no mark".
            seen = set()
            while "503" not in seen:
                assert time.monotonic() - died < PATIENCE
                seen.add(verdict(service, marked))
                time.sleep(0.2)
            assert seen <= {"detected", "503"}
        finally:
            bao.start()
        eventually(lambda: verdict(service, marked) == "detected")
        with service.client("key-admin") as client:
            made = client.post("/v1/keys", json=KEY | {"name": "late"})
            assert made.status_code == 201
            eventually(lambda: client.get("/readyz").status_code == 200)


def test_a_job_waits_for_key_management(tmp_path: Path, bao: kmskit.System) -> None:
    """Items whose keys cannot be had are not answered, and are when the keys are back."""
    settings, _ = bao.fresh()
    service = prepare(
        tmp_path,
        kms=settings,
        sections="[limits]\nsecret_lifetime_s = 1\njob_lease_s = 2\njob_chunk = 2\n",
    )
    with running(service):
        marked = make_key(service)
        with service.client("detector-expert") as client:
            job = client.post("/v1/jobs", json=[{"tokens": marked}] * 400).json()["id"]
            bao.stop()
            try:
                time.sleep(5)
                held = client.get(f"/v1/jobs/{job}").json()
                assert held["state"] in ("waiting", "running") and held["n_failed"] == 0
            finally:
                bao.start()
            done = job_done(client, job)
            assert (done["n_done"], done["n_failed"]) == (400, 0)
            assert {r["answer"]["verdict"] for r in job_results(client, job)} == {"detected"}


def test_postgresql_dies_and_comes_back(tmp_path: Path) -> None:
    with pgkit.cluster(durable=True) as cluster:
        urls = cluster.database()
        env = {"FILIGRANE_TEST_DATABASE": urls.app}
        service = prepare(
            tmp_path,
            database='url_env = "FILIGRANE_TEST_DATABASE"',
            migrated=False,
            sections="[limits]\njob_lease_s = 2\n",
            env=env,
            workers=2,
        )
        with running(service):
            marked = make_key(service)
            eventually(lambda: verdict(service, marked) == "detected")
            # Both workers have seen the key and the token.
            for _ in range(20):
                assert verdict(service, marked) == "detected"
            with service.client("detector-expert") as client:
                job = client.post("/v1/jobs", json=[{"tokens": marked}] * 100).json()["id"]
            cluster.stop(signal.SIGQUIT)
            try:
                seen = {verdict(service, marked) for _ in range(20)}
                # A worker that never met the key or the token says that it does not know.
                assert "detected" in seen and seen <= {"detected", "503"}
                with service.client("key-admin") as client:
                    problem(client.post("/v1/keys", json=KEY | {"name": "late"}), 503)
                    assert client.get("/readyz").status_code == 503
                    assert client.get("/healthz").status_code == 200
            finally:
                cluster.start()
            eventually(lambda: verdict(service, marked) == "detected")
            with service.client("key-admin") as client:
                made = client.post("/v1/keys", json=KEY | {"name": "late"})
                assert made.status_code == 201
                names = {key["name"] for key in client.get("/v1/keys").json()["keys"]}
                assert names == {"chat", "late"}
            with service.client("detector-expert") as client:
                done = job_done(client, job)
                assert (done["n_done"], done["n_failed"]) == (100, 0)
