"""filigrane radioactivity report: two files, one answer, and refusals that say what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from filigrane.study import checked
from filigrane.study import report as reports
from study.radioactive_results import closed_document, document

Report = Callable[..., Any]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {
        "found.json": json.dumps(document(n=1500, decoys=20)),
        "not.json": json.dumps(closed_document(count=20)),
    }


@pytest.fixture
def go(run: Report, tmp_path: Path, results: dict[str, str]) -> Report:
    for name, text in results.items():
        (tmp_path / name).write_text(text)
    return lambda *arguments: run("radioactivity", "report", *arguments)


def test_a_page_and_its_data_are_written(go: Report, tmp_path: Path) -> None:
    done = go("found.json", "not.json", "--out", "out/page.html")
    assert done.code == 0, done.err
    assert "trace found" in done.out and "no trace found" in done.out
    assert "page.html" in done.err and "page.json written" in done.err.replace("\n", " ")
    page = (tmp_path / "out" / "page.html").read_text("utf-8")
    documents = [checked.read(name) for name in ("found.json", "not.json")]
    assert page == reports.html(documents)
    data = json.loads((tmp_path / "out" / "page.json").read_text("utf-8"))
    assert [entry["found"] for entry in data["documents"]] == [True, False]


def test_json_is_one_document(go: Report, tmp_path: Path) -> None:
    done = go("not.json", "--json")
    assert done.code == 0 and done.err == ""
    assert done.json["files"] == ["report.html", "report.json"]
    assert done.json["documents"][0]["name"] == "not.json"
    written: dict[str, Any] = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert written == {name: value for name, value in done.json.items() if name != "files"}


def test_results_are_never_replaced(go: Report, tmp_path: Path, results: dict[str, str]) -> None:
    for out in ("not.html", "not.json", "../" + tmp_path.name + "/not.html"):
        done = go("not.json", "--out", out)
        assert done.code == 2 and "one of the results; choose another --out" in done.err
    assert (tmp_path / "not.json").read_text() == results["not.json"]
    assert not (tmp_path / "not.html").exists()


def test_what_is_no_result_is_refused_and_nothing_written(go: Report, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "cut.json").write_text('{"command": "radioactivity test", "format": 1}')
    for name, words in (
        ("bad.json", "bad.json is no result of a radioactivity test"),
        ("cut.json", "run the test again"),
        ("missing.json", "missing.json: No such file"),
        (".", "Is a directory"),
    ):
        done = go("not.json", name, "--out", "page.html")
        assert done.code == 2 and done.out == "", name
        assert words in " ".join(done.err.split()), done.err
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "page.json").exists()


def test_a_name_cannot_drive_the_terminal(go: Report, tmp_path: Path) -> None:
    fields = closed_document(count=20)
    fields["suspect"]["name"] = "evil\x1b[31m[bold]x\u202ey"
    (tmp_path / "evil.json").write_text(json.dumps(fields))
    done = go("evil.json")
    assert done.code == 0 and "\x1b" not in done.out + done.err and "\u202e" not in done.out
    assert "[bold]" in done.out, "markup is text"
