"""A root in a file under a passphrase: for development, tests and a single host.

The file is JSON with mode 0600: the parameters of scrypt, and AES-256-GCM over the versions, each
with two random keys of 32 bytes, one for MACs and one for wrapping. Versions are added by writing a
new file beside it and renaming it over the old one, under a lock, so that a crash or a second
process leaves a whole file. The root is in this process's memory while it is open: whoever reads
the memory, or file and passphrase, has it.
"""

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from typing import Final, Self, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.blobs import (
    NOT_OURS,
    require_message,
    require_version,
    require_wrappable,
    version_of,
    versioned_head,
)
from filigrane.private_files import new_file, open_to_others, why_not

__all__ = ["LocalRoot"]

FORMAT: Final = "filigrane-local-root-1"
MIN_PASSPHRASE: Final = 12
_MAX_FILE_BYTES: Final = 1 << 20
# 2**16 * 8 * 128 bytes are 64 MiB and about 0.2 s: once for each opening, hard on guessers.
_SCRYPT_N: Final = 1 << 16
_SCRYPT_MAX_N: Final = 1 << 20
_NONCE: Final = 12
_TAG: Final = 16

_Versions = dict[int, tuple[bytes, bytes]]
_Seen = tuple[int, int, int]


@final
class LocalRoot:
    """A KeyManagement whose root is a file; made by `create` or `open`, shows its path only.

    Other processes may rotate the same file; what they add is seen at once.
    """

    __slots__ = ("_file_key", "_lock", "_passphrase", "_path", "_seen", "_versions")

    _path: str
    _lock: threading.RLock
    _passphrase: _Secret[str] | None
    _file_key: tuple[bytes, int, _Secret[bytes]] | None
    _seen: _Seen | None
    _versions: _Secret[_Versions]

    def __init__(self) -> None:
        """Refuse: a root is a file."""
        raise TypeError(
            "use LocalRoot.create(path, passphrase) or LocalRoot.open(path, passphrase)"
        )

    @classmethod
    def create(cls, path: str | os.PathLike[str], passphrase: _Secret[str]) -> Self:
        """A new root with version 1 in a new file.

        passphrase: at least 12 characters; without it the root is lost. Raises KmsError if the
        file exists or cannot be made.
        """
        _require_passphrase(passphrase)
        path = os.fspath(path)
        salt = secrets.token_bytes(16)
        file_key = _stretch(passphrase, salt, _SCRYPT_N)
        text = _encode(salt, _SCRYPT_N, file_key, _Secret({1: _fresh()}))
        try:
            with new_file(path) as out:
                out.write(text)
        except OSError as error:
            raise KmsError(f"{path}: {why_not(error)}.") from None
        _sync_folder(os.path.dirname(path) or ".")
        self = cls._closed(path, passphrase)
        self._file_key = (salt, _SCRYPT_N, file_key)
        self._known()
        return self

    @classmethod
    def open(cls, path: str | os.PathLike[str], passphrase: _Secret[str]) -> Self:
        """The root of a file that `create` made.

        Raises KmsUnavailable if the file cannot be read, KmsError if others may read it, the
        passphrase is another or the file is damaged.
        """
        self = cls._closed(os.fspath(path), passphrase)
        self._known()
        return self

    @classmethod
    def _closed(cls, path: str, passphrase: _Secret[str]) -> Self:
        self = object.__new__(cls)
        self._path = path
        self._passphrase = passphrase
        self._lock = threading.RLock()
        self._file_key = None
        self._seen = None
        self._versions = _Secret({})
        return self

    @property
    def provider(self) -> str:
        """local."""
        return "local"

    @property
    def protection(self) -> str:
        """In words, where the root lives and whether it can leave."""
        return (
            "a file under a passphrase, opened in this process's memory: for development and "
            "single hosts; whoever has file and passphrase has the root"
        )

    def versions(self) -> tuple[int, ...]:
        """The root's versions, ascending, as the file has them now."""
        return tuple(sorted(self._known().reveal()))

    def mac(self, version: int, message: bytes) -> _Secret[bytes]:
        """HMAC-SHA256 of a message of 1 to 4,096 bytes: 32 bytes."""
        require_message(message)
        known = self._known()
        require_version(version, sorted(known.reveal()))
        return _Secret(hmac.digest(known.reveal()[version][0], message, "sha256"))

    def wrap(self, data: _Secret[bytes], context: bytes) -> bytes:
        """Encrypt 1 to 4,096 bytes under the current version, bound to a context."""
        require_wrappable(data, context)
        known = self._known()
        version = max(known.reveal())
        head = versioned_head("local", version)
        nonce = secrets.token_bytes(_NONCE)
        cipher = AESGCM(known.reveal()[version][1])
        return head + nonce + cipher.encrypt(nonce, data.reveal(), head + context)

    def unwrap(self, blob: bytes, context: bytes) -> _Secret[bytes]:
        """What was wrapped, under whichever version; KmsError for another context."""
        version, body = version_of("local", blob, context, least=_NONCE + _TAG)
        known = self._known()
        require_version(version, sorted(known.reveal()))
        cipher = AESGCM(known.reveal()[version][1])
        bound = versioned_head("local", version) + context
        try:
            return _Secret(cipher.decrypt(body[:_NONCE], body[_NONCE:], bound))
        except InvalidTag:
            raise KmsError(NOT_OURS) from None

    def rotate(self) -> int:
        """Make a new version and return its number."""
        with self._lock, _file_lock(self._path):
            known = self._known()
            assert self._file_key is not None
            version = max(known.reveal()) + 1
            salt, work, file_key = self._file_key
            more = _Secret({**known.reveal(), version: _fresh()})
            text = _encode(salt, work, file_key, more)
            folder, name = os.path.split(self._path)
            beside = os.path.join(folder, f".{name}.{secrets.token_hex(8)}")
            try:
                with new_file(beside) as out:
                    out.write(text)
            except OSError as error:
                raise KmsUnavailable(f"{beside}: {why_not(error)}; nothing was changed.") from None
            os.replace(beside, self._path)
            _sync_folder(folder or ".")
            self._known()
            return version

    def close(self) -> None:
        """Forget passphrase and root; every later call raises KmsError."""
        with self._lock:
            self._passphrase = self._file_key = self._seen = None
            self._versions = _Secret({})

    def __repr__(self) -> str:
        return f"<LocalRoot {self._path}>"

    def _known(self) -> _Secret[_Versions]:
        """The versions, read again if the file is not the one that was read last."""
        with self._lock:
            if self._passphrase is None:
                raise KmsError(f"{self._path}: this root is closed; open it again.")
            try:
                about = os.stat(self._path)
                if _identity(about) == self._seen:
                    return self._versions
                with open(self._path, "rb") as stream:
                    about = os.fstat(stream.fileno())
                    _require_private(self._path, about)
                    text = stream.read(_MAX_FILE_BYTES + 1)
            except OSError as error:
                if isinstance(error, KmsError):
                    raise
                raise KmsUnavailable(
                    f"{self._path}: the root's file cannot be read ({error.strerror}); bring it "
                    "back, or correct the path."
                ) from None
            salt, work, sealed = _decode(self._path, text)
            if self._file_key is None or self._file_key[:2] != (salt, work):
                self._file_key = (salt, work, _stretch(self._passphrase, salt, work))
            self._versions = _unseal(self._path, salt, work, self._file_key[2], sealed)
            self._seen = _identity(about)
            return self._versions


