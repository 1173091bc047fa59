"""Processes: a supervisor that holds the socket, and workers that answer.

Every worker opens an office of its own from the same settings file, whose path it finds in
FILIGRANE_CONFIG: no secret is handed from process to process, in an argument or otherwise. Granian
serves; uvicorn does where granian is not installed.
"""

import errno
import http.client
import importlib.util
import logging
import multiprocessing
import os
import resource
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from filigrane.errors import FiligraneError, MissingDependency
from filigrane.schemes import from_tag
from filigrane.service.office import open_office
from filigrane.service.settings import ENVIRONMENT, Listen, Settings
from filigrane.serving.readiness import known_answers

__all__ = ["run", "worker"]

_log: Final = logging.getLogger("filigrane.service")
_TARGET: Final = "filigrane.service.running:worker"
_METRICS: Final = "PROMETHEUS_MULTIPROC_DIR"
_POLL_S: Final = 0.05
_GRACE_S: Final = 10


def worker() -> Any:
    """The application of one worker process, its settings found by the environment.

    Raises NotReady where the known answers do not come out: such a machine must not say "no mark".
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        return _application()
    except Exception as error:
        # The supervisor replaces a worker that ends, and says nothing of why.
        told = str(error) if isinstance(error, FiligraneError) else type(error).__name__
        _log.critical("a worker cannot start: %s", told)
        raise


def _end_with_parent() -> None:
    """A worker without its supervisor would serve old settings for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _application() -> Any:
    from filigrane.service.app import application

    settings = Settings.load(os.environ[ENVIRONMENT])
    # Also compiles what the first requests would wait for.
    known_answers([from_tag("gumbel")])
    app: Any = application(open_office(settings), owns_office=True)
    if settings.listen.proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        # Whoever else sends X-Forwarded-For would choose the address that its limits count.
        app = ProxyHeadersMiddleware(app, trusted_hosts=list(settings.listen.proxies))
    return app


def run(path: Path, *, ready: Callable[[str], None]) -> None:
    """Serve the settings file at `path` until interrupted (SIGINT or SIGTERM).

    ready: called once, with the address, when the service answers. Everything is opened once
    before, so that what is wrong is said in one line: raises FiligraneError, KmsError, StoreError.
    """
    settings = Settings.load(path)
    _require_free(settings.listen)
    with open_office(settings) as office:
        # One that cannot be loaded would read as "no such tokenizer" to everybody.
        office.tokenizers.load()
    # A core dump would hold every secret.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ[ENVIRONMENT] = str(path.absolute())
    metrics = None
    if settings.listen.workers > 1 and _METRICS not in os.environ:
        metrics = os.environ[_METRICS] = tempfile.mkdtemp(prefix="filigrane-metrics-")
    threading.Thread(target=_announce, args=(settings.listen, ready), daemon=True).start()
    try:
        if importlib.util.find_spec("granian") is not None:
            _granian(settings.listen)
        elif importlib.util.find_spec("uvicorn") is not None:
            _uvicorn(settings.listen)
        else:
            raise MissingDependency("a server is missing: pip install 'filigrane[service]'.")
    finally:
        if metrics is not None:
            shutil.rmtree(metrics, ignore_errors=True)


def _require_free(listen: Listen) -> None:
    """Raise FiligraneError if something listens there; workers would share the port with it."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen.host, listen.port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise FiligraneError(
                    f"port {listen.port} of {listen.host} is taken, perhaps by this service "
                    "itself; stop what listens there, or change [listen] port."
                ) from None
            raise FiligraneError(
                f"{listen.host}:{listen.port} cannot be listened on ({error.strerror}); change "
                "[listen] host or port."
            ) from None


def _granian(listen: Listen) -> None:
    from granian.constants import Interfaces
    from granian.server import Server

    # A forked worker would inherit what this process imported and opened, such as sessions of an
    # HSM, which do not outlive a fork.
    multiprocessing.set_start_method("spawn", force=True)
    Server(
        _TARGET,
        factory=True,
        address=listen.host,
        port=listen.port,
        interface=Interfaces.ASGI,
        workers=listen.workers,
        websockets=False,
        # Its lines would carry paths.
        log_enabled=False,
        ssl_cert=listen.tls_certificate,
        ssl_key=listen.tls_key,
        # A worker that was killed is replaced; what it was working on is still in the database.
        respawn_failed_workers=True,
        respawn_interval=1.0,
        workers_kill_timeout=_GRACE_S,
        backlog=1024,
        process_name=None,
    ).serve()


def _uvicorn(listen: Listen) -> None:
    import uvicorn

    uvicorn.run(
        _TARGET,
        factory=True,
        host=listen.host,
        port=listen.port,
        workers=listen.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=listen.tls_certificate,
        ssl_keyfile=listen.tls_key,
        timeout_graceful_shutdown=_GRACE_S,
    )


def _announce(listen: Listen, ready: Callable[[str], None]) -> None:
    """Ask the service itself until it answers; then say where it is."""
    host = "127.0.0.1" if listen.host in ("0.0.0.0", "::") else listen.host
    while True:
        try:
            connection: http.client.HTTPConnection
            if listen.tls_key is not None:
                # Whether its certificate fits its name is for clients to judge.
                context = ssl._create_unverified_context()
                connection = http.client.HTTPSConnection(
                    host, listen.port, timeout=2, context=context
                )
            else:
                connection = http.client.HTTPConnection(host, listen.port, timeout=2)
            connection.request("GET", "/healthz")
            status = connection.getresponse().status
            connection.close()
            if status == 200:
                break
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(_POLL_S)
    scheme = "https" if listen.tls_key is not None else "http"
    shown = f"[{listen.host}]" if ":" in listen.host else listen.host
    ready(f"{scheme}://{shown}:{listen.port}")
