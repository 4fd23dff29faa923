#!/usr/bin/env bash
# Our Jacobian lens against TransformerLens's, which came with 4.3, a later release than the one this
# project runs on: installs it (pinned, alone) into a folder of its own and compares both, matrices
# and logits, on a tiny random GPT-2 and a Llama.
#
#     PYTHON=.venv/bin/python tests/libraries/jacobian_lens.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-deps --target "$folder" transformer-lens==4.3.0
PYTHONPATH=$folder "$python" tests/libraries/jacobian_lens.py
