"""Fresh stores for tests, on SQLite and PostgreSQL, and texts marked by any version of a key."""

import base64
import io
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

import pgkit
from filigrane import Sampling, embed, from_tag
from filigrane.custody.hierarchy import KeySpec
from filigrane.custody.verification import LogReport, read_lines, verify_log
from filigrane.foreign import ForeignKey
from filigrane.foreign import from_tag as profile_from_tag
from filigrane.foreign.writing import write
from filigrane.keys import Key
from filigrane.kms.base import KeyManagement
from filigrane.store.access import Access, Principal, Role
from filigrane.store.database import Database, migrate, now
from filigrane.store.jobs import Jobs
from filigrane.store.keys import KeyBook
from filigrane.store.log import Log
from filigrane.toy import ZipfModel

__all__ = ["Opened", "Stores", "Ticking", "identity", "marked", "now", "stores"]

MODEL = ZipfModel(64, 0.3)


class Ticking:
    """A clock that moves by a second each time it is looked at, and more when told to."""

    def __init__(self) -> None:
        self.at = datetime(2026, 3, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


@dataclass(kw_only=True)
class Opened:
    """A store with everything that stands on it."""

    url: str
    database: Database
    kms: KeyManagement
    clock: Ticking
    opened: list[Database] = field(default_factory=list, repr=False)
    keybook: KeyBook = field(init=False)
    access: Access = field(init=False)
    log: Log = field(init=False)
    jobs: Jobs = field(init=False)

    def __post_init__(self) -> None:
        self.keybook = KeyBook(self.database, self.kms)
        self.access = Access(self.database)
        self.log = Log(self.database, self.kms)
        self.jobs = Jobs(self.database, self.kms)

    def again(self) -> "Opened":
        """The same store as another process would have it: nothing in memory."""
        database = Database.open(self.url, clock=self.clock)
        self.opened.append(database)
        return Opened(
            url=self.url, database=database, kms=self.kms, clock=self.clock, opened=self.opened
        )

    def verify(self, tenant: str) -> LogReport:
        out = io.BytesIO()
        self.log.export(tenant, out)
        out.seek(0)
        return verify_log(read_lines(out), self.log.jwks())

    def person(self, tenant: str, name: str, *roles: Role) -> Principal:
        return Principal(tenant=tenant, name=name, roles=frozenset(roles))

    def approved(self, tenant: str, subject: str, kind: str = "destroy") -> str:
        """An approval by ann and bob."""
        role = Role.CUSTODIAN if kind == "destroy" else Role.ATTRIBUTION_OFFICER
        ann, bob = (self.person(tenant, name, role) for name in ("ann", "bob"))
        asked = self.access.request_approval(tenant, kind, subject, "a test", ann)
        return self.access.approve(tenant, asked.id, bob).id


class Stores:
    """Makes stores of one kind; all of them are gone at the end."""

    def __init__(self, folder: Path, cluster: pgkit.Cluster | None) -> None:
        self._folder = folder
        self._cluster = cluster
        self._urls: list[pgkit.Urls] = []
        self._numbers = itertools.count()
        self._opened: list[Database] = []

    @property
    def dialect(self) -> str:
        return "sqlite" if self._cluster is None else "postgresql"

    def urls(self) -> pgkit.Urls:
        """A fresh database with tables; on SQLite all three roles are the same."""
        if self._cluster is not None:
            urls = self._cluster.database()
            self._urls.append(urls)
            return urls
        template = self._folder / "template.db"
        if not template.exists():
            migrate(f"sqlite:///{template}")
        path = self._folder / f"{next(self._numbers)}.db"
        shutil.copy(template, path)
        os.chmod(path, 0o600)
        url = f"sqlite:///{path}"
        return pgkit.Urls(superuser=url, owner=url, app=url, name=str(path))

    def owner_of(self, url: str) -> str:
        """A URL by which triggers can be switched off."""
        assert self._cluster is not None
        return self._cluster.urls(url.rpartition("/")[2]).superuser

    def fresh(self, kms: KeyManagement, clock: Ticking | None = None) -> Opened:
        ticking = clock or Ticking()
        url = self.urls().app
        database = Database.open(url, clock=ticking)
        self._opened.append(database)
        return Opened(url=url, database=database, kms=kms, clock=ticking, opened=self._opened)

    def close(self) -> None:
        for database in self._opened:
            database.close()
        self._opened.clear()
        for urls in self._urls:
            assert self._cluster is not None
            self._cluster.recycle(urls)
        self._urls.clear()


@contextmanager
def stores(folder: Path, cluster: pgkit.Cluster | None) -> Iterator[Stores]:
    made = Stores(folder, cluster)
    try:
        yield made
    finally:
        made.close()


def identity() -> dict[str, str]:
    """The public part of some engine's X25519 identity."""
    x = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    return {"kty": "OKP", "crv": "X25519", "x": x}


def marked(key: Key | ForeignKey, spec: KeySpec, seed: int) -> npt.NDArray[np.int64]:
    """A text of 90 tokens with the key's mark; its evidence is far beyond 1e-9."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 64, 8)
    if isinstance(key, ForeignKey):
        assert spec.profile is not None
        return write(
            MODEL, prompt, 90, key, profile_from_tag(spec.profile), rng=rng, sampling=Sampling()
        )
    assert spec.scheme is not None
    return np.asarray(embed(MODEL, prompt, 90, key, from_tag(spec.scheme), rng=rng).tokens)
