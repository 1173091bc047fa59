"""filigrane serve."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from filigrane.errors import FiligraneError, MissingDependency


def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Settings; else the file of FILIGRANE_CONFIG, else filigrane.toml here.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="FOLDER",
            help="Write a first service into FOLDER, with one tenant and a token for each role, "
            "unless there is one; then serve it.",
            show_default=False,
        ),
    ] = None,
    tenant: Annotated[
        str, typer.Option("--tenant", help="With --init: the name of the first tenant.")
    ] = "demo",
) -> None:
    """Run the detection service: keys, detection, tracing, receipts and jobs over HTTP.

    Prints the address when it answers, and stops on Ctrl-C after the requests that it has. Log
    lines go to stderr, one JSON object each.

    Exit codes: 0 stopped; 2 bad settings, or something that is needed does not answer.
    """
    if config is not None and init is not None:
        raise FiligraneError("name one of them: --config for a service that is there, or --init.")
    try:
        from filigrane.service.running import run
        from filigrane.service.settings import FILE, Settings, settings_path
    except ImportError as error:
        raise MissingDependency(
            f"{error.name} is missing: pip install 'filigrane[service]'."
        ) from None
    path = settings_path(config)
    if init is not None:
        path = init / FILE
        if not path.exists():
            Settings.initial(init, tenant)
            _say(f"wrote {path} and tokens.json beside it: a token for each role")
    again = "" if init is None else f"; later: filigrane serve --config {path}"
    run(path, ready=lambda address: _say(f"filigrane serves {address} (Ctrl-C stops it{again})"))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
