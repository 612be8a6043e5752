#!/usr/bin/env bash
# Create the virtual environment $1 from lock.txt: by uv where it can be had, by pip otherwise.
set -euo pipefail
venv=${1:-.venv}
python=${PYTHON:-python3}

"$python" - <<'PY' || { echo "nightdesk needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY

echo "setting up $venv, first time only: Python packages are fetched (10 s to a few minutes)"

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  [ -x .tools/bin/python ] || "$python" -m venv .tools
  .tools/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null && uv=.tools/bin/uv || uv=""
fi

if [ -n "$uv" ]; then
  [ -x "$venv/bin/python" ] || "$uv" venv --quiet --python "$python" "$venv"
  "$uv" pip install --quiet --python "$venv/bin/python" --require-hashes -r lock.txt
  "$uv" pip install --quiet --python "$venv/bin/python" --no-deps -e .
else
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r lock.txt
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
fi
