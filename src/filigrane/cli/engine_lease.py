"""filigrane engine lease."""

import signal
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.cli.secrets import no_core_dumps
from filigrane.errors import FiligraneError

if TYPE_CHECKING:
    from filigrane.adapters.leases.keeping import Round

_WATCH = "Watching"


def lease(
    service: Annotated[
        str, typer.Option("--service", metavar="URL", help="Where filigrane's service is.")
    ],
    identity: Annotated[
        str,
        typer.Option("--identity", metavar="FILE", help="What `filigrane engine enrol` wrote."),
    ],
    token_file: Annotated[
        list[str],
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="The engine's token, in a file of mode 0600; one for each tenant.",
        ),
    ],
    keyring: Annotated[
        str,
        typer.Option(
            "--keyring", metavar="DIR", help="The engine's keyring folder; made if need be."
        ),
    ],
    everybody: Annotated[
        bool,
        typer.Option(
            "--everybody", help="The keys are for all requests, not for their tenants' alone."
        ),
    ] = False,
    ca: Annotated[
        str | None,
        typer.Option(
            "--ca",
            metavar="FILE",
            help="Certificates (PEM) to trust instead of the system's.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Go on until a signal ends it.", rich_help_panel=_WATCH),
    ] = False,
    every: Annotated[
        float,
        typer.Option(
            "--every",
            metavar="SECONDS",
            min=0.2,
            help="How often to ask; a rotation is here after at most this.",
            rich_help_panel=_WATCH,
        ),
    ] = 15.0,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="URL",
            help="The engine's own /metrics: report what it counted. With one token file only, "
            "because engines do not count by tenant.",
            rich_help_panel=_WATCH,
            show_default=False,
        ),
    ] = None,
    report_every: Annotated[
        float,
        typer.Option(
            "--report-every",
            metavar="SECONDS",
            min=0.2,
            help="How often to report it.",
            rich_help_panel=_WATCH,
        ),
    ] = 3600.0,
    json: Json = False,
) -> None:
    """Lease keys from the service into an engine's keyring, and prove that they are here.

    Keys arrive sealed to this engine and are written into private files; a running engine takes a
    changed keyring up by itself. When the service is down, engines mark on until their leases
    expire, and refuse after that. What the operator decides (policy, tenants' tokens, keys of his
    own) stands in base.toml of the folder.

    Exit codes: 0 all leased and proved, 1 something was not (what was there before stays), 2 bad
    usage.
    """
    import contextlib

    import numpy as np

    from filigrane.adapters.leases.client import Service, read_token
    from filigrane.adapters.leases.folder import LeaseFolder
    from filigrane.adapters.leases.keeping import Keeper, Ledger
    from filigrane.adapters.leases.sealing import Identity

    if metrics is not None and (len(token_file) > 1 or not watch):
        raise FiligraneError("--metrics goes with --watch and one --token-file.")
    no_core_dumps()
    who = Identity.load(identity)
    tokens = [read_token(path) for path in token_file]
    stop = threading.Event()
    if watch:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as opened:
        services = [opened.enter_context(Service(service, token, who, ca=ca)) for token in tokens]
        folder = opened.enter_context(LeaseFolder.open(keyring))
        rng = np.random.default_rng()
        keeper = Keeper(services, folder, rng=rng, everybody=everybody)
        ledger = None if metrics is None else Ledger(services[0], metrics)
        said: tuple[str, ...] | None = None
        reported = -report_every
        while True:
            done = keeper.round(render.notice)
            if not watch:
                break
            problems = list(done.problems)
            if ledger is not None and time.monotonic() - reported >= report_every:
                try:
                    ledger.report()
                    reported = time.monotonic()
                except FiligraneError as error:
                    problems.append(str(error))
            # Once, however long it lasts.
            if said is None or tuple(problems) != said:
                for problem in problems:
                    render.warn(problem)
                if said is None or (said and not problems):
                    render.notice(_summary(done))
            said = tuple(problems)
            # Not all engines of a fleet at once.
            if stop.wait(every * rng.uniform(0.9, 1.1)):
                return
    _show(done, json=json)
    if not done.good:
        raise typer.Exit(1)


def _summary(done: "Round") -> str:
    keys = sum(len(renewed.lease.keys) for renewed in done.renewed)
    ends = [renewed.expires for renewed in done.renewed]
    until = f", good until {min(ends):%Y-%m-%d %H:%M:%S} UTC" if ends else ""
    return f"{len(done.renewed)} leases with {keys} keys{until}."


def _show(done: "Round", *, json: bool) -> None:
    if json:
        leases = [
            {
                "tenant": renewed.lease.tenant,
                "engine": renewed.lease.engine,
                "expires": renewed.expires.isoformat(),
                "keys": [
                    {"id": key.id, "state": key.state, "mark": key.mark, "kind": key.kind}
                    for key in renewed.lease.keys
                ],
                "acknowledged": list(renewed.acknowledged),
            }
            for renewed in done.renewed
        ]
        render.dump({"leases": leases, "problems": list(done.problems)})
        return
    for problem in done.problems:
        render.warn(problem)
    grid = render.table("key", "state", "mark", "good until (UTC)")
    for renewed in done.renewed:
        for key in renewed.lease.keys:
            state = key.state if key.kind == "scheme" else f"{key.state}, not for a keyring"
            grid.add_row(key.id, state, key.mark, f"{renewed.expires:%Y-%m-%d %H:%M:%S}")
    render.stdout().print(grid)
