"""Codes and numbers of results in plain language: the only place where the page finds its words.

A verdict is said the same way everywhere, and never more than the test says: a mark of a key was
found, or none was. Who wrote a text is not among the things that can be found out.
"""

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final

__all__ = [
    "DONE",
    "REFUSALS",
    "STATES",
    "VERDICTS",
    "VerdictWords",
    "chance",
    "count",
    "day",
    "moment",
    "short",
]


@dataclass(frozen=True, slots=True)
class VerdictWords:
    """title: the answer in a few words; sentence: what it means; caveat: what it does not."""

    title: str
    sentence: str
    caveat: str


VERDICTS: Final = {
    "detected": VerdictWords(
        "This text carries a mark",
        "It contains the hidden pattern that is written with the key named below.",
        "The mark says what the text passed through, not who is its author. Parts of it may have "
        "been written or edited by people.",
    ),
    "uncounted": VerdictWords(
        "A mark was found that does not count",
        "It agrees with a key that others may have had, or that never came into use.",
        "Whoever had the key could have put the mark there, or made the key to fit the text. A "
        "receipt for this very text from before the key was compromised would make it count.",
    ),
    "inconclusive": VerdictWords(
        "No mark was found",
        "Nothing in this text stands out from chance under the keys that were tried.",
        "That does not say that a person wrote it: a mark may have been lost by rewriting or "
        "translation, and other models leave other marks or none.",
    ),
    "too_short": VerdictWords(
        "This text is too short to tell",
        "With so few words nobody could find a mark, even if there is one.",
        "Nothing follows from that, in either direction. Try again with a longer passage.",
    ),
}

STATES: Final = {
    "pre-active": "waiting",
    "active": "in use",
    "retired": "retired",
    "compromised": "compromised",
    "destroyed": "destroyed",
}

DONE: Final = {
    "created": "The key was created. It waits until every engine of its model has it; then promote "
    "it.",
    "rotated": "A new version was made. It waits until every engine has it; then promote it.",
    "promoted": "The version is in use now; the one before it is retired and goes on reading.",
    "retired": "The version marks no more. It goes on reading.",
    "compromised": "The version is recorded as compromised. What it finds counts only with a "
    "receipt from before.",
    "requested": "The request is recorded. Another person has to approve it.",
    "approved": "You approved the request. It can be used once, until it expires.",
    "destroyed": "The version is destroyed. Nobody can mark or read with it again.",
    "out": "You are logged out.",
}
"""What was just done, by the code that the address carries."""

REFUSALS: Final = {
    400: "That could not be read",
    401: "This token does not open anything",
    403: "This is not yours to do",
    404: "There is no such thing",
    405: "Nothing can be opened here like that",
    408: "That took too long",
    409: "That is not possible now",
    413: "That is too long",
    415: "That could not be read",
    422: "That cannot be used as it is",
    429: "Please wait a little",
    500: "Something went wrong here",
    503: "Not available at the moment",
}
"""Headlines of refusals, by HTTP status."""

_LONG: Final = re.compile(r"[0-9a-f]{24,}")
_RAISED: Final = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: int) -> str:
    """1234567 -> '1,234,567'."""
    return f"{value:,}"


def chance(log_pvalue: float) -> str:
    """A natural log p-value as people say it: '1 in 40 million', '1 in 10³¹'."""
    if log_pvalue > math.log(0.05):
        return f"{math.exp(log_pvalue):.2f}"
    log10 = -log_pvalue / math.log(10)
    if log10 >= 15:
        return "1 in 10" + str(math.floor(log10)).translate(_RAISED)
    for digits, name in ((12, " trillion"), (9, " billion"), (6, " million"), (0, "")):
        if log10 >= digits:
            value = 10 ** (log10 - digits)
            shown = int(float(f"{value:.2g}")) if value >= 10 else float(f"{value:.2g}")
            return f"1 in {shown:,}{name}" if name else f"1 in {round(shown):,}"
    raise AssertionError("log10 of a chance below 0.05 is above 0")


def day(value: datetime | None) -> str:
    """A date, or a dash."""
    return "–" if value is None else f"{value:%Y-%m-%d}"


def moment(value: datetime | None) -> str:
    """A time to the minute, UTC, or a dash."""
    return "–" if value is None else f"{value:%Y-%m-%d %H:%M} UTC"


def short(value: str) -> str:
    """A line in which hashes of 24 and more hex digits are cut to their first 12."""
    return _LONG.sub(lambda found: found[0][:12] + "…", value)
