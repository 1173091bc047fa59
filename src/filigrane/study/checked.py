"""Result documents as they come in, from anybody: read, checked, and cut down to what is known.

The shape is that of `study.documents`. Documents are taken for hostile: every field is checked,
numbers that say the same thing twice have to agree, what is unknown is left out, and texts lose
what would deceive a reader. Computes no statistics and knows no model.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from filigrane.errors import RecordError
from filigrane.study.documents import FORMAT

MAX_BYTES: Final = 64 * 2**20
_MAX_TEXT: Final = 4000

ACCESS: Final = ("open", "semi-open", "closed")
SUPERVISION: Final = ("supervised", "unsupervised")
COMBINED: Final = ("fisher", "stouffer", "holm", "none")
WHAT_TO_PASS: Final = "pass what `filigrane radioactivity test --out FILE` wrote."

Check: TypeAlias = Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A result document that has been checked: fields holds what the format names, nothing else.

    name: of its file, without folders; sha256: of its bytes, as they were read.
    """

    name: str
    sha256: str
    fields: dict[str, Any]

    @property
    def decisive(self) -> float:
        """log10 of the p-value that is held against alpha: the combined one, or the primary."""
        combined = self.fields["combined"]
        if combined is not None and combined["log10_pvalue"] is not None:
            return float(combined["log10_pvalue"])
        return float(_primary(self.fields["results"])[0]["log10_pvalue"])

    @property
    def setting(self) -> str:
        """What could be seen, and with which texts: 'open, unsupervised'."""
        return f"{self.fields['suspect']['access']}, {self.fields['supervision']}"


def read(path: str | Path) -> Document:
    """A result document from a file. Raises RecordError, OSError."""
    path = Path(path)
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    return parse(path.name, data)


def parse(name: str, data: bytes) -> Document:
    """A result document from its bytes; name: for messages. Raises RecordError."""
    name = _clean(name)
    if len(data) > MAX_BYTES:
        raise RecordError(f"{name} is larger than {MAX_BYTES >> 20} MiB: {WHAT_TO_PASS}")
    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name} is not one valid JSON document: {WHAT_TO_PASS}") from error
    if not isinstance(fields, dict) or fields.get("command") != "radioactivity test":
        raise RecordError(f"{name} is no result of a radioactivity test: {WHAT_TO_PASS}")
    if fields.get("format") != FORMAT:
        raise RecordError(
            f"{name} has a format that is not known here (known: {FORMAT}); make the report with "
            "the version of filigrane that ran the test."
        )
    try:
        checked = _DOCUMENT(fields, "")
        document = Document(name=name, sha256=hashlib.sha256(data).hexdigest(), fields=checked)
        _consistent(document)
    except _Wrong as error:
        raise RecordError(
            f"{name}: {error}. It was changed or cut short after the test; run the test again and "
            "pass the file of its --out as it is."
        ) from error
    return document


# Checking. Each check returns the value that is kept, or raises _Wrong with its place.


