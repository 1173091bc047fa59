"""The report: right words, honest numbers, a page that stands alone, no way in for strangers."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import filigrane as fg
from filigrane.errors import RecordError
from filigrane.study import checked, report
from filigrane.study.checked import Document
from study.radioactive_results import KEY, closed_document, document

Fields = dict[str, Any]
# What needs no end tag.
VOID = {"meta", "br", "img", "input", "link", "hr"}


def received(fields: Fields, name: str = "result.json") -> Document:
    return checked.parse(name, json.dumps(fields).encode())


@pytest.fixture(scope="module")
def found() -> Fields:
    return document(control=True)


@pytest.fixture(scope="module")
def not_found() -> Fields:
    return closed_document()


@pytest.fixture(scope="module")
def page(found: Fields, not_found: Fields) -> str:
    return report.html([received(found, "a.json"), received(not_found, "b.json")])


class Page(HTMLParser):
    """A page as it is read: tags with what encloses them, and the text without tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], "a tag was not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_finding_says_what_it_is_and_what_it_is_not(found: Fields) -> None:
    assert found["verdict"]
    said = report.answer(received(found))
    assert "A dependence on the key was found" in said and "alpha = 10⁻⁵" in said
    assert "“bob/helpful-7b”" in said and f"“{KEY.name}”" in said
    assert "probability is over the key" in said and "It is not the probability that" in said
    assert "No dependence" not in said and "no evidence" not in said
    assert "less than 1 in a billion" in said


def test_not_finding_is_no_proof_of_absence(not_found: Fields) -> None:
    assert not not_found["verdict"]
    said = report.answer(received(not_found))
    assert "No dependence on the key was found" in said and "above the threshold" in said
    assert "That is no evidence that marked text was not used" in said
    assert "This is statistical evidence" not in said


def test_the_page_never_says_proven(page: str) -> None:
    words = Page(page).text.lower()
    assert not re.search(r"\bpro(ven|ved|ves|of)\b|guilt|innocent|certain", words)


def test_order_of_the_page(page: str) -> None:
    headings = [attributes["id"] for attributes in Page(page).all("h2")]
    assert headings == [
        "answer", "hypothesis", "results", "evidence", "controls", "more", "combination",
        "sources", "limits", "words",
    ]  # fmt: skip


def test_everything_that_a_document_holds_is_shown(page: str, found: Fields) -> None:
    text = Page(page).text
    for result in found["results"]:
        assert report.log10(result["log10_pvalue"]) in text and result["method"] in text
        assert all(f"{count:,}" in text for count in result["ledger"].values())
        for rule in result["ledger"]:
            assert rule in text and report.RULES[rule] in text
    for limit in report.LIMITS:
        assert limit in text
    for part in (
        found["hypothesis"], KEY.fingerprint, found["suspect"]["weights_sha256"], found["scheme"],
        found["base"]["name"], found["inputs"][0]["sha256"], "before anything was tested",
        "87.4 %", "two-sample Kolmogorov-Smirnov", found["versions"]["numpy"],
        report.log10(found["control"][0]["log10_pvalue"]), "https://models.example/v1",
        "Settings that are not in this report: open, supervised; closed, unsupervised",
        "split into tokens again", "not decided", "2026-03-02",
    ):  # fmt: skip
        assert part in text, part
    assert "exact" in text and report.log10(found["results"][0]["log10_bound"]) in text


def test_several_documents_are_corrected_for_their_number(
    found: Fields, not_found: Fields, page: str
) -> None:
    documents = [received(found), received(not_found)]
    made = report.summary(documents)
    strong = made["documents"][0]
    assert strong["log10_pvalue_holm"] == pytest.approx(strong["log10_pvalue"] + math.log10(2))
    assert "Corrected for the 2 tests of this report (Holm)" in Page(page).text
    assert "Corrected for" not in report.html(documents[:1])


def test_two_results_of_one_statistic_are_told_apart() -> None:
    fields = closed_document(bias=0.3, pieces=2, combination="fisher")
    text = Page(report.html([received(fields)])).text
    assert "answer count 1 (primary)" in text and "answer count 2 (primary)" in text
    assert "Fisher's method over 2 results" in text
    assert "(2 results, Fisher's method)" in report.answer(received(fields))


