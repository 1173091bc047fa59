"""SoftHSM: keys that cannot be read, PINs, lost tokens, duplicates, forks and stuck processes."""

import os
import subprocess
import sys
import time
from typing import Any

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass

import kmskit
from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.opening import create_kms, open_kms
from filigrane.kms.pkcs11 import Pkcs11Root


def keys(system: kmskit.System, label: str) -> list[Any]:
    """The token's keys by python-pkcs11 alone, in the session that is logged in."""
    token = pkcs11.lib(system.settings["module"]).get_token(token_label="tests")
    session = token.open()
    found = session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY})
    return [key for key in found if key.label.startswith(label)]


def child(settings: dict[str, str], code: str) -> "subprocess.CompletedProcess[str]":
    """Code in a process of its own, where nobody has logged in."""
    head = f"settings = {settings!r}\nfrom filigrane.kms.opening import open_kms\n"
    return subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60
    )


def test_keys_are_made_in_the_token_and_stay_there(pkcs11_token: kmskit.Pkcs11) -> None:
    settings, kms = pkcs11_token.fresh()
    kms.rotate()
    label = settings["label"]
    found = {key.label: key for key in keys(pkcs11_token, label)}
    assert set(found) == {f"{label}-{use}-{n}" for use in ("mac", "wrap") for n in (1, 2)}
    for key in found.values():
        for attribute, expected in {
            Attribute.PRIVATE: True,
            Attribute.SENSITIVE: True,
            Attribute.ALWAYS_SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            Attribute.NEVER_EXTRACTABLE: True,
            Attribute.LOCAL: True,
            Attribute.MODIFIABLE: False,
        }.items():
            assert key[attribute] is expected, attribute
        with pytest.raises(pkcs11.AttributeSensitive):
            key[Attribute.VALUE]
    assert found[f"{label}-mac-1"].key_length == 256


@pytest.mark.parametrize(
    ("sensitive", "extractable"), [(False, True), (True, True), (False, False)]
)
def test_a_root_that_could_be_read_out_is_refused(
    pkcs11_token: kmskit.Pkcs11, sensitive: bool, extractable: bool
) -> None:
    settings, kms = pkcs11_token.fresh()
    token = pkcs11.lib(settings["module"]).get_token(token_label="tests")
    with token.open(rw=True) as session:
        session.generate_key(
            KeyType.GENERIC_SECRET,
            256,
            label=f"{settings['label']}-mac-2",
            store=True,
            capabilities=MechanismFlag.SIGN,
            template={Attribute.SENSITIVE: sensitive, Attribute.EXTRACTABLE: extractable},
        )
        session.generate_key(KeyType.AES, 256, label=f"{settings['label']}-wrap-2", store=True)
    with pytest.raises(KmsError, match="read out"):
        open_kms(settings)
    assert kms.versions() == (1, 2)


def test_two_keys_of_one_name_are_refused(pkcs11_token: kmskit.Pkcs11) -> None:
    settings, kms = pkcs11_token.fresh()
    kms.mac(1, b"m")
    token = pkcs11.lib(settings["module"]).get_token(token_label="tests")
    with token.open(rw=True) as session:
        session.generate_key(
            KeyType.GENERIC_SECRET,
            256,
            label=f"{settings['label']}-mac-1",
            store=True,
            capabilities=MechanismFlag.SIGN,
        )
    with pytest.raises(KmsError, match="2 keys"):
        open_kms(settings)


def test_a_wrong_pin_is_tried_once(pkcs11_token: kmskit.Pkcs11) -> None:
    file = pkcs11_token.secret_file("wrong-pin", "7654321")
    code = (
        "from filigrane.errors import KmsError, KmsUnavailable\n"
        "for _ in range(2):\n"
        "    try: open_kms(settings)\n"
        "    except KmsUnavailable: print('unavailable')\n"
        "    except KmsError as error: print(error)\n"
        f"open_kms({{**settings, 'pin_file': {pkcs11_token.settings['pin_file']!r}}})\n"
        "print('opened')\n"
    )
    done = child(pkcs11_token.settings | {"pin_file": file}, code)
    assert done.stdout.count("refuses the PIN") == 2 and "opened" in done.stdout, done.stderr
    assert "7654321" not in done.stdout + done.stderr
    # In this process somebody is logged in, and still another PIN opens nothing.
    with pytest.raises(KmsError, match="PIN"):
        open_kms(pkcs11_token.settings | {"pin_file": file})


