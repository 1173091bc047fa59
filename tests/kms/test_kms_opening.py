"""Settings: what is read, what is refused, and that secrets are never among them."""

import subprocess
import sys
from pathlib import Path

import pytest

from filigrane.errors import KmsError
from filigrane.kms import local
from filigrane.kms.addresses import checked_address, host_of
from filigrane.kms.opening import create_kms, open_kms

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(local, "_SCRYPT_N", 1 << 11)
    file = tmp_path / "passphrase"
    file.touch(mode=0o600)
    file.write_text(f"{PASSPHRASE}\n")
    return {
        "provider": "local",
        "path": str(tmp_path / "root"),
        "passphrase_file": str(file),
    }


def test_create_then_open(settings: dict[str, str]) -> None:
    made = create_kms(settings)
    assert open_kms(settings).mac(1, b"m").reveal() == made.mac(1, b"m").reveal()
    with pytest.raises(KmsError, match="exists"):
        create_kms(settings)


def test_a_secret_from_the_environment(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_kms(settings)
    del settings["passphrase_file"]
    settings["passphrase_env"] = "FILIGRANE_TEST_PASSPHRASE"
    with pytest.raises(KmsError, match="FILIGRANE_TEST_PASSPHRASE"):
        open_kms(settings)
    monkeypatch.setenv("FILIGRANE_TEST_PASSPHRASE", PASSPHRASE)
    assert open_kms(settings).versions() == (1,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"provider": "gcp"}, "local, transit, aws, pkcs11"),
        ({"provider": ""}, "local, transit, aws, pkcs11"),
        ({"path": None}, "path"),
        ({"passphrase_file": None}, "passphrase_env"),
        ({"passphrase_env": "X"}, "one place"),
        ({"passphrase": PASSPHRASE}, "no setting passphrase"),
        ({"passphrase_file": "/nonexistent"}, "No such file"),
        ({"path": 3}, "not text"),
    ],
)
def test_settings_that_make_no_sense(
    settings: dict[str, str], change: dict[str, str | None], says: str
) -> None:
    changed = {name: value for name, value in (settings | change).items() if value is not None}
    with pytest.raises(KmsError, match=says) as caught:
        create_kms(changed)
    assert PASSPHRASE not in str(caught.value)
    assert not Path(settings["path"]).exists()


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "inf", "1e9"])
def test_a_time_limit_is_a_time(settings: dict[str, str], timeout: str) -> None:
    file = settings["passphrase_file"]
    transit = {"provider": "transit", "address": "https://x", "token_file": file}
    with pytest.raises(KmsError, match="60 seconds"):
        open_kms(transit | {"timeout_s": timeout})


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\xfd secret secret"])
def test_a_secret_file_that_holds_none(settings: dict[str, str], content: bytes) -> None:
    Path(settings["passphrase_file"]).write_bytes(content)
    with pytest.raises(KmsError, match="one line of text"):
        create_kms(settings)


def test_a_secret_file_that_others_read(settings: dict[str, str]) -> None:
    Path(settings["passphrase_file"]).chmod(0o644)
    with pytest.raises(KmsError, match="chmod 600"):
        create_kms(settings)


@pytest.mark.parametrize(
    "address",
    [
        "bao.example:8200",
        "ftp://bao.example",
        "https://",
        "https://user@bao.example",
        "https://user:hunter2@bao.example",
        "https://bao.example?token=hunter2",
        "https://bao.example:port",
        "http://bao.example:8200",
        "http://10.0.0.1",
        "http://127.0.0.1.example",
        "http://[::1",
        "",
    ],
)
def test_addresses_that_would_spill_secrets(address: str) -> None:
    with pytest.raises(KmsError) as caught:
        checked_address(address)
    assert "hunter2" not in str(caught.value)


def test_addresses_that_will_do() -> None:
    for address in (
        "https://bao.example:8200/",
        "http://127.0.0.1:1",
        "http://[::1]:1",
        "http://localhost",
    ):
        assert checked_address(address) == address.rstrip("/")
    assert host_of("https://bao.example:8200") == "bao.example:8200"


@pytest.mark.parametrize(
    ("provider", "package"), [("transit", "hvac"), ("aws", "boto3"), ("pkcs11", "pkcs11")]
)
def test_a_package_that_is_not_installed_is_named(provider: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from filigrane.errors import MissingDependency\n"
        "from filigrane.kms.opening import open_kms\n"
        f"try: open_kms({{'provider': {provider!r}}})\n"
        "except MissingDependency as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "filigrane[kms]" in done.stdout
