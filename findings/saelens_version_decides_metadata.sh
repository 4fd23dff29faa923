#!/usr/bin/env bash
# sae-lens 6.54.12: a folder of the present form without `sae_lens_version` loses all its metadata.
#
# Guess: cfg.json of release 6 keeps hook name, model and context size under `metadata`; whoever
#        writes such a folder by hand, or with another tool, may leave the writer's version out.
# Seen:  without that one key the file is taken for one of before release 6, whose hook name stands
#        at the top: the weights load, `metadata.hook_name` and the rest are None, and nothing says
#        so. What needs them (`ActivationsStore.from_sae`, `run_evals`) then fails far from here.
# Here:  sae exports and imports write the key (pipeline/imports, pipeline/sharing), with a test that
#        SAELens reads the metadata back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 datasets==5.2.0 \
    transformer-lens==3.9.0 sae-lens==6.54.12
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import json
import sys
from pathlib import Path

from sae_lens import SAE, StandardSAE, StandardSAEConfig

config = StandardSAEConfig(d_in=8, d_sae=32)
config.metadata.hook_name, config.metadata.model_name = "blocks.3.hook_resid_post", "gpt2"
StandardSAE(config).save_model("sae")
told, file = {}, Path("sae/cfg.json")
for said in ("with", "without"):
    cfg = json.loads(file.read_text())
    if said == "without":
        del cfg["metadata"]["sae_lens_version"]
        file.write_text(json.dumps(cfg))
    found = SAE.load_from_disk("sae").cfg.metadata
    told[said] = found.hook_name, found.model_name
    print(f"{said} sae_lens_version: hook_name {found.hook_name}, model_name {found.model_name}")
as_told = told == {"with": ("blocks.3.hook_resid_post", "gpt2"), "without": (None, None)}
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: one key decides whether the others are read"
