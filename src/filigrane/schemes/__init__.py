"""The schemes, and the one place where a scheme's text becomes an object."""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Final

from filigrane.errors import SchemeError
from filigrane.schemes.base import Scheme
from filigrane.schemes.greenlist import GreenList
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.tournament import Tournament
from filigrane.schemes.unbiased import DeltaReweight, GammaReweight

__all__ = [
    "SCHEMES",
    "DeltaReweight",
    "GammaReweight",
    "GreenList",
    "Gumbel",
    "Scheme",
    "Tournament",
    "from_tag",
]

SCHEMES: Final[dict[str, type[Scheme]]] = {
    "gumbel": Gumbel,
    "greenlist": GreenList,
    "tournament": Tournament,
    "gamma": GammaReweight,
    "delta": DeltaReweight,
}


def from_tag(tag: str) -> Scheme:
    """Read 'gumbel' or 'greenlist:gamma=0.5,delta=3' (omitted parameters keep their defaults).

    Raises SchemeError for unknown names, parameters and values.
    """
    name, _, rest = tag.strip().partition(":")
    if name not in SCHEMES:
        close = difflib.get_close_matches(name.lower(), SCHEMES, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SchemeError(f"unknown scheme {name!r}.{hint} Known: {', '.join(SCHEMES)}.")
    scheme = SCHEMES[name]
    parsers: dict[type, Callable[[str], int | float | str]] = {int: int, float: float, str: str}
    # Python reads more as a number (other digits, underscores) than a stranger's reader would.
    forms = {int: r"-?[0-9]+", float: r"-?[0-9]*\.?[0-9]*([eE][+-]?[0-9]+)?", str: r"[a-z]+"}
    types = {f.name: type(f.default) for f in dataclasses.fields(scheme)}
    values: dict[str, int | float | str] = {}
    for item in rest.split(",") if rest else []:
        parameter, equals, text = item.partition("=")
        parameter, text = parameter.strip(), text.strip()
        if parameter not in types:
            raise SchemeError(
                f"{name} has no parameter {parameter!r}. It takes: {', '.join(types)}."
            )
        if not equals:
            raise SchemeError(f"{name}: write {parameter}=VALUE.")
        if parameter in values:
            raise SchemeError(f"{name}: {parameter} is given twice.")
        try:
            if not re.fullmatch(forms[types[parameter]], text):
                raise ValueError
            values[parameter] = parsers[types[parameter]](text)
        except ValueError:
            raise SchemeError(
                f"{name}: {parameter}={text!r} is not of type {types[parameter].__name__}."
            ) from None
    return scheme(**values)  # type: ignore[arg-type]
