#!/bin/sh
# Makes the secrets of the service beside this file, once: in secrets/, one in a file, readable by their
# owner alone, and the folders data/ of the two databases. Overwrites nothing.
#
#   sh deploy/secrets.sh [FOLDER]     FOLDER: instead of the one of this script
#
# Containers run as whoever calls it; called by root, as 10001.
set -eu
umask 077

refuse() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

folder=${1:-$(dirname -- "$0")}
command -v openssl >/dev/null || refuse "openssl is missing; install it (apt-get install openssl)."
[ -d "$folder" ] || refuse "$folder is no folder; make it, or name another."
cd -- "$folder"
for name in secrets data .env; do
  [ ! -e "$name" ] || refuse "$folder/$name is there already and is never overwritten: without these \
secrets the data cannot be read. To begin anew, move $folder/secrets, data and .env away together."
done

user=$(id -u) group=$(id -g)
if [ "$user" = 0 ]; then
  user=10001 group=10001
fi

# Everything appears at once or not at all.
made=$(mktemp -d ./.secrets.XXXXXX)
trap 'rm -rf -- "$made"' EXIT
mkdir "$made/secrets" "$made/data" "$made/data/postgres" "$made/data/openbao"

# Texts without a line break at the end: OpenBao takes the whole file for the token.
text() {
  openssl rand -hex 32 | tr -d '\n' >"$made/secrets/$1"
}
text postgres.superuser
text postgres.owner
text postgres.service
text openbao.token
text openbao.operator
openssl rand -out "$made/secrets/openbao.seal" 32
# OpenBao's certificate, which is its own authority: nobody else is believed.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -subj /CN=openbao \
  -addext subjectAltName=DNS:openbao,DNS:localhost,IP:127.0.0.1 \
  -addext keyUsage=critical,digitalSignature,keyCertSign \
  -keyout "$made/secrets/openbao.tls" -out "$made/secrets/openbao.crt" 2>/dev/null ||
  refuse "openssl cannot make a certificate; version 3 or newer does."
printf 'FILIGRANE_UID=%s\nFILIGRANE_GID=%s\n' "$user" "$group" >"$made/.env"

if [ "$(id -u)" = 0 ]; then
  chown -R "$user:$group" "$made/secrets" "$made/data"
fi
mv "$made/secrets" "$made/data" "$made/.env" .
printf 'made %s/secrets and %s/data\n' "$folder" "$folder"
printf 'Copy secrets/openbao.seal and secrets/openbao.operator to where no copy of data/ lies.\n'
