#!/usr/bin/env bash
# Installs peftsearch into a virtual environment of its own; the same on every machine of a cluster.
#
#   install.sh WHEEL [CONSTRAINTS] [ENVIRONMENT]
#
# WHEEL        peftsearch-VERSION-py3-none-any.whl, made by `python3 -m pip wheel --no-deps --wheel-dir dist .`
# CONSTRAINTS  a file that all machines see. The first machine (the head) writes there what it installed, and every later
#              one installs the very same versions: a node that joins in the second week must not be newer than the rest.
#              Delete the file to move to newer versions.
# ENVIRONMENT  the folder of the environment; ~/peftsearch-env by default.
#
# Run again, it changes only what differs. Also for shells that come later: PATH, and token authentication for Ray.
set -euo pipefail

wheel=$1
constraints=${2:-}
environment=${3:-$HOME/peftsearch-env}

python=python3
for candidate in python3.12 python3.11; do
  if "$candidate" -c "" 2>/dev/null; then
    python=$candidate
    break
  fi
done

[ -x "$environment/bin/pip" ] || "$python" -m venv "$environment"

pinned=()
if [ -n "$constraints" ] && [ -s "$constraints" ]; then
  pinned=(--constraint "$constraints")
fi
"$environment/bin/pip" install --quiet --disable-pip-version-check "${pinned[@]}" "${wheel}[cluster,postgres,quickstart]"
# pip takes a wheel that was built anew, with the same version, for the one that is installed.
"$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$wheel"

if [ -n "$constraints" ] && [ ! -s "$constraints" ]; then
  mkdir -p "$(dirname "$constraints")"
  # Moved into place whole: another machine may be looking.
  "$environment/bin/pip" freeze --exclude peftsearch >"$constraints.$$"
  mv "$constraints.$$" "$constraints"
fi

# At the top of .bashrc: some distributions leave the file early where the shell is not interactive.
for line in 'export RAY_AUTH_MODE=token' "export PATH=\"$environment/bin:\$PATH\""; do
  if ! grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null; then
    printf '%s\n' "$line" | cat - "$HOME/.bashrc" 2>/dev/null >"$HOME/.bashrc.$$" || true
    mv "$HOME/.bashrc.$$" "$HOME/.bashrc"
  fi
done

"$environment/bin/pip" show peftsearch | sed -n '1,2p'
