"""Marks inside vLLM: found by its entry points, configured by FILIGRANE_KEYRING, nothing patched.

    launch       `vllm.general_plugins`: reads the keyring when a server starts, or refuses to start
    admission    each request, in the process that talks to clients: key and scheme, or HTTP 400
    processors   `vllm.logits_processors`: the marks, in the processes that run the model
    tenants      a middleware (`--middleware`) that knows tenants by their bearer tokens
    native       vLLM's own watermark, driven from filigrane's keys

For vLLM 0.30 to 0.33, both of its interfaces for logits processors. Importing this package imports
no vLLM. How to serve with it: docs/serving.md.
"""
