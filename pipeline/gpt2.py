"""GPT-2 (Radford et al. 2019) as it is trained here. [torch]

Its parameters have the names, shapes and order of Hugging Face's GPT2LMHeadModel, so its weights
are that model's, and a test holds the logits equal; a model that was trained here is loaded as
Hugging Face's. It is written out because theirs, made for every use, trains slower: under
torch.compile its attention gets a mask in place of the causal kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.native import ACT, Output
from pipeline.spec_training import Architecture


class Projection(nn.Module):
    """x W + b, W [d_in d_out]; b is left out where biases are not trained, and is 0."""

    def __init__(self, d_in: int, d_out: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))
        self.biased = biased

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias if self.biased else None)


class LayerNorm(nn.LayerNorm):
    def __init__(self, d_model: int, biased: bool) -> None:
        super().__init__(d_model, eps=1e-5)
        self.biased = biased

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.biased else None
        return F.layer_norm(x, self.normalized_shape, self.weight, bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention, in PyTorch's fused kernel."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.n_heads, self.dropout = a.n_heads, a.dropout
        self.c_attn = Projection(a.d_model, 3 * a.d_model, a.bias == "all")
        self.c_proj = Projection(a.d_model, a.d_model, a.bias == "all")

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [batch n_heads pos d_head] each
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return F.dropout(self.c_proj(z.transpose(1, 2).flatten(2)), p, self.training)


class MLP(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.c_fc = Projection(a.d_model, a.d_mlp, a.bias != "none")
        self.c_proj = Projection(a.d_mlp, a.d_model, a.bias != "none")
        self.act, self.dropout = ACT[a.act_fn], a.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.ln_1, self.attn = LayerNorm(a.d_model, a.bias == "all"), Attention(a)
        self.ln_2, self.mlp = LayerNorm(a.d_model, a.bias == "all"), MLP(a)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """tokens [batch pos] -> the final stream [batch pos d_model], normalised."""

    def __init__(self, a: Architecture, d_vocab: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(d_vocab, a.d_model), nn.Embedding(a.n_ctx, a.d_model)
        self.h = nn.ModuleList(Block(a) for _ in range(a.n_layers))
        self.ln_f, self.dropout = LayerNorm(a.d_model, a.bias == "all"), a.dropout

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[-1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT2(nn.Module):
    """model(tokens [batch pos]).logits [batch pos d_vocab]."""

    def __init__(self, a: Architecture, d_vocab: int) -> None:
        super().__init__()
        self.transformer = Transformer(a, d_vocab)
        self.lm_head = nn.Linear(a.d_model, d_vocab, bias=False)
        if a.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_: Any) -> Output:
        """
        Args:
            logits_to_keep: logits of this many last positions; 0 for all.
        """
        return Output(self.lm_head(self.transformer(input_ids)[:, -logits_to_keep:]))
