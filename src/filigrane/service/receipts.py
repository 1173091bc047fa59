"""Signed results that anybody can check without this service, years later.

    header    {"alg": "EdDSA", "kid": "receipt-<r>", "typ": "filigrane-receipt+jws"}
    payload   JSON, see `Receipts.issue`: what was tested (content hash), when, by which detector,
              for what (techniques, key versions, alpha), the verdict, and, where a mark was found,
              the log's record that committed to its key, with an inclusion proof to a signed
              checkpoint
    form      RFC 7515 compact serialisation; Ed25519 (RFC 8037)

A key that was chosen after a text can make any text seem marked. That is why a receipt carries the
proof that its key stood in the log before it was issued, and why `verify` asks for it. It proves
nothing for a text that was known before: whoever makes keys can make them until one fits. So a
receipt counts only for texts first seen after `committed_at`, which it says, and `check_date`
checks; and it says how many versions could have been read, and which hints left some out. Public
receipts hold the verdict and no number of the test; expert ones hold log p and spans as well.
"""

import base64
import hashlib
import json
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy.typing as npt
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import OKPKey

from filigrane import __version__
from filigrane.custody import chain, checkpoints, merkle
from filigrane.errors import AuditError, KmsError, NotFound, ReceiptError, StateError
from filigrane.kms.base import KeyManagement
from filigrane.service.contents import content_hash
from filigrane.service.detecting import Finding, KeyFinding, Said
from filigrane.store.log import Log, Signers
from filigrane.store.material import Material

__all__ = [
    "DETECTOR",
    "TYPE",
    "WORDS",
    "Receipt",
    "Receipts",
    "Replay",
    "check_date",
    "content_hash",
    "verify",
]

TYPE: Final = "filigrane-receipt+jws"
ISSUER: Final = "filigrane"
DETECTOR: Final = f"filigrane/{__version__}"
"""Name and version of what tested."""
WORDS: Final[Mapping[Said, str]] = {
    "detected": "This text carries the mark of the key named here. That says what it passed "
    "through, not who wrote it, and counts only for a text first seen after the key was committed "
    "to, and before it was compromised, if it was.",
    "uncounted": "A mark was found that does not count: others may have had its key, or the key is "
    "not in use yet.",
    "inconclusive": "No mark was found under the keys named here. That does not say that the text "
    "was written by a human, nor that no model was used.",
    "too_short": "The text has too few positions to be tested; nothing follows from that.",
}
"""`Finding.said` -> what a receipt says of it."""
MAX_RECEIPT: Final = 100_000
_MAX_SPANS: Final = 64
_SKEW: Final = timedelta(seconds=60)
_CACHED: Final = 1024
# A forged receipt must not cost a call to the key management system each time.
_REFRESH_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A receipt that was verified.

    n_keys: versions tested, of n_readable that could be read; hints: what left out the others;
    key_id: whose mark was found, with proof that it was committed at committed_at, or None;
    log10_pvalue: on expert receipts only; claims: the whole payload.
    """

    tenant: str
    id: str
    issued_at: datetime
    tier: Literal["public", "expert"]
    detector: str
    content_sha256: str
    content_kind: str
    verdict: str
    technique: str
    alpha: float
    n_keys: int
    n_readable: int
    hints: Mapping[str, str]
    key_id: str | None
    committed_at: datetime | None
    log10_pvalue: float | None
    claims: Mapping[str, Any]


class _OnlyEdDSA(jws.JWSRegistry):
    """No other algorithm, whatever a header says; sizes as receipts have them.

    RFC 9864 calls this use of EdDSA "Ed25519"; the older name is what libraries know so far, and
    the key says which curve.
    """

    max_payload_length = MAX_RECEIPT

    def get_alg(self, name: str) -> jws.JWSAlgModel:
        if name != "EdDSA":
            raise UnsupportedAlgorithmError("a receipt is signed with EdDSA")
        return self.algorithms["EdDSA"]


def verify(
    token: str, jwks: Mapping[str, Any], content: str | npt.ArrayLike | None = None
) -> Receipt:
    """Check a receipt offline. Raises ReceiptError that says what is wrong with it.

    jwks: the service's public keys (RFC 7517), from /.well-known/jwks.json, not from the receipt;
    content: the text or the ids (n,) that it must be about, None to leave that open.
    """
    claims = _signed(token, jwks)
    receipt = _read(claims)
    if content is not None and content_hash(content) != receipt.content_sha256:
        raise ReceiptError(
            "this receipt is about another content: compare the file, to the last character, with "
            "the one that was tested."
        )
    if receipt.key_id is not None:
        receipt = _with_commitment(receipt, jwks)
    elif receipt.verdict == "detected":
        raise ReceiptError("this receipt says that a mark was found and does not say whose.")
    return receipt


def check_date(receipt: Receipt, first_seen: datetime) -> None:
    """Raise ReceiptError unless the key of the mark was committed to before the text was seen.

    first_seen: when the text was first seen, from elsewhere than from whoever holds the key.
    """
    if receipt.committed_at is not None and first_seen < receipt.committed_at:
        raise ReceiptError(
            f"this receipt does not count for this text: the text was first seen "
            f"{first_seen.isoformat()}, and the key was committed to after that, "
            f"{receipt.committed_at.isoformat()}; it may have been chosen to fit."
        )


def _signed(token: str, jwks: Mapping[str, Any]) -> dict[str, Any]:
    """The payload, if its signature is one of the service's keys for receipts."""
    token = token.strip()
    if len(token) > 2 * MAX_RECEIPT or not token.isascii():
        raise ReceiptError("this is no receipt: it is too long, or not plain ASCII.")
    try:
        found = jws.extract_compact(token.encode("ascii"), registry=_OnlyEdDSA())
        header = found.headers()
        name = header.get("kid")
        if header.get("typ") != TYPE or not isinstance(name, str):
            raise ReceiptError("this is signed, but it is no receipt of filigrane.")
        if not name.startswith("receipt-"):
            raise ReceiptError("this is not signed by a key for receipts.")
        raw = checkpoints.public_key(jwks, name).public_bytes_raw()
        key = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": _base64(raw)})
        if not jws.validate_compact(found, key, registry=_OnlyEdDSA()):
            raise ReceiptError(
                f"the signature of this receipt is not one of {name}: the receipt was altered, or "
                "it comes from another service than the keys."
            )
    except (JoseError, AuditError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, ReceiptError):
            raise
        said = str(error) if isinstance(error, AuditError) else "it is damaged, or something else."
        raise ReceiptError(f"this receipt cannot be read: {said}") from None
    return _object(found.payload or b"")


