"""filigrane radioactivity: the commands of the group, each in a file of its own."""

import importlib
from collections.abc import Callable
from typing import Any, Final

_PLACES: Final = {
    "plan": ("radioactivity_plan", "plan"),
    "collect": ("radioactivity_collect", "collect"),
    "read": ("radioactivity_read", "read"),
    "filter": ("radioactivity_filter", "filter_"),
    "baseline": ("radioactivity_baseline", "baseline"),
    "test": ("radioactivity_test", "test"),
    "report": ("radioactivity_report", "report"),
    "study": ("radioactivity_study", "study"),
    "selftest": ("radioactivity_selftest", "selftest"),
}


def _function(module: str, name: str) -> Callable[..., None]:
    found: Any = getattr(importlib.import_module(f"filigrane.cli.{module}"), name)
    made: Callable[..., None] = found
    return made


SUBCOMMANDS: Final = {word: _function(*place) for word, place in _PLACES.items()}
