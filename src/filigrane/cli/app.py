"""The typer application: which commands there are, and what becomes of errors.

A command is a function of the name of its module. It imports what is heavy (numba, torch,
transformers) inside, so that help is instant, and reports failure by raising FiligraneError.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from filigrane import __version__
from filigrane.cli import render
from filigrane.cli.secrets import refuse_secrets
from filigrane.errors import FiligraneError

COMMANDS: Final = ("keygen", "schemes", "embed", "detect", "trace", "demo", "bench")


class Commands(TyperGroup):
    """Turns what a command raises into one line on stderr and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run; errors leave with 2, an interruption with 130."""
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
        sys.exit(2)

    def invoke(self, ctx: Any) -> Any:
        """Run one command; it has said what was saved when an interruption arrives here."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            render.notice("interrupted")
            raise typer.Exit(130) from None


def build() -> typer.Typer:
    """The application with every command whose module is there."""
    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        # Both show local variables or long tracebacks, and a frame may hold a key.
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(filigrane)
    for name in COMMANDS:
        path = f"filigrane.cli.{name}"
        if importlib.util.find_spec(path) is not None:
            command = getattr(importlib.import_module(path), name)
            app.command(name, help=_paragraphs(command.__doc__))(command)
    return app


def _paragraphs(docstring: str | None) -> str:
    """A docstring without the line breaks of its source, which would show in a narrow terminal."""
    parts = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def filigrane(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Watermark what a language model writes, prove it later, trace who it came from.

    Every command takes --json: one machine-readable answer on stdout, everything else on stderr.
    """
    if version:
        sys.stdout.write(f"filigrane {__version__}\n")
        raise typer.Exit
