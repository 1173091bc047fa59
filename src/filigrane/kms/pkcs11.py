"""A root in a hardware security module, by PKCS#11.

Every version is two keys of the token, made in it, sensitive and not extractable: a generic secret
of 32 bytes for HMAC-SHA256 and an AES-256 key for wrapping with GCM. Labels say which:

    <label>-mac-<n>     made last: a version exists when this does
    <label>-wrap-<n>

PKCS#11 calls block in C, and a module that lost its device may do so for ever; many modules, and
python-pkcs11, which initialises them, are for one thread at a time. So all calls of one module run
in one thread of their own, and callers wait for their time limit and no longer. A module that lost
its token and found it again often needs C_Finalize and C_Initialize: that is done, and disturbs
other users of the same module in this process.
"""

import contextlib
import hmac
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, Self, TypeVar, final

from filigrane.errors import KmsError, KmsUnavailable, MissingDependency
from filigrane.keys import _Secret
from filigrane.kms.blobs import (
    body_of,
    head_of,
    require_context,
    require_data,
    require_message,
    require_version,
)

try:
    import pkcs11
    from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass
    from pkcs11 import exceptions as refusals
except ImportError:
    raise MissingDependency(
        "the pkcs11 provider needs python-pkcs11: pip install 'filigrane[kms]'."
    ) from None

__all__ = ["Pkcs11Root"]

_T = TypeVar("_T")

_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_RESTART_S: Final = 0.5
_NONCE: Final = 12
_TAG: Final = 16

_AWAY: Final = (
    refusals.DeviceError,
    refusals.DeviceMemory,
    refusals.DeviceRemoved,
    refusals.HostMemory,
    refusals.NoSuchToken,
    refusals.SessionCount,
    refusals.SlotIDInvalid,
    refusals.TokenNotPresent,
)
# Asking again with a PIN that was refused locks the token.
_PIN: Final = (
    refusals.PinExpired,
    refusals.PinIncorrect,
    refusals.PinInvalid,
    refusals.PinLenRange,
    refusals.PinLocked,
    refusals.UserPinNotInitialized,
)


class _NoKey(Exception):
    """The token shows no such key."""


class _Pin(Exception):
    """The token refuses the PIN; the name of its error."""


class _Failed(Exception):
    """A call failed for good: the name of the module's error, and whether the token is there."""

    def __init__(self, name: str, away: bool) -> None:
        super().__init__(name)
        self.name = name
        self.away = away


class _Open:
    """A token that is logged in: its session, the PIN that opened it, handles of keys by label."""

    def __init__(self, lib: Any, session: Any, pin: _Secret[str]) -> None:
        self.lib = lib
        self.session = session
        self.pin = pin
        self.keys: dict[str, Any] = {}


class _Module:
    """One PKCS#11 library in this process, and the thread that calls it."""

    def __init__(self, path: str) -> None:
        self.pid = os.getpid()
        self.lib = pkcs11.lib(path)
        self.users: dict[str, int] = {}
        # Logging in is per token and process. The PIN is kept beside, because without comparing
        # it the next root would be opened under any PIN.
        self.tokens: dict[str, _Open] = {}
        self.__restarted = 0.0
        self.__inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]]
        self.__inbox = queue.SimpleQueue()
        # A thread that is stuck in C must not keep the process from ending.
        threading.Thread(target=self.__serve, name="filigrane-pkcs11", daemon=True).start()

    def run(self, work: Callable[[], _T], timeout_s: float) -> _T:
        """The result of work in the thread; TimeoutError if it is not there in time."""
        future: Future[_T] = Future()
        self.__inbox.put((work, future))
        try:
            return future.result(timeout=timeout_s)
        finally:
            # What has not begun when its caller leaves must not be done behind their back.
            future.cancel()

    def forget(self, token: str) -> None:
        """In the thread: log out of a token and close its session."""
        opened = self.tokens.pop(token, None)
        if opened is not None:
            with contextlib.suppress(pkcs11.PKCS11Error):
                opened.session.close()

    def restart(self) -> None:
        """In the thread: finalize and initialize, at most every half second."""
        now = time.monotonic()
        if now - self.__restarted < _RESTART_S:
            return
        self.__restarted = now
        self.tokens.clear()
        with contextlib.suppress(pkcs11.PKCS11Error):
            self.lib.finalize()
        # A module without its token may not even start; the next call tries again.
        with contextlib.suppress(pkcs11.PKCS11Error):
            self.lib.initialize()

    def __serve(self) -> None:
        while True:
            work, future = self.__inbox.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            # The thread must not hold on to what its last caller got.
            del work, future


