"""filigrane schemes."""

import dataclasses

from rich.text import Text

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.schemes import SCHEMES, Scheme

_CARRIED_BY = {
    "logits": ("sampling", "greedy", "beam"),
    # What is left to choose after temperature and truncation is all such a mark can use.
    "distribution": ("sampling",),
}


def _parameters(scheme: type[Scheme]) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(scheme)}


def schemes(json: Json = False) -> None:
    """List the schemes, their parameters and defaults, and what decoding can carry them.

    A tag names a scheme and the parameters that differ: greenlist:gamma=0.5,delta=3.
    """
    if json:
        listing = [
            {
                "name": scheme.name,
                "tag": scheme().tag,
                "parameters": _parameters(scheme),
                "unbiased": scheme.unbiased,
                "acts_on": scheme.acts_on,
                "deterministic": scheme.deterministic,
                "decoding": list(_CARRIED_BY[scheme.acts_on]),
                "reference": scheme.reference,
            }
            for scheme in SCHEMES.values()
        ]
        render.dump({"schemes": listing})
        return
    grid = render.table("scheme", "unbiased", "acts on", "decoding", "parameters")
    references = {}
    for scheme in SCHEMES.values():
        grid.add_row(
            Text(scheme.name, style="bold"),
            "yes" if scheme.unbiased else "no",
            scheme.acts_on,
            ", ".join(_CARRIED_BY[scheme.acts_on]),
            "\n".join(f"{name}={value}" for name, value in _parameters(scheme).items()),
        )
        references[scheme.name] = scheme.reference
    out = render.stdout()
    out.print(grid)
    out.print()
    out.print(render.facts(references))
