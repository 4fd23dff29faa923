#!/usr/bin/env bash
# sae-lens 6.54.12 on transformer-lens 3.9.0: SAETransformerBridge ignores TransformerLens's names.
#
# Guess: a subclass of TransformerBridge takes the hook names that TransformerBridge takes, or says
#        that it does not. SAEs carry such a name in `metadata.hook_name`.
# Seen:  `blocks.0.hook_resid_post` works in TransformerBridge. In SAETransformerBridge the same
#        name gives an empty cache and a hook that never runs, without a warning; `add_sae` alone
#        resolves it. SAELens's own `run_evals` then replaces nothing: the losses of the model, of
#        a dictionary of zeros and of the ablation are one number, and their score divides zero by
#        zero. The bridge's own name, `blocks.0.hook_out`, works.
# Here:  an export carries both names (`metadata.hook_name_bridge`), and its card says which serves.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 datasets==5.2.0 \
    transformer-lens==3.9.0 sae-lens==6.54.12
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'PYTHON'
import sys
from types import SimpleNamespace

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                    initializer_range=0.3, bos_token_id=0, eos_token_id=0)
GPT2LMHeadModel(config).save_pretrained("model")
words = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, 64)}, unk_token="<s>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>",
                        unk_token="<s>").save_pretrained("model")
tokens = torch.randint(1, 64, (4, 12))
ALIAS, OWN = "blocks.0.hook_resid_post", "blocks.0.hook_out"


def effect(bridge, name):
    """Tensors in the cache under a name, and how far zeroing there moves the logits."""
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=[name])
        zeroed = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 0)])
        return len(cache), (zeroed - bridge(tokens)).abs().max().item()


plain = TransformerBridge.boot_transformers("model", device="cpu")
theirs = SAETransformerBridge.boot_transformers("model", device="cpu")
seen = {
    ("TransformerBridge", ALIAS): effect(plain, ALIAS),
    ("SAETransformerBridge", ALIAS): effect(theirs, ALIAS),
    ("SAETransformerBridge", OWN): effect(theirs, OWN),
}
for (kind, name), (n, moved) in seen.items():
    print(f"{kind}, {name}: {n} cached, logits moved by {moved:.3f}")

store = SimpleNamespace(get_batch_tokens=lambda n: tokens, reset_input_dataset=lambda: None,
                        store_batch_size_prompts=4, context_size=12)
evals = EvalConfig(n_eval_reconstruction_batches=1, compute_ce_loss=True)
ended = {}
for name in (ALIAS, OWN):
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, metadata=SAEMetadata(hook_name=name)))
    for parameter in sae.parameters():
        parameter.data.zero_()
    try:
        found, _ = run_evals(sae, store, theirs, ActivationScaler(), evals)
        ended[name] = {k: round(v, 3) for k, v in found["model_performance_preservation"].items()}
    except ZeroDivisionError as e:
        ended[name] = repr(e)
    print(f"run_evals of zeros at {name}: {ended[name]}")

as_told = (
    seen["TransformerBridge", ALIAS][0] > 0 and seen["TransformerBridge", ALIAS][1] > 0.1
    and seen["SAETransformerBridge", ALIAS] == (0, 0.0)
    and seen["SAETransformerBridge", OWN][0] == 1 and seen["SAETransformerBridge", OWN][1] > 0.1
    and "ZeroDivisionError" in ended[ALIAS] and isinstance(ended[OWN], dict)
)
sys.exit(0 if as_told else "this has changed")
PYTHON
echo "as described: the name is ignored without a word, the evaluation moves nothing"
