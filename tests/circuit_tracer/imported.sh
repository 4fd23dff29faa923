#!/usr/bin/env bash
# Transcoders that circuit-tracer's own code wrote, brought in by ours: fetches its public code
# (pinned; the repository is the successor of the one in official.sh, and knows cross-layer and TopK
# transcoders) into a temporary folder, and compares features and reconstructions.
#
#     PYTHON=.venv/bin/python tests/circuit_tracer/imported.sh
#
# CODE=FOLDER takes a checkout that is already there. Needs git and a network otherwise.
set -euo pipefail
cd "$(dirname "$0")/../.."
commit=4bb8c0e
code=${CODE:-}
if [ -z "$code" ]; then
    code=$(mktemp -d)
    trap 'rm -rf "$code"' EXIT
    git clone --quiet https://github.com/decoderesearch/circuit-tracer "$code"
    git -C "$code" checkout --quiet "$commit"
fi
PYTHONPATH=$code "${PYTHON:-python3}" tests/circuit_tracer/imported.py
