"""Random language models of three layers, of every family, and tokens to read, for the lenses."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.models import lens
from pipeline.models.native import NativeForCausalLM
from pipeline.spec.training import Architecture

FAMILIES = ["llama", "gpt2", "native", "attention_only"]
D, VOCAB, LAYERS = 16, 40, 3
WRITES = ("o_proj", "down_proj", "c_proj", "attn.o.", "fc_out")  # into the stream


def tiny(kind: str) -> nn.Module:
    """A random model of three layers whose weights are large enough that layers differ."""
    torch.manual_seed(0)
    native = Architecture(n_layers=LAYERS, d_model=D, n_heads=2, d_mlp=32, n_ctx=24)
    attention = native.model_copy(update={"d_mlp": 0, "normalization": "none"})
    model = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS,
                        num_attention_heads=2, intermediate_size=32)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=24)
        ),
        "native": lambda: NativeForCausalLM({"d_vocab": VOCAB, **native.model_dump()}),
        "attention_only": lambda: NativeForCausalLM({"d_vocab": VOCAB, **attention.model_dump()}),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4) if p.dim() > 1 else p.normal_(1, 0.2)
    return model.eval().requires_grad_(False)


TOKENS = torch.randint(0, VOCAB, (6, 13), generator=torch.Generator().manual_seed(1))
READ, NEXT = TOKENS[:, :-1], TOKENS[:, 1:]


def silence(hf: nn.Module) -> None:
    """Every layer passes its input on."""
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if any(w in name for w in WRITES):
                p.zero_()


def translated(hf: nn.Module, scale: float) -> lens.Translators:
    draw = torch.Generator().manual_seed(2)
    return lens.Translators(
        {i: torch.randn(D, D, generator=draw) * scale for i in range(LAYERS)},
        {i: torch.randn(D, generator=draw) * scale for i in range(LAYERS)},
    )
