"""Private files: theirs alone from the first moment, whole or not there, never written over."""

import os
import stat
from pathlib import Path

import pytest

from filigrane.private_files import new_file, open_to_others, why_not

SOURCE = Path(__file__).parent.parent / "src" / "filigrane"
POSIX = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")


@POSIX
def test_a_new_file_is_private_from_its_first_moment(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with new_file(tmp_path / "k") as out:
            assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
            out.write(b"secret")
    finally:
        os.umask(old)
    assert (tmp_path / "k").read_bytes() == b"secret"
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600


def test_it_is_on_disk_when_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr("os.fsync", lambda file: sizes.append(os.fstat(file).st_size))
    with new_file(tmp_path / "k") as out:
        out.write(b"secret")
    assert sizes == [6]


@POSIX
def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("mine")
    link.symlink_to(tmp_path / "elsewhere")
    for path in (there, link):
        with pytest.raises(FileExistsError) as caught, new_file(path):
            pytest.fail("the block must not run")
        assert "never overwritten" in why_not(caught.value)
    assert there.read_text() == "mine" and link.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_no_half_file_stays(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), new_file(tmp_path / "k") as out:
        out.write(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught, new_file(tmp_path / "k") as out:
        out.write(b"whole")
    assert list(tmp_path.iterdir()) == []
    assert "No space" in why_not(caught.value) and "room" in why_not(caught.value)


def test_a_folder_that_is_not_there_is_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, new_file(tmp_path / "no" / "k"):
        pytest.fail("the block must not run")
    assert "directory of this file does not exist" in why_not(caught.value)


def about(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, owner, 0, 0, 0, 0))


@POSIX
@pytest.mark.parametrize(
    ("mode", "mine", "mounted"),
    [
        *[(mode, True, True) for mode in (0o600, 0o400, 0o700)],
        *[(mode, False, True) for mode in (0o440, 0o640)],
        *[(mode, False, False) for mode in (0o460, 0o450, 0o620, 0o610, 0o604, 0o602, 0o601)],
    ],
)
def test_who_may_use_a_file(
    mode: int, mine: bool, mounted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mine: whether it is fine as this user's own; mounted: as a file of root's, for another."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for owner, fine in ((1000, mine), (0, mounted)):
        said = open_to_others("a.key", about(mode, owner))
        assert (said is None) == fine
        assert said is None or (f"{mode:04o}" in said and "chmod 600 a.key" in said)
    # Who is root is not somebody whom root has mounted a file for.
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert (open_to_others("a.key", about(mode, 0)) is None) == mine


def test_nobody_else_makes_private_files() -> None:
    """One place decides what private means; O_EXCL and checks of modes by hand are a second."""
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "private_files.py":
            text = path.read_text()
            for word in ("O_EXCL", "S_IRWXG", "0o077", "st_mode & 0o"):
                assert word not in text, f"{path}: {word}; use filigrane.private_files"