def _object(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ReceiptError("this receipt says something twice.")
        return dict(pairs)

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ReceiptError):
            raise
        raise ReceiptError("this receipt does not hold JSON.") from None
    if not isinstance(value, dict):
        raise ReceiptError("this receipt does not hold a JSON object.")
    return value


def _read(claims: dict[str, Any]) -> Receipt:
    try:
        content, mark = claims["content"], claims["mark"]
        if claims["iss"] != ISSUER or claims["version"] != 1:
            raise ReceiptError("this receipt is of a newer filigrane; verify it with that one.")
        number = claims.get("log10_pvalue")
        return Receipt(
            tenant=_text(claims["tenant"]),
            id=_text(claims["jti"]),
            issued_at=datetime.fromtimestamp(int(claims["iat"]), UTC),
            tier="expert" if claims["tier"] == "expert" else "public",
            detector=_text(claims["detector"]),
            content_sha256=_text(content["sha256"]),
            content_kind=_text(content["kind"]),
            verdict=_text(claims["verdict"]),
            technique=_text(claims["technique"]),
            alpha=float(claims["alpha"]),
            n_keys=int(claims["n_keys"]),
            n_readable=int(claims["n_readable"]),
            hints={_text(name): _text(value) for name, value in claims["hints"].items()},
            key_id=None if mark is None else _text(mark["key"]),
            committed_at=None,
            log10_pvalue=None if number is None else float(number),
            claims=MappingProxyType(claims),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        if isinstance(error, ReceiptError):
            raise
        raise ReceiptError("this receipt lacks something that receipts have.") from None


def _with_commitment(receipt: Receipt, jwks: Mapping[str, Any]) -> Receipt:
    """The receipt with the time of its key's commitment, which the log proves."""
    try:
        mark = receipt.claims["mark"]
        record = chain.Record.from_json(mark["record"])
        point = checkpoints.Checkpoint.from_json(mark["checkpoint"])
        leaf = chain.link(bytes.fromhex(mark["previous"]), record)
        proof = [bytes.fromhex(part) for part in mark["inclusion"]]
        commitment = _text(mark["commitment"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f": {error}" if isinstance(error, AuditError) else "."
        raise ReceiptError(f"this receipt's proof of its key cannot be read{said}") from None
    try:
        checkpoints.verify_checkpoint(point, jwks)
        merkle.verify_inclusion(leaf, record.index, point.size, proof, bytes.fromhex(point.root))
    except AuditError as error:
        raise ReceiptError(f"this receipt's key is not proved to be in the log: {error}") from None
    if not record.tenant == point.tenant == receipt.tenant:
        raise ReceiptError("this receipt's key was committed to by somebody else.")
    if record.facts.get("key") != receipt.key_id or record.facts.get("commitment") != commitment:
        raise ReceiptError("the log's record in this receipt commits to another key.")
    committed = _moment(record.at)
    # Seconds are what the receipt's time has; a record of the same second may be later by less.
    if committed >= receipt.issued_at + timedelta(seconds=1):
        raise ReceiptError("this receipt's key was committed to after the receipt was issued.")
    if _moment(point.at) > receipt.issued_at + _SKEW:
        raise ReceiptError("this receipt's proof is younger than the receipt.")
    return replace(receipt, committed_at=committed)


class Replay:
    """Remembers which receipts were shown as evidence; bounded, in memory, of this process.

    A receipt proves a date as often as it is shown: showing it again is noted, never refused.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def seen(self, name: str) -> bool:
        """Whether it was shown before; from now on it was."""
        with self._lock:
            before = name in self._seen
            self._seen[name] = None
            self._seen.move_to_end(name)
            while len(self._seen) > self._most:
                self._seen.popitem(last=False)
        return before


class Receipts:
    """Issues receipts and checks its own. Methods may be called from several threads.

    clock: the time, in UTC.
    """

    def __init__(
        self,
        log: Log,
        kms: KeyManagement,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        secret_lifetime_s: float = 600.0,
    ) -> None:
        self._log = log
        self._kms = kms
        self._clock = clock
        self._signers = Signers(kms, checkpoints.SIGN_RECEIPT)
        self._material = Material(kms, secret_lifetime_s)
        self._lock = threading.Lock()
        self._proofs: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()
        self._jwks: dict[str, Any] | None = None
        self._asked = -math.inf
        self._first: int | None = None
        self._replay = Replay()

    def __repr__(self) -> str:
        return "<Receipts>"

    def issue(self, tenant: str, finding: Finding, *, expert: bool, actor: str) -> str:
        """A receipt for a finding; that it was issued is logged first.

        Raises StoreError or KmsUnavailable if log or key cannot be had, StateError if the clock is
        behind the log: then there are no receipts.
        """
        now = self._clock()
        mark = self._mark(tenant, finding) if finding.verdict == "detected" else None
        if mark is not None and _moment(mark["checkpoint"]["at"]) > now + _SKEW:
            raise StateError("this machine's clock is behind the log; set it before receipts.")
        tags = sorted({one.mark for one in finding.per_key})
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "version": 1,
            "jti": secrets.token_hex(16),
            "iat": int(now.timestamp()),
            "tenant": tenant,
            "tier": "expert" if expert else "public",
            "detector": DETECTOR,
            "content": {"sha256": finding.content_sha256, "kind": finding.content_kind},
            "verdict": finding.verdict,
            "statement": WORDS[finding.said],
            "technique": finding.technique,
            "alpha": finding.alpha,
            "n_keys": finding.n_keys,
            "n_tests": finding.n_tests,
            "n_readable": finding.n_readable,
            "hints": dict(finding.hints),
            "keys": list(finding.tried),
            "marks_sha256": hashlib.sha256("\n".join(tags).encode("ascii")).hexdigest(),
            "cautions": list(finding.cautions),
            "mark": mark,
        }
        if expert:
            claims |= {
                "method": finding.method,
                "marks": tags,
                "log10_pvalue": _finite(finding.log10_pvalue),
                "n_tokens": finding.n_tokens,
                "n_scored": finding.n_scored,
                "spans": [
                    {
                        "start": span.start,
                        "stop": span.stop,
                        "log10_pvalue": _finite(span.log_pvalue / math.log(10)),
                    }
                    for span in finding.spans[:_MAX_SPANS]
                ],
            }
        signer = self._signers.current()
        if not any(key["kid"] == signer.key_id for key in (self._jwks or {}).get("keys", ())):
            self._jwks = None
        self._log.append(
            tenant,
            actor,
            "receipt.issue",
            {
                "receipt": claims["jti"],
                "content": self.content_name(tenant, finding.content_sha256),
                "verdict": finding.verdict,
                "tier": claims["tier"],
                "n_keys": finding.n_keys,
                "key": finding.key_id,
                "marks_sha256": claims["marks_sha256"],
            },
        )
        header = {"alg": "EdDSA", "kid": signer.key_id, "typ": TYPE}
        body = f"{_base64(_json(header))}.{_base64(_json(claims))}"
        # By hand, since the key never leaves its seal; joserfc and others verify it.
        return f"{body}.{_base64(signer.sign(body.encode('ascii')))}"

    def verify(self, token: str, content: str | npt.ArrayLike | None = None) -> Receipt:
        """`verify` against this service's own keys. Raises ReceiptError; KmsError."""
        try:
            return verify(token, self._known_jwks(), content)
        except ReceiptError:
            # The root may have got a version since.
            if time.monotonic() - self._asked < _REFRESH_S:
                raise
            known = self._jwks
            if self.jwks() == known:
                raise
            return verify(token, self._known_jwks(), content)

    def existed_at(self, token: str, tenant: str, content_sha256: str) -> datetime:
        """When a receipt of ours said that this content was there. Raises ReceiptError.

        Only a receipt of the same tenant counts.
        """
        receipt = self.verify(token)
        if receipt.tenant != tenant:
            raise ReceiptError("this receipt is of another tenant.")
        if receipt.content_sha256 != content_sha256:
            raise ReceiptError("this receipt is about another content than the request.")
        return receipt.issued_at

    def shown_before(self, token: str) -> bool:
        """Whether this receipt, which was verified, was shown as evidence before."""
        # By the digest of what was signed: a signature can be written in one way only.
        return self._replay.seen(hashlib.sha256(token.strip().encode("ascii")).hexdigest())

    def jwks(self) -> dict[str, Any]:
        """The public keys for receipts and for checkpoints, of all versions of the root.

        While the key management system does not answer, those that were known before. KmsError if
        there are none.
        """
        self._asked = time.monotonic()
        try:
            keys = [*self._signers.jwks()["keys"], *self._log.jwks()["keys"]]
        except KmsError:
            if self._jwks is None:
                raise
            return self._jwks
        self._jwks = {"keys": keys}
        return self._jwks

    def content_name(self, tenant: str, content_sha256: str) -> str:
        """What the log calls a content: its hash under a secret of the tenant, 64 hex digits."""
        # The first version of the root, so that the name of a content does not change.
        if self._first is None:
            self._first = min(self._kms.versions())
        root = self._first
        return self._material.secret(tenant, root).content_hash(bytes.fromhex(content_sha256))

    def _known_jwks(self) -> dict[str, Any]:
        return self.jwks() if self._jwks is None else self._jwks

    def _mark(self, tenant: str, finding: Finding) -> dict[str, Any]:
        found = next(one for one in finding.per_key if one.key_id == finding.key_id)
        name = (tenant, found.key_id)
        with self._lock:
            known = self._proofs.get(name)
            if known is not None:
                self._proofs.move_to_end(name)
        if known is None:
            known = self._proof(tenant, found)
            with self._lock:
                self._proofs[name] = known
                while len(self._proofs) > _CACHED:
                    self._proofs.popitem(last=False)
        return known | {"tag": found.mark}

    def _proof(self, tenant: str, found: KeyFinding) -> dict[str, Any]:
        index = found.log_index
        records = self._log.records(tenant, index, index + 1)
        if not records:
            raise NotFound(f"the log has no record of the commitment to {found.key_id}.")
        point = self._log.latest(tenant)
        if point is None or point.size <= index:
            point = self._log.checkpoint(tenant)
        return {
            "key": found.key_id,
            "commitment": found.commitment,
            "log_index": index,
            "record": records[0].to_json(),
            "previous": self._log.previous(tenant, index),
            "inclusion": self._log.inclusion(tenant, index, point.size),
            "checkpoint": point.to_json(),
        }


def _finite(log10: float) -> float:
    # JSON has no infinity.
    return max(-1e6, log10) + 0.0


def _moment(written: str) -> datetime:
    return datetime.fromisoformat(written)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
