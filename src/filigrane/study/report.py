"""The report of radioactivity tests for lawyers and statisticians: an HTML file and a JSON file.

Knows result documents, as `filigrane radioactivity test` writes them, and nothing of keys, models
or texts. It tests nothing again and puts no number in that a document does not hold, but for Holm's
correction over several documents. The same documents give the same bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from filigrane import stats
from filigrane.adapters.evidence import replacing
from filigrane.errors import MissingDependency, RecordError, SchemeError
from filigrane.schemes import from_tag
from filigrane.study import figures
from filigrane.study.checked import WHAT_TO_PASS, Document

FORMAT: Final = 1
"""Of the JSON that is written."""

LIMITS: Final = (
    "Who wrote the training data. A mark speaks of a key, and of whoever held it.",
    "That the training was direct. A model that was trained on the answers of another model, or on "
    "data bought or scraped from a third party, can carry the same trace.",
    "That the answers of a closed suspect are its own. A server that passes questions on to the "
    "marked model gives marked answers without any training.",
    "That the mark is genuine. Somebody who has seen enough marked text can imitate a mark, and a "
    "model can be trained on such imitations.",
    "How much marked text was used, when, or by whom. The effect depends on the share of marked "
    "text, the number of passes over it and the learning rate, and does not tell them apart.",
    "Anything about legality. Whether the use of a text was allowed is no question of statistics.",
    "Absence, where nothing was found. Marks with windows of three or four tokens or more hardly "
    "pass into a model; a later fine-tune on other text, paraphrased training data, or a small "
    "share of marked text weaken the trace until no test of this size sees it.",
)
"""What no result of this kind establishes; in every report."""

RULES: Final = {
    "candidates": "All positions of the texts or answers, before any rule.",
    "incomplete window": "Too few tokens before it: the window would reach back beyond the start "
    "of the text.",
    "window in the attended context": "The same window stood earlier in what the suspect, or the "
    "writer of the text, could look at. A model that merely copies what it sees would be counted "
    "as one that has learned.",
    "window in the prompt": "The window stood in the request. An answer that repeats its request "
    "would be counted as learned.",
    "not in the filter": "The window is not among those that the marked text is known to hold; it "
    "can carry no trace and would only dilute the rest.",
    "pair scored before": "The same window with the same next token was scored already. Counting "
    "it again would count one piece of evidence twice.",
    "no token border of the suspect there": "The suspect cuts text into other tokens and has no "
    "border here, so that its prediction cannot be translated.",
    "no prediction of the endpoint there": "The server gave no log-probabilities there that say "
    "nothing of the text's own next token.",
    "scored": "What is left and was scored.",
}
"""What each rule of a ledger does, in one sentence."""

_UNKNOWN_RULE: Final = (
    "A rule that this version of the report does not know; see the version below."
)

ROLES: Final = {
    "texts": "texts that the suspect read",
    "answers": "answers of the suspect",
    "filter": "windows worth counting",
    "logged": "texts that had been handed out",
    "fresh": "new texts of the marked model",
    "control": "the same test on a clean model",
}
_ACCESS: Final = {
    "open": "its probabilities for every next token could be read",
    "semi-open": "a server told some of its probabilities",
    "closed": "only its answers could be seen",
}
_SUPERVISION: Final = {
    "supervised": "tested with the very texts that had been handed out",
    "unsupervised": "tested with other texts than those that had been handed out",
}
_COMBINED: Final = {
    "fisher": "Fisher's method",
    "stouffer": "Stouffer's method",
    "holm": "Holm's correction",
    "none": "no combination",
}


# Words and numbers.


def log10(value: float) -> str:
    """A logarithm with two digits, rounded towards no evidence: -4.999 is never shown as -5."""
    shown = math.ceil(value * 100.0 - 1e-7) / 100.0
    return _minus(f"{shown + 0.0:,.2f}")


def probability(value: float) -> str:
    """10**value for people: 0.032, or 7.6 × 10⁻¹⁶; rounded up."""
    if value >= -3.0:
        return f"{min(1.0, math.ceil(10.0**value * 1e4 - 1e-7) / 1e4):.4f}".rstrip("0").rstrip(".")
    exponent = math.floor(value)
    digits = math.ceil(10.0 ** (value - exponent) * 10.0 - 1e-7) / 10.0
    if digits >= 10.0:
        digits, exponent = 1.0, exponent + 1
    return f"{digits:.1f} × 10{_raised(exponent)}"


def threshold(alpha: float) -> str:
    """0.01, or 10⁻⁵."""
    digits, exponent = f"{alpha:.3e}".split("e")
    if alpha >= 1e-3:
        return f"{alpha:g}"
    power = f"10{_raised(int(exponent))}"
    return power if float(digits) == 1.0 else f"{float(digits):g} × {power}"


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def odds(value: float) -> str:
    """10**value in words that need no exponent."""
    if value < -9.0:
        return "less than 1 in a billion"
    chance = 10.0**value
    if chance > 0.1:
        return f"about {chance * 100:.0f} in 100"
    scale = 10.0 ** max(0, math.floor(-value) - 1)
    return f"about 1 in {math.floor(1.0 / chance / scale + 1e-9) * scale:,.0f}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _decimal(value: float, digits: int = 2) -> str:
    return _minus(f"{value + 0.0:,.{digits}f}")


def effect(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """An effect, its interval and the unit of both, for people."""
    weighted = result["statistic"] in ("soft", "differential")
    if result["effect_unit"] == "share of green tokens":
        scale, digits = 100.0, 2
        unit = {
            "soft": "percentage points of probability on green tokens",
            "differential": "percentage points of probability moved to green tokens",
        }.get(result["statistic"], "percentage points of green tokens")
    else:
        scale, digits = 1.0, 4
        unit = result["effect_unit"] + (", weighted by probability" if weighted else "")
    values = [scale * result[name] for name in ("effect", "effect_low", "effect_high")]
    shown = [_minus(f"{value + 0.0:+,.{digits}f}") for value in values]
    return shown[0], f"{shown[1]} to {shown[2]}", unit


def answer(document: Document) -> str:
    """What was asked, what was found and how to read it: one paragraph in plain words."""
    fields, value = document.fields, document.decisive
    suspect, alpha = fields["suspect"], threshold(fields["alpha"])
    combined = fields["combined"]
    how = ""
    if combined is not None and combined["method"] != "none" and combined["of"] > 1:
        how = f" ({combined['of']} results, {_COMBINED[combined['method']]})"
    parts = [
        f"The question was whether the model “{suspect['name']}” was trained on text that carries "
        f"the mark of the key “{fields['key']['name']}”; {_ACCESS[suspect['access']]}, and it was "
        f"{_SUPERVISION[fields['supervision']]}."
    ]
    size = f"p = {probability(value)}, {odds(value)}{how}"
    if fields["verdict"]:
        parts.append(
            f"A dependence on the key was found: {size}, at most the threshold alpha = {alpha} of "
            "this test. This is statistical evidence that marked text, directly or by way of "
            "another model, went into the training."
        )
    else:
        parts.append(
            f"No dependence on the key was found: {size}, above the threshold alpha = {alpha} of "
            "this test. That is no evidence that marked text was not used: a trace that is too "
            "weak for this much evidence looks the same."
        )
    parts.append(
        "The probability is over the key: if the model had nothing to do with it, a key drawn at "
        "random would give a result at least this strong with probability p. It is not the "
        "probability that the model was, or was not, trained on marked text."
    )
    return " ".join(parts)


def remarks(document: Document) -> list[str]:
    """What a careful reader should know of this result before relying on it."""
    fields, found = document.fields, document.fields["verdict"]
    level = math.log10(fields["alpha"])
    results, control = fields["results"], fields["control"]
    said = []
    if not any(result["decoys"] for result in results):
        said.append("No decoy keys were run, so nothing controls the law of the test.")
    for result in results:
        name, decoys = label(document, result), result["decoys"]
        if decoys and decoys["ks_log_pvalue"] < math.log(0.01):
            said.append(
                f"{name}: the decoy keys do not follow the law of the test "
                f"(p = {probability(decoys['ks_log_pvalue'] / math.log(10))}). Rely on the rank "
                "among the decoys, or test on other texts."
            )
        if decoys and result["log10_pvalue"] <= level and decoys["rank"]:
            said.append(
                f"{name}: {decoys['rank']} of {decoys['n']} keys that nobody used do as well as "
                "the true one, which does not fit its p-value."
            )
        if result["log10_pvalue"] <= level < result["log10_bound"]:
            said.append(
                f"{name}: p is an approximation, and the bound that is never too small does not "
                "reach alpha."
            )
        if result["concentration"] > 0.1:
            said.append(
                f"{name}: one window carries {result['concentration']:.0%} of the variance; rely "
                "on the bound, not on the approximation."
            )
    for result in control:
        if result["log10_pvalue"] < -2.0:
            said.append(
                f"A model that is taken for clean gives p = {probability(result['log10_pvalue'])} "
                f"({result['statistic']}): either it is not clean, or something else than "
                "training leads to the suspect's result."
            )
    if found and not control:
        said.append(
            "No clean model was tested on the same texts. Decoy keys cannot show a leak through "
            "the texts themselves; a clean model can."
        )
    if fields["retokenized"]:
        said.append(
            "The answers came as text and were split into tokens again, not always into those "
            "that were written; this costs some of the evidence."
        )
    alignment = fields["alignment"]
    if alignment and alignment["refuse_below"] and alignment["rate"] < alignment["refuse_below"]:
        said.append("The two tokenizers meet more rarely than the test accepts by itself.")
    with suppress(SchemeError):
        width = from_tag(fields["scheme"]).context_width
        if width >= 3 and not found:
            said.append(
                f"This mark looks at windows of {width} tokens; such marks hardly pass into a "
                "model, so that nothing was to be expected even if marked text was used."
            )
    return said


def label(document: Document, result: Mapping[str, Any]) -> str:
    """The statistic of a result; numbered where several pieces of evidence have the same one."""
    alike = [
        other for other in document.fields["results"] if other["statistic"] == result["statistic"]
    ]
    if len(alike) < 2:
        return str(result["statistic"])
    place = next(number for number, other in enumerate(alike, 1) if other is result)
    return f"{result['statistic']} {place}"


def needed(document: Document, result: Mapping[str, Any]) -> str | None:
    """How much more it would take where a result is not significant; None where it is."""
    if result["log10_pvalue"] <= math.log10(document.fields["alpha"]):
        return None
    want = result["needed"]
    if want is None:
        return "not estimated by the test."
    if want["n_scored"] is None:
        return "no estimate: the result does not point towards the mark at all."
    more = max(0, want["n_scored"] - result["n_scored"])
    return (
        f"about {_about(more)} more scored positions ({_about(want['n_scored'])} in all, now "
        f"{result['n_scored']:,}), for alpha = {threshold(want['alpha'])} with power "
        f"{want['power']:g}."
    )


def _about(count: int) -> str:
    """A count with two digits, rounded up: an estimate has no more."""
    scale = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // scale) * scale:,}"


def summary(documents: Sequence[Document]) -> dict[str, Any]:
    """The report as one JSON object: the words of the HTML, and every field that was read."""
    _some(documents)
    corrected = _holm(documents)
    return {
        "command": "radioactivity report",
        "format": FORMAT,
        "documents": [
            {
                "name": document.name,
                "sha256": document.sha256,
                "setting": document.setting,
                "found": document.fields["verdict"],
                "alpha": document.fields["alpha"],
                "log10_pvalue": document.decisive,
                "log10_pvalue_holm": holm,
                "answer": answer(document),
                "remarks": remarks(document),
                "needed": [
                    {"statistic": label(document, result), "words": needed(document, result)}
                    for result in document.fields["results"]
                ],
                "test": document.fields,
            }
            for document, holm in zip(documents, corrected, strict=True)
        ],
        "rules": _rules(documents),
        "limits": list(LIMITS),
    }


def html(documents: Sequence[Document]) -> str:
    """The report as one HTML file that needs no other. Raises MissingDependency."""
    _some(documents)
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingDependency(
            "a report needs jinja2 and matplotlib: pip install 'filigrane[report]'"
        ) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "log10": log10,
        "probability": probability,
        "threshold": threshold,
        "decimal": _decimal,
        "natural": lambda value: probability(value / math.log(10)),
        "count": lambda value: f"{value:,}",
        "day": lambda time: datetime.fromisoformat(time).date().isoformat(),
    }
    # Figures hold numbers and words of ours only, and are the one thing that is not escaped.
    drawn = {
        "decoys": lambda result, name: Markup(
            figures.decoys(result["decoys"]["z"], result["z"], name)
        ),
        "sequential": lambda process, alpha, name: Markup(
            figures.sequential(process["at"], process["log10_e"], alpha, name)
        ),
    }
    settings = {document.setting for document in documents}
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    page: str = environment.from_string(template).render(
        documents=documents,
        several=len(documents) > 1,
        corrected=_holm(documents),
        missing=[
            setting
            for setting in (f"{a}, {b}" for a in ("open", "closed") for b in _SUPERVISION)
            if setting not in settings
        ],
        hypotheses=list(dict.fromkeys(d.fields["hypothesis"] for d in documents)),
        explain=lambda rule: RULES.get(rule, _UNKNOWN_RULE),
        rules_of=lambda document: list(_rules([document])),
        roles=ROLES,
        combinations=_COMBINED,
        answer=answer,
        remarks=remarks,
        needed=needed,
        effect=effect,
        label=label,
        named=lambda document: [label(document, result) for result in document.fields["results"]],
        draw=drawn,
        limits=LIMITS,
        level=math.log10,
    )
    return page


def write(documents: Sequence[Document], out: str | Path) -> tuple[Path, Path]:
    """Write the report to out and, beside it, the same name with .json; returns both.

    Raises RecordError if the two would be one file, MissingDependency.
    """
    page = Path(out)
    data = page.with_suffix(".json")
    if page.suffix.lower() == ".json":
        raise RecordError(
            f"{page.name} would be the report's JSON; name the HTML file: --out X.html."
        )
    text = html(documents)
    record = json.dumps(summary(documents), indent=1, allow_nan=False)
    for path, content in ((page, text), (data, record + "\n")):
        with replacing(path) as file:
            file.write(content.encode("utf-8"))
    return page, data


def _some(documents: Sequence[Document]) -> None:
    if not documents:
        raise RecordError(f"there is nothing to report: {WHAT_TO_PASS}")
    if len({document.sha256 for document in documents}) < len(documents):
        raise RecordError("the same result is given twice; pass each file once.")


def _rules(documents: Sequence[Document]) -> dict[str, str]:
    """Every rule of every ledger, in order, with its sentence; 'scored' last."""
    names = [
        rule
        for document in documents
        for result in document.fields["results"]
        for rule in result["ledger"]
    ]
    ordered = [name for name in dict.fromkeys(names) if name != "scored"] + ["scored"]
    return {name: RULES.get(name, _UNKNOWN_RULE) for name in ordered}


def _holm(documents: Sequence[Document]) -> list[float]:
    """log10 of each document's p-value, corrected for their number."""
    logs = [min(0.0, document.decisive * math.log(10)) for document in documents]
    return [float(value) / math.log(10) + 0.0 for value in stats.holm(logs)]
