"""What everybody may know of this service: its public keys, what it detects, where to go."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from filigrane.foreign import PROFILES
from filigrane.schemes import SCHEMES
from filigrane.service.auth import office_of
from filigrane.service.public import LIMITS, TECHNIQUE
from filigrane.service.receipts import DETECTOR

router = APIRouter(tags=["about"])

_KEPT = "public, max-age=300"


class JwksBody(BaseModel):
    """A JWK set (RFC 7517) of Ed25519 keys (RFC 8037). kid: receipt-<r> or log-<r>; old keys stay,
    so that old receipts can be verified.
    """

    keys: list[dict[str, str]]


class MarkBody(BaseModel):
    """A technique. tool: whose it is; reference: where it is described."""

    name: str
    tool: str
    reference: str


class ProfilesBody(BaseModel):
    """What keys can be made for: schemes of filigrane and profiles of other tools."""

    schemes: list[MarkBody]
    profiles: list[MarkBody]


class DescriptorBody(BaseModel):
    """What this detector is, for programs that look for one."""

    detector: str
    media: list[str]
    techniques: list[str]
    tokenizers: list[str]
    public_tier: bool
    min_tokens: int | None
    limits: list[str]
    detect: str
    verify_receipt: str
    jwks: str
    openapi: str


@router.get("/.well-known/jwks.json")
def jwks(request: Request, response: Response) -> JwksBody:
    """The public keys that receipts and checkpoints verify with."""
    response.headers["Cache-Control"] = _KEPT
    return JwksBody(keys=office_of(request).receipts.jwks()["keys"])


@router.get("/.well-known/filigrane.json")
async def descriptor(request: Request, response: Response) -> DescriptorBody:
    """What this detector is."""
    office = office_of(request)
    public = office.settings.public
    response.headers["Cache-Control"] = _KEPT
    return DescriptorBody(
        detector=DETECTOR,
        media=["text/plain"],
        techniques=[TECHNIQUE],
        tokenizers=list(office.tokenizers.names()),
        public_tier=public is not None,
        min_tokens=None if public is None else public.min_tokens,
        limits=list(LIMITS),
        detect="/v1/detect",
        verify_receipt="/v1/receipts/verify",
        jwks="/.well-known/jwks.json",
        openapi="/openapi.json",
    )


@router.get("/v1/profiles")
async def profiles() -> ProfilesBody:
    """The schemes and profiles that keys can be made for."""

    def mark(kind: Any, tool: str) -> MarkBody:
        return MarkBody(name=kind.name, tool=tool, reference=kind.reference)

    return ProfilesBody(
        schemes=[mark(kind, "filigrane") for kind in SCHEMES.values()],
        profiles=[mark(kind, kind.tool) for kind in PROFILES.values()],
    )
