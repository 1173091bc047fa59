"""The code in the documents runs, block by block, in one namespace per document."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(
    r"(?P<model><!-- model -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```", re.M | re.S
)


def blocks(path: Path) -> list[tuple[int, bool, str]]:
    """(line, whether it needs the real model, code) of the Python blocks of a document."""
    text = path.read_text()
    return [
        (text.count("\n", 0, match.start("code")) + 1, bool(match["model"]), match["code"])
        for match in BLOCK.finditer(text)
        if match["language"] == "python"
    ]


def run(path: Path, *, model: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "document"}
    for line, needs_model, code in blocks(path):
        if needs_model and not model:
            continue
        # Padded so that a traceback names the line of the document.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


WITH_CODE = [path for path in DOCUMENTS if blocks(path)]
CORE = [path for path in WITH_CODE if any(not needs for _, needs, _ in blocks(path))]
MODEL = [path for path in WITH_CODE if any(needs for _, needs, _ in blocks(path))]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, model=False, folder=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.model
@pytest.mark.parametrize("path", MODEL, ids=lambda path: path.name)
def test_all_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, model=True, folder=tmp_path, monkeypatch=monkeypatch)


def test_readme_shows_code_at_once() -> None:
    lines = (ROOT / "README.md").read_text().split("\n")
    assert next(number for number, line in enumerate(lines) if "```python" in line) <= 20


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (path.parent / target).exists(), f"{path.name} points to {target}"


def test_nothing_was_left_to_fill_in() -> None:
    for path in DOCUMENTS:
        assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX)\b|\b[A-Z]+_TABLE\b", path.read_text()), (
            path
        )
