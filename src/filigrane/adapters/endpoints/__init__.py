"""Models behind an OpenAI-compatible address: asking them, and reading with them.

    keys      the API key, which is shown to the endpoint and to nobody else
    answers   what is sent and what comes back, as JSON
    pacing    budget and pace
    workers   threads that wait
    client    Endpoint: one request, with retries
    reading   prompt log-probabilities, and from them what radioactivity tests

Nothing here knows a mark's key.
"""

from filigrane.adapters.endpoints.answers import Answer, Parameters
from filigrane.adapters.endpoints.client import Api, Endpoint, Unanswered
from filigrane.adapters.endpoints.keys import ApiKey, read_api_key
from filigrane.adapters.endpoints.pacing import Budget, Stopped
from filigrane.adapters.endpoints.reading import (
    find_form,
    prompt_probabilities,
    read_endpoint,
    token_strings,
)

__all__ = [
    "Answer",
    "Api",
    "ApiKey",
    "Budget",
    "Endpoint",
    "Parameters",
    "Stopped",
    "Unanswered",
    "find_form",
    "prompt_probabilities",
    "read_api_key",
    "read_endpoint",
    "token_strings",
]
