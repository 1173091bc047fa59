"""filigrane engine serve."""

import logging
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from filigrane.cli import render
from filigrane.errors import FiligraneError

if TYPE_CHECKING:
    from filigrane.serving import Keyring

_KEYS = "Keys"
_LIMITS = "Limits"


def serve(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="smollm2, a .gguf file, a transformers folder or a hub id.",
            show_default=False,
        ),
    ],
    keyring: Annotated[
        str | None,
        typer.Option(
            "--keyring",
            metavar="DIR",
            help="Folder with keyring.toml and the key files. Else FILIGRANE_KEYRING is used; "
            "without either, text is not marked.",
            rich_help_panel=_KEYS,
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name",
            help="What clients call the model; its own name by default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Of torch: cpu, cuda, cuda:1, mps.")] = (
        "cpu"
    ),
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            min=2,
            help="Most tokens of prompt and answer together; the model's own limit by default.",
            rich_help_panel=_LIMITS,
            show_default=False,
        ),
    ] = None,
    max_answer: Annotated[
        int,
        typer.Option("--max-answer", min=1, help="Most tokens.", rich_help_panel=_LIMITS),
    ] = 4096,
    max_rows: Annotated[
        int,
        typer.Option(
            "--max-rows",
            min=1,
            help="Texts that are written at a time.",
            rich_help_panel=_LIMITS,
        ),
    ] = 16,
    grace: Annotated[
        int,
        typer.Option(
            "--grace",
            min=0,
            help="Seconds that answers have to end when the server is stopped.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30,
) -> None:
    """Serve one model in OpenAI's protocol, and mark what it writes.

    POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics. Marks are
    made with the keys of a keyring, by its policy; requests name keys by id and never hold them. A
    keyring that changes counts for the requests that come after, without a restart.

    Exit codes: 2 not started; then that of the signal that ended it.
    """
    from filigrane.adapters.models import load
    from filigrane.adapters.openai_server import Limits, application
    from filigrane.adapters.openai_server import serve as run
    from filigrane.serving import LiveKeyring, known_answers

    def accept(ring: "Keyring") -> None:
        known_answers(ring.schemes)

    if keyring is not None:
        keys: LiveKeyring | None = LiveKeyring(keyring, accept=accept)
    else:
        keys = LiveKeyring.from_environment(accept=accept)
    if keys is None:
        render.warn("no keyring: text is not marked. Name one with --keyring DIR.")
    _require_free(host, port)
    _log_to_stderr()
    loaded = load(model, device=device)
    limits = Limits(context=max_context, answer=max_answer, rows=max_rows)
    app = application(loaded, keys, name=name or loaded.name, limits=limits)
    run(app, host=host, port=port, grace=grace)


def _require_free(host: str, port: int) -> None:
    """Raise OSError if the address is taken: before a model is loaded, which takes its time."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise FiligraneError(f"cannot listen on {host}:{port}: {error.strerror}.") from None


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for logger in ("filigrane", "uvicorn"):
        logging.getLogger(logger).addHandler(handler)
        logging.getLogger(logger).setLevel(logging.INFO)
