#!/usr/bin/env bash
# circuit-tracer 0.5.0 (the only release on the index) with a cross-layer transcoder in Gemma
# Scope 2's files: the file of the last layer is never opened, so that none can be loaded.
#
# Guess: load_gemma_scope_2_clt takes the files of all layers, {0: …, 1: …, 2: …}, and gives a
#        transcoder of so many layers.
# Seen:  it counts layers up to the largest number, that one left out: of three files it reads two,
#        while every decoder still writes to three layers, and load_state_dict ends in size
#        mismatches. With a fourth path, which is not opened either, the three layers are read.
# Here:  such files are read layer by layer (`format: gemma_scope_2, layers: cross`);
#        tests/imports/test_sae_libraries.py holds the result to the library's, given one path more.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    huggingface_hub==1.33.0 tqdm==4.67.1 pyyaml==6.0.3 transformers==5.17.0
"$work/venv/bin/pip" install --quiet --no-deps circuit-tracer==0.5.0 # a transcoder needs no more
cd "$work"
"$work/venv/bin/python" - << 'PYTHON'
import sys

import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt
from safetensors.torch import save_file

LAYERS, WIDTH, LATENTS = 3, 4, 8
paths = {}
for layer in range(LAYERS):
    paths[layer] = f"params_layer_{layer}.safetensors"
    shapes = {
        "w_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,), "threshold": (LATENTS,),
        "w_dec": (LATENTS, LAYERS, WIDTH), "b_dec": (WIDTH,),
    }  # fmt: skip
    save_file({name: torch.rand(shape) for name, shape in shapes.items()}, paths[layer])


def layers_read(given):
    """How many layers are read; None where the files cannot be loaded."""
    how = {"device": torch.device("cpu"), "dtype": torch.float32}
    try:
        return load_gemma_scope_2_clt(given, **how).n_layers
    except RuntimeError as error:
        print(str(error).splitlines()[1].strip())
        return None


every = layers_read(paths)
one_more = layers_read(paths | {LAYERS: "no file at all"})
print(f"{LAYERS} files: {every}; {LAYERS} files and one path more: {one_more} layers")
sys.exit(0 if (every, one_more) == (None, LAYERS) else "this has changed")
PYTHON
echo "as described: the last of the files given is not opened"
