"""What people see: results on stdout, everything else on stderr, and nothing a terminal would obey.

Consoles are made when used, because tests and callers replace the streams.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Leave the exit code to the application: rich would take 1."""
        raise BrokenPipeError


_live: Console | None = None


def stdout() -> Console:
    """For results."""
    return _Console(highlight=False, emoji=False)


def stderr() -> Console:
    """For notices, errors and progress; while a bar is shown, lines go above it."""
    return _live or _Console(stderr=True, highlight=False, emoji=False)


def clean(text: str, keep: str = "") -> str:
    """Text without control characters, which could drive a terminal; `keep` lists exceptions."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def _line(prefix: str, message: str, style: str) -> None:
    line = Text(f"{prefix}{clean(' '.join(message.split()))}", style=style)
    # A remark that nobody reads ends no work, and changes no exit code.
    with contextlib.suppress(BrokenPipeError):
        stderr().print(line, soft_wrap=True)


def fail(message: str) -> None:
    """One red line."""
    _line("error: ", message, "red")


def warn(message: str) -> None:
    """One yellow line."""
    _line("", message, "yellow")


def notice(message: str) -> None:
    """One quiet line."""
    _line("", message, "dim")


def dump(document: Mapping[str, object]) -> None:
    """One JSON object on one line of stdout, in ASCII: no encoding can spoil it."""
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    sys.stdout.flush()


def answer(json: bool, document: Mapping[str, object], *lines: str) -> None:
    """One answer: as JSON if it was asked for, else in lines.

    They are for copying from: not broken, however narrow the terminal, and without control
    characters.
    """
    if json:
        dump(document)
        return
    out = stdout()
    for line in lines:
        out.print(clean(line), soft_wrap=True, markup=False)


def log10(value: float) -> str:
    """A decimal logarithm for people; zero has no sign."""
    return f"{value + 0.0:.1f}" if abs(value) >= 0.05 else "0.0"


def shorten(text: str, width: int) -> str:
    """The end of a name that is too long: file and line are there."""
    text = clean(text)
    return text if len(text) <= width else "…" + text[1 - width :]


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the house style; columns in `right` hold numbers."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return grid


def facts(pairs: Mapping[str, str]) -> Table:
    """Names and values, one pair a line."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(name, Text(clean(value)))
    return grid


class Report(Protocol):
    """Takes what is done, what there is to do (None if unknown) and a few words."""

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """Show it."""


@contextmanager
def progress(unit: str) -> Iterator[Report]:
    """A progress bar on stderr that vanishes at the end; silent unless stderr is a terminal.

    Nothing may be written to a terminal on stdout meanwhile: the bar does not know of it.
    """
    global _live
    console = stderr()
    if not console.is_terminal:
        yield lambda done, total, what: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    name = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.fields[count]}", markup=False)
    _live = console
    try:
        with Progress(
            *(name, BarColumn(), count),
            console=console,
            transient=True,
            # rich would send what is written to stdout to stderr, where the bar is.
            redirect_stdout=False,
            redirect_stderr=False,
        ) as bar:
            task = bar.add_task("", total=None, count="")

            def report(done: int, total: int | None, what: str) -> None:
                seen = f"{done} {unit}" if total is None else f"{done}/{total} {unit}"
                about = shorten(what, 30)
                bar.update(task, completed=done, total=total, description=about, count=seen)

            yield report
    finally:
        _live = None
