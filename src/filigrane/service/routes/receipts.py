"""Checking receipts. Offline `filigrane receipt verify` does the same, but for one thing: only the
service knows which keys were compromised since.
"""

import contextlib
from typing import Annotated, Self

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from filigrane.errors import NotFound
from filigrane.service.answers import ReceiptAnswer, Token, TokenId, receipt_answer
from filigrane.service.auth import office_of, optional
from filigrane.service.problems import no_token, told
from filigrane.service.receipts import Receipt
from filigrane.store.records import Principal

router = APIRouter(prefix="/v1/receipts", tags=["receipts"])

Anyone = Annotated[Principal | None, Depends(optional())]


class VerifyBody(BaseModel):
    """A receipt, and the text or the ids that it must be about, if at hand."""

    model_config = ConfigDict(extra="forbid", strict=True)

    receipt: Token
    text: str | None = None
    tokens: list[TokenId] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.text is not None and self.tokens is not None:
            raise told("Send text or tokens, not both.")
        return self


@router.post("/verify")
def verify(body: VerifyBody, who: Anyone, request: Request) -> ReceiptAnswer:
    """Whether a receipt is one of this service, unaltered, what it says, and what became of its key
    since: what a compromised one found counts only on receipts from before.
    """
    office = office_of(request)
    if who is None and office.settings.public is None:
        raise no_token()
    content = body.text if body.text is not None else body.tokens
    receipt: Receipt = office.receipts.verify(body.receipt, content)
    record = None
    if receipt.key_id is not None:
        with contextlib.suppress(NotFound):
            record = office.keybook.version(receipt.tenant, receipt.key_id)
    return receipt_answer(receipt, record)
