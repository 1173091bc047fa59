"""What requests for detection look like on the wire, and what is answered; computes nothing.

Numbers are logarithms to base 10 here, as everywhere outside the library. Answers are plain
dictionaries, turned into JSON once; the models below describe them in the API's documentation, and
tests hold one to the other.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from filigrane.service.detecting import CAUTIONS, MAX_ALPHA, Finding, Query, Verdict
from filigrane.service.problems import told

if TYPE_CHECKING:
    from filigrane.service.public import PublicAnswer
    from filigrane.service.receipts import Receipt
    from filigrane.service.tracing import Traced
    from filigrane.store.records import VersionRecord

__all__ = [
    "Content",
    "DetectBody",
    "ExpertAnswer",
    "PublicAnswerBody",
    "expert_answer",
    "public_answer",
    "query_of",
    "traced_answer",
]

TokenId = Annotated[int, Field(ge=0, le=2**32 - 2)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Token = Annotated[str, Field(min_length=1, max_length=200_000)]
_LEAST: Final = -1e6


class Content(BaseModel):
    """A text, or its token ids without the prompt: one of the two."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | None = Field(None, min_length=1)
    tokens: list[TokenId] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise told("Send one of the two, text or tokens.")
        return self


class Hinted(Content):
    """What is known of the text from elsewhere; fewer keys are tried then.

    model: that may have written it; key: a key's name or the id of one version; tokenizer: name or
    fingerprint of the one that the text is to be read with.
    """

    model: Name | None = None
    key: Name | None = None
    tokenizer: Name | None = None


class DetectBody(Hinted):
    """A text to test. The public tier takes text and issue_receipt alone.

    alpha: the level of the verdict, 1e-6 unless the service is set up otherwise; evidence: whether
    to say where the mark is; receipt: an earlier one for this content, which shows that it existed
    by then; issue_receipt: whether the answer is to come with a signed receipt.
    """

    alpha: Annotated[float, Field(gt=0, le=MAX_ALPHA)] | None = None
    evidence: bool = False
    receipt: Token | None = None
    issue_receipt: bool = False


class CautionBody(BaseModel):
    """Something to know before relying on the answer."""

    code: str
    words: str


class KeyBody(BaseModel):
    """One version's result. log10_pvalue: corrected for its own slots; log10_pvalue_holm: for all
    tests that were made; counts: whether it may count, see the cautions compromised_key and
    pre_active_key.
    """

    key: str
    mark: str
    state: str
    log10_pvalue: float
    log10_pvalue_holm: float
    n_scored: int
    n_repeated: int
    slots: int
    reading: Literal["given", "cleaned"]
    counts: bool


class SpanBody(BaseModel):
    """Tokens start to stop - 1 carry the mark; characters likewise, null for ids."""

    start: int
    stop: int
    start_char: int | None
    stop_char: int | None
    log10_pvalue: float
    n_scored: int


class HeatBody(BaseModel):
    """nats: evidence of each token under the best key, null where not scored; offsets: characters
    of the text that each token covers, [start, stop).
    """

    key: str
    reading: Literal["given", "cleaned"]
    nats: list[float | None]
    offsets: list[tuple[int, int]] | None


class ExpertAnswer(BaseModel):
    """All that a test says. The verdict is about marks of this tenant's keys, never about authors.

    log10_pvalue: of the best version that counts, corrected for every test; key: that version, if
    detected; n_keys: versions tested, of n_readable that the tenant has; n_tests: their slots and
    readings.
    """

    tier: Literal["expert"]
    verdict: Verdict
    alpha: float
    log10_pvalue: float
    key: str | None
    technique: str
    n_tokens: int
    n_scored: int
    n_repeated: int
    n_keys: int
    n_tests: int
    n_readings: int
    n_readable: int
    keys: list[KeyBody]
    spans: list[SpanBody]
    heat: HeatBody | None
    cautions: list[CautionBody]
    unusual: list[str]
    method: str
    content_sha256: str
    content_kind: Literal["text", "ids"]
    receipt: str | None


class PublicAnswerBody(BaseModel):
    """What everybody is told. The same text gets the same answer.

    notes: what the validity of a found mark depends on.
    """

    tier: Literal["public"]
    verdict: Verdict
    headline: str
    explanation: str
    technique: str
    limits: list[str]
    notes: list[str]
    min_tokens: int
    alpha: float
    content_sha256: str
    receipt: str | None


class NamedBody(BaseModel):
    """A candidate. log10_pvalue: corrected for every user, slot and key."""

    key: str
    user: int
    log10_pvalue: float


class TraceAnswer(BaseModel):
    """Whose mark a text carries. named: at or below alpha; candidates: the best, named or not."""

    named: list[NamedBody]
    candidates: list[NamedBody]
    alpha: float
    n_users: int
    n_keys: int
    n_tests: int
    n_tokens: int
    n_scored: int
    method: str
    cautions: list[CautionBody]
    content_sha256: str
    approval: str
    purpose: str


class ReceiptAnswer(BaseModel):
    """What a genuine receipt says, and what the service knows of its key by now.

    committed_at: when the log had the key's commitment: the receipt counts only for texts first
    seen after that; n_keys: versions tested, of n_readable; hints: what left out the others;
    key_state, compromised_since: of the key today, null if there is none or it is not known here;
    counts: false if the key was compromised before the receipt was issued, null without a key.
    """

    tenant: str
    id: str
    issued_at: str
    tier: Literal["public", "expert"]
    detector: str
    content_sha256: str
    content_kind: str
    verdict: str
    statement: str
    technique: str
    alpha: float
    n_keys: int
    n_readable: int
    hints: dict[str, str]
    key: str | None
    committed_at: str | None
    key_state: str | None
    compromised_since: str | None
    counts: bool | None