class _Wrong(Exception):
    def __init__(self, where: str, want: str) -> None:
        super().__init__(f'"{where}" is not {want}')


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names occur once: of two values, readers would believe different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _clean(text: str) -> str:
    """Without control characters and those that reorder text, which change what people read."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _Wrong(where, f"a text of at most {_MAX_TEXT} characters")
    if re.search(r"filigrane-key-\d+:", value, re.IGNORECASE):
        raise _Wrong(
            where, "fit to be published: it holds a secret key, which is not repeated here"
        )
    return _clean(value)


def _name(value: Any, where: str) -> str:
    """A short text, which stands at the head of a column."""
    text = _text(value, where)
    if not 0 < len(text) <= 60:
        raise _Wrong(where, "a name of at most 60 characters")
    return text


def _number(value: Any, where: str) -> float:
    # An integer too long for a float is no number of a test.
    with suppress(OverflowError):
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    raise _Wrong(where, "a finite number")


def _between(low: float, high: float, want: str) -> Check:
    def check(value: Any, where: str) -> float:
        number = _number(value, where)
        if not low <= number <= high:
            raise _Wrong(where, want)
        return number + 0.0

    return check


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _Wrong(where, "a count")
    return value


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or abs(value) >= 2**128:
        raise _Wrong(where, "an integer")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(where, "true or false")
    return value


def _digest(value: Any, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise _Wrong(where, "a SHA-256 in 64 hexadecimal digits")
    return value


def _time(value: Any, where: str) -> str:
    text = _text(value, where)
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise _Wrong(where, "a time in ISO 8601") from None
    return text


def _one_of(names: Sequence[str]) -> Check:
    def check(value: Any, where: str) -> str:
        if value not in tuple(names):
            raise _Wrong(where, "one of " + ", ".join(names))
        return str(value)

    return check


def _optional(inner: Check) -> Check:
    return lambda value, where: None if value is None else inner(value, where)


def _list(inner: Check, least: int = 0) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise _Wrong(where, f"a list of at least {least}" if least else "a list")
        return [inner(item, f"{where}[{number}]") for number, item in enumerate(value)]

    return check


def _mapping(inner: Check) -> Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Wrong(where, "an object")
        return {
            _text(name, where): inner(item, f"{where}.{_clean(name)}")
            for name, item in value.items()
        }

    return check


def _object(parts: Mapping[str, Check]) -> Check:
    """What is not named in parts is left out; what may be null may also be missing."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Wrong(where or "document", "an object")
        head = f"{where}." if where else ""
        return {name: inner(value.get(name), head + name) for name, inner in parts.items()}

    return check


def _ledger(value: Any, where: str) -> dict[str, int]:
    ledger: dict[str, int] = _mapping(_count)(value, where)
    counts, names = list(ledger.values()), list(ledger)
    if len(names) < 2 or names[0] != "candidates" or names[-1] != "scored":
        raise _Wrong(where, "a ledger from candidates to scored")
    if counts[0] - sum(counts[1:-1]) != counts[-1]:
        raise _Wrong(where, "a ledger whose numbers add up")
    return ledger


