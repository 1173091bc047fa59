"""Keys, files and texts for the tests of the command line; see clikit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

import clikit
import filigrane as fg
from clikit import Done, Record, Run, World, record
from filigrane.cli.app import build


@pytest.fixture(scope="session")
def texts() -> dict[str, Record]:
    """Tokens written once: by the root, by users 7 and 8, and by nobody."""
    key = fg.Key.generate("acme", slots=4)
    made = {
        "root": record(1, key),
        "seven": record(2, key.user(7)),
        "eight": record(3, key.user(8)),
    }
    made["seven_too"] = record(4, key.user(7))
    made["plain"] = record(5, None)
    return made | {"key": {"text": key.export_text()}}


@pytest.fixture
def world(tmp_path: Path, texts: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("FILIGRANE_KEY", "FILIGRANE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    here = World(
        tmp_path, fg.Key.from_text(texts["key"]["text"]), fg.Key.generate("other", slots=4)
    )
    here.key.save("acme.key")
    here.other.save("other.key")
    here.watch(here.key)
    here.watch(here.other)
    here.write("seven.jsonl", [texts["seven"], texts["seven_too"]])
    here.write("mixed.jsonl", [texts["seven"], texts["plain"], texts["eight"]])
    here.write("root.jsonl", [texts["root"]])
    return here


@pytest.fixture
def run(world: World) -> Run:
    def go(
        *arguments: str, input: str | bytes | None = None, env: Mapping[str, str] | None = None
    ) -> Done:
        width = {"COLUMNS": "100", "NO_COLOR": "1"}
        result = CliRunner().invoke(
            build(), list(arguments), input=input, env=width | dict(env or {})
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code != 70, result.stderr
        if result.exit_code == 2 and "Usage:" not in result.stderr:
            errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, result.stderr
        everything = result.stdout + result.stderr
        everything += "".join(
            path.read_text(errors="replace") for path in world.folder.glob("*.jsonl")
        )
        for secret in world.secrets:
            assert secret not in everything, "a secret has leaked"
        return Done(result.exit_code, result.stdout, result.stderr)

    return go


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces models and tokenizers; the list says what was loaded."""
    return clikit.install_toy(monkeypatch)
