"""The demonstration as make demo runs it: real weights, every claim, and an exit code."""

import json
import subprocess
import sys

import pytest


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "filigrane", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.model
def test_every_claim_holds() -> None:
    done = demo("--json", "--users", "20000")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["claims_hold"] and len(answer["texts"]) == 45
    assert {text["scheme"].partition(":")[0] for text in answer["texts"]} == {
        *("gumbel", "greenlist", "tournament", "gamma", "delta")
    }
    marked = [text for text in answer["texts"] if text["user"]]
    assert all(text["named"] == [text["user"]] and text["log10_p"] < -6 for text in marked)
    assert "filigrane-key" not in done.stdout + done.stderr


@pytest.mark.model
def test_claims_that_fail_are_said() -> None:
    done = demo("--tokens", "20", "--users", "10")  # too few tokens for the weaker marks
    assert done.returncode == 1
    assert "the mark was not found with its key" in done.stderr
    assert "rows are not as claimed" in done.stderr


@pytest.mark.model
def test_a_model_that_is_not_there() -> None:
    done = demo("--model", "no/such/folder")
    assert done.returncode == 2
    assert "no/such/folder" in done.stderr and "Traceback" not in done.stderr
