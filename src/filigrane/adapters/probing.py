"""Asking a running server for a short text and looking for its mark: is it really marking?

For any server of OpenAI's protocol that returns token ids: vLLM with the plugin, filigrane's own.
"""

import math
from dataclasses import dataclass
from typing import Any

from filigrane.detection import DetectionResult, detect
from filigrane.errors import EndpointError, MissingDependency
from filigrane.serving.orders import Mark

try:
    import httpx2
except ImportError as error:
    raise MissingDependency(
        "asking servers needs another package: pip install 'filigrane[endpoints]'"
    ) from error

PROMPT = "Write a long story about a journey through a foreign country. Once upon a time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a server wrote when asked for a mark. tokens: how many; result: the test of them."""

    tokens: int
    result: DetectionResult

    def found(self, alpha: float) -> bool:
        """Whether the mark is there, at level alpha."""
        return self.result.log_pvalue <= math.log(alpha)


def probe(
    url: str,
    model: str,
    mark: Mark,
    *,
    tenant: str | None = None,
    token: str | None = None,
    tokens: int = 120,
    timeout: float = 120.0,
) -> Probe:
    """Have a server write a text with this mark, and test it.

    url: the server's base address, ".../v1"; token: the tenant's bearer token, or tenant: its name
    where servers believe it. Raises EndpointError if the server cannot be reached, refuses, or
    returns no token ids.
    """
    arguments = {"filigrane_key": mark.key_id, "filigrane_scheme": mark.scheme.tag}
    if tenant is not None:
        arguments["filigrane_tenant"] = tenant
    body: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 1.0,
        "return_token_ids": True,
        "ignore_eos": True,
        "vllm_xargs": arguments,
    }
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        answer = httpx2.post(
            f"{url.rstrip('/')}/completions", json=body, headers=headers, timeout=timeout
        )
    except httpx2.HTTPError as error:
        raise EndpointError(
            f"{url} cannot be asked ({type(error).__name__}): name a running server's base "
            "address, http://HOST:PORT/v1."
        ) from None
    if answer.status_code != 200:
        said = answer.text[:500]
        if token:
            said = said.replace(token, "[token]")
        hint = {
            401: " The tenant's token is wanted.",
            404: " Is the address the base address, ending in /v1?",
        }.get(answer.status_code, "")
        raise EndpointError(f"{url} refused the request ({answer.status_code}):{hint} {said}")
    try:
        ids = answer.json()["choices"][0]["token_ids"]
    except (ValueError, LookupError, TypeError):
        ids = None
    if not isinstance(ids, list):
        raise EndpointError(
            f"{url} returns no token ids; the probe needs a server that knows return_token_ids "
            "(vLLM 0.10.2 or newer, filigrane engine serve)."
        )
    return Probe(tokens=len(ids), result=detect(ids, mark.key, mark.scheme))
