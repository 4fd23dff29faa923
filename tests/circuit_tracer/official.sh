#!/usr/bin/env bash
# Our attribution graph beside that of circuit-tracer's own algorithm: fetches its public code
# (pinned; what the package index has under its name is a third party's fork) into a temporary
# folder, gives both the same transcoders, and compares features, effects and pruning.
#
#     PYTHON=.venv/bin/python tests/circuit_tracer/official.sh
#
# CODE=FOLDER takes a checkout that is already there. Needs git and a network otherwise.
set -euo pipefail
cd "$(dirname "$0")/../.."
commit=d797c824c0ffe3a0274071e32d92962a36656212
code=${CODE:-}
if [ -z "$code" ]; then
    code=$(mktemp -d)
    trap 'rm -rf "$code"' EXIT
    git clone --quiet https://github.com/safety-research/circuit-tracer "$code"
    git -C "$code" checkout --quiet "$commit"
fi
PYTHONPATH=$code "${PYTHON:-python3}" tests/circuit_tracer/official.py
