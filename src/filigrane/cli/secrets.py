"""Where a key comes from: a file, the environment or a keyring, and never the command line."""

import contextlib
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from filigrane.errors import FiligraneError, KeyFormatError, MissingDependency

if TYPE_CHECKING:
    from filigrane.keys import Key, MarkingKey

FILE_VARIABLE: Final = "FILIGRANE_KEY_FILE"
TEXT_VARIABLE: Final = "FILIGRANE_KEY"
SERVICE: Final = "filigrane"
"""The service under which a keyring holds keys; the user name is the key's name."""

_SOURCES: Final = (
    f"--key-file PATH, --keyring NAME, or the environment ({FILE_VARIABLE} or {TEXT_VARIABLE})"
)
# The head of a key, or a secret part on its own: pasted without its head it is as secret.
_KEY_TEXT = re.compile(r"filigrane-key-\d+:|(?<![a-z2-7])[a-z2-7]{58}(?![a-z2-7])", re.IGNORECASE)


def looks_like_key(text: str) -> bool:
    """Whether some part of a text has the form of a secret key."""
    return _KEY_TEXT.search(text) is not None


def no_core_dumps() -> None:
    """Let this process end without a core dump, which would hold every secret it has."""
    # Not on Windows, which has none.
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise KeyFormatError, without repeating anything, if an argument holds a key's text."""
    if any(looks_like_key(argument) for argument in arguments):
        raise KeyFormatError(
            "an argument holds the text of a key. It was not used and is not repeated here, but "
            "the key is now in your shell's history, and other users could see it: remove it "
            "there, and make a new key if anybody may have read it. A key is passed by "
            f"{_SOURCES}."
        )


def read_key(key_file: str | None, keyring: str | None) -> "Key":
    """The key of the one source that is named; an option comes before the environment.

    Raises KeyFormatError if there is no source, more than one, or no key in it.
    """
    keys = read_keys([] if key_file is None else [key_file], keyring)
    return keys[0]


def read_keys(key_files: Sequence[str], keyring: str | None) -> "list[Key]":
    """As `read_key`, for several key files. Raises KeyFormatError if two of them are one key."""
    if key_files and keyring is not None:
        raise KeyFormatError("--key-file and --keyring both name a key; use one of them.")
    if key_files:
        keys = [_load(path) for path in key_files]
    elif keyring is not None:
        keys = [_from_keyring(keyring)]
    else:
        keys = [_from_environment()]
    first: dict[str, int] = {}
    for number, key in enumerate(keys):
        twin = first.setdefault(key.fingerprint, number)
        if twin != number:
            raise KeyFormatError(
                f"{key_files[twin]} and {key_files[number]} hold the same key (fingerprint "
                f"{key.fingerprint}); name it once."
            )
    return keys


def _from_environment() -> "Key":
    given = [name for name in (FILE_VARIABLE, TEXT_VARIABLE) if os.environ.get(name)]
    if not given:
        raise KeyFormatError(
            f"no key: use one of {_SOURCES}. `filigrane keygen NAME --out FILE` makes one."
        )
    if len(given) == 2:
        raise KeyFormatError(f"{given[0]} and {given[1]} both name a key; unset one of them.")
    # The text stays in the environment and in the call: no variable here outlives it.
    if given[0] == FILE_VARIABLE:
        if looks_like_key(os.environ[FILE_VARIABLE]):
            raise KeyFormatError(
                f"{FILE_VARIABLE} holds the text of a key instead of a path; put the text into "
                f"{TEXT_VARIABLE}."
            )
        return _load_named(FILE_VARIABLE)
    try:
        from filigrane.keys import Key

        return Key.from_text(os.environ[TEXT_VARIABLE])
    except KeyFormatError as error:
        problem = str(error)
    raise KeyFormatError(f"{TEXT_VARIABLE}: {problem}")


def _load(path: str) -> "Key":
    try:
        os.stat(path)
    except FileNotFoundError:
        # Key.load would say how python makes one.
        raise KeyFormatError(
            f"{path}: there is no such file; check the path, or make a key with "
            "`filigrane keygen NAME --out FILE`"
        ) from None
    except OSError:
        pass  # Key.load says what it is
    from filigrane.keys import Key

    return Key.load(path)


def _load_named(variable: str) -> "Key":
    try:
        return _load(os.environ[variable])
    except KeyFormatError as error:
        problem = str(error)
    raise KeyFormatError(f"{variable}: {problem}")


def _from_keyring(name: str) -> "Key":
    ring = _keyring()
    try:
        if ring.get_password(SERVICE, name) is None:
            problem = (
                f"the keyring holds no key {name!r}; `filigrane keygen {name} --keyring` makes one."
            )
        else:
            from filigrane.keys import Key

            return Key.from_text(ring.get_password(SERVICE, name))
    except KeyFormatError as error:
        problem = str(error)
    except Exception as error:  # every backend has errors of its own
        problem = _keyring_trouble(error)
    raise KeyFormatError(f"keyring {name!r}: {problem}")


def store_in_keyring(key: "Key") -> None:
    """Put a key into the keyring under its name; raises KeyFormatError if the name is taken."""
    ring = _keyring()
    problem = None
    try:
        if ring.get_password(SERVICE, key.name) is not None:
            problem = (
                "there is a key of this name already and it is never overwritten; "
                "use another name, or delete it with the keyring's own tool"
            )
        else:
            ring.set_password(SERVICE, key.name, key.export_text())
    except Exception as error:  # every backend has errors of its own
        problem = _keyring_trouble(error)
    if problem is not None:
        raise KeyFormatError(f"keyring {key.name!r}: {problem}.")


def _keyring() -> Any:
    try:
        import keyring
    except ImportError:
        raise MissingDependency(
            "--keyring needs one more package: pip install 'filigrane[keyring]'"
        ) from None
    return keyring


def _keyring_trouble(error: Exception) -> str:
    # Not its message: a backend may quote what it was asked to store.
    return (
        f"the keyring cannot be used ({type(error).__name__}); unlock it or set one up, or keep "
        "the key in a file (--out FILE, --key-file FILE)"
    )


def for_user(root: "Key", user: int | None) -> "MarkingKey":
    """The key itself, or that of one of its users; raises KeyFormatError for no index."""
    if user is None:
        return root
    from filigrane.keys import MAX_INDEX

    if not 0 <= user <= MAX_INDEX:
        raise KeyFormatError("--user is out of range; users are 0 to 2**64 - 1.")
    return root.user(user)


def refuse_unused_key(key_file: str | None, keyring: str | None) -> None:
    """Raise FiligraneError if a key is named for a command that was told to use none."""
    if key_file is not None or keyring is not None:
        raise FiligraneError("--unmarked uses no key; drop the key, or drop --unmarked.")
