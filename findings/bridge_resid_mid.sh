#!/usr/bin/env bash
# transformer-lens 3.9.0: at hook_resid_mid TransformerBridge edits another thing than
# HookedTransformer.
#
# Guess: the name reads the stream between attention and MLP in both (it does), so replacing it
#        replaces the stream in both.
# Seen:  in HookedTransformer a block's output after zeroing hook_resid_mid is its MLP's output
#        alone. In TransformerBridge the name is an alias of the second norm's input: the MLP reads
#        zeros, and the skip connection still adds the old stream. Ablations, patching and spliced
#        SAEs at this hook give other numbers in the two, though every cached value agrees.
# Here:  `hooks.edited` replaces both, and the card of an export at this hook says so.
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
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                    initializer_range=0.3, bos_token_id=0, eos_token_id=0)
GPT2LMHeadModel(config).save_pretrained("model")
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0",
                        unk_token="w0").save_pretrained("model")
shape = HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=64,
                                act_fn="gelu_new", seed=0, initializer_range=0.3)
found = {}
for model in (HookedTransformer(shape), TransformerBridge.boot_transformers("model", device="cpu")):
    tokens, kept = torch.randint(0, 64, (2, 9)), {}

    def keep(x, hook, name, kept=kept):
        kept[name] = x.clone()

    names = {n: f"blocks.1.{n}" for n in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")}
    see = [(full, lambda x, hook, n=n: keep(x, hook, n)) for n, full in names.items()]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=see)
        before = dict(kept)
        zero = (names["hook_resid_mid"], lambda x, hook: torch.zeros_like(x))
        model.run_with_hooks(tokens, fwd_hooks=[zero, *see[1:]])
    skip = (kept["hook_resid_post"] - kept["hook_mlp_out"]).abs().max().item()
    old = (kept["hook_resid_post"] - kept["hook_mlp_out"] - before["hook_resid_mid"]).abs().max()
    found[type(model).__name__] = (skip, old.item())
    print(f"{type(model).__name__}: after zeroing hook_resid_mid, resid_post - mlp_out is {skip:.4f} "
          f"at most, and {old.item():.4f} from the stream before")
hooked, bridge = found["HookedTransformer"], found["TransformerBridge"]
as_told = hooked[0] < 1e-5 and bridge[0] > 0.1 and bridge[1] < 1e-5
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: the bridge zeroes what the MLP reads, and keeps the stream"
