"""Where keys come from, and that they never show. `run` looks for secrets in everything it sees."""

import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import filigrane as fg
from filigrane.keys import MAX_SLOTS

DETECT = ("detect", "--scheme", "gumbel", "root.jsonl")


@pytest.fixture
def ring(monkeypatch: Any) -> dict[tuple[str, str], str]:
    """A keyring in memory."""
    store: dict[tuple[str, str], str] = {}
    module = types.ModuleType("keyring")
    module.get_password = lambda service, name: store.get((service, name))  # type: ignore[attr-defined]
    module.set_password = lambda s, n, text: store.__setitem__((s, n), text)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", module)
    return store


def test_keygen_writes_a_key_for_its_owner(run: Any, world: Any) -> None:
    done = run("keygen", "new", "--slots", "3", "--out", "new.key")
    key = fg.Key.load("new.key")
    world.watch(key)
    assert done.code == 0 and key.fingerprint in done.out and (key.name, key.slots) == ("new", 3)
    assert stat.S_IMODE(Path("new.key").stat().st_mode) == 0o600
    assert key.export_text()[-20:] not in done.out + done.err
    before = Path("new.key").read_bytes()
    assert run("keygen", "new", "--out", "new.key").code == 2
    assert Path("new.key").read_bytes() == before


def test_keygen_json(run: Any) -> None:
    done = run("keygen", "new", "--out", "new.key", "--json")
    key = fg.Key.load("new.key")
    assert done.json == {
        "name": "new",
        "slots": 8,
        "fingerprint": key.fingerprint,
        "file": "new.key",
    }


def test_slots_end_where_keys_end(run: Any) -> None:
    most = run("keygen", "most", "--slots", str(MAX_SLOTS), "--out", "most.key", "--json")
    assert most.json["slots"] == MAX_SLOTS
    assert run("keygen", "more", "--slots", str(MAX_SLOTS + 1), "--out", "more.key").code == 2
    assert not Path("more.key").exists()


def test_keygen_prints_the_secret_only_when_told(run: Any) -> None:
    done = run("keygen", "new", "--out", "-")
    assert fg.Key.from_text(done.out).name == "new" and done.out.count("\n") == 1
    assert fg.Key.from_text(done.out).fingerprint in done.err
    assert run("keygen", "new", "--out", "-", "--json").code == 2
    assert run("keygen", "new").code == 2
    assert run("keygen", "new", "--out", "a.key", "--keyring").code == 2
    assert not Path("a.key").exists()
    assert run("keygen", "no spaces", "--out", "a.key").code == 2


def test_keyring(run: Any, world: Any, ring: Any) -> None:
    done = run("keygen", "new", "--keyring", "--json")
    text = ring["filigrane", "new"]
    world.watch(fg.Key.from_text(text))
    assert done.code == 0 and done.json["keyring"] == "new"
    assert run("keygen", "new", "--keyring").code == 2 and ring["filigrane", "new"] == text
    assert run(*DETECT, "--keyring", "new").code == 1
    ring["filigrane", "acme"] = world.key.export_text()
    assert run(*DETECT, "--keyring", "acme").code == 0
    done = run(*DETECT, "--keyring", "nobody")
    assert done.code == 2 and "filigrane keygen nobody --keyring" in done.err
    ring["filigrane", "broken"] = world.key.export_text()[:-1]
    assert run(*DETECT, "--keyring", "broken").code == 2


def test_a_keyring_that_fails_does_not_quote(run: Any, world: Any, monkeypatch: Any) -> None:
    module = types.ModuleType("keyring")

    def fail(*arguments: str) -> None:
        raise RuntimeError(f"cannot store {arguments} {world.key.export_text()}")

    module.get_password = module.set_password = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", module)
    assert run(*DETECT, "--keyring", "acme").code == 2
    assert run("keygen", "new", "--keyring").code == 2
    monkeypatch.setitem(sys.modules, "keyring", None)
    done = run(*DETECT, "--keyring", "acme")
    assert done.code == 2 and "filigrane[keyring]" in done.err


def test_every_source_works(run: Any, world: Any) -> None:
    assert run(*DETECT, "--key-file", "acme.key").code == 0
    assert run(*DETECT, env={"FILIGRANE_KEY_FILE": "acme.key"}).code == 0
    assert run(*DETECT, env={"FILIGRANE_KEY": world.key.export_text()}).code == 0
    # An option is more specific than the environment.
    assert run(*DETECT, "--key-file", "acme.key", env={"FILIGRANE_KEY_FILE": "other.key"}).code == 0
    assert run(*DETECT, "--key-file", "other.key", env={"FILIGRANE_KEY_FILE": "acme.key"}).code == 1


