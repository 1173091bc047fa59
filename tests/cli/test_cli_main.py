"""The command line from outside: help, start-up, signals, missing packages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from filigrane.cli.app import COMMANDS, functions
from filigrane.schemes import SCHEMES

PYTHON = sys.executable


def python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def filigrane(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "filigrane", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("command", ["", *(word for name in COMMANDS for word in functions(name))])
def test_every_help_mentions_json(run: Any, command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.code == 0
    # A server has no answer of its own to write.
    assert ("--json" in done.out) == (command not in ("engine serve", "serve"))
    if command in ("keygen", "embed", "detect", "trace"):
        assert "Exit codes: 0" in done.out


def test_help_is_light() -> None:
    code = (
        "import sys, filigrane.cli.main as m\n"
        "try: m.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numba', 'transformers', 'scipy', 'cryptography', 'keyring'}\n"
        "    sys.stderr.write(' '.join(sorted(heavy & set(sys.modules))))\n"
    )
    for command in ((), ("detect",)):
        start = time.perf_counter()
        done = python(code, *command, "--help")
        seconds = time.perf_counter() - start
        assert done.returncode == 0 and "--json" in done.stdout
        assert done.stderr == "", "imported for a help text"
        assert seconds < 20  # half a second on an idle machine; this one may be anything


def test_help_lists_every_command_and_version_works() -> None:
    done = filigrane("--help", env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = filigrane("--version")
    assert done.returncode == 0 and done.stdout.startswith("filigrane 0.")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\nfrom filigrane.cli.main import main; main()"
    )
    done = python(code, "--help")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and package in done.stderr
    assert "pip install 'filigrane[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_schemes(run: Any) -> None:
    listing = run("schemes", "--json").json["schemes"]
    assert [entry["name"] for entry in listing] == list(SCHEMES)
    for entry in listing:
        assert entry["tag"] == SCHEMES[entry["name"]]().tag
        assert ("greedy" in entry["decoding"]) == (entry["acts_on"] == "logits")
    table = run("schemes", env={"COLUMNS": "80"}).out
    assert all(name in table for name in SCHEMES) and "scoring=weighted" in table
    assert max(map(len, table.splitlines())) <= 80


def test_tables_fit_a_narrow_terminal(run: Any) -> None:
    key = ("--scheme", "gumbel", "--key-file", "acme.key")
    long = "folder-of-a-very-long-name/" * 3
    os.makedirs(long)
    Path(f"{long}x.jsonl").write_text(Path("mixed.jsonl").read_text())
    for command in (("detect", *key), ("trace", *key, "--users", "20")):
        out = run(*command, f"{long}x.jsonl", env={"COLUMNS": "80"}).out
        assert max(map(len, out.splitlines())) <= 80 and "name/x.jsonl:3" in out


def test_an_error_is_one_red_line_and_2(world: Any) -> None:
    command = ("detect", "--scheme", "gumbel", "--key-file", "missing.key", "root.jsonl")
    done = filigrane(*command, env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": "60"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("\x1b[31merror: missing.key: there is no such file")


def test_a_crash_shows_no_secret(world: Any) -> None:
    code = (
        "import filigrane.detection as d\n"
        "def bug(tokens, key, scheme, **options):\n"
        "    words = key.prf_keys(scheme.label); text = key.export_text()\n"
        "    raise RuntimeError('a bug')\n"
        "d.detect = bug\n"
        "from filigrane.cli.main import main; main()"
    )
    command = ("detect", "--scheme", "gumbel", "--json", "root.jsonl")
    done = python(code, *command, env=os.environ | {"FILIGRANE_KEY": world.key.export_text()})
    assert done.returncode == 70 and "RuntimeError: a bug" in done.stderr
    for secret in world.secrets:
        assert secret not in done.stdout + done.stderr


def test_interruption_keeps_what_was_found(world: Any, texts: Any) -> None:
    """And, while the process lives: its command line, which everybody can read, has no secret."""
    command = [PYTHON, "-m", "filigrane", "detect", "--scheme", "gumbel", "--user", "7", "--json"]
    process = subprocess.Popen(
        [*command, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"FILIGRANE_KEY": world.key.export_text()},
        # A job in the background inherits an ignored SIGINT, and python then leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(json.dumps(texts["seven"]).encode() + b"\nnot json\n")
    process.stdin.flush()
    # Told as soon as it is met: the first record is done, and the process waits for a third.
    assert b"stdin:2: is not valid JSON" in process.stderr.readline()
    visible = Path(f"/proc/{process.pid}/cmdline")
    if visible.exists():
        shown = visible.read_text()
        assert "filigrane" in shown and not any(secret in shown for secret in world.secrets)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    answer = json.loads(out)
    assert process.returncode == 130 and b"interrupted" in err and b"Traceback" not in err
    assert [result["found"] for result in answer["results"]] == [True]
    assert answer["summary"]["complete"] is False and len(answer["errors"]) == 1


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_progress_bar_does_not_swallow_results() -> None:
    master, slave = os.openpty()
    code = (
        "from filigrane.cli import render\n"
        "with render.progress('keys') as report:\n"
        "    report(1, 2, 'busy'); render.dump({'a': 1}); render.warn('look out')\n"
    )
    environment = os.environ | {"TERM": "xterm"}
    done = subprocess.run(
        [PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=slave, timeout=300, env=environment
    )
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert done.stdout == b'{"a": 1}\n' and "1/2 keys" in shown
    assert "\x1b[2K\x1b[33mlook out" in shown or "\nlook out" in shown, "on a line of its own"


def test_output_that_nobody_reads(world: Any) -> None:
    key = "--scheme gumbel --key-file acme.key --user 7"
    for flag in ("", "--json"):
        shell = (
            f"{PYTHON} -m filigrane detect {key} {flag} mixed.jsonl | true; echo ${{PIPESTATUS[0]}}"
        )
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300)
        assert done.stdout == "141\n" and done.stderr == ""


def test_a_stream_that_nobody_reads(world: Any) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import pytest, clikit\n"
        "patch = pytest.MonkeyPatch()\n"
        "clikit.install_toy(patch)\n"
        "from filigrane.cli.main import main; main()"
    )
    embed = ("embed", "-m", "toy", "-s", "gumbel", "-k", "acme.key", "-p", "one")
    reading, writing = os.pipe()
    os.close(reading)
    command = [PYTHON, "-c", code, str(Path(__file__).parents[1]), *embed]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=300)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.parametrize("error", [MemoryError, OverflowError])
def test_too_much_at_once(run: Any, monkeypatch: Any, error: type[Exception]) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("filigrane.tracing.trace", fail)
    key = ("--scheme", "gumbel", "--key-file", "acme.key")
    done = run("trace", *key, "--users", "9", "root.jsonl")
    assert done.code == 2 and done.out == "" and "--users A:B" in done.err


@pytest.mark.model
def test_embed_detect_trace_on_text(tmp_path: Path) -> None:
    """The whole way with a real model, through text: what a reader would copy out of a page."""
    calm = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": calm}
    key = ("--scheme", "gumbel", "--key-file", "acme.key")
    assert filigrane("keygen", "acme", "--out", "acme.key", **options).returncode == 0
    (tmp_path / "p.txt").write_text("Write a story about a cat.\nDescribe a walk through Venice.\n")
    model = ("--model", "smollm2", "--max-new-tokens", "100", "--seed", "1", "--user", "42")
    command = ("embed", *key, *model, "--prompts", "p.txt", "--out", "o.jsonl", "--json")
    process = subprocess.run(
        [PYTHON, "-m", "filigrane", *command],
        capture_output=True,
        text=True,
        timeout=900,
        **options,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["written"] == 2
    made = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    (tmp_path / "page.txt").write_text(made[0]["text"])
    text = ("--tokenizer", "smollm2", "--json", "page.txt")
    found = filigrane("detect", *key, "--user", "42", *text, **options)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["results"][0]["log10_pvalue"] < -10
    assert filigrane("detect", *key, "--user", "41", *text, **options).returncode == 1
    traced = filigrane("trace", *key, "--users", "1000", *text, **options)
    assert traced.returncode == 0, traced.stderr
    assert json.loads(traced.stdout)["results"][0]["named"] == ["acme/42"]
    whole = filigrane(
        "detect", *key, "--user", "42", "o.jsonl", "--tokenizer", "smollm2", **options
    )
    assert whole.returncode == 0, whole.stderr


def test_the_list_of_commands_says_what_they_say() -> None:
    from filigrane.cli import app

    for name, about in app.COMMANDS.items():
        inside = functions(name)
        if list(inside) == [name]:
            assert app._paragraphs(inside[name]).partition("\n\n")[0] == about


@pytest.mark.parametrize("name", COMMANDS)
def test_a_group_lists_its_commands(run: Any, name: str) -> None:
    inside = functions(name)
    if list(inside) == [name]:
        return
    done = run(name, "--help", env={"COLUMNS": "80"})
    assert done.code == 0 and " ".join(COMMANDS[name].split()[:5]) in done.out
    for words, function in inside.items():
        assert f" {words.removeprefix(name).strip()} " in done.out
        assert (function.__doc__ or "").split()[0] in done.out
        assert f" {words} [OPTIONS]" in run(*words.split(), "-h").out
    assert max(map(len, done.out.splitlines())) <= 80
    for wrong, named in ((), "Missing command"), (("no-such-command",), "no-such-command"):
        done = run(name, *wrong)
        assert done.code == 2 and done.out == "" and named in done.err


def test_a_timing_through_the_command_line(run: Any) -> None:
    done = run("bench", "detect", "--quick", "--json", "--out", "d.json")
    assert done.code == 0 and done.json["benchmark"] == "detect" and done.json["quick"]
    assert json.loads(Path("d.json").read_text()) == done.json and not Path("d.json.part").exists()
    assert "median_us" in run("bench", "detect", "--quick").out