def test_modules_and_tokens_that_are_not_there(pkcs11_token: kmskit.Pkcs11) -> None:
    settings = pkcs11_token.settings
    for module in ("/nonexistent.so", settings["pin_file"]):
        with pytest.raises(KmsError, match="no PKCS#11 module"):
            open_kms(settings | {"module": module})
    with pytest.raises(KmsUnavailable, match="not there"):
        open_kms(settings | {"token": "none"})
    with pytest.raises(KmsError, match="no root"):
        open_kms(settings | {"label": "none"})
    with pytest.raises(KmsError, match="already"):
        create_kms(settings)
    with pytest.raises(KmsError, match="label"):
        open_kms(settings | {"label": "a b"})


def test_closing_one_root_leaves_the_others(pkcs11_token: kmskit.Pkcs11) -> None:
    first, second = pkcs11_token.again(), pkcs11_token.again()
    first.close()
    assert len(second.mac(1, b"m").reveal()) == 32


def test_who_closes_the_last_root_logs_out(pkcs11_token: kmskit.Pkcs11) -> None:
    code = (
        "from filigrane.kms import pkcs11_module as ours\n"
        "first, second = open_kms(settings), open_kms(settings)\n"
        "(module,) = ours._modules.values()\n"
        "for root in (first, second):\n"
        "    print('tests' in module.tokens)\n"
        "    root.close()\n"
        "print('tests' in module.tokens)\n"
    )
    done = child(pkcs11_token.settings, code)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


def test_a_token_that_computes_something_else(
    pkcs11_token: kmskit.Pkcs11, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some modules draw the nonce themselves and put it in front, or cut MACs."""

    class Odd:
        def encrypt(self, data: bytes, mechanism: object, mechanism_param: object) -> bytes:
            return bytes(12 + len(data) + 16)

        def sign(self, data: bytes, mechanism: object) -> bytes:
            return bytes(20)

    kms = pkcs11_token.again()
    monkeypatch.setattr(Pkcs11Root, "_key", lambda *_: Odd())
    with pytest.raises(KmsError, match="as AES-GCM does"):
        kms.wrap(_Secret(b"data"), b"context")
    with pytest.raises(KmsError, match="no MAC of 32 bytes"):
        kms.mac(1, b"m")


def test_logged_out_by_somebody_else(pkcs11_token: kmskit.Pkcs11) -> None:
    kms = pkcs11_token.again()
    before = kms.mac(1, b"m").reveal()
    token = pkcs11.lib(pkcs11_token.settings["module"]).get_token(token_label="tests")
    # Sessions share their login: closing one that has it logs all of them out.
    from filigrane.kms import pkcs11_module as ours

    opened = ours._modules[pkcs11_token.settings["module"]].tokens["tests"]
    opened.session.close()
    token.open().close()
    assert kms.mac(1, b"m").reveal() == before


def test_after_a_fork_it_has_to_be_opened_anew(pkcs11_token: kmskit.Pkcs11) -> None:
    code = (
        "import os, sys\n"
        "kms = open_kms(settings)\n"
        "before = kms.mac(1, b'm').reveal()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try: kms.mac(1, b'm')\n"
        "    except OSError as error: print(error, flush=True)\n"
        "    kms.close()\n"
        "    print(open_kms(settings).mac(1, b'm').reveal() == before, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(kms.mac(1, b'm').reveal() == before)\n"
    )
    done = child(pkcs11_token.settings, code)
    assert "does not survive a fork" in done.stdout, done.stderr
    assert done.stdout.count("True") == 2, done.stdout + done.stderr


def test_a_process_ends_though_a_call_is_stuck(pkcs11_token: kmskit.Pkcs11) -> None:
    code = (
        "import sys\n"
        "kms = open_kms(settings)\n"
        "kms.mac(1, b'm')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try: kms.mac(1, b'm')\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    head = f"settings = {pkcs11_token.settings!r}\nfrom filigrane.kms.opening import open_kms\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    pkcs11_token.hang()
    try:
        start = time.monotonic()
        said, _ = process.communicate("go\n", timeout=60)
        assert said == "KmsUnavailable\n" and time.monotonic() - start < 10
    finally:
        process.kill()
        pkcs11_token.resume()


def test_what_nobody_waits_for_is_not_done(pkcs11_token: kmskit.Pkcs11) -> None:
    settings, kms = pkcs11_token.fresh()
    pkcs11_token.hang()
    try:
        for call in (lambda: kms.mac(1, b"m"), kms.rotate, kms.rotate):
            with pytest.raises(KmsUnavailable):
                call()
    finally:
        pkcs11_token.resume()
    assert kms.versions() == (1,)
    assert os.getpid() and settings["label"] not in kms.protection
    assert kms.unwrap(kms.wrap(_Secret(b"d"), b"c"), b"c").reveal() == b"d"
