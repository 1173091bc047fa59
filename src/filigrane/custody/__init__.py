"""Custody of keys: where they come from, what may become of them, and the log that says what did.

    hierarchy     root -> tenant -> key version -> user; commitments
    states        pre-active, active, retired, compromised, destroyed
    chain         the append-only log: records, each tied by its hash to all before it
    merkle        the log's tree: proofs that a record is in it, that a longer log extends a shorter
    checkpoints   what a log was at one moment, signed; the keys that sign
    verification  an exported log, checked without the service
    forms         what names, times and numbers in a log look like

Bytes and rules only: no database, no socket, no clock.
"""
