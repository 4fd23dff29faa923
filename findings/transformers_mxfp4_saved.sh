#!/usr/bin/env bash
# transformers 5.23.0: a gpt-oss checkpoint in MXFP4, loaded and saved again, comes back with random
# experts.
#
# Guess: what is loaded with MXFP4 weights on a CPU is dequantised, and save_pretrained writes a
#        plain checkpoint: from_pretrained of it is the same model.
# Seen:  the plain weights are written under the names of the quantised ones (gate_up_proj_blocks,
#        down_proj_blocks), while config.json no longer says that they are quantised. Loading takes
#        them for unexpected keys, finds gate_up_proj and down_proj missing and draws them anew.
#        Nothing is raised; a report on the terminal alone says so, and the logits are another
#        model's.
# Here:  stage model writes its own copy of a checkpoint (pipeline/weights/model.py);
#        tests/weights/test_towers.py holds its experts to the numbers that the bits stand for.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

torch.manual_seed(0)
config = GptOssConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=32,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    max_position_embeddings=64, layer_types=["full_attention"], rope_scaling=None,
)
GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained("given")
tensors = load_file("given/model.safetensors")
for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
    experts, d_in, d_out = tensors.pop(name).shape
    blocks = (experts, d_out, d_in // 32)  # 32 numbers of 4 bits share a scale
    tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
    tensors[f"{name}_scales"] = torch.randint(122, 126, blocks, dtype=torch.uint8)
save_file(tensors, "given/model.safetensors", {"format": "pt"})
about = json.loads(Path("given/config.json").read_text())
about["quantization_config"] = {"quant_method": "mxfp4"}
Path("given/config.json").write_text(json.dumps(about))

tokens = torch.arange(16)[None]
with torch.no_grad():
    first = AutoModelForCausalLM.from_pretrained("given", dtype=torch.float32)
    before = first(tokens).logits
    first.save_pretrained("again")
    second, info = AutoModelForCausalLM.from_pretrained(
        "again", dtype=torch.float32, output_loading_info=True
    )
    off = float((second(tokens).logits - before).abs().max())
written = load_file("again/model.safetensors")
print("written:", {n: str(t.dtype) for n, t in written.items() if n.endswith("_blocks")})
said = "quantization_config" in json.loads(Path("again/config.json").read_text())
print("config says quantised:", said)
print("missing:", sorted(info["missing_keys"]))
print(f"logits differ by {off:.2f}, and the largest was {float(before.abs().max()):.2f}")
as_told = off > 0.1 and len(info["missing_keys"]) == 2 and len(info["unexpected_keys"]) == 2
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: the experts were drawn anew"
