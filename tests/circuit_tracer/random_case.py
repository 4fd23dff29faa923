"""A random model of Llama's type and random ReLU transcoders, without circuit-tracer's code."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.tracing.dictionaries import Dictionaries


def llama(
    n_layers: int, d_model: int, n_heads: int, n_key_heads: int, d_mlp: int, d_vocab: int,
    device: str = "cpu", size: float = 0.0,
) -> LlamaForCausalLM:  # fmt: skip
    """A random model of Llama's type.

    Args:
        size: standard deviation of weights; 0: one over the square root of their inputs.
    """
    config = LlamaConfig(
        hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        num_key_value_heads=n_key_heads, intermediate_size=d_mlp, vocab_size=d_vocab,
        max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.normal_(0, size or p.shape[-1] ** -0.5) if p.dim() > 1 else p.normal_(1, 0.1)
            if name.endswith("embed_tokens.weight"):
                p.normal_(0, 1.0)
    return hf.eval().requires_grad_(False).to(device)


def weights(
    n_layers: int, d_model: int, d_sae: int, skip: bool, bias: float, device: str = "cpu",
    spread: float = 0.1,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Of each layer the weights of a ReLU transcoder; the lower the bias, the fewer are active.

    Args:
        spread: standard deviation of the encoders' biases.
    """
    draw = torch.Generator().manual_seed(1)

    def drawn(*shape: int, size: float) -> Tensor:
        return (torch.randn(*shape, generator=draw) * size).to(device)

    out = []
    for _ in range(n_layers):
        found = {
            "W_enc": drawn(d_model, d_sae, size=d_model**-0.5),
            "b_enc": drawn(d_sae, size=spread) + bias,
            "W_dec": drawn(d_sae, d_model, size=d_model**-0.5),
            "b_dec": drawn(d_model, size=0.1),
        }
        found |= {"W_skip": drawn(d_model, d_model, size=0.1 * d_model**-0.5)} if skip else {}
        out.append(found)
    return out


def dictionaries(found: list[dict[str, Tensor]]) -> Dictionaries:
    """These transcoders for us."""

    def encoder(one: dict[str, Tensor]):
        return lambda x: torch.relu(x @ one["W_enc"] + one["b_enc"])

    return Dictionaries(
        hooks=[f"blocks.{i}.mlp.hook_in" for i in range(len(found))],
        output_hooks=[f"blocks.{i}.hook_mlp_out" for i in range(len(found))],
        W_enc=[one["W_enc"].T for one in found],
        b_enc=[one["b_enc"] for one in found],
        W_dec=[one["W_dec"][:, None] for one in found],
        b_dec=torch.stack([one["b_dec"] for one in found]),
        encoders=[encoder(one) for one in found],
        W_skip=[one["W_skip"] for one in found] if "W_skip" in found[0] else None,
    )