def test_no_source_or_several(run: Any, world: Any) -> None:
    assert "no key" in run(*DETECT).err
    both = {"FILIGRANE_KEY_FILE": "acme.key", "FILIGRANE_KEY": world.key.export_text()}
    done = run(*DETECT, env=both)
    assert done.code == 2 and "both" in done.err
    done = run(*DETECT, "--key-file", "acme.key", "--keyring", "acme")
    assert done.code == 2 and "--key-file and --keyring" in done.err
    trace = ("trace", "--scheme", "gumbel", "root.jsonl", "-k", "acme.key")
    assert "the same key" in run(*trace, "-k", "acme.key").err
    assert run(*DETECT, "--key-file", "missing.key").code == 2


def test_a_key_on_the_command_line_is_refused_unread(run: Any, world: Any) -> None:
    text = world.key.export_text()
    body = text.rsplit(":", 1)[1]
    for arguments in (
        (*DETECT, "--key-file", text),
        (*DETECT, f"--key-file={text}"),
        (*DETECT, f"-k{text}"),
        (*DETECT, "-k", body),
        (*DETECT, "-k", body.upper()),
        (*DETECT, "-k", text[:-5]),
        (*DETECT, "-k", f"  {text}\n"),
        (*DETECT, "--keyring", text),
        (*DETECT, "--no-such-option", text),
        (*DETECT, "--alpha", text),
        (*DETECT, text),
        ("keygen", text, "--out", "a.key"),
        ("keygen", "a", "--out", text),
        ("trace", "--scheme", text, "--users", text),
        ("embed", "--model", text),
        (text,),
        (text, "--json"),
    ):
        done = run(*arguments)
        assert done.code == 2 and done.out == "", arguments[0]
        assert "history" in done.err, done.err


def test_keys_in_the_wrong_variable_or_damaged(run: Any, world: Any) -> None:
    text = world.key.export_text()
    done = run(*DETECT, env={"FILIGRANE_KEY_FILE": text})
    assert done.code == 2 and "FILIGRANE_KEY_FILE holds the text of a key" in done.err
    done = run(*DETECT, env={"FILIGRANE_KEY": "acme.key"})
    assert done.code == 2 and "FILIGRANE_KEY:" in done.err
    swapped = text[:-3] + ("a" if text[-3] != "a" else "b") + text[-2:]
    for damaged in (text[:-1], text + "a", swapped, text.upper(), text.replace(":", " "), text * 2):
        for flag in ((), ("--json",)):
            assert run(*DETECT, *flag, env={"FILIGRANE_KEY": damaged}).code == 2
        Path("bad.key").write_text(damaged)
        Path("bad.key").chmod(0o600)
        assert run(*DETECT, "--key-file", "bad.key").code == 2
        Path("bad.key").unlink()
    Path("acme.key").chmod(0o644)
    done = run(*DETECT, "--key-file", "acme.key")
    assert done.code == 2 and "chmod 600" in done.err


def test_a_key_file_taken_for_something_else(run: Any, toy: Any) -> None:
    key = ("--scheme", "gumbel", "--key-file", "other.key")
    for name in ("detect", "trace"):
        assert run(name, *key, "acme.key").code == 2
        assert run(name, *key, "acme.key", "--format", "jsonl", "--json").code == 2
        assert run(name, *key, "acme.key", "-t", "toy", "--json").code == 1
    done = run("embed", "--model", "toy", *key, "--prompts", "acme.key", "--out", "o.jsonl")
    assert done.code == 3 and "text of a key" in done.err


def test_every_command_keeps_quiet(run: Any, toy: Any) -> None:
    """The plain runs, once more with --json and without: `run` does the listening."""
    key = ("--scheme", "gumbel", "--key-file", "acme.key")
    model = ("--model", "toy", "--max-new-tokens", "20")
    for flag in ((), ("--json",)):
        assert run("schemes", *flag).code == 0
        assert run("keygen", "x", "--out", f"x{len(flag)}.key", *flag).code == 0
        assert run("embed", *model, *key, "--prompt", "hi", *flag).code == 0
        assert run("embed", *model, *key, "--prompt", "hi", "--out", "o.jsonl", *flag).code == 0
        assert run("detect", *key, "mixed.jsonl", *flag).code == 1
        assert run("trace", *key, "--users", "20", "mixed.jsonl", *flag).code == 1


def test_a_missing_key_file_is_made_with_keygen(run: Any) -> None:
    done = run(*DETECT, "--key-file", "missing.key")
    assert done.code == 2 and "`filigrane keygen NAME --out FILE`" in done.err
    assert "Key.generate" not in done.err
