#!/usr/bin/env bash
# sae-lens 6.54.12 reads what eai-sparsify 1.3.3 writes: the decoder turned, the bias not taken away.
#
# Guess: SAELens has a loader for sparsify's folders (`sparsify_disk_loader`), so a coder that
#        sparsify saves is the same function in SAELens.
# Seen:  sparsify keeps W_dec as [latents, d_in], as SAELens does, and the loader transposes it. Where
#        the two sizes differ, loading ends in an error of shapes. Where they are equal it loads, and
#        reconstructions are off by more than half of their norm, without a word. Beside it,
#        `normalize_decoder` (sparsify's default) is read as "b_dec is not taken off the input", which
#        sparsify takes off always: with W_dec turned back and `apply_b_dec_to_input`, the two agree.
# Here:  format sparsify is read by a reader of our own, and every dictionary that is brought in is
#        compared with the original formula before it passes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 datasets==5.2.0 \
    transformer-lens==3.9.0 sae-lens==6.54.12 natsort schedulefree simple-parsing
"$work/venv/bin/pip" install --quiet --no-deps eai-sparsify==1.3.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder, SparseCoderConfig

D_IN = 64


def as_it_is(path, device="cpu", cfg_overrides=None):
    return sparsify_disk_loader(path, device, {"dtype": "float32"})


def turned_back(path, device="cpu", cfg_overrides=None):
    config, state = as_it_is(path, device)
    return config | {"apply_b_dec_to_input": True}, state | {"W_dec": state["W_dec"].T.contiguous()}


def off(theirs, folder, loader):
    """|SAELens - sparsify| / |sparsify| over the reconstructions of 64 rows, or what was raised."""
    x = torch.randn(64, D_IN)
    try:
        ours = SAE.load_from_disk(folder, converter=loader)
    except RuntimeError as e:
        return str(e).splitlines()[0]
    with torch.no_grad():
        wanted = theirs(x).sae_out
        return ((ours(x) - wanted).norm() / wanted.norm()).item()


torch.manual_seed(0)
found = {}
for latents in (256, D_IN):
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=latents, k=4), device="cpu")
    coder.b_dec.data.normal_()
    folder = Path(f"coder{latents}/layers.0")
    coder.save_to_disk(folder)
    for name, loader in (("as it is", as_it_is), ("turned back", turned_back)):
        found[latents, name] = off(coder, folder, loader)
        print(f"{latents} latents, {D_IN} dimensions, {name}: {found[latents, name]}")
same = (
    isinstance(found[256, "as it is"], str)
    and found[D_IN, "as it is"] > 0.5
    and all(found[n, "turned back"] < 1e-5 for n in (256, D_IN))
)
sys.exit(0 if same else "this has changed")
PYTHON
# Output seen:
# 256 latents, 64 dimensions, as it is: Error(s) in loading state_dict for TopKSAE:
# 256 latents, 64 dimensions, turned back: 3.541192583611519e-08
# 64 latents, 64 dimensions, as it is: 0.5485544800758362
# 64 latents, 64 dimensions, turned back: 3.222360334120822e-08
