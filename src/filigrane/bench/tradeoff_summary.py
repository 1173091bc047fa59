"""From the records of a run to its tables: estimates, paired comparisons, Markdown.

Knows nothing of models or plots. Everything is recomputed from the rows, with a bootstrap that
starts from a fixed seed, so that the same records give the same summary.

References: acceptance and time are compared with `plain` at the same draft length, strength with
`watermark` (the unaccelerated mark) of the same scheme. A comparison whose reference is not in the
run is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from filigrane.speculative import method
from filigrane.speculative.metrics import (
    AATPS,
    ALPHA,
    ANLPPT,
    ANLPPT_A,
    ANLPPT_U,
    CALL,
    LOGPPL,
    NODES,
    PTT,
    Estimate,
    Metric,
    Row,
    acceptance,
    difference,
    estimate,
    pooled_rates,
    rate_a,
    rate_u,
    ratio,
    tpr,
)

Summary = dict[str, Any]

_PLAIN: Final = "plain"
_WATERMARK: Final = "watermark"
_VALUES: Final[Mapping[str, Metric]] = {
    "aatps": AATPS,
    "anlppt_u": ANLPPT_U,
    "anlppt_a": ANLPPT_A,
    "anlppt": ANLPPT,
    "logppl": LOGPPL,
    "ptt_ms": PTT,
    "call_ms": CALL,
    "tpr": tpr(),
    "nodes": NODES,
}


def summarise(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    replay: Mapping[str, Mapping[str, float]] | None = None,
) -> Summary:
    """All figures of a run, ready for JSON (null for what is not defined).

    settings: as in config.json, kept beside the figures. replay: mean u and a of each method at
    recorded positions, {"otmc": {"mean_u": ..., "mean_a": ...}}: strength without the luck of the
    draw, which joins the table if there is any.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.draft_length), []).append(row)
    order = {name: number for number, name in enumerate(settings["methods"])}
    lengths = sorted({length for row in rows for length in row.prefixes})
    entries = []
    for name, draft_length in sorted(groups, key=lambda group: (order[group[0]], group[1])):
        mine = groups[name, draft_length]
        entry: Summary = {
            "method": name,
            "draft_length": draft_length,
            "texts": len(mine),
            "tokens": sum(row.n_tokens for row in mine),
            "scored": sum(row.n_scored for row in mine),
        }
        for label, metric in _VALUES.items():
            entry[label] = _json(estimate(mine, metric, _rng()))
        pooled = pooled_rates(mine)
        entry["pooled_u"], entry["pooled_a"] = map(_finite, pooled)
        entry["tpr_at"] = {str(n): _json(estimate(mine, tpr(n), _rng())) for n in lengths}
        shares, reached = acceptance(mine)
        entry["acceptance"] = [_finite(share) for share in shares.tolist()]
        entry["acceptance_reached"] = reached.tolist()
        plain = groups.get((_PLAIN, draft_length))
        if plain is not None and name != _PLAIN:
            entry["aatps_minus_plain"] = _json(difference(mine, plain, AATPS, _rng()))
            entry["ptt_over_plain"] = _json(ratio(mine, plain, PTT, _rng()))
            entry["call_over_plain"] = _json(ratio(mine, plain, CALL, _rng()))
        whole = groups.get(_strongest(name, groups))
        if whole is not None and whole is not mine:
            for label in ("anlppt_u", "anlppt_a", "anlppt"):
                compared = ratio(mine, whole, _VALUES[label], _rng())
                entry[f"{label}_over_watermark"] = _json(compared)
        if replay and name in replay:
            entry["replay"] = {
                **replay[name],
                "rate_u": _finite(float(rate_u(replay[name]["mean_u"]))),
                "rate_a": _finite(float(rate_a(replay[name]["mean_a"]))),
            }
        entries.append(entry)
    return {"alpha": ALPHA, "settings": dict(settings), "rows": entries}


def _strongest(name: str, groups: Mapping[tuple[str, int], object]) -> tuple[str, int]:
    """Which group is the unaccelerated mark of the same scheme."""
    mine = method(name)
    for other, draft_length in groups if mine.marks else ():
        reference = method(other)
        if reference.name == _WATERMARK and reference.scheme == mine.scheme:
            return other, draft_length
    return _WATERMARK, -1


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(found: Estimate) -> dict[str, float | None]:
    return {
        "value": _finite(found.value),
        "low": _finite(found.low),
        "high": _finite(found.high),
    }


# ---------------------------------------------------------------- Markdown


def markdown(summary: Summary) -> str:
    """The tables of a run; "–" where a figure is not defined or has no reference in the run."""
    rows = summary["rows"]
    settings = summary["settings"]
    head = (
        "# Speed against strength\n\n"
        f"{settings['target']} with drafts of {settings['draft']}; task {settings['task']}, "
        f"{settings['prompts']} prompts x {settings['seeds']} seeds, at most "
        f"{settings['max_new_tokens']} tokens; temperature {settings['temperature']:g}, top-k "
        f"{settings['top_k']}, top-p {settings['top_p']:g}; batch {settings['batch_size']}.\n"
    )
    parts = [head, table(rows), _NOTES, _positions(rows), _detection(rows)]
    return "\n".join(part for part in parts if part)


