"""Tags: a class's name and parameters as one line of text, read back strictly.

Knows dataclasses, not what they mean; every group of classes (schemes, foreign profiles) brings its
own dictionary of names.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from filigrane.errors import SchemeError

T = TypeVar("T")

# Python reads more as a number (other digits, underscores) than a stranger's reader would.
_FORMS: Final = {
    int: r"-?[0-9]+",
    float: r"-?[0-9]*\.?[0-9]*([eE][+-]?[0-9]+)?",
    str: r"[A-Za-z0-9_.-]+",
    bool: r"true|false|True|False",
}
_PARSERS: Final[dict[type, Callable[[str], Any]]] = {
    int: int,
    float: float,
    str: str,
    bool: lambda text: text.lower() == "true",
}


def read(tag: str, known: Mapping[str, type[T]], noun: str) -> T:
    """Read 'name' or 'name:parameter=value,...' (omitted parameters keep their defaults).

    known: classes by name, each a dataclass of int, float, str and bool fields, or of one of these
    and None; noun: what they are, for messages. A name may hold colons itself; the longest known
    one counts. Raises SchemeError for unknown names, parameters and values, and for a parameter
    that is missing and has no default.
    """
    name, rest = _split(tag.strip(), known)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SchemeError(f"unknown {noun} {name!r}.{hint} Known: {', '.join(known)}.")
    cls = known[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        parameter, equals, text = item.partition("=")
        parameter, text = parameter.strip(), text.strip()
        if parameter not in fields:
            raise SchemeError(
                f"{name} has no parameter {parameter!r}. It takes: {', '.join(fields)}."
            )
        if not equals:
            raise SchemeError(f"{name}: write {parameter}=VALUE.")
        if parameter in values:
            raise SchemeError(f"{name}: {parameter} is given twice.")
        values[parameter] = _value(f"{name}: {parameter}", hints[parameter], text)
    for parameter, about in fields.items():
        bare = about.default is dataclasses.MISSING and about.default_factory is dataclasses.MISSING
        if bare and parameter not in values:
            raise SchemeError(f"{name} needs {parameter}: write {name}:{parameter}=VALUE.")
    return cls(**values)


def _split(tag: str, known: Mapping[str, Any]) -> tuple[str, str]:
    for name in sorted(known, key=len, reverse=True):
        if tag == name or tag.startswith(f"{name}:"):
            return name, tag[len(name) + 1 :]
    name, _, rest = tag.partition(":")
    return name, rest


def _value(what: str, hint: Any, text: str) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text == "none":
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind not in _FORMS:  # a Literal
        kind = str
    try:
        if not re.fullmatch(_FORMS[kind], text):
            raise ValueError
        return _PARSERS[kind](text)
    except ValueError:
        raise SchemeError(f"{what}={text!r} is not of type {kind.__name__}.") from None
