#!/usr/bin/env bash
# Our attribution graph in circuit-tracer's own page: fetches the page and the scripts that it
# names (pinned), then runs tests/sharing/test_circuit_tracer.py, which is skipped without them.
#
#     PYTHON=.venv/bin/python tests/circuit_tracer/run.sh
#
# Needs npm, chromium and chromedriver. circuit-tracer itself wants other versions of our packages,
# so only its files are taken.
set -euo pipefail
cd "$(dirname "$0")/../.."
page=$(mktemp -d)
trap 'rm -rf "$page"' EXIT
python=${PYTHON:-python3}

"$python" -m pip download --quiet --no-deps --dest "$page" circuit-tracer==0.5.0
"$python" -m zipfile -e "$page"/circuit_tracer-0.5.0-*.whl "$page"
(cd "$page" && npm pack --silent d3@7.9.0 d3-collection@1.0.7 d3-jetpack@2.3.0 dagre@0.8.5 pako@2.1.0 > /dev/null)
for name in d3-7.9.0 d3-collection-1.0.7 d3-jetpack-2.3.0 dagre-0.8.5 pako-2.1.0; do
    mkdir -p "$page/js/$name"
    tar xzf "$page/$name.tgz" -C "$page/js/$name" --strip-components=1
done
# its loaders on our transcoders of all layers
PYTHONPATH=$page "$python" tests/circuit_tracer/transcoders.py
RETRACE_CIRCUIT_TRACER=$page "$python" -m pytest -v tests/sharing/test_circuit_tracer.py "$@"
