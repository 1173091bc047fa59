"""A root in a hardware security module, by PKCS#11.

Every version is two keys of the token, made in it, sensitive and not extractable: a generic secret
of 32 bytes for HMAC-SHA256 and an AES-256 key for wrapping with GCM. Labels say which:

    <label>-mac-<n>     made last: a version exists when this does
    <label>-wrap-<n>

How a library is called, and a token found again, is `filigrane.kms.pkcs11_module`.
"""

import os
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar, final

from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.blobs import (
    CLOSED,
    NOT_OURS,
    require_message,
    require_version,
    require_wrappable,
    version_of,
    versioned_head,
)
from filigrane.kms.pkcs11_module import Failed, Module, NoKey, Opened, PinRefused, load

# isort: split
# After the module of ours that says which package is missing.
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass

__all__ = ["Pkcs11Place", "Pkcs11Root"]

_T = TypeVar("_T")

_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_NONCE: Final = 12
_TAG: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pkcs11Place:
    """Where a root is, and how to get there.

    module: path of the vendor's library; token: the token's label; pin: reads the PIN from where it
    is kept; label: what the labels of the root's keys begin with; timeout_s: of each call, seconds.
    """

    module: str | os.PathLike[str]
    token: str
    pin: Callable[[], _Secret[str]] = field(repr=False)
    label: str = "filigrane"
    timeout_s: float = 5.0


