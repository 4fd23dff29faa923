"""Random models and random dictionaries of all layers, for the tests of tracing."""

import torch
from torch import nn

from pipeline.families.tiny_models import tiny_config, tiny_model
from pipeline.tracing.dictionaries import Dictionaries
from pipeline.tracing.replacement import Replacement

N_LAYERS, D, D_SAE = 3, 32, 24
TOKENS = torch.tensor([3, 17, 5, 17, 29, 8, 31])


def model(kind: str = "llama") -> nn.Module:
    """A random model of three layers."""
    layers = {"num_hidden_layers": N_LAYERS, "n_layer": N_LAYERS}
    known = tiny_config(kind).to_dict()
    config = tiny_config(kind, **{k: v for k, v in layers.items() if k in known})
    return tiny_model(config)


def relu(W: torch.Tensor, b: torch.Tensor):
    return lambda x: torch.relu(x @ W.T + b)


def dictionaries(
    kind: str = "each", reads: str = "mlp.hook_in", skip_first: int = 0, seed: int = 0,
    n_layers: int = N_LAYERS,
) -> Dictionaries:  # fmt: skip
    """Random ReLU dictionaries: each, skip or cross."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, size: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * size

    n_out = [n_layers - i if kind == "cross" else 1 for i in range(n_layers)]
    W_enc = [drawn(D_SAE, D) for _ in range(n_layers)]
    b_enc = [drawn(D_SAE) - 0.2 for _ in range(n_layers)]
    return Dictionaries(
        hooks=[f"blocks.{i}.{reads}" for i in range(n_layers)],
        output_hooks=[f"blocks.{i}.hook_mlp_out" for i in range(n_layers)],
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=[drawn(D_SAE, n, D) for n in n_out],
        b_dec=drawn(n_layers, D),
        encoders=[relu(W, b) for W, b in zip(W_enc, b_enc, strict=True)],
        W_skip=[drawn(D, D, size=0.05) for _ in range(n_layers)] if kind == "skip" else None,
        skip_first=skip_first,
    )


def replacement(kind: str = "llama", sort: str = "each", **options) -> Replacement:
    return Replacement.of(model(kind), TOKENS, dictionaries(sort, **options))
