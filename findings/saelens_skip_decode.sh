#!/usr/bin/env bash
# sae-lens 6.54.12: a skip transcoder's `decode(encode(x))` is not what it reconstructs.
#
# Guess: as for SAEs and plain transcoders, `sae.decode(sae.encode(x))` is `sae(x)`; code that needs
#        the latents anyway, to count or to change them, decodes them.
# Seen:  W_skip is added in `forward` and `forward_with_activations` alone, since `decode` is not
#        given x. So whoever encodes, edits and decodes loses the linear term without a word.
# Here:  sets of skip transcoders are read by pipeline/crosscoders/layered_files.py, whose `decode`
#        is given x.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 datasets==5.2.0 \
    transformer-lens==3.9.0 sae-lens==6.54.12
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from sae_lens.saes import (
    SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig,
)

torch.manual_seed(0)
x, off = torch.randn(5, 8), {}
for kind, config in ((Transcoder, TranscoderConfig), (SkipTranscoder, SkipTranscoderConfig)):
    sae = kind(config(d_in=8, d_sae=32, d_out=8, apply_b_dec_to_input=False))
    if kind is SkipTranscoder:
        sae.W_skip.data.normal_()
    with torch.no_grad():
        off[kind.__name__] = float((sae(x) - sae.decode(sae.encode(x))).abs().max())
    print(f"{kind.__name__}: largest |sae(x) - decode(encode(x))| {off[kind.__name__]:.3f}")
as_told = off["Transcoder"] == 0 and off["SkipTranscoder"] > 0.1
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: decode(encode(x)) leaves the skip connection out"