_modules: Final[dict[str, _Module]] = {}
_modules_lock: Final = threading.Lock()


def _module(path: str) -> _Module:
    with _modules_lock:
        known = _modules.get(path)
        if known is not None and known.pid == os.getpid():
            return known
        try:
            _modules[path] = _Module(path)
        except (pkcs11.PKCS11Error, OSError):
            raise KmsError(
                f"{path}: this is no PKCS#11 module that can be loaded; name the library of the "
                "device's vendor."
            ) from None
        if known is not None:
            # This process was forked from one that had the module: it needs a start of its own.
            _modules[path].restart()
        return _modules[path]


@final
class Pkcs11Root:
    """A KeyManagement in a token; made by `open` or `create`, shows token and label only."""

    __slots__ = ("_label", "_lock", "_module", "_pin", "_timeout_s", "_token")

    _label: str
    _lock: threading.Lock
    _module: _Module | None  # None once closed
    _pin: _Secret[str]
    _timeout_s: float
    _token: str

    def __init__(self) -> None:
        """Refuse: a root is in a token."""
        raise TypeError("use Pkcs11Root.open or Pkcs11Root.create, with module, token and PIN")

    @classmethod
    def open(
        cls,
        module: str | os.PathLike[str],
        token: str,
        pin: _Secret[str],
        *,
        label: str = "filigrane",
        timeout_s: float = 5.0,
    ) -> Self:
        """The root that is there.

        module: path of the vendor's library; token: the token's label; label: what the labels of
        the root's keys begin with; timeout_s: of each call, seconds. Open it in the process that
        uses it: PKCS#11 does not survive a fork. Raises KmsError for a wrong PIN, no such root or
        one that can be read out, KmsUnavailable if the token is not there.
        """
        self = cls._connected(module, token, pin, label, timeout_s)
        try:
            self._call(self._require_kept)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def create(
        cls,
        module: str | os.PathLike[str],
        token: str,
        pin: _Secret[str],
        *,
        label: str = "filigrane",
        timeout_s: float = 5.0,
    ) -> Self:
        """A new root with version 1; raises KmsError if there is one, else as `open`."""
        self = cls._connected(module, token, pin, label, timeout_s)
        try:
            if self._call(self._numbers):
                raise KmsError(f"the token {token} has a root {label} already; open it.")
            self._call(lambda opened: self._add(opened, 1), twice=False)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def _connected(
        cls,
        module: str | os.PathLike[str],
        token: str,
        pin: _Secret[str],
        label: str,
        timeout_s: float,
    ) -> Self:
        if not _LABEL.fullmatch(label):
            raise KmsError("a root's label has 1 to 32 letters, digits and _ . - only.")
        self = object.__new__(cls)
        self._module = found = _module(os.fspath(module))
        self._token, self._pin, self._label = token, pin, label
        self._timeout_s, self._lock = timeout_s, threading.Lock()
        with _modules_lock:
            found.users[token] = found.users.get(token, 0) + 1
        return self

    @property
    def provider(self) -> str:
        """pkcs11."""
        return "pkcs11"

    @property
    def protection(self) -> str:
        """In words, where the root lives and whether it can leave."""
        return (
            f"keys in the PKCS#11 token {self._token}, sensitive and not extractable; MACs and "
            "what is wrapped pass through this process"
        )

    def versions(self) -> tuple[int, ...]:
        """The root's versions, ascending, as the token has them now."""
        found = self._call(self._numbers)
        if not found:
            raise KmsError(
                f"the token {self._token} has no root {self._label}; make it (docs/kms.md), or "
                "correct the label."
            )
        return found

    def mac(self, version: int, message: bytes) -> _Secret[bytes]:
        """HMAC-SHA256 of a message of 1 to 4,096 bytes: 32 bytes."""
        require_message(message)

        def work(opened: _Open) -> _Secret[bytes]:
            key = self._key(opened, "mac", version)
            return _Secret(bytes(key.sign(message, mechanism=Mechanism.SHA256_HMAC)))

        made = self._call(work, version=version)
        if len(made.reveal()) != 32:
            raise KmsError(f"the token {self._token} made no MAC of 32 bytes.")
        return made

    def wrap(self, data: _Secret[bytes], context: bytes) -> bytes:
        """Encrypt 1 to 4,096 bytes under the current version, bound to a context."""
        require_data(data)
        require_context(context)
        version = self.versions()[-1]
        head = head_of("pkcs11") + version.to_bytes(4, "big")
        nonce = secrets.token_bytes(_NONCE)

        def work(opened: _Open) -> bytes:
            key = self._key(opened, "wrap", version)
            how = GCMParams(nonce, head + context, 8 * _TAG)
            return bytes(
                key.encrypt(data.reveal(), mechanism=Mechanism.AES_GCM, mechanism_param=how)
            )

        sealed = self._call(work, version=version)
        # Some modules draw the nonce themselves and cannot be asked for it: such a blob is lost.
        if len(sealed) != len(data.reveal()) + _TAG:
            raise KmsError(f"the token {self._token} does not encrypt as AES-GCM does.")
        return head + nonce + sealed

    def unwrap(self, blob: bytes, context: bytes) -> _Secret[bytes]:
        """What was wrapped, under whichever version; KmsError for another context."""
        require_context(context)
        body = body_of("pkcs11", blob)
        version, nonce = int.from_bytes(body[:4], "big"), body[4 : 4 + _NONCE]
        sealed = body[4 + _NONCE :]
        if len(sealed) <= _TAG:
            raise KmsError("what was wrapped is cut short; restore it from a backup.")

        def work(opened: _Open) -> _Secret[bytes]:
            key = self._key(opened, "wrap", version)
            how = GCMParams(nonce, head_of("pkcs11") + body[:4] + context, 8 * _TAG)
            return _Secret(
                bytes(key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=how))
            )

        return self._call(
            work,
            version=version,
            refused="this cannot be unwrapped: it belongs to another context or root, or was "
            "altered.",
        )

    def rotate(self) -> int:
        """Make the keys of a new version and return its number."""
        version = self.versions()[-1] + 1
        self._call(lambda opened: self._add(opened, version), twice=False)
        return version

    def close(self) -> None:
        """Log out if no other root uses the token; every later call raises KmsError."""
        with self._lock:
            module, self._module = self._module, None
        if module is None:
            return
        with _modules_lock:
            left = module.users[self._token] = module.users[self._token] - 1
        if not left and module.pid == os.getpid():
            with contextlib.suppress(TimeoutError):
                module.run(lambda: module.forget(self._token), self._timeout_s)

    def __repr__(self) -> str:
        return f"<Pkcs11Root {self._label} in token {self._token}>"

    # What follows up to _call runs in the module's thread and may raise PKCS11Error or _NoKey.

    def _name(self, use: str, version: int) -> str:
        return f"{self._label}-{use}-{version}"

    def _found(self, session: Any, name: str | None = None) -> list[Any]:
        wanted: dict[Any, Any] = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True}
        if name is not None:
            wanted[Attribute.LABEL] = name
        return list(session.get_objects(wanted))

    def _numbers(self, opened: _Open) -> tuple[int, ...]:
        pattern = re.compile(re.escape(self._label) + "-mac-([1-9][0-9]{0,5})")
        found = self._found(opened.session)
        if not found:
            # A token that is gone shows no keys either; this raises if it is.
            opened.lib.get_token(token_label=self._token)
        matches = (pattern.fullmatch(key.label or "") for key in found)
        return tuple(sorted(int(match[1]) for match in matches if match))

    def _key(self, opened: _Open, use: str, version: int) -> Any:
        name = self._name(use, version)
        if name not in opened.keys:
            found = self._found(opened.session, name)
            if len(found) > 1:
                raise KmsError(
                    f"the token {self._token} has {len(found)} keys {name}; delete those that "
                    "nothing was made with."
                )
            if not found:
                raise _NoKey
            opened.keys[name] = found[0]
        return opened.keys[name]

    def _require_kept(self, opened: _Open) -> None:
        numbers = self._numbers(opened)
        if not numbers:
            raise KmsError(
                f"the token {self._token} has no root {self._label}; make it (docs/kms.md), or "
                "correct the label."
            )
        for number in numbers:
            for use in ("mac", "wrap"):
                # Looked up anew: another key may have taken the name since.
                opened.keys.pop(self._name(use, number), None)
                key = self._key(opened, use, number)
                if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE]:
                    raise KmsError(
                        f"the key {self._name(use, number)} can be read out of the token; make "
                        "the root anew, sensitive and not extractable."
                    )

    def _add(self, opened: _Open, version: int) -> None:
        session = opened.session.token.open(rw=True)
        try:
            for use, kind, able in (
                ("wrap", KeyType.AES, MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT),
                ("mac", KeyType.GENERIC_SECRET, MechanismFlag.SIGN),
            ):
                name = self._name(use, version)
                # A wrapping key that was left behind before its MAC key was made will do.
                if use == "wrap" and len(self._found(session, name)) == 1:
                    continue
                made = session.generate_key(
                    kind,
                    256,
                    label=name,
                    id=name.encode("ascii"),
                    store=True,
                    capabilities=able,
                    template={
                        Attribute.PRIVATE: True,
                        Attribute.SENSITIVE: True,
                        Attribute.EXTRACTABLE: False,
                        Attribute.MODIFIABLE: False,
                    },
                )
                # Labels need not be unique, so two that rotate at once may both have made one.
                if len(self._found(session, name)) != 1:
                    made.destroy()
                    raise KmsUnavailable("another process rotates this root now; try again.")
        finally:
            session.close()

    def _prepared(self, module: _Module) -> _Open:
        """The token, logged in."""
        opened = module.tokens.get(self._token)
        if opened is None:
            token = module.lib.get_token(token_label=self._token)
            try:
                session = token.open(user_pin=self._pin.reveal())
            except refusals.UserAlreadyLoggedIn:
                session = token.open()  # by somebody else in this process
            opened = module.tokens[self._token] = _Open(module.lib, session, self._pin)
        elif not hmac.compare_digest(
            opened.pin.reveal().encode("utf-8"), self._pin.reveal().encode("utf-8")
        ):
            raise refusals.PinIncorrect
        return opened

    def _attempt(self, module: _Module, work: Callable[[_Open], _T], twice: bool) -> _T:
        """Work in the module's thread, once more if the session or the token was lost."""
        for last in (not twice, True):
            try:
                return work(self._prepared(module))
            except _PIN as error:
                raise _Pin(type(error).__name__) from None
            except (pkcs11.PKCS11Error, _NoKey) as error:
                alive = self._alive(module)
                if last and alive and isinstance(error, _NoKey):
                    raise
                failed = _Failed(type(error).__name__, not alive or isinstance(error, _AWAY))
            # The session may be one of a token that was away, or be logged out by somebody else.
            module.forget(self._token)
            if not alive:
                module.restart()
            if last:
                break
        raise failed

    def _alive(self, module: _Module) -> bool:
        try:
            module.lib.get_token(token_label=self._token)
        except pkcs11.PKCS11Error:
            return False
        return True

    def _call(
        self,
        work: Callable[[_Open], _T],
        *,
        twice: bool = True,
        version: int | None = None,
        refused: str | None = None,
    ) -> _T:
        """Have work done within the time limit, and say in our words what went wrong."""
        module = self._module
        if module is None:
            raise KmsError("this key management is closed; open it again.")
        if module.pid != os.getpid():
            raise KmsError("PKCS#11 does not survive a fork; open it anew in each process.")
        problem: KmsError
        missing = False
        try:
            return module.run(lambda: self._attempt(module, work, twice), self._timeout_s)
        except TimeoutError:
            problem = KmsUnavailable(
                f"the token {self._token} does not answer within {self._timeout_s:g} s."
            )
        except _NoKey:
            problem = KmsError(f"the token {self._token} lacks a key of {self._label}.")
            missing = True
        except _Pin as error:
            problem = KmsError(
                f"the token {self._token} refuses the PIN ({error}); correct it before it locks."
            )
        except _Failed as error:
            problem = KmsError(refused or f"the token {self._token} refuses ({error.name}).")
            if error.away:
                problem = KmsUnavailable(
                    f"the token {self._token} is not there ({error.name}); connect it, or correct "
                    "its label."
                )
        if missing and version is not None:
            require_version(version, self.versions())
        raise problem from None
