"""The local root: its file, read by independent code, damaged, shared and interrupted."""

import base64
import hashlib
import hmac
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms import local
from filigrane.kms.local import LocalRoot

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_SCRYPT_N", 1 << 11)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    LocalRoot.create(tmp_path / "root", _Secret(PASSPHRASE)).close()
    return tmp_path / "root"


def opened(path: Path, passphrase: str = PASSPHRASE) -> LocalRoot:
    return LocalRoot.open(path, _Secret(passphrase))


def plain(path: Path) -> dict[str, list[str]]:
    """The file's keys by its description alone."""
    outer = json.loads(path.read_text())
    salt, sealed = bytes.fromhex(outer["salt"]), base64.b64decode(outer["sealed"])
    key = hashlib.scrypt(
        PASSPHRASE.encode(), salt=salt, n=outer["scrypt_n"], r=8, p=1, maxmem=1 << 28, dklen=32
    )
    header = f"filigrane-local-root-1:{outer['scrypt_n']}:{outer['salt']}".encode()
    found: dict[str, list[str]] = json.loads(AESGCM(key).decrypt(sealed[:12], sealed[12:], header))
    return found


def test_the_file_is_what_the_description_says(path: Path) -> None:
    root = opened(path)
    root.rotate()
    keys = {number: [bytes.fromhex(key) for key in pair] for number, pair in plain(path).items()}
    assert list(keys) == ["1", "2"] and len({key for pair in keys.values() for key in pair}) == 4
    expected = hmac.new(keys["2"][0], b"message", hashlib.sha256).digest()
    assert root.mac(2, b"message").reveal() == expected
    blob = root.wrap(_Secret(b"data"), b"context")
    assert blob[:9] == b"fgw1\x01\x00\x00\x00\x02"
    bound = blob[:9] + b"context"
    assert AESGCM(keys["2"][1]).decrypt(blob[9:21], blob[21:], bound) == b"data"
    # A MAC must never give a wrapping key away.
    assert keys["1"][0] != keys["1"][1]


def test_the_real_cost(tmp_path: Path) -> None:
    # In a process of its own: the tests of this one have made it cheap.
    code = (
        "import sys\nfrom filigrane.keys import _Secret\n"
        "from filigrane.kms.local import LocalRoot\n"
        "LocalRoot.create(sys.argv[1], _Secret('correct horse battery staple'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "root")], check=True)
    assert json.loads((tmp_path / "root").read_text())["scrypt_n"] == 1 << 16
    opened(tmp_path / "root")


def test_nobody_else_may_read_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    root = opened(path)
    root.rotate()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for mode in (0o640, 0o604, 0o660, 0o777):
        path.chmod(mode)
        with pytest.raises(KmsError, match="chmod 600"):
            opened(path)
        with pytest.raises(KmsError, match="chmod 600"):
            root.mac(1, b"m")
    path.chmod(0o600)
    assert len(root.mac(1, b"m").reveal()) == 32


def test_a_root_is_never_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KmsError, match="exists"):
        LocalRoot.create(path, _Secret(PASSPHRASE))
    assert path.read_bytes() == before


def test_passphrases(path: Path, tmp_path: Path) -> None:
    with pytest.raises(KmsError, match="passphrase is another"):
        opened(path, PASSPHRASE + "!")
    with pytest.raises(KmsError, match="12 characters"):
        LocalRoot.create(tmp_path / "short", _Secret("too short"))
    assert not (tmp_path / "short").exists()


def test_a_damaged_file_is_refused(path: Path) -> None:
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            root = opened(path)
        except KmsError:
            continue
        # White space and the like may change; the root may not.
        assert plain(path) and root.versions() == (1,)
    for bad in (b"", b"{}", good[:-30], b"[" * 100_000, b"\xff" * 20, b'{"format": 1}'):
        path.write_bytes(bad)
        with pytest.raises(KmsError):
            opened(path)
    path.write_bytes(good)
    opened(path)


def test_a_file_that_asks_for_endless_work_is_refused(path: Path) -> None:
    outer = json.loads(path.read_text())
    for work in (1 << 40, 3, 0, -4, 1 << 9):
        path.write_text(json.dumps(outer | {"scrypt_n": work}))
        with pytest.raises(KmsError, match="damaged"):
            opened(path)


def test_a_rotation_that_is_interrupted_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, before = opened(path), path.read_bytes()

    def stop(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(KmsUnavailable, match="No space"):
            root.rotate()
    assert path.read_bytes() == before and root.versions() == (1,)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["root", "root.lock"]
    assert root.rotate() == 2


def test_processes_share_a_file(path: Path) -> None:
    code = (
        "import sys\nfrom filigrane.keys import _Secret\n"
        "from filigrane.kms.local import LocalRoot\n"
        "root = LocalRoot.open(sys.argv[1], _Secret(sys.stdin.readline()[:-1]))\n"
        "print(*[root.rotate() for _ in range(5)])"
    )
    here = opened(path)
    first = here.mac(1, b"m").reveal()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    made = [int(n) for worker in workers for n in worker.communicate(PASSPHRASE + "\n")[0].split()]
    assert sorted(made) == list(range(2, 17))
    assert here.versions() == tuple(range(1, 17)) and here.mac(1, b"m").reveal() == first


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(KmsUnavailable, match="No such file"):
        opened(tmp_path / "none")
    with pytest.raises(KmsUnavailable):
        opened(tmp_path)
    with pytest.raises(KmsError, match="directory of this file does not exist"):
        LocalRoot.create(tmp_path / "none" / "root", _Secret(PASSPHRASE))
