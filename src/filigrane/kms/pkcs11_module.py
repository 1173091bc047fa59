"""One PKCS#11 library in this process: its thread, the tokens that are logged in, what was lost.

PKCS#11 calls block in C, and a module that lost its device may do so for ever; many modules, and
python-pkcs11, which initialises them, are for one thread at a time. So all calls of one module run
in one thread of their own, and callers wait for their time limit and no longer. A module that lost
its token and found it again often needs C_Finalize and C_Initialize: that is done, and disturbs
other users of the same module in this process.

Knows nothing of roots and of the names of their keys: that is `filigrane.kms.pkcs11`.
"""

import contextlib
import hmac
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from filigrane.errors import KmsError, MissingDependency
from filigrane.keys import _Secret

try:
    import pkcs11
    from pkcs11 import exceptions as refusals
except ImportError:
    raise MissingDependency(
        "the pkcs11 provider needs python-pkcs11: pip install 'filigrane[kms]'."
    ) from None

__all__ = ["Failed", "Module", "NoKey", "Opened", "PinRefused", "load"]

_T = TypeVar("_T")

_RESTART_S: Final = 0.5

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


class NoKey(Exception):
    """The token shows no such key; work raises it, for a session may be blind to them."""


class PinRefused(Exception):
    """The token refuses the PIN; the name of its error."""


class Failed(Exception):
    """A call failed for good: the name of the module's error, and whether the token is away."""

    def __init__(self, name: str, away: bool) -> None:
        super().__init__(name)
        self.name = name
        self.away = away


class Opened:
    """A token that is logged in: its session, the PIN that opened it, handles of keys by label."""

    def __init__(self, lib: Any, session: Any, pin: _Secret[str]) -> None:
        self.lib = lib
        self.session = session
        self.pin = pin
        self.keys: dict[str, Any] = {}


class Module:
    """One library and the thread that calls it. Made by `load`."""

    def __init__(self, path: str) -> None:
        self.__pid = os.getpid()
        self.__lib = pkcs11.lib(path)
        self.__users: dict[str, int] = {}
        # Logging in is per token and process. The PIN is kept beside, because without comparing
        # it the next root would be opened under any PIN.
        self.tokens: dict[str, Opened] = {}
        self.__restarted = 0.0
        self.__inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]]
        self.__inbox = queue.SimpleQueue()
        # A thread that is stuck in C must not keep the process from ending.
        threading.Thread(target=self.__serve, name="filigrane-pkcs11", daemon=True).start()

    @property
    def is_here(self) -> bool:
        """Whether it was loaded in this process, not in one that this was forked from."""
        return self.__pid == os.getpid()

    def join(self, token: str) -> None:
        """One more root uses a token."""
        with _modules_lock:
            self.__users[token] = self.__users.get(token, 0) + 1

    def leave(self, token: str, timeout_s: float) -> None:
        """One root fewer uses a token; log out of it after the last."""
        with _modules_lock:
            left = self.__users[token] = self.__users[token] - 1
        if not left and self.is_here:
            with contextlib.suppress(TimeoutError):
                self.__run(lambda: self.__forget(token), timeout_s)

    def call(
        self,
        token: str,
        pin: _Secret[str],
        work: Callable[[Opened], _T],
        *,
        twice: bool,
        timeout_s: float,
    ) -> _T:
        """The result of work with a token that is logged in.

        twice: work may be done again if session or token were lost. timeout_s: seconds to wait.
        Raises TimeoutError, PinRefused, Failed, and whatever else work raises.
        """
        return self.__run(lambda: self.__attempt(token, pin, work, twice), timeout_s)

    def restart(self) -> None:
        """In the thread, or before anybody has it: finalize and initialize, at most every 0.5 s."""
        now = time.monotonic()
        if now - self.__restarted < _RESTART_S:
            return
        self.__restarted = now
        self.tokens.clear()
        with contextlib.suppress(pkcs11.PKCS11Error):
            self.__lib.finalize()
        # A module without its token may not even start; the next call tries again.
        with contextlib.suppress(pkcs11.PKCS11Error):
            self.__lib.initialize()

    def __run(self, work: Callable[[], _T], timeout_s: float) -> _T:
        """The result of work in the thread; TimeoutError if it is not there in time."""
        future: Future[_T] = Future()
        self.__inbox.put((work, future))
        try:
            return future.result(timeout=timeout_s)
        finally:
            # What has not begun when its caller leaves must not be done behind their back.
            future.cancel()

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

    # What follows runs in the thread.

    def __attempt(
        self, token: str, pin: _Secret[str], work: Callable[[Opened], _T], twice: bool
    ) -> _T:
        for last in (not twice, True):
            try:
                return work(self.__logged_in(token, pin))
            except _PIN as error:
                raise PinRefused(type(error).__name__) from None
            except (pkcs11.PKCS11Error, NoKey) as error:
                alive = self.__alive(token)
                if last and alive and isinstance(error, NoKey):
                    raise
                failed = Failed(type(error).__name__, not alive or isinstance(error, _AWAY))
            # The session may be one of a token that was away, or be logged out by somebody else.
            self.__forget(token)
            if not alive:
                self.restart()
            if last:
                break
        raise failed

    def __logged_in(self, token: str, pin: _Secret[str]) -> Opened:
        opened = self.tokens.get(token)
        if opened is None:
            there = self.__lib.get_token(token_label=token)
            try:
                session = there.open(user_pin=pin.reveal())
            except refusals.UserAlreadyLoggedIn:
                session = there.open()  # by somebody else in this process
            opened = self.tokens[token] = Opened(self.__lib, session, pin)
        elif not hmac.compare_digest(
            opened.pin.reveal().encode("utf-8"), pin.reveal().encode("utf-8")
        ):
            raise refusals.PinIncorrect
        return opened

    def __forget(self, token: str) -> None:
        """Log out of a token and close its session."""
        opened = self.tokens.pop(token, None)
        if opened is not None:
            with contextlib.suppress(pkcs11.PKCS11Error):
                opened.session.close()

    def __alive(self, token: str) -> bool:
        try:
            self.__lib.get_token(token_label=token)
        except pkcs11.PKCS11Error:
            return False
        return True


_modules: Final[dict[str, Module]] = {}
_modules_lock: Final = threading.Lock()


def load(path: str) -> Module:
    """The module of a library, one in each process. Raises KmsError if it cannot be loaded."""
    with _modules_lock:
        known = _modules.get(path)
        if known is not None and known.is_here:
            return known
        try:
            _modules[path] = Module(path)
        except (pkcs11.PKCS11Error, OSError):
            raise KmsError(
                f"{path}: this is no PKCS#11 module that can be loaded; name the library of the "
                "device's vendor."
            ) from None
        if known is not None:
            # This process was forked from one that had the module: it needs a start of its own.
            _modules[path].restart()
        return _modules[path]
