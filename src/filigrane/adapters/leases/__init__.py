"""How keys come to engines: leases, sealed to the one engine that can open them.

    sealing    what a lease says; sealed by the service, opened by the engine; an engine's identity
    client     asks the service for leases, proves that keys have arrived, reports what was marked
    folder     leases of several tenants merged into one keyring folder
    proof      a text that shows that its writer has a key
    metrics    what an engine has counted, read from its own /metrics

The keys travel as JWE (RFC 7516, ECDH-ES+A256KW with X25519, A256GCM): no proxy, log or crash dump
between the two ends holds one, and a bearer token that is stolen gets nothing that can be read.
"""
