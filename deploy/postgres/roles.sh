#!/bin/sh
# The database of the service and its two roles, on a PostgreSQL that is there. Run by an administrator,
# who is named as for psql (PGHOST, PGUSER, ...); a second run changes nothing but the passwords, to what
# the files hold now.
#
#   filigrane_owner   owns the database and its tables; `filigrane keys migrate` connects with it
#   filigrane         owns nothing and is held by row-level security; the service connects with it
set -eu

owner_password=${FILIGRANE_OWNER_PASSWORD_FILE:-/run/secrets/postgres.owner}
service_password=${FILIGRANE_PASSWORD_FILE:-/run/secrets/postgres.service}
for file in "$owner_password" "$service_password"; do
  [ -s "$file" ] || { echo "error: $file cannot be read; it holds a password." >&2; exit 2; }
done
export owner_password service_password

# Passwords go from file to server: an argument could be read by everybody on the host.
psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --username "${POSTGRES_USER:-${PGUSER:-postgres}}" \
  --dbname "${PGDATABASE:-postgres}" <<'SQL'
\set owner_password `cat "$owner_password"`
\set service_password `cat "$service_password"`

SELECT 'CREATE ROLE filigrane_owner'
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'filigrane_owner') \gexec
SELECT 'CREATE ROLE filigrane'
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'filigrane') \gexec

ALTER ROLE filigrane_owner LOGIN NOCREATEDB NOCREATEROLE PASSWORD :'owner_password';
ALTER ROLE filigrane LOGIN NOCREATEDB NOCREATEROLE PASSWORD :'service_password';

SELECT 'CREATE DATABASE filigrane OWNER filigrane_owner'
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'filigrane') \gexec
REVOKE ALL ON DATABASE filigrane FROM PUBLIC;
GRANT CONNECT ON DATABASE filigrane TO filigrane;

\connect filigrane
-- Before PostgreSQL 15 everybody may make tables here.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO filigrane_owner;

-- Row-level security holds neither of these back, so a service that connects as one would mix tenants.
DO $$
BEGIN
  IF EXISTS (
    SELECT FROM pg_roles
    WHERE rolname IN ('filigrane', 'filigrane_owner') AND (rolsuper OR rolbypassrls)
  ) OR pg_has_role('filigrane', 'filigrane_owner', 'MEMBER') THEN
    RAISE EXCEPTION 'the roles filigrane and filigrane_owner are there with more rights than they may '
      'have: take SUPERUSER, BYPASSRLS and memberships from them, then run this again';
  END IF;
END
$$;
SQL
