#!/usr/bin/env bash
# Mazes of the paper mazes against maze-dataset, which wants an older muutils than others do: installs
# it (pinned, without the notebooks that it asks for) into a folder of its own, then runs the test
# that is skipped without it.
#
#     PYTHON=.venv/bin/python tests/libraries/mazes.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-deps --target "$folder" \
    maze-dataset==1.4.2 muutils==0.8.12 zanj==0.5.0
RETRACE_MAZES=$folder "$python" -m pytest -v tests/replications/test_mazes_dataset.py "$@"
