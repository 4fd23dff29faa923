"""Models before their first step, and the learning rate of every step. [torch]"""

import math

import torch
from torch import nn

from pipeline.spec.training import Architecture, Optimiser

RESIDUAL = ("attn.o.weight", "fc_out.weight", "c_proj.weight")  # what writes into the stream


def build(architecture: Architecture, d_vocab: int) -> nn.Module:
    """An untrained model; its weights are PyTorch's until `initial` draws them."""
    a = architecture
    if a.family == "native":
        from pipeline.models.native import NativeForCausalLM

        return NativeForCausalLM({"d_vocab": d_vocab, **a.model_dump()})
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=d_vocab, n_positions=a.n_ctx, n_embd=a.d_model, n_layer=a.n_layers,
        n_head=a.n_heads, n_inner=a.d_mlp, activation_function=a.act_fn, resid_pdrop=a.dropout,
        embd_pdrop=a.dropout, attn_pdrop=a.dropout, tie_word_embeddings=a.tied,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def is_trained(name: str, architecture: Architecture) -> bool:
    """Whether a parameter is trained; a bias that is not stays 0."""
    if not name.endswith("bias"):
        return True
    return architecture.bias == "all" or (architecture.bias == "mlp" and ".mlp." in name)


@torch.no_grad()
def initial(model: nn.Module, architecture: Architecture, seed: int) -> None:
    """Draw the weights of a model in place, in the order of named_parameters; on the CPU.

    gpt2: Normal(0, 0.02²), projections into the stream over sqrt(2 n_layers) (Radford et al. 2019;
    nanoGPT). inverse_sqrt: Normal(0, 1 / d_model), the unembedding Normal(0, 1 / d_vocab) (Nanda et
    al. 2023, released code). Biases and smear are 0, gains of layer norm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(float(not name.endswith(("bias", "smear"))))
            continue
        if architecture.init == "gpt2":
            sd = 0.02 / (math.sqrt(2 * architecture.n_layers) if name.endswith(RESIDUAL) else 1)
        else:
            rows = model.config.vocab_size if "head" in name else architecture.d_model
            sd = 1 / math.sqrt(rows)
        p.copy_(torch.randn(p.shape, generator=generator) * sd)


def learning_rate(how: Optimiser, lr: float, step: int, steps: int) -> float:
    """Learning rate of update `step`, counted from 1.

    Linear warm-up lr · step / warmup; then constant, or a cosine from lr to min_lr that ends at
    decay_steps.
    """
    if step <= how.warmup_steps:
        return lr * step / how.warmup_steps
    if how.schedule == "constant":
        return lr
    end = how.decay_steps or steps
    share = min((step - how.warmup_steps) / max(end - how.warmup_steps, 1), 1)
    return how.min_lr + (lr - how.min_lr) * (1 + math.cos(math.pi * share)) / 2
