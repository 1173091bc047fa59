"""The real service, as a process of its own on the loopback, with a token for each role."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
from joserfc import jwk, jwt

from filigrane.embedding import embed
from filigrane.keys import Key
from filigrane.kms.opening import create_kms, open_kms
from filigrane.schemes import from_tag
from filigrane.service.office import open_office
from filigrane.service.settings import Settings
from filigrane.store.access import Access
from filigrane.store.database import Database, migrate
from filigrane.store.keys import KeyBook
from filigrane.store.records import Role
from filigrane.toy import ZipfModel
from servers import free_port

TENANT = "demo"
OTHER = "other"
COMMAND = [sys.executable, "-m", "filigrane", "serve", "--config"]
PATIENCE = 120.0


@dataclass
class Service:
    """A service that can be started, killed and started again. tokens: tenant -> role -> token."""

    config: Path
    port: int
    tokens: dict[str, dict[str, str]]
    env: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def out(self) -> Path:
        return self.config.parent / "stdout.log"

    @property
    def err(self) -> Path:
        return self.config.parent / "stderr.log"

    def token(self, role: str, tenant: str = TENANT) -> str:
        return self.tokens[tenant][role]

    def headers(self, role: str, tenant: str = TENANT) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(role, tenant)}"}

    def client(self, role: str | None = None, tenant: str = TENANT) -> httpx2.Client:
        """A client of this service, with the token of a role."""
        headers = {} if role is None else self.headers(role, tenant)
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30)

    def start(self, *, patience: float = PATIENCE) -> None:
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                [*COMMAND, str(self.config)],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.env},
                # A group of its own, so that its workers end with it.
                start_new_session=True,
            )
        try:
            self._wait(patience)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def _wait(self, patience: float) -> None:
        assert self.process is not None
        deadline = time.monotonic() + patience
        while True:
            try:
                if httpx2.get(f"{self.url}/healthz", timeout=2).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            said = self.err.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"the service has ended: {said}"
            assert time.monotonic() < deadline, f"the service is not ready: {said}"
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT, *, patience: float = 15) -> int:
        """End it with its workers; its exit code."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        try:
            if how is signal.SIGKILL:
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            try:
                return process.wait(patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
                raise AssertionError("the service did not end when it was asked to") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """The processes of the service, its supervisor first."""
        assert self.process is not None
        found = [self.process.pid]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    if os.getpgid(int(entry.name)) == self.process.pid:
                        found.append(int(entry.name))
                except ProcessLookupError:
                    continue
        return found


def prepare(
    folder: Path,
    *,
    database: str = 'url = "sqlite:///filigrane.db"',
    kms: Mapping[str, str] | None = None,
    migrated: bool = True,
    sections: str = "",
    env: Mapping[str, str] | None = None,
    workers: int = 1,
    log_level: str = "info",
) -> Service:
    """Write settings for a service of two tenants, and fill its database.

    database: lines of the table [database]; migrated: whether its tables have to be made; kms:
    lines of [kms], a root that exists, by default a new local one; sections: further tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new_root = kms is None
    if kms is None:
        _write(folder / "root.passphrase", "correct horse battery staple\n")
        kms = {"provider": "local", "path": "root.key", "passphrase_file": "root.passphrase"}
    port = free_port()
    tables = [
        f'[listen]\nhost = "127.0.0.1"\nport = {port}\nworkers = {workers}\n',
        f"[database]\n{database}\n",
        "[kms]\n" + "".join(f'{name} = "{value}"\n' for name, value in kms.items()),
        f'[telemetry]\nlog_level = "{log_level}"\n',
        "[web]\nsecure_cookie = false\n" if "[web]" not in sections else "",
        sections,
    ]
    config = folder / "filigrane.toml"
    _write(config, "\n".join(tables))
    with _environment(env or {}):
        settings = Settings.load(config)
        url = settings.database.open_url().reveal()
        if migrated:
            migrate(url)
        manager = (create_kms if new_root else open_kms)(settings.kms)
        book = Database.open(url)
        try:
            keys, access = KeyBook(book, manager), Access(book)
            tokens: dict[str, dict[str, str]] = {}
            for tenant in (TENANT, OTHER):
                keys.create_tenant(tenant, actor="test")
                tokens[tenant] = {
                    str(role): access.issue_token(tenant, str(role), {role}, actor="test")
                    for role in Role
                    if role is not Role.ENGINE
                }
        finally:
            book.close()
            manager.close()
    return Service(config=config, port=port, tokens=tokens, env=dict(env or {}))


def operator_token(service: Service, name: str, role: str, tenant: str = TENANT) -> str:
    """A token as the operator issues it, on the service's host."""
    book = Database.open(Settings.load(service.config).database.open_url().reveal())
    try:
        return Access(book).issue_token(tenant, name, {Role(role)}, actor="operator")
    finally:
        book.close()


class Provider:
    """An identity provider: its keys, and tokens that it signs."""

    issuer = "https://login.example"
    audience = "filigrane"

    def __init__(self, folder: Path) -> None:
        self.keys = {
            "rsa-1": jwk.RSAKey.generate_key(2048, {"kid": "rsa-1"}),
            "ec-1": jwk.ECKey.generate_key("P-256", {"kid": "ec-1"}),
        }
        self.file = folder / "jwks.json"
        self.publish()

    def publish(self) -> None:
        keys = [key.as_dict(private=False) for key in self.keys.values()]
        self.file.write_text(json.dumps({"keys": keys}))

    def claims(self, *roles: str, tenant: str = TENANT, subject: str = "alice") -> dict[str, Any]:
        now = int(time.time())
        return {
            "iss": self.issuer,
            "aud": self.audience,
            "sub": subject,
            "iat": now,
            "exp": now + 300,
            "filigrane_tenant": tenant,
            "filigrane_roles": list(roles),
        }

    def sign(self, claims: dict[str, Any], kid: str = "rsa-1", alg: str = "RS256") -> str:
        return jwt.encode({"alg": alg, "kid": kid}, claims, self.keys[kid], algorithms=[alg])

    @property
    def section(self) -> str:
        return (
            f'[oidc]\nissuer = "{self.issuer}"\naudience = "{self.audience}"\n'
            f'jwks_file = "{self.file}"\njwks_lifetime_s = 2\nalgorithms = ["RS256", "ES256"]\n'
        )


def marked_ids(
    service: Service, version: str, n: int, seed: int, tenant: str = TENANT
) -> npt.NDArray[np.int64]:
    """n ids of a toy model of 256 tokens, marked with a version's key of the service."""
    with _environment(service.env), open_office(Settings.load(service.config)) as office:
        record = office.keybook.version(tenant, version)
        key = office.keybook.key_of(record)
    assert isinstance(key, Key) and record.spec.scheme is not None
    rng = np.random.default_rng(seed)
    prompt = np.array([1, 2, 3])
    scheme = from_tag(record.spec.scheme)
    return embed(ZipfModel(256, 1.0), prompt, n, key, scheme, rng=rng).tokens


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """The service, started; ended with all its processes."""
    service.start()
    try:
        yield service
    finally:
        service.stop()


@contextmanager
def signed_in(
    service: Service, role: str, tenant: str = TENANT
) -> Iterator[tuple[httpx2.Client, str]]:
    """A client with a session, and its CSRF token."""
    with httpx2.Client(base_url=service.url) as client:
        yield client, _csrf(client, service, role, tenant)


def _csrf(client: httpx2.Client, service: Service, role: str, tenant: str) -> str:
    answer = client.post("/login", data={"token": service.token(role, tenant)})
    assert answer.status_code == 303, answer.text
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
    assert service.token(role, tenant) not in cookie
    page = client.get(answer.headers["location"]).text
    found = re.search(r'name="csrf" value="([^"]+)"', page)
    assert found is not None
    return found.group(1)


def problem(answer: httpx2.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The problem of a refusal, which has this status and is well formed."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = json.loads(answer.text)
    assert body["status"] == status and body["title"] and body["detail"]
    if code is not None:
        assert body["code"] == code, body
    return body


def job_done(client: httpx2.Client, job: str, *, patience: float = PATIENCE) -> dict[str, Any]:
    """What a job says once it waits no longer."""
    until = time.monotonic() + patience
    while True:
        body: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if body["state"] not in ("waiting", "running"):
            return body
        assert time.monotonic() < until, body
        time.sleep(0.05)


def job_results(client: httpx2.Client, job: str, limit: int = 100) -> list[dict[str, Any]]:
    """Every result of a job, page after page."""
    found: list[dict[str, Any]] = []
    start: int | None = 0
    while start is not None:
        page = client.get(f"/v1/jobs/{job}/results", params={"start": start, "limit": limit})
        found += page.json()["results"]
        start = page.json()["next"]
    return found


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