def test_numbers_are_rounded_towards_no_evidence() -> None:
    assert report.log10(-4.9999) == "−4.99" and report.log10(-5.0) == "−5.00"
    assert report.log10(-1513.0) == "−1,513.00" and report.log10(0.0) == "0.00"
    assert report.probability(-15.1249) == "7.6 × 10⁻¹⁶"
    assert report.probability(-4000.0) == "1.0 × 10⁻⁴⁰⁰⁰"
    assert report.probability(0.0) == "1" and report.probability(math.log10(0.03201)) == "0.0321"
    assert report.odds(math.log10(1 / 12345)) == "about 1 in 12,000"
    assert report.odds(math.log10(0.32)) == "about 32 in 100"
    assert report.odds(-9.5) == "less than 1 in a billion"
    assert report.threshold(1e-5) == "10⁻⁵" and report.threshold(2.5e-6) == "2.5 × 10⁻⁶"
    assert report.threshold(0.01) == "0.01"


@pytest.mark.parametrize("exponent", [-0.1, -0.7, -2.3, -3.0, -5.0, -8.99, -40.25])
def test_a_shown_probability_is_never_too_small(exponent: float) -> None:
    shown = report.probability(exponent)
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    value = float(shown.replace(" × 10", "e").translate(digits))
    assert 10**exponent * (1 - 1e-6) <= value <= 10**exponent * 1.12


def test_effects_have_a_unit(found: Fields) -> None:
    units = {r["statistic"]: report.effect(r)[2] for r in found["results"]}
    assert units == {
        "argmax count": "percentage points of green tokens",
        "soft": "percentage points of probability on green tokens",
        "differential": "percentage points of probability moved to green tokens",
    }
    value, interval, _ = report.effect(
        {"statistic": "argmax count", "effect": 0.0123, "effect_low": -0.01, "effect_high": 0.03,
         "effect_unit": "share of green tokens"}
    )  # fmt: skip
    assert (value, interval) == ("+1.23", "−1.00 to +3.00")


def test_how_much_more_is_only_said_where_nothing_was_found(
    found: Fields, not_found: Fields
) -> None:
    assert report.needed(received(found), found["results"][0]) is None
    weak = received(not_found)
    assert "more scored positions" in str(report.needed(weak, weak.fields["results"][0]))
    fields = copy.deepcopy(not_found)
    fields["results"][0]["needed"]["n_scored"] = None
    away = received(fields)
    assert "does not point" in str(report.needed(away, away.fields["results"][0]))


def changed(fields: Fields, **parts: Any) -> Document:
    """The first result with other numbers; the rest of the document follows."""
    fields = copy.deepcopy(fields)
    fields["results"][0] |= parts
    return received(fields)


def test_remarks_warn_of_what_weakens_a_result(found: Fields, not_found: Fields) -> None:
    decoys = found["results"][0]["decoys"]
    everything = " ".join(report.remarks(received(found)))
    assert "decoy" not in everything and "clean" not in everything
    lawless = changed(found, decoys=decoys | {"ks_log_pvalue": -12.0})
    assert "do not follow the law of the test" in " ".join(report.remarks(lawless))
    ranked = changed(found, decoys=decoys | {"rank": 3})
    assert "3 of 200 keys that nobody used do as well" in " ".join(report.remarks(ranked))
    loose = changed(found, log_bound=-2.0, log10_bound=-2.0 / math.log(10))
    assert "does not reach alpha" in " ".join(report.remarks(loose))
    heavy = changed(found, concentration=0.4)
    assert "one window carries 40%" in " ".join(report.remarks(heavy))
    fields = copy.deepcopy(found)
    fields["control"] = [fields["results"][0]]
    assert "taken for clean" in " ".join(report.remarks(received(fields)))
    fields["control"] = []
    assert "No clean model was tested" in " ".join(report.remarks(received(fields)))
    bare = document(n=400, decoys=0)
    assert "No decoy keys were run" in " ".join(report.remarks(received(bare)))
    assert "No decoy keys were run." in Page(report.html([received(bare)])).text
    assert "No clean model" not in " ".join(report.remarks(received(not_found)))


def test_long_windows_are_said_to_leave_nothing_to_find() -> None:
    wide = fg.GreenList(gamma=0.25, delta=3.0, context_width=4)
    fields = document(bias=0.0, n=300, scheme=wide, decoys=20)
    said = " ".join(report.remarks(received(fields)))
    assert "windows of 4 tokens" in said and "even if marked text was used" in said


def test_other_schemes_have_other_units() -> None:
    fields = document(bias=0.3, n=300, scheme=fg.Gumbel(context_width=1), decoys=20)
    made = received(fields)
    assert report.effect(made.fields["results"][1])[2] == "mean score"
    assert "mean score, weighted by probability" in Page(report.html([made])).text