@final
class Pkcs11Root:
    """A KeyManagement in a token; made by `open` or `create`, shows token and label only."""

    __slots__ = ("_label", "_lock", "_module", "_pin", "_timeout_s", "_token")

    _label: str
    _lock: threading.Lock
    _module: Module | None  # None once closed
    _pin: _Secret[str]
    _timeout_s: float
    _token: str

    def __init__(self) -> None:
        """Refuse: a root is in a token."""
        raise TypeError("use Pkcs11Root.open or Pkcs11Root.create, with a Pkcs11Place")

    @classmethod
    def open(cls, place: Pkcs11Place) -> Self:
        """The root that is there.

        Open it in the process that uses it: PKCS#11 does not survive a fork. Raises KmsError for a
        wrong PIN, no such root or one that can be read out, KmsUnavailable if the token is not
        there.
        """
        self = cls._connected(place)
        try:
            self._call(self._require_kept)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def create(cls, place: Pkcs11Place) -> Self:
        """A new root with version 1; raises KmsError if there is one, else as `open`."""
        self = cls._connected(place)
        try:
            if self._call(self._numbers):
                raise KmsError(
                    f"the token {place.token} has a root {place.label} already; open it."
                )
            self._call(lambda opened: self._add(opened, 1), twice=False)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def _connected(cls, place: Pkcs11Place) -> Self:
        if not _LABEL.fullmatch(place.label):
            raise KmsError("a root's label has 1 to 32 letters, digits and _ . - only.")
        self = object.__new__(cls)
        self._token, self._label, self._pin = place.token, place.label, place.pin()
        self._timeout_s, self._lock = place.timeout_s, threading.Lock()
        self._module = load(os.fspath(place.module))
        self._module.join(self._token)
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
            raise self._no_root()
        return found

    def mac(self, version: int, message: bytes) -> _Secret[bytes]:
        """HMAC-SHA256 of a message of 1 to 4,096 bytes: 32 bytes."""
        require_message(message)

        def work(opened: Opened) -> _Secret[bytes]:
            key = self._key(opened, "mac", version)
            return _Secret(bytes(key.sign(message, mechanism=Mechanism.SHA256_HMAC)))

        made = self._call(work, version=version)
        if len(made.reveal()) != 32:
            raise KmsError(f"the token {self._token} made no MAC of 32 bytes.")
        return made

    def wrap(self, data: _Secret[bytes], context: bytes) -> bytes:
        """Encrypt 1 to 4,096 bytes under the current version, bound to a context."""
        require_wrappable(data, context)
        version = self.versions()[-1]
        head = versioned_head("pkcs11", version)
        nonce = secrets.token_bytes(_NONCE)

        def work(opened: Opened) -> bytes:
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
        version, body = version_of("pkcs11", blob, context, least=_NONCE + _TAG + 1)
        bound = versioned_head("pkcs11", version) + context

        def work(opened: Opened) -> _Secret[bytes]:
            key = self._key(opened, "wrap", version)
            how = GCMParams(body[:_NONCE], bound, 8 * _TAG)
            return _Secret(
                bytes(key.decrypt(body[_NONCE:], mechanism=Mechanism.AES_GCM, mechanism_param=how))
            )

        return self._call(work, version=version, refused=NOT_OURS)

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
        module.leave(self._token, self._timeout_s)

    def __repr__(self) -> str:
        return f"<Pkcs11Root {self._label} in token {self._token}>"

    # What follows up to _call runs in the module's thread and may raise PKCS11Error or NoKey.

    def _name(self, use: str, version: int) -> str:
        return f"{self._label}-{use}-{version}"

    def _found(self, session: Any, name: str | None = None) -> list[Any]:
        wanted: dict[Any, Any] = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True}
        if name is not None:
            wanted[Attribute.LABEL] = name
        return list(session.get_objects(wanted))

    def _numbers(self, opened: Opened) -> tuple[int, ...]:
        pattern = re.compile(re.escape(self._label) + "-mac-([1-9][0-9]{0,5})")
        found = self._found(opened.session)
        if not found:
            # A token that is gone shows no keys either; this raises if it is.
            opened.lib.get_token(token_label=self._token)
        matches = (pattern.fullmatch(key.label or "") for key in found)
        return tuple(sorted(int(match[1]) for match in matches if match))

    def _key(self, opened: Opened, use: str, version: int) -> Any:
        name = self._name(use, version)
        if name not in opened.keys:
            found = self._found(opened.session, name)
            if len(found) > 1:
                raise KmsError(
                    f"the token {self._token} has {len(found)} keys {name}; delete those that "
                    "nothing was made with."
                )
            if not found:
                raise NoKey
            opened.keys[name] = found[0]
        return opened.keys[name]

    def _require_kept(self, opened: Opened) -> None:
        numbers = self._numbers(opened)
        if not numbers:
            raise self._no_root()
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

    def _add(self, opened: Opened, version: int) -> None:
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

    # What follows runs in the callers' threads.

    def _no_root(self) -> KmsError:
        return KmsError(
            f"the token {self._token} has no root {self._label}; make it (docs/kms.md), or "
            "correct the label."
        )

    def _call(
        self,
        work: Callable[[Opened], _T],
        *,
        twice: bool = True,
        version: int | None = None,
        refused: str | None = None,
    ) -> _T:
        """Have work done within the time limit, and say in our words what went wrong."""
        module = self._module
        if module is None:
            raise KmsError(CLOSED)
        if not module.is_here:
            raise KmsError("PKCS#11 does not survive a fork; open it anew in each process.")
        problem: KmsError
        missing = False
        try:
            return module.call(self._token, self._pin, work, twice=twice, timeout_s=self._timeout_s)
        except TimeoutError:
            problem = KmsUnavailable(
                f"the token {self._token} does not answer within {self._timeout_s:g} s."
            )
        except NoKey:
            problem = KmsError(f"the token {self._token} lacks a key of {self._label}.")
            missing = True
        except PinRefused as error:
            problem = KmsError(
                f"the token {self._token} refuses the PIN ({error}); correct it before it locks."
            )
        except Failed as error:
            problem = KmsError(refused or f"the token {self._token} refuses ({error.name}).")
            if error.away:
                problem = KmsUnavailable(
                    f"the token {self._token} is not there ({error.name}); connect it, or correct "
                    "its label."
                )
        if missing and version is not None:
            require_version(version, self.versions())
        raise problem from None
