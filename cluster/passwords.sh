#!/usr/bin/env bash
# Writes cluster/.env with random passwords for cluster/compose.yaml; never overwrites one that is there.
#
#   cluster/passwords.sh [FILE]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
file=${1:-$here/.env}
if [ -e "$file" ]; then
  echo "$file is there already: its passwords are those of the databases that were made with it" >&2
  exit 1
fi
umask 077
sed -n 's/^\([A-Z_]*\)=$/\1/p' "$here/env.example" | while read -r name; do
  printf '%s=%s\n' "$name" "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
done >"$file"
echo "wrote $file"