# The page itself.


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    seen = Page(page)
    outside = {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image"}
    assert not {tag for tag, _ in seen.tags} & outside
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert value is not None and value.startswith("#"), (tag, value)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    policy = [a["content"] for a in seen.all("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_structure_serves_assistive_technology(page: str) -> None:
    seen = Page(page)
    assert seen.all("html")[0]["lang"] == "en" and len(seen.all("h1")) == 1
    assert len(seen.all("main")) == 1
    ids = [a["id"] for _, a in seen.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for target in [a.get("href") or a.get("xlink:href") for _, a in seen.tags]:
        assert target is None or target[1:] in ids, target
    # What the keyboard reaches comes in the order of the page, and the way past the list first.
    links = seen.all("a")
    assert links[0] == {"class": "skip", "href": "#content"}
    assert [a["href"] for a in links[1:]] == [f"#{h['id']}" for h in seen.all("h2")]
    assert {a["tabindex"] for _, a in seen.tags if "tabindex" in a} == {"-1"}
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(seen.all("caption")) == len(seen.all("table")) > 8
    assert all(a.get("scope") in ("col", "row") for a in seen.all("th"))
    figures = seen.all("svg")
    assert len(figures) == len(seen.all("figure")) == len(seen.all("figcaption")) == 5
    assert all(a["role"] == "img" and len(str(a["aria-label"])) > 60 for a in figures)


def test_narrow_screens_get_every_label(page: str) -> None:
    """Where rows are stacked the heads are hidden, and each cell names its column itself."""
    cells = [a for a in Page(page).all("td") if a.get("role") == "cell"]
    assert len(cells) > 60 and all(a.get("data-label") for a in cells)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark_and_on_paper(page: str) -> None:
    """WCAG 2.1 AA: 4.5 to 1 for text, 3 to 1 for what a plot shows."""
    palettes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", page)
    ]
    assert len(palettes) == 3
    assert luminance(palettes[1]["paper"]) < 0.05 < 0.9 < luminance(palettes[0]["paper"])
    for colours in palettes:
        for name, least in (
            ("ink", 7.0), ("quiet", 4.5), ("link", 4.5), ("mark", 4.5), ("found", 4.5),
            ("none", 4.5), ("fill", 3.0),
        ):  # fmt: skip
            for ground in ("paper", "raised"):
                high, low = sorted((luminance(colours[name]), luminance(colours[ground])))[::-1]
                assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def test_plots_take_the_colours_of_the_page(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for figure in figures:
        assert "currentColor" in figure and "var(--mark)" in figure
        assert not re.search(r"#[0-9a-f]{6}\b", figure), "a colour that is the same in the dark"


def test_same_documents_same_bytes(found: Fields, not_found: Fields, page: str) -> None:
    again = [received(found, "a.json"), received(not_found, "b.json")]
    assert report.html(again) == page
    assert json.dumps(report.summary(again)) == json.dumps(report.summary(again))


# Strangers.

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></main><h1>x</h1>",
    "{{ 7 * 7 }}{% for x in [] %}",
    "&lt;script&gt;",
)


def poisoned(value: Any, text: str, path: str = "") -> Any:
    """Every text that a document may choose freely, replaced."""
    fixed = ("command", "created", "access", "supervision", "sha256", "combined.method", "scheme")
    if isinstance(value, str):
        return value if path.endswith(fixed) else text
    if isinstance(value, list):
        return [poisoned(item, text, path) for item in value]
    if isinstance(value, dict):
        made = {}
        for name, item in value.items():
            free = path.endswith(("versions", "seeds", "ledger")) and name not in (
                "candidates", "scored",
            )  # fmt: skip
            made[f"{text} {name}" if free else name] = poisoned(item, text, f"{path}.{name}")
        return made
    return value


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_a_document_stay_text(found: Fields, text: str) -> None:
    fields = found | {"results": found["results"][:1]}
    made = report.html([received(poisoned(fields, text), f"{text}.json")])
    seen, harmless = Page(made), Page(report.html([received(fields)]))
    assert text in seen.text, "it is shown as it is written"
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(a) for _, a in seen.tags] == [sorted(a) for _, a in harmless.tags]


def test_unknown_rules_and_roles_are_shown_as_such(found: Fields) -> None:
    text = Page(report.html([received(poisoned(found, "odd"))])).text
    assert "A rule that this version of the report does not know" in text


def test_signs_that_reorder_or_erase_text_are_replaced(found: Fields) -> None:
    fields = found | {"key": {"name": "a\u202eb\u0007c\x00d\ud800e", "fingerprint": "f"}}
    made = received(fields)
    assert made.fields["key"]["name"] == "a\ufffdb\ufffdc\ufffdd\ufffde"
    report.html([made]).encode("utf-8")


def test_what_is_unknown_in_a_document_is_left_out(found: Fields) -> None:
    made = received(found | {"surprise": "boo", "key": found["key"] | {"secret": "boo"}})
    assert "boo" not in json.dumps(report.summary([made]))


@pytest.mark.parametrize("place", ["suspect", "key"])
def test_a_secret_key_in_a_document_is_refused_and_not_repeated(found: Fields, place: str) -> None:
    secret = KEY.export_text()
    fields = found | {place: found[place] | {"name": f"x {secret}"}}
    with pytest.raises(RecordError, match="secret key, which is not repeated") as caught:
        received(fields)
    assert secret not in str(caught.value)


def put(path: str, value: Any) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        *way, last = path.split(".")
        holder: Any = fields
        for name in way:
            holder = holder[int(name)] if isinstance(holder, list) else holder[name]
        if value is KeyError:
            del holder[last]
        else:
            holder[last] = value

    return change


WRONG = {
    "alpha": [0.0, 1.0, "1e-5", True, None, KeyError],
    "created": ["yesterday", 5],
    "verdict": [False, "yes", 1],
    "suspect.access": ["ajar", None, ["open"]],
    "suspect.name": [None, 5, "x" * 5000],
    "supervision": ["none"],
    "results": [[], {}, None],
    "results.0.log10_pvalue": [-3.0, 1.0, None, 10**400],
    "results.0.log_bound": [-1.0],
    "results.0.ledger": [{}, {"candidates": 5, "scored": 4}, {"scored": 1, "candidates": 1}],
    "results.0.ledger.scored": [3.5, -1, True],
    "results.0.decoys.z": [[0.0, 1.0], "many"],
    "results.0.decoys.rank": [201],
    "results.0.effect": [0.9],
    "results.0.primary": ["yes"],
    "combined.method": ["mean"],
    "combined.log10_pvalue": [-1.0],
    "inputs": [[{"name": "x", "sha256": "short", "role": "texts"}], "none"],
    "seeds": [{"decoys": "x"}],
    "versions": [{"numpy": 2}],
    "alignment.rate": [1.2, "all"],
    "baseline.log_pvalue": [0.5],
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, vs in WRONG.items() for v in vs])
def test_a_document_that_was_changed_is_refused(found: Fields, path: str, value: Any) -> None:
    fields = copy.deepcopy(found)
    put(path, value)(fields)
    with pytest.raises(RecordError, match=r"result\.json: .*run the test again"):
        received(fields)


def test_an_e_process_has_to_fit_itself(not_found: Fields) -> None:
    for name, value in (("at", [3, 2, 1]), ("log10_e", [0.0])):
        fields = copy.deepcopy(not_found)
        fields["results"][0]["sequential"][name] = value
        with pytest.raises(RecordError, match="growing numbers of scores"):
            received(fields)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xfe", b"[1]", b"null", b"{}", b'{"command": "detect"}', b"NaN", b"[" * 10_000,
        b'{"command": "radioactivity test", "format": 1, "alpha": NaN}',
        b'{"command": "radioactivity test", "command": "radioactivity test"}',
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_with_what_to_do(data: bytes) -> None:
    with pytest.raises(RecordError, match=r"x\.json is .*radioactivity test --out FILE"):
        checked.parse("x.json", data)


def test_other_formats_are_refused(found: Fields) -> None:
    for number in (2, "1", None):
        with pytest.raises(RecordError, match="version of filigrane that ran the test"):
            received(found | {"format": number})


def test_too_large_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checked, "MAX_BYTES", 100)
    file = tmp_path / "big.json"
    file.write_bytes(b" " * 1000)
    with pytest.raises(RecordError, match=r"big\.json is larger"):
        checked.read(file)


def test_nothing_and_twice_the_same_are_refused(found: Fields) -> None:
    with pytest.raises(RecordError, match="nothing to report"):
        report.html([])
    with pytest.raises(RecordError, match="given twice"):
        report.summary([received(found), received(found, "copy.json")])


def test_both_files_are_written(found: Fields, tmp_path: Path) -> None:
    made = received(found)
    page, data = report.write([made], tmp_path / "out.html")
    assert page.read_text("utf-8") == report.html([made])
    read = json.loads(data.read_text("utf-8"))
    assert read == json.loads(json.dumps(report.summary([made])))
    assert read["documents"][0]["sha256"] == made.sha256
    assert read["documents"][0]["test"]["results"][0]["z"] == found["results"][0]["z"]
    with pytest.raises(RecordError, match=r"--out X\.html"):
        report.write([made], tmp_path / "out.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.html", "out.json"]
