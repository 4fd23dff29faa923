"""A training step of ours against plain PyTorch's, on nanoGPT's recipes, with the same weights.

    python tests/benchmarks/nanogpt.py                  the CPU recipe on the CPU
    python tests/benchmarks/nanogpt.py --device cuda    the GPU recipe in bfloat16, and the CPU one

ours     Members.step of weights/members.py: Hugging Face's GPT-2, own AdamW on flat weights; on a
         GPU the step is one CUDA graph
peer     a GPT of 40 lines below: SDPA, fused AdamW, autocast, clipping; torch.compile on a GPU

Both draw their windows of the text and set the learning rate in every step. Before the clock
starts, both must give the same loss. Tokens a second; the ratio comes last.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import ROOT, Row, arguments, interleaved, median, rates, report
from torch import Tensor, nn

D_VOCAB = 65
N_TOKENS = 1_000_000
FOLDER = ROOT / "rules/papers/nanogpt_shakespeare"


class Block(nn.Module):
    """Attention and MLP without biases, layer norm before each."""

    def __init__(self, d_model: int, n_heads: int, d_mlp: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.ln_1 = nn.LayerNorm(d_model, bias=False)
        self.ln_2 = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, d_mlp, bias=False)
        self.down = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch pos d_model] -> the same."""
        p = self.dropout if self.training else 0.0
        qkv = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), p)
        return x + F.dropout(self.down(F.gelu(self.up(self.ln_2(x)))), p)


class Plain(nn.Module):
    """GPT-2 as one would write it on a page: tied embeddings, learned positions."""

    def __init__(self, a) -> None:
        super().__init__()
        self.dropout = a.dropout
        self.wte, self.wpe = nn.Embedding(D_VOCAB, a.d_model), nn.Embedding(a.n_ctx, a.d_model)
        shape = (a.d_model, a.n_heads, a.d_mlp, a.dropout)
        self.blocks = nn.Sequential(*(Block(*shape) for _ in range(a.n_layers)))
        self.ln_f = nn.LayerNorm(a.d_model, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of targets [batch pos]."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = self.blocks(F.dropout(x, self.dropout if self.training else 0.0))
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def take(self, ours: dict[str, Tensor]) -> None:
        """The weights of a Hugging Face GPT-2, whose projections are [in out]."""
        names = {"ln_1": "ln_1", "ln_2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj",
                 "up": "mlp.c_fc", "down": "mlp.c_proj"}  # fmt: skip
        for name, p in self.named_parameters():
            part = name.removesuffix(".weight").split(".")
            theirs = f"h.{part[1]}.{names[part[2]]}" if part[0] == "blocks" else part[0]
            w = ours[f"transformer.{theirs}.weight"]
            p.copy_(w.T if part[-1] in ("qkv", "out", "up", "down") else w)


class Peer:
    """Plain PyTorch's training loop around Plain."""

    def __init__(self, spec, data, weights: dict[str, Tensor], device: torch.device) -> None:
        from pipeline.weights.initial import learning_rate

        self.spec, self.data, self.device, self.learning_rate = spec, data, device, learning_rate
        self.model = Plain(spec.architecture).to(device)
        self.model.take(weights)
        how = spec.optimiser
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": how.weight_decay},
                  {"params": others, "weight_decay": 0.0}]  # fmt: skip
        self.adam = torch.optim.AdamW(groups, how.lr, tuple(how.betas), how.eps, fused=True)
        self.run = torch.compile(self.model) if device.type == "cuda" else self.model

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        half = self.spec.precision == "bfloat16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.run(tokens, targets)

    def step(self, step: int) -> None:
        how = self.spec.optimiser
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(how, how.lr, step + 1, self.spec.steps)
        self.loss(*self.data.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), how.clip)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def same_loss(members, peer: Peer) -> None:
    """Both give the loss of the same batch, without dropout, to rounding."""
    tokens, targets = peer.data.batch(0)
    members.forward.model.eval()
    peer.model.eval()
    with torch.no_grad():
        ours = members.forward.loss(members.flat[0], tokens, targets).item()
        theirs = peer.model(tokens, targets).item()
    members.forward.model.train()
    peer.model.train()
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        raise SystemExit(f"the two models differ: loss {ours} of ours, {theirs} of plain PyTorch")


def measure(recipe: str, args, device: torch.device) -> Row:
    """One row: tokens a second of a recipe."""
    import numpy as np

    from pipeline.papers import papers
    from pipeline.weights import batches
    from pipeline.weights.members import Members

    spec = papers.load(Path(FOLDER), "paper").spec.training[recipe]
    spec = spec.model_copy(update={"seeds": [0]})
    ids = np.random.default_rng(0).integers(0, D_VOCAB, N_TOKENS).astype(np.int32)
    text = {"train": ids, "eval": ids[:10_000]}
    data = batches.of_corpus(text, D_VOCAB, spec, 0, device)
    members = Members(spec, [data], device)
    members.forward.model.train()
    peer = Peer(spec, data, members.forward.layout.named(members.flat[0].detach()), device)
    same_loss(members, peer)

    def several(step):
        def work() -> None:
            for i in range(args.steps):
                step(i)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # the plan of step sizes ends with the recipe's last step
            members.optimiser.count.zero_()

        return work

    work = {"ours": several(members.step), "peer": several(peer.step)}
    per_run = args.steps * spec.batch_size * spec.architecture.n_ctx
    found = rates(interleaved(work, args.repeats), per_run)
    return Row(
        case=f"{recipe}, {spec.precision if device.type == 'cuda' else 'float32'}",
        ours=median(found["ours"]),
        units="tokens/s",
        peer=median(found["peer"]),
        peer_name="plain PyTorch" + (", compiled" if device.type == "cuda" else ""),
        target="ratio >= 1",
        runs=found,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="steps a run")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    recipes = ["gpu_recipe", "cpu_recipe"] if device.type == "cuda" else ["cpu_recipe"]
    rows = [measure(recipe, args, device) for recipe in recipes]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report("nanogpt", rows, args.out, name)


if __name__ == "__main__":
    main()
