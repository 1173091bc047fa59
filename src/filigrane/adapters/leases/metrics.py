"""What an engine has counted, from its own /metrics, and what has come since the last look.

    filigrane_requests_total{outcome, reason}   filigrane_tokens_total{state}

Counters begin again at nothing when an engine does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from filigrane.errors import EndpointError, MissingDependency

__all__ = ["Counts", "read", "since"]

_MOST_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """requests: (outcome, reason) -> number; tokens: positions of marked texts."""

    requests: Mapping[tuple[str, str], int] = field(default_factory=dict)
    marked_tokens: int = 0
    unmarked_tokens: int = 0

    def __bool__(self) -> bool:
        return any(self.requests.values()) or bool(self.marked_tokens or self.unmarked_tokens)


def read(url: str) -> Counts:
    """What the engine at this address has counted so far. Raises EndpointError."""
    try:
        import httpx2
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise MissingDependency(
            "reading an engine's metrics needs more packages: pip install prometheus-client httpx2"
        ) from error
    try:
        answer = httpx2.get(url, timeout=10.0, follow_redirects=False, trust_env=False)
        if answer.status_code != 200 or len(answer.content) > _MOST_BYTES:
            raise EndpointError(f"the engine's metrics answered {answer.status_code}.")
        requests: dict[tuple[str, str], int] = {}
        tokens = {"marked": 0, "unmarked": 0}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                labels = sample.labels
                if sample.name == "filigrane_requests_total":
                    place = (labels["outcome"], labels["reason"])
                    requests[place] = requests.get(place, 0) + int(sample.value)
                elif sample.name == "filigrane_tokens_total" and labels["state"] in tokens:
                    tokens[labels["state"]] += int(sample.value)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, OverflowError):
        raise EndpointError(
            "the engine's metrics cannot be read; pass the address that Prometheus would."
        ) from None
    return Counts(
        requests=requests, marked_tokens=tokens["marked"], unmarked_tokens=tokens["unmarked"]
    )


def since(before: Counts, after: Counts) -> Counts:
    """What has come between two looks; all of `after` if the engine was started anew."""
    again = any(after.requests.get(place, 0) < n for place, n in before.requests.items())
    if again or after.marked_tokens < before.marked_tokens:
        return after
    return Counts(
        requests={
            place: number - before.requests.get(place, 0)
            for place, number in after.requests.items()
            if number > before.requests.get(place, 0)
        },
        marked_tokens=after.marked_tokens - before.marked_tokens,
        unmarked_tokens=max(0, after.unmarked_tokens - before.unmarked_tokens),
    )
