#!/usr/bin/env bash
# Direct preference optimisation against trl's own trainer: installs trl (pinned, without packages that
# it would replace here) into a folder of its own, then runs the test that is skipped without it.
#
#     PYTHON=.venv/bin/python tests/libraries/dpo.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-deps --target "$folder" trl==1.16.0
RETRACE_TRL=$folder "$python" -m pytest -v tests/tuning/test_dpo_trl.py "$@"
