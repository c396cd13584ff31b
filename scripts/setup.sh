#!/usr/bin/env bash
# Makes .venv with exactly what requirements.lock pins (hashes checked) and this project in it, editable. A second run
# with the same lock takes milliseconds. On a bare Debian it installs python3-venv, for which it must be root.
#
# PYTHON   the interpreter to use, >= 3.11   (default: python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
venv=$root/.venv
say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

command -v "$python" >/dev/null || die "no $python here: install Python >= 3.11, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$python" --version) is too old: Python >= 3.11 is needed; set PYTHON to one"

stamp=$(cat "$root/requirements.lock" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)-$("$python" -c 'import sys; print(sys.version.split()[0])')
[[ -x $venv/bin/meshctl && -f $venv/.stamp && $(<"$venv/.stamp") == "$stamp" ]] && exit 0

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  ((EUID == 0)) && command -v apt-get >/dev/null || die "$python has no venv module: run 'apt-get install python3-venv' as root"
  say "installing python3-venv"
  apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
fi
say "creating .venv from requirements.lock (a minute, once)"
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r "$root/requirements.lock"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable "$root"
printf '%s' "$stamp" >"$venv/.stamp"
