"""A root in AWS KMS, by boto3.

HMAC keys of KMS do not rotate, so every version is keys of its own: HMAC_256 for MACs and a
symmetric one for wrapping. Their aliases are the list of versions, kept where the keys are:

    alias/<prefix>/mac/<n>     made last: a version exists when this does
    alias/<prefix>/wrap/<n>

Aliases are unique, so of two processes that make version n at once one takes n + 1. A key that lost
such a race stays without an alias (tag filigrane:root tells whose it was); filigrane never asks for
the right to delete keys. The context of what is wrapped is the encryption context, in hex, which
CloudTrail shows: contexts are names of keys, never secrets.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar, final

from filigrane.errors import KmsError, KmsUnavailable, MissingDependency
from filigrane.keys import _Secret
from filigrane.kms.addresses import checked_address, host_of
from filigrane.kms.blobs import (
    CLOSED,
    NOT_OURS,
    require_message,
    require_version,
    require_wrappable,
    version_of,
    versioned_head,
)

try:
    import boto3
    from botocore import exceptions as failures
    from botocore.config import Config
except ImportError:
    raise MissingDependency("the aws provider needs boto3: pip install 'filigrane[kms]'.") from None

__all__ = ["AwsPlace", "AwsRoot"]

_T = TypeVar("_T")

_PREFIX: Final = re.compile(r"(?!aws)[A-Za-z0-9][A-Za-z0-9_/-]{0,127}")
_ATTEMPTS: Final = 5
_AWAY: Final = frozenset(
    {
        "DependencyTimeoutException",
        "InternalFailure",
        "KMSInternalException",
        "KeyUnavailableException",
        "LimitExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "Throttling",
        "ThrottlingException",
    }
)
_DENIED: Final = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_UNREADABLE: Final = frozenset({"IncorrectKeyException", "InvalidCiphertextException"})


class _Taken(Exception):
    """Another process has made this alias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsPlace:
    """Where a root is, and how to get there.

    prefix: what its aliases begin with. region, profile, credentials: by the SDK's own chain where
    not given. endpoint: of a VPC or a test server. timeout_s: to connect, and to answer, seconds.
    """

    prefix: str = "filigrane"
    region: str | None = None
    profile: str | None = None
    endpoint: str | None = None
    timeout_s: float = 5.0


