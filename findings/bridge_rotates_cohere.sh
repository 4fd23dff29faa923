#!/usr/bin/env bash
# transformer-lens 3.9.0: TransformerBridge around Cohere's Command runs another model.
#
# Guess: the bridge wraps the Hugging Face module, so that its logits are that module's; it boots
#        the type without a warning.
# Seen:  Command rotates neighbouring coordinates of queries and keys, (0 1) (2 3) …; the bridge's
#        attention rotates halves, (0 n/2) (1 n/2+1) …, as Llama does. Logits agree at the first
#        position, whose angle is 0, and at no other; the bridge's are to rounding those of the
#        Hugging Face model with Llama's `rotate_half` in place of its own. Every hook behind the
#        first attention reads a stream that Command never has. The bridge of Cohere 2 is off, too.
# Here:  activations come from hooks on the Hugging Face module, and tests/families_check.py lists
#        the bridges whose logits are another model's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import (AutoModelForCausalLM, CohereConfig, LlamaConfig,
                          PreTrainedTokenizerFast)
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0",
                                    unk_token="w0")
own, bridged = {}, {}
for name, config in (("llama", LlamaConfig(**size)), ("cohere", CohereConfig(**size))):
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(1, 64, (2, 9))
    hf.save_pretrained(name)
    tokenizer.save_pretrained(name)
    bridge = TransformerBridge.boot_transformers(name, device="cpu")
    with torch.no_grad():
        own[name], bridged[name] = hf(tokens).logits, bridge(tokens, prepend_bos=False)
    apart = (own[name] - bridged[name]).abs().amax((0, 2))
    print(f"{name}: largest logit {own[name].abs().max():.3f}; the bridge's logits are apart by "
          f"{apart[0]:.1e} at the first position, {apart[1:].max():.1e} at the others")
modeling_cohere.rotate_half = modeling_llama.rotate_half
with torch.no_grad():
    rotated = (hf(tokens).logits - bridged["cohere"]).abs().max().item()
print(f"cohere with Llama's rotation: {rotated:.1e} from the bridge")
apart = {k: (own[k] - bridged[k]).abs().amax((0, 2)) for k in own}
as_told = (apart["llama"].max() < 1e-4 and apart["cohere"][0] < 1e-5
           and apart["cohere"][1:].min() > 1e-2 and rotated < 1e-5)
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: the bridge around Command rotates as Llama does"
