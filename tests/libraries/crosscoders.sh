#!/usr/bin/env bash
# Crosscoders against the library of Minder et al. (2025), in both directions: fetches its public
# code (pinned; it is on no package index) into a temporary folder, and a package that it imports.
#
#     PYTHON=.venv/bin/python tests/libraries/crosscoders.sh
#
# CODE=FOLDER takes a checkout that is already there. Needs git and a network otherwise.
set -euo pipefail
cd "$(dirname "$0")/../.."
commit=173f7facbe80f16c837e7b5e4dca78a50c000115
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
code=${CODE:-}
if [ -z "$code" ]; then
    code=$folder/code
    git clone --quiet https://github.com/science-of-finetuning/dictionary_learning "$code"
    git -C "$code" checkout --quiet "$commit"
fi
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-deps --target "$folder/packages" zstandard
RETRACE_CROSSCODERS=$code RETRACE_LIBRARIES=$folder/packages \
    "$python" -m pytest -v tests/crosscoders/test_crosscoder_library.py "$@"
