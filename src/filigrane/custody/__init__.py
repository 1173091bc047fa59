"""Custody of keys: where they come from, what may become of them, and the log that says what did.

    hierarchy   root -> tenant -> key version -> user; commitments
    states      pre-active, active, retired, compromised, destroyed
    audit       the append-only log: records, chain, checkpoints, proofs, offline verification

Bytes and rules only: no database, no socket, no clock.
"""
