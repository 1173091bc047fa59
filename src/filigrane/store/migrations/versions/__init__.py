"""One file a migration; `filigrane.store.tables.HEAD` names the newest."""
