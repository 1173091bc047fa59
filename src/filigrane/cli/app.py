"""The typer application: which commands there are, and what becomes of errors.

A command is a function of the name of its module; a module with `SUBCOMMANDS: dict[str, Callable]`
is a group of commands instead. They import what is heavy (numba, torch, transformers) inside, so
that help is instant, and report failure by raising FiligraneError.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any, Final

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from filigrane import __version__
from filigrane.cli import render
from filigrane.cli.secrets import refuse_secrets
from filigrane.errors import FiligraneError

COMMANDS: Final = {
    "keygen": "Make a secret key, keep it, and say its name, slots and fingerprint.",
    "schemes": "List the schemes, their parameters and defaults, and what decoding can carry them.",
    "embed": "Write marked text with a language model.",
    "detect": "Test texts for a key's mark, with an exact p-value for each.",
    "trace": "Find who, among many candidates, a text was written for, or say that it was nobody.",
    "demo": "Mark, detect and trace texts of a real model, and check every claim.",
    "speculative": "Show numerically what no watermark can have together with speculative "
    "sampling.",
    "radioactivity": "Find out whether another model was trained on marked text.",
    "engine": "Mark text in engines that serve models: their keyring, servers, probes.",
    "serve": "Run the detection service: keys, detection, tracing, receipts and jobs over HTTP.",
    "keys": "Create, rotate, promote, retire and destroy the keys of a service's tenants.",
    "access": "Say who may use a service: tenants, tokens, engines, approvals.",
    "audit": "Export the log of a tenant's keys, and verify it offline.",
    "receipt": "Verify signed receipts of a detection, offline.",
    "bench": "Measure speed beside what others do, and strength against speed, on this machine.",
}
"""What the list of commands says of each, in its order. Kept here so that the list needs none of
their modules, and with them numpy; a test holds it to their docstrings. For a group it is the help
itself."""

_FAULT: Final = 70  # EX_SOFTWARE of sysexits.h
_UNREAD: Final = 141  # what a shell says of a process that SIGPIPE ended


class Commands(TyperGroup):
    """Turns what a command raises into one line on stderr and an exit code.

    Importing a command and making its options takes a tenth of a second, so that is done only for
    the one that is asked for.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, about in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=about)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command, and make its options."""
        if args and args[0] in self.commands:
            self.commands[args[0]] = _command(args[0])
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run; errors leave with 2, an interruption with 130, a fault of filigrane's with 70."""
        try:
            # Before parsing: a message about a misplaced argument would repeat it.
            refuse_secrets(sys.argv[1:] if args is None else args)
            return super().main(args, *rest, **options)
        except FiligraneError as error:
            render.fail(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            what = error.strerror or str(error)
            render.fail(f"{where}{what}; check the path, its permissions and the disk")
        except (MemoryError, OverflowError):
            render.fail(
                "too much at once for this machine; trace in ranges (--users A:B), or pass less "
                "at a time"
            )
        except Exception:
            # Never 1, python's own code: that one means "no mark" or "nobody".
            traceback.print_exc()
            sys.exit(_FAULT)
        sys.exit(2)

    def invoke(self, ctx: Any) -> Any:
        """Run one command; it has said what was saved when an interruption arrives here."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            render.notice("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # What is still buffered has to go somewhere, or the interpreter complains at its end.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            raise typer.Exit(_UNREAD) from None
        except EOFError:
            # click would leave with 1, which means something else here.
            traceback.print_exc()
            raise typer.Exit(_FAULT) from None


def _application(**settings: Any) -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        # Both show local variables or long tracebacks, and a frame may hold a key.
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def build() -> typer.Typer:
    """The application with every command."""
    app = _application(cls=Commands, no_args_is_help=True)
    app.callback(help=_paragraphs(filigrane))(filigrane)
    return app


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"filigrane.cli.{name}")


def functions(name: str) -> dict[str, Callable[..., None]]:
    """What a command runs, by the words that call it: 'trace', or 'bench embed', 'bench detect'."""
    module = _module(name)
    if (inside := _subcommands(module)) is None:
        return {name: getattr(module, name)}
    return {f"{name} {word}": function for word, function in inside.items()}


def _subcommands(module: ModuleType) -> dict[str, Callable[..., None]] | None:
    return getattr(module, "SUBCOMMANDS", None)


def _command(name: str) -> Any:
    module = _module(name)
    if (inside := _subcommands(module)) is None:
        function = getattr(module, name)
        app = _application()
        app.command(name, help=_paragraphs(function))(function)
    else:
        app = _application()
        # With a callback even a single command keeps its name.
        app.callback(help=COMMANDS[name])(_nothing)
        for word, function in inside.items():
            app.command(word, help=_paragraphs(function))(function)
    return typer.main.get_command(app)


def _nothing() -> None:
    pass


def _paragraphs(function: Callable[..., None]) -> str:
    """A docstring without the line breaks of its source, which would show in a narrow terminal."""
    parts = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"filigrane {__version__}\n")
        raise typer.Exit


def filigrane(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Watermark what a language model writes, prove it later, trace who it came from.

    Every command but a server takes --json: one JSON document on stdout (embed: one per record),
    everything else on stderr; bad usage leaves stdout empty.

    Exit codes that every command has: 2 bad usage, 70 an error of filigrane itself, 130
    interrupted, 141 nobody reads the output any more.
    """
