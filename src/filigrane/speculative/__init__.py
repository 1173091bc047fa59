"""Watermarks at the speed of speculative decoding.

    decoding    generate, Session: the loop, its histories and noise
    base        Method and Position: what a method decides, and from what
    plain coupled efficient two_key keyed_coin      published methods, one rule a file
    shifted_race transport frontier block lists     one key beyond them
    drafts      a smaller model, or the text itself
    detectors   what texts of two and three keys need; all else is `filigrane.detect`
    whitebox    scores that know the model's probabilities
    metrics     tokens per target call, evidence per token, time per token
    nogo        what no watermark can have

Every method here writes text of exactly the target's law, and says what it keeps: full strength,
full acceptance, or one key with the ordinary detector. Which to choose: docs/speculative.md.
"""

import dataclasses
import difflib
import re
from typing import Final

from filigrane.errors import SchemeError
from filigrane.schemes import from_tag
from filigrane.schemes.base import Scheme
from filigrane.schemes.gumbel import Gumbel
from filigrane.speculative.base import Method
from filigrane.speculative.block import Block, MarkedBlock
from filigrane.speculative.coupled import Coupled, Unaccelerated
from filigrane.speculative.decoding import Session, Speculated, generate
from filigrane.speculative.drafts import Drafter, ModelDrafter, NGram
from filigrane.speculative.efficient import Efficient
from filigrane.speculative.keyed_coin import KeyedCoin
from filigrane.speculative.lists import RaceLists
from filigrane.speculative.models import BlockModel
from filigrane.speculative.plain import Autoregressive, Plain
from filigrane.speculative.races import Frontier, Mixed, Transport
from filigrane.speculative.shifted_race import ShiftedRace
from filigrane.speculative.two_key import TwoKey

__all__ = [
    "METHODS",
    "Autoregressive",
    "Block",
    "BlockModel",
    "Coupled",
    "Drafter",
    "Efficient",
    "Frontier",
    "KeyedCoin",
    "MarkedBlock",
    "Method",
    "Mixed",
    "ModelDrafter",
    "NGram",
    "Plain",
    "RaceLists",
    "Session",
    "ShiftedRace",
    "Speculated",
    "Transport",
    "TwoKey",
    "Unaccelerated",
    "generate",
    "method",
]

METHODS: Final[dict[str, type[Method]]] = {
    "autoregressive": Autoregressive,
    "watermark": Unaccelerated,
    "plain": Plain,
    "mws": Coupled,
    "mse": Efficient,
    "two-key": TwoKey,
    "keyed-coin": KeyedCoin,
    "skt": ShiftedRace,
    "otmc": Transport,
    "frontier": Frontier,
    "mixed": Mixed,
    "bv": Block,
    "bv-skt": MarkedBlock,
    "pfr": RaceLists,
}
"""Name -> class, references first."""


def method(text: str, scheme: Scheme | None = None) -> Method:
    """Read 'otmc', 'pfr:drafts=4', 'mws@tournament:depth=20': name, parameters, scheme.

    scheme: of texts that name none; Gumbel() if that is None. Raises SchemeError for what is not
    known.
    """
    head, at, tag = text.strip().partition("@")
    name, _, rest = head.partition(":")
    if name not in METHODS:
        close = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SchemeError(f"unknown method {name!r}.{hint} Known: {', '.join(METHODS)}.")
    kind = METHODS[name]
    types = {f.name: type(f.default) for f in dataclasses.fields(kind) if f.name != "scheme"}
    values: dict[str, int | float] = {}
    for item in rest.split(",") if ":" in head else []:
        parameter, _, value = (part.strip() for part in item.partition("="))
        if parameter not in types:
            known = ", ".join(types) or "no parameters"
            raise SchemeError(f"{name} has no parameter {parameter!r}. It takes: {known}.")
        if parameter in values:
            raise SchemeError(f"{name}: {parameter} is given twice.")
        whole = types[parameter] is int
        if not re.fullmatch(r"[0-9]+" if whole else r"[0-9]*\.?[0-9]+(e-?[0-9]+)?|inf", value):
            raise SchemeError(
                f"{name}: {parameter}={value!r} is not of type {types[parameter].__name__}."
            )
        values[parameter] = int(value) if whole else float(value)
    mark = from_tag(tag) if at else scheme if scheme is not None else Gumbel()
    return kind(scheme=mark, **values)