_LOG: Final = _between(-math.inf, 1e-9, "a logarithm of a probability")
_SHARE: Final = _between(0.0, 1.0 + 1e-9, "a share")
_INSIDE: Final = _between(1e-300, 1.0 - 1e-16, "inside (0, 1)")
_ORDER: Final = {"n_scored": _optional(_count), "alpha": _INSIDE, "power": _INSIDE}
_SEQUENTIAL: Final = {
    "log10_e_max": _number,
    "decided_at": _optional(_count),
    "at": _list(_count, 1),
    "log10_e": _list(_number, 1),
}
_DECOYS: Final = {
    "n": _count,
    "rank": _count,
    "log_pvalue": _LOG,
    "ks_log_pvalue": _LOG,
    "z_mean": _number,
    "z_sd": _between(0.0, math.inf, "a standard deviation"),
    "z": _list(_number, 2),
    "seed": _integer,
}
_RESULT: Final = _object(
    {
        "statistic": _name,
        "log_pvalue": _LOG,
        "log10_pvalue": _LOG,
        "method": _text,
        "log_bound": _LOG,
        "log10_bound": _LOG,
        "total": _number,
        "z": _number,
        "n_scored": _count,
        "n_windows": _count,
        "n_documents": _count,
        "n_slots": _count,
        "effect": _number,
        "effect_low": _number,
        "effect_high": _number,
        "effect_unit": _text,
        "effect_interval": _text,
        "concentration": _SHARE,
        "ledger": _ledger,
        "decoys": _optional(_object(_DECOYS)),
        "scheme": _text,
        "key": _text,
        "hypothesis": _text,
        "needed": _optional(_object(_ORDER)),
        "sequential": _optional(_object(_SEQUENTIAL)),
        "primary": _optional(_flag),
    }
)
_MODEL: Final = _object(
    {
        "name": _text,
        "access": _one_of(ACCESS),
        "vocab_size": _optional(_count),
        "tokenizer_sha256": _optional(_text),
        "weights_sha256": _optional(_text),
        "endpoint": _optional(_text),
    }
)
_COMBINATION: Final = {
    "method": _one_of(COMBINED),
    "log10_pvalue": _optional(_LOG),
    "of": _count,
    "declared": _optional(_text),
}
_INPUT: Final = {"name": _text, "sha256": _digest, "records": _optional(_count), "role": _text}
_BASELINE: Final = {
    "log_pvalue": _LOG,
    "log10_pvalue": _LOG,
    "distance": _SHARE,
    "n_logged": _count,
    "n_fresh": _count,
    "median_logged": _number,
    "median_fresh": _number,
    "method": _text,
    "hypothesis": _text,
}
_ALIGNMENT: Final = {
    "rate": _SHARE,
    "mass": _optional(_SHARE),
    "refuse_below": _optional(_SHARE),
}
_DOCUMENT: Final = _object(
    {
        "created": _time,
        "alpha": _INSIDE,
        "hypothesis": _text,
        "key": _object({"name": _text, "fingerprint": _text}),
        "scheme": _text,
        "suspect": _MODEL,
        "base": _optional(_MODEL),
        "supervision": _one_of(SUPERVISION),
        "inputs": _list(_object(_INPUT)),
        "results": _list(_RESULT, 1),
        "combined": _optional(_object(_COMBINATION)),
        "control": _optional(_list(_RESULT)),
        "baseline": _optional(_object(_BASELINE)),
        "alignment": _optional(_object(_ALIGNMENT)),
        "retokenized": _flag,
        "seeds": _mapping(_integer),
        "versions": _mapping(_text),
        "verdict": _flag,
    }
)


def _primary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [result for result in results if result["primary"]]


def _consistent(document: Document) -> None:
    """Numbers that say the same thing twice have to agree."""
    fields = document.fields
    fields["control"] = fields["control"] or []
    parts = [("results", fields["results"]), ("control", fields["control"])]
    for name, results in parts:
        for number, result in enumerate(results):
            _agree(result, f"{name}[{number}]")
    if (baseline := fields["baseline"]) is not None:
        _same_log(baseline, "pvalue", "baseline")
    combined = fields["combined"]
    alone = combined is None or combined["log10_pvalue"] is None
    if alone and len(_primary(fields["results"])) != 1:
        raise _Wrong("combined", "there, and not exactly one result is primary")
    distance = document.decisive - math.log10(fields["alpha"])
    # At the very border the last digit of a logarithm may fall on either side.
    if abs(distance) > 1e-9 and fields["verdict"] != (distance < 0.0):
        raise _Wrong("verdict", "what p and alpha say")


def _agree(result: dict[str, Any], where: str) -> None:
    _same_log(result, "pvalue", where)
    _same_log(result, "bound", where)
    if not result["effect_low"] <= result["effect"] <= result["effect_high"]:
        raise _Wrong(f"{where}.effect", "inside its interval")
    decoys = result["decoys"]
    if decoys is not None and not decoys["rank"] <= decoys["n"] == len(decoys["z"]):
        raise _Wrong(f"{where}.decoys", "a list of n decoys")
    if (process := result["sequential"]) is not None:
        at = process["at"]
        if len(at) != len(process["log10_e"]) or at != sorted(set(at)):
            raise _Wrong(f"{where}.sequential", "one e-value for each of growing numbers of scores")


def _same_log(holder: dict[str, Any], name: str, where: str) -> None:
    natural, decimal = holder[f"log_{name}"], holder[f"log10_{name}"]
    if not math.isclose(natural, decimal * math.log(10), rel_tol=1e-6, abs_tol=1e-6):
        raise _Wrong(f"{where}.log10_{name}", f"the same as log_{name}")
