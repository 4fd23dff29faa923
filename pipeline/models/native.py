"""A small transformer with the parameters of TransformerLens's NativeModel. [torch]

    x_0 = W_E[token] + W_pos[position]
    x  <- x + attn(ln1(x));   x <- x + mlp(ln2(x))      (the MLP only where d_mlp > 0)
    logits = ln_out(x) W_U

Compiled programs attend in both directions (`bidirectional` in the config; no model is trained so).

The state dict is NativeModel's under the prefix `model.`, and `to_bridge` hands it to
TransformerLens; a test holds the logits equal. It is written out here because importing
transformer_lens costs 10 to 20 s a job (design, decision 3), and for what NativeModel lacks:
smeared keys (Olsson et al. 2022, Argument 2). Around it stands as much of a Hugging Face causal LM
as the stages use, so that a model trained here is a model like any other.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

MODEL_TYPE = "retrace_native"
SMALL_VOCABULARY = 512
FEW = 4  # positions
Stream = Float[Tensor, "*batch pos d_model"]
ACT = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu,
       "gelu_new": lambda x: F.gelu(x, approximate="tanh")}  # fmt: skip


class Output(NamedTuple):
    """What a causal LM answers; a type that torch.compile knows."""

    logits: Tensor  # [batch pos d_vocab]


class Linear(nn.Linear):
    """x W^T + b, the rows of x laid out as one matrix.

    With several dimensions in front PyTorch would, under vmap, copy W for each sequence.
    """

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        rows = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return rows.view(*x.shape[:-1], -1)


class SmearedKeys(Linear):
    """Keys that mix with those of the position before: k_t <- s k_t + (1 - s) k_{t-1}.

    s = sigmoid(a), with one learned a per head; the first position keeps its own key.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__(d_model, n_heads * d_head)
        self.smear = nn.Parameter(torch.zeros(n_heads))

    def forward(self, x: Stream) -> Float[Tensor, "*batch pos width"]:
        k = super().forward(x)
        before = torch.cat([k[..., :1, :], k[..., :-1, :]], -2)
        s = torch.sigmoid(self.smear).repeat_interleave(k.shape[-1] // len(self.smear))
        return s * k + (1 - s) * before


class Attention(nn.Module):
    """Self-attention: softmax(q k^T / sqrt(d_head)) v W_O; causal unless `bidirectional`."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.n_heads, self.d_head = cfg.n_heads, cfg.d_head
        width = cfg.n_heads * cfg.d_head
        self.q, self.v = Linear(cfg.d_model, width), Linear(cfg.d_model, width)
        self.k = (
            SmearedKeys(cfg.d_model, cfg.n_heads, cfg.d_head)
            if cfg.smeared_keys
            else Linear(cfg.d_model, width)
        )
        self.o = Linear(width, cfg.d_model)
        self.rotary, self.causal = cfg.positional == "rotary", not cfg.bidirectional
        future = torch.ones(cfg.n_ctx, cfg.n_ctx, dtype=torch.bool).triu(1)
        self.register_buffer("future", future & self.causal, persistent=False)
        if self.rotary:
            cos, sin = rotation(cfg.n_ctx, cfg.d_head)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def heads(
        self, x: Float[Tensor, "*batch pos width"]
    ) -> Float[Tensor, "*batch n_heads pos d_head"]:
        """q, k or v, head by head."""
        return x.unflatten(-1, (self.n_heads, self.d_head)).transpose(-2, -3)

    def pattern(self, x: Stream, first: int = 0) -> Float[Tensor, "*batch n_heads query pos"]:
        """Attention of every head, from query to key.

        Args:
            first: the first position that is a query.
        """
        q, k = self.heads(self.q(x[..., first:, :])), self.heads(self.k(x))
        if self.rotary:
            q, k = self.rotated(q, first), self.rotated(k)
        n = x.shape[-2]
        few = n <= FEW  # products of a few rows: elementwise is quicker than matrices so small
        scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) if few else q @ k.mT
        scores = scores / math.sqrt(self.d_head)
        return scores.masked_fill(self.future[first:n, :n], float("-inf")).softmax(-1)

    def rotated(
        self, x: Float[Tensor, "*batch n_heads pos d_head"], first: int = 0
    ) -> Float[Tensor, "*batch n_heads pos d_head"]:
        """Queries or keys, turned by the angles of positions from `first` on (Su et al. 2021)."""
        at = slice(first, first + x.shape[-2])
        pair = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * self.cos[at].to(x.dtype) + pair * self.sin[at].to(x.dtype)

    def fused(self, x: Stream) -> Float[Tensor, "*batch n_heads pos d_head"]:
        """z, as `forward` has it, by a kernel that keeps no scores."""
        q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        if self.rotary:
            q, k = self.rotated(q), self.rotated(k)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def forward(self, x: Stream, first: int = 0) -> Float[Tensor, "*batch query d_model"]:
        if self.training and x.is_cuda and first == 0 and x.shape[-2] > FEW:
            return self.o(self.fused(x).transpose(-2, -3).flatten(-2))
        pattern, v = self.pattern(x, first), self.heads(self.v(x))
        few = x.shape[-2] <= FEW
        z = (pattern.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2) if few else pattern @ v
        return self.o(z.transpose(-2, -3).flatten(-2))


def rotation(
    n_ctx: int, d_head: int, base: float = 10_000.0
) -> tuple[Float[Tensor, "n_ctx d_head"], Float[Tensor, "n_ctx d_head"]]:
    """cos and sin of each angle; a pair of dimensions stands side by side."""
    angles = torch.outer(torch.arange(n_ctx), base ** (-torch.arange(0, d_head, 2) / d_head))
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


class MLP(nn.Module):
    """W_out act(W_in x + b_in) + b_out."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.fc_in = Linear(cfg.d_model, cfg.d_mlp)
        self.fc_out = Linear(cfg.d_mlp, cfg.d_model)
        self.act = ACT[cfg.act_fn]

    def forward(self, x: Stream) -> Stream:
        return self.fc_out(self.act(self.fc_in(x)))


def norm(cfg: Any) -> nn.Module:
    """A layer norm, or nothing where the config says `none`."""
    return nn.LayerNorm(cfg.d_model, eps=1e-5) if cfg.normalization == "LN" else nn.Identity()


class Layer(nn.Module):
    """Attention and MLP, each added to the stream."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.ln1, self.attn = norm(cfg), Attention(cfg)
        if cfg.d_mlp:
            self.ln2, self.mlp = norm(cfg), MLP(cfg)

    def forward(self, x: Stream, first: int = 0) -> Float[Tensor, "*batch query d_model"]:
        """The stream behind the layer, from position `first` on."""
        x = x[..., first:, :] + self.attn(self.ln1(x), first)
        return x + self.mlp(self.ln2(x)) if hasattr(self, "mlp") else x


class Embedding(nn.Embedding):
    """Rows of W_E; small ones as a product, whose gradient needs no sorting of the tokens."""

    def forward(self, tokens: Int[Tensor, "*batch pos"]) -> Stream:
        if self.training and self.num_embeddings <= SMALL_VOCABULARY:
            every = torch.arange(self.num_embeddings, device=tokens.device)
            chosen = (tokens.reshape(-1, 1) == every).to(self.weight.dtype)
            return (chosen @ self.weight).view(*tokens.shape, -1)
        return super().forward(tokens)


class Body(nn.Module):
    """The model: tokens -> logits."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.tok_embed = Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.positional == "standard":
            self.pos = nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.ln_out = norm(cfg)
        self.head = Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(
        self, input_ids: Int[Tensor, "*batch pos"], keep: int = 0, trim: bool = False, **_: Any
    ) -> Float[Tensor, "*batch kept d_vocab"]:
        """Logits.

        Args:
            keep: logits of this many last positions; 0 for all.
            trim: the last layer computes nothing else; its hooks see only these positions.
        """
        x = self.tok_embed(input_ids)
        if hasattr(self, "pos"):
            x = x + self.pos.weight[: input_ids.shape[-1]]
        for i, layer in enumerate(self.layers):
            trimmed = trim and keep and i == len(self.layers) - 1
            x = layer(x, x.shape[-2] - keep) if trimmed else layer(x)
        return self.head(self.ln_out(x[..., -keep:, :]))


class NativeForCausalLM(nn.Module):
    """The model, with what the stages use of a Hugging Face causal LM.

    Args:
        config: d_vocab and the fields of `spec_training.Architecture`, as plain data.
    """

    base_model_prefix = "model"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        own = {"bidirectional": False, **config}
        own["d_head"] = own["d_head"] or own["d_model"] // own["n_heads"]
        self.config = SimpleNamespace(
            **own,
            model_type=MODEL_TYPE,
            vocab_size=own["d_vocab"],
            hidden_size=own["d_model"],
            num_hidden_layers=own["n_layers"],
            max_position_embeddings=own["n_ctx"],
        )
        self.model = Body(self.config)

    @property
    def base_model(self) -> Body:
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.head

    def forward(
        self,
        input_ids: Int[Tensor, "*batch pos"],
        logits_to_keep: int = 0,
        trim: bool = False,
        **_: Any,
    ) -> Output:
        """Logits, under the name `logits`; see `Body.forward`."""
        return Output(self.model(input_ids, logits_to_keep, trim))

    def save_pretrained(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        from pipeline.spec.training import Architecture

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = ["d_vocab", "model_type", *Architecture.model_fields]
        fields += ["bidirectional"] * self.config.bidirectional
        kept = {k: v for k, v in vars(self.config).items() if k in fields}
        (folder / "config.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")


def from_folder(folder: Path, dtype: torch.dtype | str = torch.float32) -> NativeForCausalLM:
    """The model that `save_pretrained` wrote.

    Raises:
        RetraceError: a tensor is missing, unexpected or of another shape, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pipeline.errors import RetraceError

    config = _config(folder)
    try:
        state = load_file(folder / "model.safetensors")
        if config.get("n_layers", 0) > len(state):  # a million layers take minutes to build
            raise ValueError(f"{config['n_layers']} layers, but {len(state)} tensors")
        settings = {k: v for k, v in config.items() if k != "model_type"}
        with torch.device("meta"):  # sizes that do not fit are known before they take memory
            NativeForCausalLM(settings).load_state_dict(state, assign=True)
        out = NativeForCausalLM(settings)
        out.load_state_dict(state)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError,
            ArithmeticError, AssertionError, MemoryError, SafetensorError) as e:  # fmt: skip
        said = "; ".join(line.strip() for line in str(e).splitlines()[1:3]) or repr(e)
        raise RetraceError(f"{folder}: its weights do not fit its config.json ({said})") from e
    return out if dtype == "auto" else out.to(dtype)


def is_native(folder: Path) -> bool:
    """Whether a model folder holds one of these."""
    return (folder / "config.json").is_file() and _config(folder).get("model_type") == MODEL_TYPE


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; RetraceError where it is damaged."""
    from pipeline.errors import RetraceError

    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise RetraceError(f"{file}: not valid JSON ({e}); give a whole copy of the model") from e
    if not isinstance(found, dict):
        raise RetraceError(f"{file}: must be a JSON object; give a whole copy of the model")
    return found


def to_bridge(hf: NativeForCausalLM, tokenizer: Any = None) -> Any:
    """The model as TransformerLens's bridge around its own NativeModel.

    Raises:
        RetraceError: smeared keys or attention in both directions, which NativeModel has not.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.sources.native import NativeModel

    from pipeline.errors import RetraceError

    cfg = hf.config
    if cfg.smeared_keys:
        raise RetraceError("smeared_keys: TransformerLens's NativeModel has none, so no bridge")
    if cfg.bidirectional:
        raise RetraceError("bidirectional: TransformerLens's NativeModel is causal, so no bridge")
    given = {
        "d_model": cfg.d_model, "d_head": cfg.d_head, "n_heads": cfg.n_heads,
        "n_layers": cfg.n_layers, "n_ctx": cfg.n_ctx, "d_vocab": cfg.vocab_size,
        "d_mlp": cfg.d_mlp or 1, "act_fn": cfg.act_fn, "attn_only": not cfg.d_mlp,
        "normalization_type": {"LN": "LN", "none": None}[cfg.normalization],
        "positional_embedding_type": cfg.positional, "rotary_dim": cfg.d_head,
        "seed": 0,
    }  # fmt: skip
    config = TransformerBridgeConfig.from_dict(given)
    weight = next(hf.parameters())
    inside = NativeModel(config).to(weight)  # as boot_native does, and then our weights
    inside.load_state_dict({n.removeprefix("model."): p for n, p in hf.state_dict().items()})
    return build_bridge_from_module(
        inside, architecture="TransformerLensNative", tl_config=config, tokenizer=tokenizer,
        dtype=weight.dtype, device=weight.device, model_name="native",
    )  # fmt: skip
