"""The detection service: keys, detection, tracing, receipts and jobs of several tenants over HTTP.

    settings    what an operator writes down; office: everything that is opened from it
    app         the ASGI application: checks before parsing, routes, problems
    auth        which roles a request needs; gatekeeper, oidc: who holds a token
    problems    errors that repeat no input
    telemetry   metrics, logs and spans with a list of what they may say
    running     processes; jobs: the worker that detects in the background
    routes      what can be asked, a file for each subject

It parses, authenticates and renders; p-values come from below.
"""
