#!/usr/bin/env bash
# peft 0.21.2: `reduce_intruder_dimension` subtracts less, the higher its `mitigation_lambda` is.
#
# Guess: what its docstring says: lambda is the portion of the intruder dimensions that is
#        subtracted, "the higher the value the more": 1 takes all of them out, 0 leaves the adapter.
# Seen:  lambda multiplies the intruders' singular values (as in the paper, 2410.21228), so 1 - lambda
#        is subtracted: 1 leaves the adapter as it is, 0 takes them out. A sweep read by the docstring
#        is upside down, and its default of 0.75 removes a quarter.
# Here:  model_diffing scales them by a factor of its own (pipeline/weights/lora.py), held to peft's
#        in tests/libraries/lora.sh.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64, bias=False))
lora = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
layer = lora.base_model.model[0]
layer.lora_B["default"].weight.data.normal_()
layer.lora_A["default"].weight.data.normal_()
before, left = layer.get_delta_weight("default"), {}
for share in (0.0, 0.5, 1.0):
    name = f"lambda{int(10 * share)}"
    reduce_intruder_dimension(lora, new_adapter_name=name, mitigation_lambda=share,
                              logging_sink=None)
    left[share] = float(layer.get_delta_weight(name).norm() / before.norm())
    print(f"mitigation_lambda {share}: {left[share]:.3f} of the update's norm is left")
as_told = left[0.0] < 0.3 < left[0.5] < left[1.0] and abs(left[1.0] - 1) < 1e-3
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: at 1 nothing is subtracted"
