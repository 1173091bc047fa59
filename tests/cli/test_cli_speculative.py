"""filigrane speculative certify, run as a command of its own."""

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from filigrane.cli import speculative
from filigrane.errors import FiligraneError
from filigrane.speculative import nogo


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(speculative.SUBCOMMANDS["certify"])
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"})


def test_certificate_for_people() -> None:
    done = run("--pairs", "200")
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    row = next(line for line in lines if line.startswith("3 tokens  "))
    assert row.split()[2:7] == ["0.7000", "0.6308", "0.4000", "0.6000", "0.7000"]
    held = next(line for line in lines if line.endswith("claims held")).split()
    assert held[0] == held[2] != "0"
    assert "OTMC gives up R_E(P)" in done.stdout and "…" not in done.stdout


def test_json() -> None:
    done = run("-V", "2", "-V", "5", "--pairs", "100", "--seed", "3", "--json")
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    document = json.loads(done.stdout)
    assert document["held"] and all(claim["held"] for claim in document["claims"])
    assert [row["size"] for row in document["random"]] == [2, 5]
    assert [row["acceptance"] for row in document["strengths"]][0::4] == pytest.approx(
        [1 / 2, 1 / 3]
    )
    assert document["worked"][3]["race"] == pytest.approx(0.6257, abs=5e-5)
    assert document["worked"][1]["otmc"]["acceptance"] == pytest.approx(0.7)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_claim_that_fails_is_1(monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]) -> None:
    monkeypatch.setattr(nogo, "race", nogo.overlap)
    done = run("-V", "3", "--pairs", "50", *form)
    assert done.exit_code == 1
    if form:
        assert not json.loads(done.stdout)["held"]
    else:
        assert "error: a claim did not hold" in done.stderr


def test_sizes_out_of_reach() -> None:
    # In the application this is one red line and exit code 2.
    assert isinstance(run("-V", "6").exception, FiligraneError)
    assert run("--pairs", "0").exit_code == 2
