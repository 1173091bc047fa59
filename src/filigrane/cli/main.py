"""The entry point `filigrane`: it must say something useful even without typer and rich."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line on sys.argv and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character is no reason to lose a result.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        import rich
        import typer
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"error: the command line needs {error.name}, which is not installed: "
            "pip install 'filigrane[cli]'\n"
        )
        sys.exit(2)
    # Only their presence was asked for; a fault inside filigrane must not look like their absence.
    del rich, typer
    from filigrane.cli.app import build

    build()(prog_name="filigrane")
    sys.exit(0)
