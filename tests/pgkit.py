"""A temporary PostgreSQL of one's own: real, on the loopback, gone at the end.

The server refuses to run as root, so as root it is run by the account `postgres`.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from filigrane.store import tables
from filigrane.store.database import migrate
from servers import free_port

MISSING = (
    "these tests run a real PostgreSQL (15 or newer): apt-get install postgresql, or put the "
    "folder with initdb and postgres on PATH"
)


@dataclass(frozen=True, kw_only=True)
class Urls:
    """One database by three roles: a superuser, the owner of the tables, and the service's role.

    `app` owns nothing and has no BYPASSRLS; it is what `Database.open` takes.
    """

    superuser: str
    owner: str
    app: str
    name: str


@dataclass(kw_only=True)
class Cluster:
    """A running server. Passwords are random and needed: no connection is trusted."""

    bin: Path
    data: Path
    log: Path
    port: int
    account: str | None
    durable: bool
    passwords: dict[str, str] = field(repr=False)
    process: "subprocess.Popen[bytes] | None" = None
    template_made: bool = False
    emptied: list[Urls] = field(default_factory=list)

    def url(self, role: str, database: str) -> str:
        password = self.passwords[role]
        return f"postgresql://{role}:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        command = [str(self.bin / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=60"]
        if not self.durable:
            # Nothing here has to survive the machine.
            settings += ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
        for setting in settings:
            command += ["-c", setting]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                user=self.account,
                start_new_session=True,
                cwd=self.data,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres", "postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                said = self.log.read_text(errors="replace")[-2000:]
                assert self.process.poll() is None, f"PostgreSQL has ended: {said}"
                assert time.monotonic() < deadline, f"PostgreSQL is not ready: {said}"
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: at once, in order. SIGQUIT: as if it had crashed. SIGTERM: waits for clients."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=30)
            self.process = None

    def restart(self, how: signal.Signals = signal.SIGQUIT) -> None:
        self.stop(how)
        self.start()

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """As superuser, each statement on its own."""
        url = self.url("postgres", database)
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def empty(self) -> Urls:
        """A new database of the owner's, without tables."""
        name = f"db_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name} OWNER filigrane_owner")
        return self.urls(name)

    def database(self) -> Urls:
        """An empty database with this version's tables, which the role `app` may use."""
        if self.emptied:
            return self.emptied.pop()
        if not self.template_made:
            self.execute("CREATE DATABASE filigrane_template OWNER filigrane_owner")
            migrate(self.url("filigrane_owner", "filigrane_template"), service_role="filigrane_app")
            self.template_made = True
        name = f"db_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE filigrane_template OWNER filigrane_owner")
        return self.urls(name)

    def recycle(self, urls: Urls) -> None:
        """Give a database back, for others; quicker than to drop it and make another."""
        names = ", ".join(tables.metadata.tables)
        # The triggers that keep the log are off for this session alone.
        with psycopg.connect(urls.superuser, autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute(f"TRUNCATE {names}".encode())
        self.emptied.append(urls)

    def urls(self, name: str) -> Urls:
        """How to reach a database of this server."""
        return Urls(
            superuser=self.url("postgres", name),
            owner=self.url("filigrane_owner", name),
            app=self.url("filigrane_app", name),
            name=name,
        )


@contextmanager
def cluster(*, durable: bool = False) -> Iterator[Cluster]:
    """Run a server until the block ends. durable: as careful with the disk as in production."""
    bin = _programs()
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="filigrane-pg-"))
    made: Cluster | None = None
    try:
        if account is not None:
            shutil.chown(folder, account)
        made = _prepared(bin, folder, account, durable)
        made.start()
        owner, app = (made.passwords[name] for name in ("filigrane_owner", "filigrane_app"))
        made.execute(
            f"CREATE ROLE filigrane_owner LOGIN PASSWORD '{owner}'",
            f"CREATE ROLE filigrane_app LOGIN PASSWORD '{app}'",
        )
        yield made
    finally:
        if made is not None:
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _prepared(bin: Path, folder: Path, account: str | None, durable: bool) -> Cluster:
    passwords = {
        role: secrets.token_hex(12) for role in ("postgres", "filigrane_owner", "filigrane_app")
    }
    held = folder / "password"
    held.write_text(passwords["postgres"])
    if account is not None:
        shutil.chown(held, account)
    command = [str(bin / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "--no-sync"]
    command += ["-A", "scram-sha-256", "--pwfile", str(held), "-E", "UTF8", "--locale", "C"]
    done = subprocess.run(command, user=account, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    held.unlink()
    return Cluster(
        bin=bin,
        data=folder / "data",
        log=folder / "log",
        port=free_port(),
        account=account,
        durable=durable,
        passwords=passwords,
    )


def _programs() -> Path:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    assert folders, MISSING
    return max(folders, key=lambda path: int(path.parent.name))


def _account() -> str | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise AssertionError(MISSING) from None
