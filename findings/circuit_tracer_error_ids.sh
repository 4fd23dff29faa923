#!/usr/bin/env bash
# circuit-tracer 0.5.0 (the only release on the index): an error node and a feature of layer 0 can
# have one id.
#
# Guess: node_id names a node: pins, supernodes and links refer to it.
# Seen:  a feature's id is layer_feature_position, an error's 0_layer_position. The error of layer
#        7 at position 3 is `0_7_3`, and so is feature 7 of layer 0 at position 3. In a graph that
#        holds both, links of the one are drawn at the other. Any layer's error collides so, with
#        the features whose numbers are those of layers.
# Here:  our error nodes are numbered -1, -2, …, and an id that stands twice is refused.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pydantic==2.14.3
"$work/venv/bin/pip" install --quiet --no-deps circuit-tracer==0.5.0 # torch is not needed for this
"$work/venv/bin/python" - << 'PYTHON'
import importlib.metadata
import importlib.util
import sys

files = importlib.metadata.files("circuit-tracer")
path = next(f for f in files if str(f).endswith("frontend/graph_models.py")).locate()
spec = importlib.util.spec_from_file_location("graph_models", path)
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)

twice = []
for layer in range(12):
    error = models.Node.error_node(layer, 3)
    feature = models.Node.feature_node(0, 3, layer)
    if error.node_id == feature.node_id:
        twice.append(error.node_id)
print(f"errors of layers 0 to 11 at position 3 whose id is a feature's of layer 0: {len(twice)}")
print(f"the first three: {twice[:3]}")
sys.exit(0 if twice == [f"0_{layer}_3" for layer in range(12)] else "this has changed")
PYTHON
echo "as described: an error of any layer has the id of a feature of layer 0"