@final
class AwsRoot:
    """A KeyManagement in AWS KMS; made by `open` or `create`, shows its prefix only."""

    __slots__ = ("_client", "_lock", "_prefix", "_where")

    _client: _Secret[Any]
    _lock: threading.Lock
    _prefix: str
    _where: str

    def __init__(self) -> None:
        """Refuse: a root is in AWS."""
        raise TypeError("use AwsRoot.open or AwsRoot.create, with an AwsPlace")

    @classmethod
    def open(cls, place: AwsPlace) -> Self:
        """The root that is there.

        Raises KmsError if there is no such root or access, KmsUnavailable if AWS does not answer.
        """
        self = cls._connected(place)
        self.versions()
        return self

    @classmethod
    def create(cls, place: AwsPlace) -> Self:
        """A new root with version 1; raises KmsError if there is one, else as `open`."""
        self = cls._connected(place)
        name = f"alias/{place.prefix}"
        if self._listed():
            raise KmsError(f"there is a root {name} in {self._where} already; open it.")
        try:
            self._add(1)
        except _Taken:
            raise KmsError(f"another process has just made {name}; open it.") from None
        return self

    @classmethod
    def _connected(cls, place: AwsPlace) -> Self:
        if not _PREFIX.fullmatch(place.prefix):
            raise KmsError("a prefix of aliases has letters, digits and _ / - only, not aws first.")
        address = None if place.endpoint is None else checked_address(place.endpoint)
        self = object.__new__(cls)
        self._prefix, self._lock = place.prefix, threading.Lock()
        # At DEBUG the SDK logs the bodies of requests and answers, MACs and plain texts included.
        logging.getLogger("botocore").setLevel(logging.INFO)
        config = Config(
            connect_timeout=place.timeout_s,
            read_timeout=place.timeout_s,
            # The callers know when to try again; here a limit is a limit.
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=32,
        )
        try:
            session = boto3.Session(profile_name=place.profile, region_name=place.region)
            client = session.client("kms", endpoint_url=address, config=config)
        except (failures.BotoCoreError, ValueError) as error:
            raise KmsError(
                f"the AWS SDK cannot be set up ({type(error).__name__}): name a region, and a "
                "profile that exists."
            ) from None
        self._where = host_of(address) if address else f"AWS KMS, {client.meta.region_name}"
        self._client = _Secret(client)
        return self

    @property
    def provider(self) -> str:
        """aws."""
        return "aws"

    @property
    def protection(self) -> str:
        """In words, where the root lives and whether it can leave."""
        return (
            f"HMAC and symmetric keys in {self._where}, which cannot leave; MACs and what is "
            "wrapped pass through this process"
        )

    def versions(self) -> tuple[int, ...]:
        """The root's versions, ascending, as the aliases in KMS say now."""
        found = self._listed()
        if not found:
            raise KmsError(
                f"there is no root alias/{self._prefix} in {self._where}; make it (docs/kms.md) or "
                "correct prefix, region and account."
            )
        return found

    def mac(self, version: int, message: bytes) -> _Secret[bytes]:
        """HMAC-SHA256 of a message of 1 to 4,096 bytes: 32 bytes."""
        require_message(message)
        answer = self._ask(
            lambda client: client.generate_mac(
                KeyId=self._alias("mac", version), Message=message, MacAlgorithm="HMAC_SHA_256"
            ),
            missing=version,
        )
        made = answer.get("Mac")
        if not isinstance(made, bytes) or len(made) != 32:
            raise KmsError(f"{self._where} answered no MAC of 32 bytes; check the endpoint.")
        return _Secret(made)

    def wrap(self, data: _Secret[bytes], context: bytes) -> bytes:
        """Encrypt 1 to 4,096 bytes under the current version, bound to a context."""
        require_wrappable(data, context)
        version = self.versions()[-1]
        answer = self._ask(
            lambda client: client.encrypt(
                KeyId=self._alias("wrap", version),
                Plaintext=data.reveal(),
                EncryptionContext=_bound(version, context),
            ),
            missing=version,
        )
        made = answer.get("CiphertextBlob")
        if not isinstance(made, bytes) or not made:
            raise KmsError(f"{self._where} answered no ciphertext; check the endpoint.")
        return versioned_head("aws", version) + made

    def unwrap(self, blob: bytes, context: bytes) -> _Secret[bytes]:
        """What was wrapped, under whichever version; KmsError for another context."""
        version, sealed = version_of("aws", blob, context, least=1)
        answer = self._ask(
            lambda client: client.decrypt(
                KeyId=self._alias("wrap", version),
                CiphertextBlob=sealed,
                EncryptionContext=_bound(version, context),
            ),
            missing=version,
        )
        made = _Secret(answer.get("Plaintext"))
        if not isinstance(made.reveal(), bytes):
            raise KmsError(f"{self._where} answered no plaintext; check the endpoint.")
        return made

    def rotate(self) -> int:
        """Make the keys of a new version and return its number."""
        for _ in range(_ATTEMPTS):
            version = self.versions()[-1] + 1
            try:
                self._add(version)
            except _Taken:
                continue
            return version
        raise KmsUnavailable("other processes rotate this root at the same time; try again.")

    def close(self) -> None:
        """Close connections; every later call raises KmsError."""
        with self._lock:
            client = self._client.reveal()
            if client is not None:
                client.close()
            self._client = _Secret(None)

    def __repr__(self) -> str:
        return f"<AwsRoot alias/{self._prefix} in {self._where}>"

    def _alias(self, use: str, version: int) -> str:
        return f"alias/{self._prefix}/{use}/{version}"

    def _listed(self) -> tuple[int, ...]:
        names = self._ask(
            lambda client: [
                alias["AliasName"]
                for page in client.get_paginator("list_aliases").paginate()
                for alias in page["Aliases"]
                if alias.get("TargetKeyId")
            ]
        )
        pattern = re.compile(re.escape(self._alias("mac", 0)[:-1]) + "([1-9][0-9]{0,5})")
        found = (pattern.fullmatch(name) for name in names)
        return tuple(sorted(int(match[1]) for match in found if match))

    def _add(self, version: int) -> None:
        """Make the keys of a version; _Taken if another process has."""
        for use, usage, kind in (
            ("wrap", "ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT"),
            ("mac", "GENERATE_VERIFY_MAC", "HMAC_256"),
        ):
            try:
                self._add_key(self._alias(use, version), usage, kind, version)
            except _Taken:
                # A wrapping key that a process left behind before it made the MAC key will do.
                if use == "mac":
                    raise

    def _add_key(self, alias: str, usage: str, kind: str, version: int) -> None:
        made = self._ask(
            lambda client: client.create_key(
                Description="filigrane root; deleting it loses detection of all its marks",
                KeyUsage=usage,
                KeySpec=kind,
                Tags=[
                    {"TagKey": "filigrane:root", "TagValue": self._prefix},
                    {"TagKey": "filigrane:version", "TagValue": str(version)},
                ],
            )["KeyMetadata"]["KeyId"],
            twice=False,
        )
        self._ask(
            lambda client: client.create_alias(AliasName=alias, TargetKeyId=made), twice=False
        )

    def _ask(
        self, call: Callable[[Any], _T], *, twice: bool = True, missing: int | None = None
    ) -> _T:
        """One request. twice: a connection that broke is tried again; missing: of which version."""
        problem: KmsError
        absent = False
        for attempt in (1, 2):
            client = self._client.reveal()
            if client is None:
                raise KmsError(CLOSED)
            try:
                return call(client)
            except failures.ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if code == "AlreadyExistsException":
                    raise _Taken from None
                absent = code in ("NotFoundException", "NotFound")
                problem = self._refusal(code, int(status))
            except failures.SSLError:
                problem = KmsError(f"the certificate of {self._where} is not one that is trusted.")
            except (failures.ConnectTimeoutError, failures.ReadTimeoutError):
                problem = KmsUnavailable(f"{self._where} does not answer within its time limit.")
            except (failures.ConnectionError, failures.HTTPClientError):
                problem = KmsUnavailable(f"{self._where} cannot be reached; try again later.")
                # A server that was restarted leaves dead connections behind.
                if attempt == 1 and twice:
                    continue
            except failures.BotoCoreError as error:
                problem = KmsError(
                    f"the AWS SDK cannot ask {self._where} ({type(error).__name__}): check "
                    "credentials and settings."
                )
            except (AttributeError, KeyError, TypeError, ValueError):
                problem = KmsError(f"{self._where} answered, but not as AWS KMS does.")
            break
        if absent and missing is not None:
            require_version(missing, self.versions())
        raise problem from None

    def _refusal(self, code: str, status: int) -> KmsError:
        # AWS's own messages name accounts and key policies; codes are enough.
        named = code if re.fullmatch(r"[A-Za-z]{1,60}", code) else "no code"
        if code in _AWAY or status >= 500 or status == 429:
            return KmsUnavailable(f"{self._where} is overloaded ({named}); try again later.")
        if code in _DENIED or status == 403:
            return KmsError(
                f"{self._where} refuses these credentials ({named}); docs/kms.md lists the "
                "permissions."
            )
        if code in _UNREADABLE:
            return KmsError(NOT_OURS)
        return KmsError(f"{self._where} refuses ({named}); is the key of alias/{self._prefix} on?")


def _bound(version: int, context: bytes) -> dict[str, str]:
    return {"filigrane": f"{version}:{context.hex()}"}
