"""Stage `siit`: a transformer trained to have one circuit and no other. [torch]

Strict interchange intervention training, as InterpBench trains its models (Gupta, Arcuschin,
Kwa & Garriga-Alonso 2024, 2407.14494). The program H is xproportion on BOS and letters:
is_x at each position, and then the share of x so far. Its parts are given places in a transformer L
that is larger than needed: is_x is what MLP 0 writes, the share what one head of layer 1 writes.

    behaviour    (L(base) - H(base))^2
    interchange  (L with a part from source - H with that part from source)^2, some positions
    strict       (L with any other head or MLP from source - H(base))^2

1. A step draws sequences in pairs, a part, and a node outside the circuit, and adds the three.
2. checks: the three on all sequences with fresh partners, mean over nodes.
3. Each seed is a network of its own: other weights at the start, and other pairs.
"""

from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.job import cli, own
from pipeline.models import hooks
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import Node
from pipeline.spec.base import Seeds
from pipeline.spec.training import Architecture
from pipeline.store import provenance, tables

from . import sequences

X = 3  # the id of x, as in the compiled vocabulary
IS_X, SHARE = Node("mlp", 0), Node("head", 1, 0)
CHECKS = "behaviour interchange strict".split()
TABLES = ("checks",)
WRITES = {"checkpoint": "folder of the networks"}


class Options(own.Options):
    """own.siit of paper.yaml."""

    architecture: Architecture
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="pairs of sequences a step")
    lr: float = Field(gt=0, description="Adam; falls to 0 along a cosine")
    seeds: Seeds = Field(description="a network each: of its weights and of its training pairs")


def is_x(tokens: Tensor) -> Tensor:
    return (tokens[:, 1:] == X).float()


def share(x: Tensor) -> Tensor:
    """The share of x so far, [n 4], of is_x [n 4]."""
    return x.cumsum(-1) / torch.arange(1, x.shape[-1] + 1, device=x.device)


def outside(hf: nn.Module) -> list[Node]:
    """Heads and MLPs that have no part in the program."""
    layers = range(hf.config.n_layers)
    every = [Node("head", *at) for at in product(layers, range(hf.config.n_heads))]
    return [n for n in [*every, *(Node("mlp", i) for i in layers)] if n not in (IS_X, SHARE)]


def outputs(hf: nn.Module, tokens: Tensor) -> Tensor:
    """What the model says behind each token but BOS, [n 4]."""
    return hf(tokens).logits[:, 1:, 0]


def hook_of(node: Node) -> str:
    """Where a node is read and replaced: z of a head, the output of an MLP."""
    return f"blocks.{node.layer}." + ("hook_mlp_out" if node.kind == "mlp" else "attn.hook_z")


def replaced(hf: nn.Module, node: Node, new: Tensor, where: Tensor) -> AbstractContextManager[None]:
    """Inside: the node's activation is `new` [n pos d] where the mask [n pos] says."""
    mask = where[..., None]
    if node.kind == "head":
        head = torch.arange(new.shape[-1], device=new.device) // hf.config.d_head
        mask = mask & (head == node.head)
    return hooks.edited(hf, hook_of(node), lambda x: torch.where(mask, new, x))


def errors(
    hf: nn.Module, base: Tensor, source: Tensor, part: Node, other: Node, where: Tensor
) -> dict[str, Tensor]:
    """The three squared errors, CHECKS -> scalar, of base and source tokens [n 5]; where, bool [n
    5], are the positions of the interchange."""
    with hooks.capture(hf, [hook_of(part), hook_of(other)]) as acts:
        plain = outputs(hf, torch.cat([base, source]))
    x, from_source = is_x(base), is_x(source)
    at = where[:, 1:]
    if part == IS_X:
        wanted = share(torch.where(at, from_source, x))
    else:
        wanted = torch.where(at, share(from_source), share(x))
    out = {"behaviour": plain - share(torch.cat([x, from_source]))}
    for name, node, mask, target in (
        ("interchange", part, where, wanted),
        ("strict", other, torch.ones_like(where), share(x)),
    ):
        new = acts[hook_of(node)].chunk(2)[1]
        with replaced(hf, node, new, mask):
            out[name] = outputs(hf, base) - target
    return {name: (error**2).mean() for name, error in out.items()}


def train(options: Options, seed: int, device: torch.device) -> NativeForCausalLM:
    """The model of a seed."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = {"d_vocab": 6, **options.architecture.model_dump()}
    hf = NativeForCausalLM(config).to(device)
    every, others, n = sequences.all_letters().to(device), outside(hf), options.batch_size
    optimiser = torch.optim.Adam(hf.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    progress = cli.Progress("training", options.steps, "steps")
    for step in range(1, options.steps + 1):
        base, source = every[rng.integers(len(every), size=(2, n))]
        where = torch.tensor(rng.random((n, every.shape[1])) < 0.5, device=device)
        part, other = (IS_X, SHARE)[rng.integers(2)], others[rng.integers(len(others))]
        found = errors(hf, base, source, part, other, where)
        optimiser.zero_grad()
        sum(found.values()).backward()
        optimiser.step()
        schedule.step()
        progress.at(step)
    return hf.eval().requires_grad_(False)


def checks(hf: NativeForCausalLM, seed: int) -> pd.DataFrame:
    """The error of each node on all sequences; that of behaviour is of no node."""
    device, rng, rows = next(hf.parameters()).device, np.random.default_rng(seed), []
    base = sequences.all_letters().to(device)
    source = base[rng.permutation(len(base))]
    where = torch.tensor(rng.random(tuple(base.shape)) < 0.5, device=device)
    others = outside(hf)
    for i in range(max(2, len(others))):
        part, other = (IS_X, SHARE)[i % 2], others[i % len(others)]
        found = errors(hf, base, source, part, other, where)
        nodes = (Node("", -1), part, other)
        rows += [
            {"check": check, "kind": n.kind, "layer": n.layer, "head": n.head}
            | {"error": float(found[check])}
            for check, n in zip(CHECKS, nodes, strict=True)
        ]
    return pd.DataFrame(rows).drop_duplicates()


def work(job: cli.Job, options: Options) -> own.Tables:
    """The network of each seed, in a folder of its own, and the rows of the table."""
    out, root, files = own.Tables(TABLES), Path(job.args.checkpoint), {}
    for seed in options.seeds:
        hf = train(options, seed, job.device())
        with torch.no_grad():
            out.add({"checks": checks(hf, seed + 1)}, seed=seed)
        folder = root / str(seed)
        hf.cpu().save_pretrained(folder)
        certificate = job.certificate([], seed=seed)
        tables.stamp_safetensors(folder / "model.safetensors", certificate)
        written = sorted(f for f in folder.iterdir() if f.is_file())
        files |= {str(f.relative_to(root)): provenance.sha256_file(f) for f in written}
    tables.write_json(root / "provenance.json", {"files": files}, job.certificate([]))
    return out
