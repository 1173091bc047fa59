"""A root in the transit engine of OpenBao or HashiCorp Vault, by hvac.

One transit key of type aes256-gcm96 is the root: each of its versions holds two random keys, one
that encrypts and one for HMACs, and neither can be read out. The engine computes; what comes over
the wire are MACs and the texts that are wrapped, therefore TLS.

    mac      POST transit/hmac/<key>      key_version, sha2-256
    wrap     POST transit/encrypt/<key>   associated_data = first bytes and context
    unwrap   POST transit/decrypt/<key>
    rotate   POST transit/keys/<key>/rotate
    versions GET  transit/keys/<key>

The token is read from where it lives again whenever the server refuses it, so an agent that renews
it (`bao agent`, a sink file) needs no restart here.
"""

import base64
import binascii
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar, final

from filigrane.errors import KmsError, KmsUnavailable, MissingDependency
from filigrane.keys import _Secret
from filigrane.kms.addresses import checked_address, host_of
from filigrane.kms.blobs import (
    CLOSED,
    MAX_VERSION,
    NOT_OURS,
    body_of,
    head_of,
    require_message,
    require_version,
    require_wrappable,
)

try:
    import hvac
    import requests
    from hvac import exceptions as refusals
    from requests.adapters import HTTPAdapter
except ImportError:
    raise MissingDependency(
        "the transit provider needs hvac: pip install 'filigrane[kms]'."
    ) from None

__all__ = ["TransitPlace", "TransitRoot"]

_T = TypeVar("_T")