def query_of(body: Hinted, alpha: float) -> Query:
    """The query of a body. Raises TokenError."""
    tokens = None if body.tokens is None else np.asarray(body.tokens, dtype=np.int64)
    detect = body if isinstance(body, DetectBody) else None
    return Query(
        text=body.text,
        tokens=tokens,
        model=body.model,
        key=body.key,
        tokenizer=body.tokenizer,
        alpha=alpha,
        receipt=None if detect is None else detect.receipt,
        evidence=False if detect is None else detect.evidence,
    )


def expert_answer(finding: Finding, receipt: str | None = None) -> dict[str, Any]:
    """`ExpertAnswer` of a finding."""
    return {
        "tier": "expert",
        "verdict": finding.verdict,
        "alpha": finding.alpha,
        "log10_pvalue": _log10(finding.log_pvalue),
        "key": finding.key_id,
        "technique": finding.technique,
        "n_tokens": finding.n_tokens,
        "n_scored": finding.n_scored,
        "n_repeated": finding.n_repeated,
        "n_keys": finding.n_keys,
        "n_tests": finding.n_tests,
        "n_readings": finding.n_readings,
        "n_readable": finding.n_readable,
        "keys": [
            {
                "key": one.key_id,
                "mark": one.mark,
                "state": one.state,
                "log10_pvalue": _log10(one.log_pvalue),
                "log10_pvalue_holm": _log10(one.log_pvalue_holm),
                "n_scored": one.n_scored,
                "n_repeated": one.n_repeated,
                "slots": one.slots,
                "reading": one.reading,
                "counts": one.counts,
            }
            for one in finding.per_key
        ],
        "spans": [
            {
                "start": span.start,
                "stop": span.stop,
                "start_char": span.start_char,
                "stop_char": span.stop_char,
                "log10_pvalue": _log10(span.log_pvalue),
                "n_scored": span.n_scored,
            }
            for span in finding.spans
        ],
        "heat": _heat(finding),
        "cautions": _cautions(finding.cautions),
        "unusual": list(finding.unusual),
        "method": finding.method,
        "content_sha256": finding.content_sha256,
        "content_kind": finding.content_kind,
        "receipt": receipt,
    }


def public_answer(answer: "PublicAnswer", receipt: str | None = None) -> dict[str, Any]:
    """`PublicAnswerBody` of an answer: no number of the test is in it."""
    return {
        "tier": "public",
        "verdict": answer.verdict,
        "headline": answer.headline,
        "explanation": answer.explanation,
        "technique": answer.technique,
        "limits": list(answer.limits),
        "notes": list(answer.notes),
        "min_tokens": answer.min_tokens,
        "alpha": answer.finding.alpha,
        "content_sha256": answer.finding.content_sha256,
        "receipt": receipt,
    }


def traced_answer(traced: "Traced") -> TraceAnswer:
    """`TraceAnswer` of a trace."""

    def bodies(named: Any) -> list[NamedBody]:
        return [
            NamedBody(key=one.key_id, user=one.user, log10_pvalue=_log10(one.log_pvalue))
            for one in named
        ]

    return TraceAnswer(
        named=bodies(traced.named),
        candidates=bodies(traced.candidates),
        alpha=traced.alpha,
        n_users=traced.n_users,
        n_keys=traced.n_keys,
        n_tests=traced.n_tests,
        n_tokens=traced.n_tokens,
        n_scored=traced.n_scored,
        method=traced.method,
        cautions=[CautionBody(**one) for one in _cautions(traced.cautions)],
        content_sha256=traced.content_sha256,
        approval=traced.approval,
        purpose=traced.purpose,
    )


def receipt_answer(receipt: "Receipt", record: "VersionRecord | None" = None) -> ReceiptAnswer:
    """`ReceiptAnswer` of a verified receipt; record: its key's, if it names one and we have it."""
    committed = receipt.committed_at
    since = None if record is None else record.compromised_since
    statement = str(receipt.claims.get("statement", ""))
    counts = None if receipt.key_id is None else since is None or receipt.issued_at < since
    if counts is False and since is not None:
        statement = (
            f"This receipt does not count: its key was compromised on {since.isoformat()}, before "
            "it was issued, and whoever had the key could mark any text."
        )
    return ReceiptAnswer(
        tenant=receipt.tenant,
        id=receipt.id,
        issued_at=receipt.issued_at.isoformat(),
        tier=receipt.tier,
        detector=receipt.detector,
        content_sha256=receipt.content_sha256,
        content_kind=receipt.content_kind,
        verdict=receipt.verdict,
        statement=statement,
        technique=receipt.technique,
        alpha=receipt.alpha,
        n_keys=receipt.n_keys,
        n_readable=receipt.n_readable,
        hints=dict(receipt.hints),
        key=receipt.key_id,
        committed_at=None if committed is None else committed.isoformat(),
        key_state=None if record is None else str(record.state),
        compromised_since=None if since is None else since.isoformat(),
        counts=counts,
    )


def _heat(finding: Finding) -> dict[str, Any] | None:
    heat = finding.heat
    if heat is None:
        return None
    # Four digits show everything that a colour can, and keep the answer small.
    nats = [None if math.isnan(value) else round(value, 4) for value in heat.evidence.tolist()]
    return {
        "key": heat.key_id,
        "reading": heat.reading,
        "nats": nats,
        "offsets": None if heat.offsets is None else heat.offsets.tolist(),
    }


def _cautions(codes: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"code": code, "words": CAUTIONS[code]} for code in codes]


def _log10(log_p: float) -> float:
    # JSON has no infinity.
    return max(_LEAST, log_p / math.log(10)) + 0.0
