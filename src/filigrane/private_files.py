"""Files that only their owner may use: how they are made, and how one is told that is not so.

    new_file        a new file of mode 0600, whole or not there at all
    why_not         what to say of one that could not be made
    open_to_others  what to say of one that others may use

Knows nothing of what is in them: a secret passes through no function of this module.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["new_file", "open_to_others", "why_not"]


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file of mode 0600 to write bytes into; on disk when the block ends.

    Its mode is set where it is made: there is no moment at which others could read it. Whatever
    goes wrong in the block, no half file stays. Raises FileExistsError if there is anything at the
    path, a link included, and other OSErrors as the system does; `why_not` puts them in words.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(file, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(file)  # what was made with a key that a crash loses is lost with it
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def why_not(error: OSError) -> str:
    """Why `new_file` made no file, and what to do; to follow the path and a colon."""
    if isinstance(error, FileExistsError):
        return "this file exists and is never overwritten; move it away, or choose another name"
    if isinstance(error, FileNotFoundError):
        return "the directory of this file does not exist; make it first"
    return (
        f"this file cannot be written ({error.strerror}); check the directory's permissions and "
        "the room on its disk"
    )


def open_to_others(path: str | os.PathLike[str], about: os.stat_result) -> str | None:
    """What to say, after the path and a colon, if anyone but the owner may use a file; else None.

    Orchestrators mount secrets as files of root that the process's group may read (mode 0440): to
    read those is what the group is for. A group never counts as oneself otherwise. Where files
    have no such modes (Windows) nothing is said.
    """
    if os.name != "posix":
        return None
    mounted = about.st_uid == 0 and os.geteuid() != 0
    if not about.st_mode & (0o037 if mounted else 0o077):
        return None
    return (
        f"others may use this file (mode {stat.S_IMODE(about.st_mode):04o}); make it yours alone "
        f"with: chmod 600 {os.fsdecode(path)}"
    )
