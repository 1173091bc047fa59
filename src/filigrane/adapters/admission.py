"""From what a request says to what is written, alike in every server that runs the model itself.

    identify    whose request it is, by its bearer token where the keyring has such
    admit       the settings of a request -> Admitted: how it is drawn, and marked with what

A request keeps to the keyring that it was admitted with, `current` when it came, whatever becomes
of the folder meanwhile. Knows nothing of sockets. (vLLM has its own admission, in its own names.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from filigrane.embedding import Sampling
from filigrane.errors import RequestRefused
from filigrane.serving.keyring import Keyring
from filigrane.serving.orders import GREEDY, Decoding, Mark, Unmarked, decide

_TENANT: Final = "filigrane_tenant"


class NotIdentified(RequestRefused):
    """The request comes without a token that this server knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that is going to be answered: how, and marked with what."""

    sampling: Sampling
    mark: Mark | Unmarked


def identify(keyring: Keyring | None, token: str | None) -> str | None:
    """The tenant whose token this is; None where nobody has tokens, and what clients say counts.

    Raises NotIdentified if tokens are needed and this is none of them.
    """
    if keyring is None or not keyring.knows_tokens:
        return None
    tenant = keyring.tenant_of(token) if token else None
    if tenant is None:
        raise NotIdentified(
            "filigrane: this server knows its clients by bearer tokens "
            f"({'this is none of them' if token else 'none was sent'}): "
            "send one in the header Authorization: Bearer TOKEN.",
            reason="unknown_tenant",
        )
    return tenant


def admit(
    keyring: Keyring | None,
    arguments: Mapping[str, object],
    *,
    tenant: str | None,
    temperature: float,
    top_k: int,
    top_p: float,
    max_tokens: int,
) -> Admitted:
    """What becomes of a request.

    arguments: its own that begin with "filigrane_"; tenant: what `identify` said. Raises
    RequestRefused with its reason, UnsupportedDecoding for settings that make no sense.
    """
    given = dict(arguments)
    if tenant is not None:
        if _TENANT in given:
            raise RequestRefused(
                "filigrane: this server knows tenants by their bearer tokens; "
                "leave filigrane_tenant out.",
                reason="unknown_tenant",
            )
        given[_TENANT] = tenant
    sampling = Sampling(
        temperature=0.0 if temperature < GREEDY else temperature,
        top_k=max(top_k, 0),
        top_p=top_p,
    )
    mark = decide(
        keyring,
        given,
        Decoding(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
        ),
    )
    return Admitted(sampling=sampling, mark=mark)
