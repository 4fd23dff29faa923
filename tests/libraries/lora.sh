#!/usr/bin/env bash
# Low-rank updates against peft: installs it (pinned, with what it imports and this project has not)
# into a folder of its own, then runs the tests that are skipped without it.
#
#     PYTHON=.venv/bin/python tests/libraries/lora.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-deps --target "$folder" \
    peft==0.21.2 accelerate==1.15.0 psutil==7.2.2
RETRACE_PEFT=$folder "$python" -m pytest -v tests/weights/test_singular.py "$@"
