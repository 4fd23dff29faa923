#!/usr/bin/env bash
# Published dictionaries against the libraries that wrote them, in both directions, sparse probing
# against SAEBench, and probes against scikit-learn: installs dictionary_learning, sparsify,
# circuit-tracer, SAEBench and scikit-learn (pinned, without the packages that they would replace
# here) into a folder of its own, then runs the tests that are skipped without them.
#
#     PYTHON=.venv/bin/python tests/libraries/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

# Behind the libraries stand what they import and this project has not.
"$python" -m pip install --quiet --no-deps --target "$folder" \
    dictionary_learning==0.1.0 eai-sparsify==1.3.3 circuit-tracer==0.5.0 \
    nnsight==0.3.7 python-socketio python-engineio bidict simple-websocket wsproto \
    websocket-client pillow umap-learn pynndescent numba llvmlite circuitsvis importlib_metadata \
    zstandard natsort schedulefree \
    sae-bench==0.6.0 scikit-learn==1.7.2 joblib threadpoolctl collectibles tabulate
RETRACE_LIBRARIES=$folder "$python" -m pytest -v tests/imports/test_sae_libraries.py \
    tests/saebench/test_saebench.py tests/probes/test_scikit_learn.py "$@"