_NOTES: Final = """\
AATPS: tokens per target call, ± half of the 95 % interval. Square brackets: 95 % intervals from a
bootstrap over prompts, of pairs with the same (prompt, seed). ANLPPT: nats of evidence per token,
skipped tokens counted; U and A are the published Chernoff forms of the ordinary detector's scores,
text by text and, in round brackets, of all texts pooled (– for methods with a detector of their
own). log10 p / 100: exact test of the method's own detector, per 100 tokens; p / watermark: its
evidence as a ratio to that of the unaccelerated mark. LOGPPL: nats per token under the target; the
same for exact methods, up to chance. PTT: time per token after the first block, as a ratio to
plain; call: time per block, the same way. TPR: share of texts with p ≤ 0.01; without a mark it is
the false-positive rate. nodes: draft tokens verified per target call.
"""


def table(rows: Sequence[Summary]) -> str:
    """The main table as Markdown."""
    lines = [columns(row) for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    return _grid(names, [[line.get(name, "–") for name in names] for line in lines])


def columns(row: Summary) -> dict[str, str]:
    """The cells of one row of the main table, by heading."""
    cells = {
        "method": row["method"],
        "K": str(row["draft_length"] or "–"),
        "AATPS": half(row["aatps"], 3),
        "- plain": _bracket(row.get("aatps_minus_plain"), 3, sign=True),
        "ANLPPT-U": _and_pooled(row, "u"),
        "U / watermark": _bracket(row.get("anlppt_u_over_watermark"), 3),
        "ANLPPT-A": _and_pooled(row, "a"),
        "log10 p / 100": number(_per_100(row["anlppt"]["value"]), 1),
        "p / watermark": _bracket(row.get("anlppt_over_watermark"), 3),
        "LOGPPL": half(row["logppl"], 3),
        "PTT / plain": _bracket(row.get("ptt_over_plain"), 2),
        "call / plain": _bracket(row.get("call_over_plain"), 3),
        "TPR": number(row["tpr"]["value"], 3),
        "nodes": number(row["nodes"]["value"], 2),
    }
    if "replay" in row:
        cells["replay U / A"] = " / ".join(
            number(row["replay"][f"rate_{kind}"], 4) for kind in "ua"
        )
    return cells


def _and_pooled(row: Summary, kind: str) -> str:
    value, pooled = row[f"anlppt_{kind}"]["value"], row[f"pooled_{kind}"]
    return "–" if value is None else f"{value:.3f} ({number(pooled, 3)})"


def _per_100(anlppt: float | None) -> float | None:
    # Adding 0.0 turns -0.0 into 0.0.
    return None if anlppt is None else -100.0 * anlppt / math.log(10) + 0.0


def _positions(rows: Sequence[Summary]) -> str:
    """Acceptance by draft position."""
    drafted = [row for row in rows if row["acceptance"]]
    if not drafted:
        return ""
    longest = max(len(row["acceptance"]) for row in drafted)
    lines = [
        [row["method"], str(row["draft_length"])]
        + [number(share, 3) for share in row["acceptance"]]
        + ["–"] * (longest - len(row["acceptance"]))
        for row in drafted
    ]
    names = ["method", "K", *(f"position {number + 1}" for number in range(longest))]
    return "Drafts kept, given that they were reached:\n\n" + _grid(names, lines)


def _detection(rows: Sequence[Summary]) -> str:
    """TPR by text length."""
    lengths = list(dict.fromkeys(length for row in rows for length in row["tpr_at"]))
    if not lengths:
        return ""
    lines = [
        [row["method"], str(row["draft_length"] or "–")]
        + [number(row["tpr_at"][length]["value"], 3) for length in lengths]
        for row in rows
    ]
    names = ["method", "K", *(f"{length} tokens" for length in lengths)]
    return "Share of texts, cut to a length, with p ≤ 0.01:\n\n" + _grid(names, lines)


def _grid(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [names, ["---"] + ["---:"] * (len(names) - 1), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def number(value: float | None, digits: int) -> str:
    """A number for people; "–" for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def half(found: Mapping[str, float | None], digits: int) -> str:
    """A value ± half of its interval."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or high is None:
        return number(value, digits)
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def _bracket(found: Mapping[str, float | None] | None, digits: int, *, sign: bool = False) -> str:
    if found is None or found["value"] is None:
        return "–"
    plus = "+" if sign else ""
    text = f"{found['value']:{plus}.{digits}f}"
    if found["low"] is None or found["high"] is None:
        return text
    return f"{text} [{found['low']:{plus}.{digits}f}, {found['high']:{plus}.{digits}f}]"


def as_json(summary: Summary) -> str:
    """The file summary.json."""
    return json.dumps(summary, indent=1, allow_nan=False) + "\n"


def read_replay(path: Path) -> dict[str, dict[str, float]] | None:
    """The file replay.json of a run directory, if there is one; see `summarise`."""
    if not path.exists():
        return None
    found: dict[str, dict[str, float]] = json.loads(path.read_text("utf-8"))
    return found