def _identity(about: os.stat_result) -> _Seen:
    # The change time moves with every chmod too.
    return about.st_ino, about.st_ctime_ns, about.st_size


def _require_private(path: str, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise KmsError(f"{path}: this is no file; give the path of one that create made.")
    exposed = open_to_others(path, about)
    if exposed is not None:
        raise KmsError(f"{path}: {exposed}; and if somebody may have read it, rotate.")


def _require_passphrase(passphrase: _Secret[str]) -> None:
    if len(passphrase.reveal()) < MIN_PASSPHRASE:
        raise KmsError(f"a root's passphrase has at least {MIN_PASSPHRASE} characters.")


def _fresh() -> tuple[bytes, bytes]:
    return secrets.token_bytes(32), secrets.token_bytes(32)


def _stretch(passphrase: _Secret[str], salt: bytes, work: int) -> _Secret[bytes]:
    return _Secret(
        hashlib.scrypt(
            passphrase.reveal().encode("utf-8"),
            salt=salt,
            n=work,
            r=8,
            p=1,
            maxmem=work * 8 * 128 + (1 << 20),
            dklen=32,
        )
    )


def _header(salt: bytes, work: int) -> bytes:
    return f"{FORMAT}:{work}:{salt.hex()}".encode("ascii")


def _encode(salt: bytes, work: int, file_key: _Secret[bytes], known: _Secret[_Versions]) -> bytes:
    inner = _Secret(
        json.dumps(
            {str(number): [key.hex() for key in pair] for number, pair in known.reveal().items()}
        ).encode("ascii")
    )
    nonce = secrets.token_bytes(_NONCE)
    sealed = nonce + AESGCM(file_key.reveal()).encrypt(nonce, inner.reveal(), _header(salt, work))
    outer = {
        "format": FORMAT,
        "scrypt_n": work,
        "salt": salt.hex(),
        "sealed": base64.b64encode(sealed).decode("ascii"),
    }
    return (json.dumps(outer, indent=1) + "\n").encode("ascii")


def _decode(path: str, text: bytes) -> tuple[bytes, int, bytes]:
    try:
        if len(text) > _MAX_FILE_BYTES:
            raise ValueError
        outer = json.loads(text)
        if outer["format"] != FORMAT:
            raise ValueError
        salt, work = bytes.fromhex(outer["salt"]), int(outer["scrypt_n"])
        sealed = base64.b64decode(outer["sealed"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KmsError(
            f"{path}: this is not a local root of format {FORMAT}; restore it from a backup."
        ) from None
    if work & (work - 1) or not 1 << 10 <= work <= _SCRYPT_MAX_N or len(sealed) < _NONCE + _TAG:
        raise KmsError(f"{path}: this local root is damaged; restore it from a backup.")
    return salt, work, sealed


def _unseal(
    path: str, salt: bytes, work: int, file_key: _Secret[bytes], sealed: bytes
) -> _Secret[_Versions]:
    try:
        cipher = AESGCM(file_key.reveal())
        inner = _Secret(cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], _header(salt, work)))
    except InvalidTag:
        raise KmsError(
            f"{path}: this file does not open: the passphrase is another, or the file is damaged."
        ) from None
    return _Secret(
        {
            int(number): (bytes.fromhex(mac), bytes.fromhex(wrap))
            for number, (mac, wrap) in json.loads(inner.reveal()).items()
        }
    )


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _file_lock(path: str) -> Iterator[None]:
    """One process at a time adds versions; the lock is beside the file, which is replaced."""
    try:
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KmsUnavailable(
            f"{path}: no lock can be made beside it ({error.strerror}); nothing was changed."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
