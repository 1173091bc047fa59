"""A small server that speaks OpenAI's protocol and marks text: one model, one process, no vLLM.

    application   a loaded model and a keyring -> an ASGI application
    serve         runs it until a signal ends it; `server` leaves running it to the caller

For laptops, processors, tests and small teams; what needs throughput is served by vLLM, with the
same keyring and the same fields in requests. How to use it: docs/serving-small.md.
"""

from filigrane.adapters.openai_server.app import Limits, application
from filigrane.adapters.openai_server.running import serve, server

__all__ = ["Limits", "application", "serve", "server"]