_CIPHERTEXT: Final = re.compile(r"vault:v[1-9][0-9]{0,5}:[A-Za-z0-9+/=]+")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_MOUNT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,127}")
_KINDS: Final = ("aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305")
_AWAY: Final = (
    refusals.VaultDown,
    refusals.VaultNotInitialized,
    refusals.InternalServerError,
    refusals.BadGateway,
    refusals.RateLimitExceeded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitPlace:
    """Where a root is, and how to get there.

    token: reads the token from where it is kept. ca_file: PEM of who signed the server's
    certificate, if the system does not know them. timeout_s: of each request, seconds.
    """

    address: str
    token: Callable[[], _Secret[str]] = field(repr=False)
    key: str = "filigrane"
    mount: str = "transit"
    namespace: str | None = None
    ca_file: str | None = None
    timeout_s: float = 5.0


@final
class TransitRoot:
    """A KeyManagement in a transit engine; made by `open` or `create`, shows host and key only."""

    __slots__ = ("_address", "_client", "_key", "_lock", "_mount", "_read_token")

    _address: str
    _client: _Secret[Any]
    _key: str
    _lock: threading.Lock
    _mount: str
    _read_token: Callable[[], _Secret[str]]

    def __init__(self) -> None:
        """Refuse: a root is on a server."""
        raise TypeError("use TransitRoot.open or TransitRoot.create, with a TransitPlace")

    @classmethod
    def open(cls, place: TransitPlace) -> Self:
        """The root that is there.

        Raises KmsError if there is no such key or it could be read out, KmsUnavailable if the
        server does not answer.
        """
        self = cls._connected(place)
        about = self._about()
        if about.get("exportable") or about.get("allow_plaintext_backup"):
            raise KmsError(
                f"the key {place.key} can be read out of {host_of(place.address)}; make another "
                "with exportable=false and allow_plaintext_backup=false."
            )
        if about.get("type") not in _KINDS or about.get("derived"):
            raise KmsError(
                f"the key {place.key} on {host_of(place.address)} is of another kind; make one "
                "with type=aes256-gcm96 and derived=false."
            )
        return self

    @classmethod
    def create(cls, place: TransitPlace) -> Self:
        """A new root with version 1; needs a token that may make keys. Raises as `open` does."""
        self = cls._connected(place)
        # The server takes a second creation for a success; here it is a mistake.
        if self._ask(lambda client: self._read(client), missing=None) is not None:
            raise KmsError(
                f"there is a key {place.key} on {host_of(place.address)} already; open it."
            )
        self._ask(
            lambda client: client.secrets.transit.create_key(
                name=self._key,
                key_type="aes256-gcm96",
                exportable=False,
                allow_plaintext_backup=False,
                derived=False,
                mount_point=self._mount,
            ),
            twice=False,
        )
        return self

    @classmethod
    def _connected(cls, place: TransitPlace) -> Self:
        if not _NAME.fullmatch(place.key) or not _MOUNT.fullmatch(place.mount):
            raise KmsError("a transit key's name has letters, digits and _ . - only.")
        self = object.__new__(cls)
        self._address = checked_address(place.address)
        self._key, self._mount = place.key, place.mount.strip("/")
        self._read_token, self._lock = place.token, threading.Lock()
        session = requests.Session()
        # No proxy, no .netrc: what is asked goes to the server that the settings name.
        session.trust_env = False
        session.verify = place.ca_file or True
        session.mount(self._address, HTTPAdapter(pool_maxsize=32, max_retries=0))
        client = hvac.Client(
            url=self._address,
            token=place.token().reveal(),
            namespace=place.namespace,
            verify=session.verify,
            timeout=place.timeout_s,
            session=session,
            # A redirect would take the token to a server that nobody named.
            allow_redirects=False,
        )
        self._client = _Secret(client)
        return self

    @property
    def provider(self) -> str:
        """transit."""
        return "transit"

    @property
    def protection(self) -> str:
        """In words, where the root lives and whether it can leave."""
        return (
            f"a transit key on {host_of(self._address)}, not exportable; MACs and what is wrapped "
            "pass through this process"
        )

    def versions(self) -> tuple[int, ...]:
        """The root's versions, ascending, as the server has them now."""
        keys = self._about().get("keys")
        if not isinstance(keys, dict) or not keys:
            raise self._nonsense()
        try:
            return tuple(sorted(int(number) for number in keys))
        except ValueError:
            raise self._nonsense() from None

    def mac(self, version: int, message: bytes) -> _Secret[bytes]:
        """HMAC-SHA256 of a message of 1 to 4,096 bytes: 32 bytes."""
        require_message(message)
        if isinstance(version, bool) or not 1 <= version <= MAX_VERSION:
            raise KmsError(f"a version is 1 to {MAX_VERSION}.")
        answer = self._ask(
            lambda client: client.secrets.transit.generate_hmac(
                name=self._key,
                hash_input=base64.b64encode(message).decode("ascii"),
                key_version=version,
                algorithm="sha2-256",
                mount_point=self._mount,
            ),
            # Which versions there are is only asked once this one was refused.
            refused=lambda: require_version(version, self.versions()),
        )
        text = _Secret(str(self._data(answer).get("hmac")))
        prefix = f"vault:v{version}:"
        if not text.reveal().startswith(prefix):
            raise self._nonsense()
        made = self._decoded(_Secret(text.reveal().removeprefix(prefix)))
        if len(made.reveal()) != 32:
            raise self._nonsense()
        return made

    def wrap(self, data: _Secret[bytes], context: bytes) -> bytes:
        """Encrypt 1 to 4,096 bytes under the current version, bound to a context."""
        require_wrappable(data, context)
        answer = self._ask(
            lambda client: client.secrets.transit.encrypt_data(
                name=self._key,
                plaintext=base64.b64encode(data.reveal()).decode("ascii"),
                associated_data=self._bound(context),
                mount_point=self._mount,
            )
        )
        text = self._data(answer).get("ciphertext")
        if not isinstance(text, str) or not _CIPHERTEXT.fullmatch(text):
            raise self._nonsense()
        return head_of("transit") + text.encode("ascii")

    def unwrap(self, blob: bytes, context: bytes) -> _Secret[bytes]:
        """What was wrapped, under whichever version; KmsError for another context."""
        text = body_of("transit", blob, context).decode("ascii", "replace")
        if not _CIPHERTEXT.fullmatch(text):
            raise KmsError("what was wrapped is damaged; restore it from a backup.")
        answer = self._ask(
            lambda client: client.secrets.transit.decrypt_data(
                name=self._key,
                ciphertext=text,
                associated_data=self._bound(context),
                mount_point=self._mount,
            ),
            refused=_not_here,
        )
        return self._decoded(_Secret(self._data(answer).get("plaintext")))

    def rotate(self) -> int:
        """Make a new version and return its number."""
        answer = self._ask(
            lambda client: client.secrets.transit.rotate_key(
                name=self._key, mount_point=self._mount
            ),
            twice=False,
        )
        # Newer servers say which version they made; with older ones it is the last.
        try:
            made = answer.json()["data"]["latest_version"] if hasattr(answer, "json") else None
            made = made or answer["data"]["latest_version"]
        except (ValueError, KeyError, TypeError):
            made = None
        return made if isinstance(made, int) else self.versions()[-1]

    def close(self) -> None:
        """Close connections and forget the token; every later call raises KmsError."""
        with self._lock:
            client = self._client.reveal()
            if client is not None:
                client.token = None
                client.adapter.close()
            self._client = _Secret(None)

    def __repr__(self) -> str:
        return f"<TransitRoot {self._key} on {host_of(self._address)}>"

    def _bound(self, context: bytes) -> str:
        return base64.b64encode(head_of("transit") + context).decode("ascii")

    def _read(self, client: Any) -> Any:
        return client.secrets.transit.read_key(name=self._key, mount_point=self._mount)

    def _about(self) -> dict[str, Any]:
        return self._data(self._ask(self._read))

    def _data(self, answer: Any) -> dict[str, Any]:
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise self._nonsense()
        return data

    def _decoded(self, text: _Secret[Any]) -> _Secret[bytes]:
        try:
            return _Secret(base64.b64decode(text.reveal(), validate=True))
        except (binascii.Error, ValueError, TypeError):
            raise self._nonsense() from None

    def _nonsense(self) -> KmsError:
        return KmsError(
            f"{host_of(self._address)} answered, but not as a transit engine does; check address "
            "and mount."
        )

    def _ask(
        self,
        call: Callable[[Any], Any],
        *,
        twice: bool = True,
        refused: Callable[[], None] | None = None,
        missing: Any = ...,
    ) -> Any:
        """One request. twice: a connection that broke is tried again; refused: explains a 400."""
        where = host_of(self._address)
        problem: KmsError
        bad_request = False
        for attempt in (1, 2):
            client = self._client.reveal()
            if client is None:
                raise KmsError(CLOSED)
            try:
                return call(client)
            except refusals.Forbidden:
                problem = KmsError(
                    f"{where} refuses: the token has expired or its policy does not allow this on "
                    f"the key {self._key}; docs/kms.md shows the policy."
                )
                if attempt == 1 and self._renewed(client):
                    continue
            except refusals.InvalidPath:
                if missing is not ...:
                    return missing
                problem = KmsError(
                    f"there is no key {self._key} under {self._mount} on {where}; make it "
                    "(docs/kms.md), or correct key and mount."
                )
            except _AWAY:
                problem = KmsUnavailable(
                    f"{where} is sealed, starting or overloaded; try again later."
                )
            except refusals.InvalidRequest:
                bad_request = True
                problem = KmsError(f"{where} does not take this request for {self._key}.")
            except refusals.VaultError:
                problem = KmsError(f"{where} refuses what is asked of the key {self._key}.")
            except requests.exceptions.SSLError:
                problem = KmsError(
                    f"the certificate of {where} is not one that is trusted; name its issuer's "
                    "ca_file."
                )
            except requests.exceptions.ConnectionError as error:
                problem = KmsUnavailable(f"{where} cannot be reached; start it, or try again.")
                # A server that was restarted leaves dead connections behind.
                timed = isinstance(error, requests.exceptions.Timeout)
                if attempt == 1 and twice and not timed:
                    continue
            except requests.exceptions.RequestException:
                problem = KmsUnavailable(f"{where} does not answer within its time limit.")
            except (AttributeError, KeyError, TypeError, ValueError):
                problem = self._nonsense()
            break
        if refused is not None and bad_request:
            refused()
        raise problem from None

    def _renewed(self, client: Any) -> bool:
        """Whether the token is another now than the one that was refused."""
        with self._lock:
            try:
                token = self._read_token()
            except KmsError:
                return False
            if token.reveal() == client.token:
                return False
            client.token = token.reveal()
            return True


def _not_here() -> None:
    raise KmsError(NOT_OURS)
