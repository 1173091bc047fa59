"""Where keys, tokens, approvals, the log and jobs are kept: SQLite or PostgreSQL, and no secret.

The database holds names, states, dates, salts, and blobs that only the key management system opens.
`filigrane.store.keys.KeyBook` is the way to keys, `access` to tokens and roles, `log` to the audit
log, `jobs` to work that waits; all go through `database.Database`, one tenant a transaction.
"""
