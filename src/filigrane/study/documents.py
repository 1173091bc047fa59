"""A test's result as one JSON document: what `report` reads, and what is kept for a dispute.

Computes no statistics but the combination that was declared; knows no model and no secret.
"""

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final, Literal

from filigrane import __version__, stats
from filigrane.errors import EvidenceError
from filigrane.radioactivity.membership import BaselineResult
from filigrane.radioactivity.power import needed
from filigrane.radioactivity.sequential import EProcess
from filigrane.radioactivity.testing import HYPOTHESIS, RadioactivityResult

FORMAT: Final = 1
POWER: Final = 0.5

Combination = Literal["holm", "fisher", "stouffer", "none"]
_LN10: Final = math.log(10.0)


def result(
    found: RadioactivityResult,
    alpha: float,
    *,
    primary: bool,
    sequence: EProcess | None = None,
) -> dict[str, Any]:
    """One result with what follows from it. primary: whether the verdict rests on it."""
    document = dataclasses.asdict(found)
    document["log10_pvalue"] = found.log10_pvalue + 0.0
    document["log10_bound"] = found.log_bound / _LN10 + 0.0
    document["primary"] = primary
    document["needed"] = {
        "n_scored": needed(found.z, found.n_scored, alpha=alpha, power=POWER),
        "alpha": alpha,
        "power": POWER,
    }
    document["sequential"] = None
    if sequence is not None:
        document["sequential"] = {
            "log10_e_max": float(sequence.log_e.max()) / _LN10,
            "decided_at": sequence.decided(alpha),
            "at": sequence.at.tolist(),
            "log10_e": [float(value) / _LN10 for value in sequence.log_e],
        }
    return document


def combine(log_ps: Sequence[float], rule: Combination) -> float:
    """One log p-value of several, by a rule that was declared before: the verdict rests on it.

    holm: the smallest, corrected for all (any dependence); fisher, stouffer: of independent ones.
    Raises EvidenceError for several with the rule "none", or for none at all.
    """
    if not log_ps:
        raise EvidenceError("there is no result to combine; test something first.")
    if rule == "none":
        if len(log_ps) > 1:
            raise EvidenceError(
                f"{len(log_ps)} results need a rule: holm (valid always), fisher or stouffer."
            )
        return log_ps[0]
    if rule == "fisher":
        return stats.fisher(log_ps)
    if rule == "stouffer":
        return stats.stouffer(log_ps)
    return float(stats.holm(log_ps).min())


def document(
    results: Sequence[dict[str, Any]],
    *,
    alpha: float,
    combination: Combination,
    key: Mapping[str, str],
    scheme: str,
    suspect: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    supervision: str,
    inputs: Sequence[Mapping[str, Any]],
    control: Sequence[dict[str, Any]] = (),
    baseline: BaselineResult | Mapping[str, Any] | None = None,
    alignment: Mapping[str, Any] | None = None,
    retokenized: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The whole document. key: name and fingerprint, never a secret."""
    log_ps = [row["log_pvalue"] for row in results if row["primary"]]
    combined = combine(log_ps, combination)
    if isinstance(baseline, BaselineResult):
        found = dataclasses.asdict(baseline)
        baseline = found | {"log10_pvalue": found["log_pvalue"] / _LN10 + 0.0}
    return {
        "command": "radioactivity test",
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "alpha": alpha,
        "hypothesis": HYPOTHESIS,
        "key": dict(key),
        "scheme": scheme,
        "suspect": dict(suspect),
        "base": None if base is None else dict(base),
        "supervision": supervision,
        "inputs": [dict(item) for item in inputs],
        "results": list(results),
        "combined": {
            "method": combination,
            "log10_pvalue": combined / _LN10 + 0.0,
            "of": len(log_ps),
            "declared": "on the command line, before anything was tested",
        },
        "control": list(control),
        "baseline": baseline,
        "alignment": None if alignment is None else dict(alignment),
        "retokenized": retokenized,
        "seeds": {"decoys": seed},
        "versions": versions(),
        "verdict": combined <= math.log(alpha),
    }


def versions() -> dict[str, str]:
    """What computed it."""
    found = {"filigrane": __version__, "python": platform.python_version()}
    for name in ("numpy", "numba", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
