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

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.job import cli
from pipeline.models import hooks
from pipeline.models.heads import Heads
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import Node
from pipeline.spec.base import Section, Seeds
from pipeline.spec.training import Architecture
from pipeline.store import provenance, tables

X = 3  # the id of x, as in the compiled vocabulary
IS_X, SHARE = Node("mlp", 0), Node("head", 1, 0)
CHECKS = "behaviour interchange strict".split()


class Options(Section):
    """own.siit of paper.yaml."""

    tables: list[str]
    architecture: Architecture
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="pairs of sequences a step")
    lr: float = Field(gt=0, description="Adam; falls to 0 along a cosine")
    seeds: Seeds = Field(description="a network each: of its weights and of its training pairs")


def every_sequence() -> Tensor:
    """BOS and four of w, x, y, z, [256 5]."""
    return torch.tensor([[0, *some] for some in product(range(2, 6), repeat=4)])


def is_x(tokens: Tensor) -> Tensor:
    return (tokens[:, 1:] == X).float()


def share(x: Tensor) -> Tensor:
    """The share of x so far, [n 4], of is_x [n 4]."""
    return x.cumsum(-1) / torch.arange(1, x.shape[-1] + 1, device=x.device)


def outside(heads: Heads) -> list[Node]:
    """Heads and MLPs that have no part in the program."""
    every = [Node("head", i, h) for i in range(heads.n_layers) for h in range(heads.n_heads)]
    every += [Node("mlp", i) for i in range(heads.n_layers)]
    return [n for n in every if n not in (IS_X, SHARE)]


class Swapped:
    """A model whose nodes can be read and replaced: z of a head, the output of an MLP."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf, self.heads = hf, Heads(hf)

    def outputs(self, tokens: Tensor) -> Tensor:
        """What the model says behind each token but BOS, [n 4]."""
        return self.hf(tokens).logits[:, 1:, 0]

    @contextmanager
    def seen(self) -> Iterator[dict[tuple[str, int], Tensor]]:
        """Inside: a forward pass fills the dictionary, (kind, layer) -> [n pos d]."""
        heads, out = self.heads, {}
        handles = []
        for i, layer in enumerate(heads.layers):
            keep = lambda _, args, i=i: out.__setitem__(("head", i), args[0])  # noqa: E731
            handles.append(heads.out(i).register_forward_pre_hook(keep))
            keep = lambda _, __, y, i=i: out.__setitem__(("mlp", i), y)  # noqa: E731
            handles.append(layer.mlp.register_forward_hook(keep))
        try:
            yield out
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaced(self, node: Node, new: Tensor, where: Tensor) -> Iterator[None]:
        """Inside: the node's activation is `new` [n pos d] where the mask [n pos] says."""
        mask = where[..., None]
        if node.kind == "mlp":
            hook = f"blocks.{node.layer}.hook_mlp_out"
            with hooks.edited(self.hf, hook, lambda y: torch.where(mask, new, y)):
                yield
            return
        at = torch.arange(new.shape[-1], device=new.device) // self.heads.d_head == node.head
        with self.heads.z_edited(node.layer, lambda z: torch.where(mask & at, new, z)):
            yield


def errors(
    model: Swapped, base: Tensor, source: Tensor, part: Node, other: Node, where: Tensor
) -> dict[str, Tensor]:
    """The three squared errors, CHECKS -> scalar.

    Args:
        base, source: [n 5] tokens; where: bool [n 5], positions of the interchange.
    """
    with model.seen() as acts:
        plain = model.outputs(torch.cat([base, source]))
    x, from_source = is_x(base), is_x(source)
    both = torch.cat([x, from_source])
    at = where[:, 1:]
    if part == IS_X:
        wanted = share(torch.where(at, from_source, x))
    else:
        wanted = torch.where(at, share(from_source), share(x))
    out = {"behaviour": plain - share(both)}
    for name, node, mask, target in (
        ("interchange", part, where, wanted),
        ("strict", other, torch.ones_like(where), share(x)),
    ):
        new = acts[node.kind, node.layer].chunk(2)[1]
        with model.replaced(node, new, mask):
            out[name] = model.outputs(base) - target
    return {name: (error**2).mean() for name, error in out.items()}


def train(
    options: Options, seed: int, device: torch.device
) -> tuple[NativeForCausalLM, pd.DataFrame]:
    """The model, and the three errors by step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = {"d_vocab": 6, **options.architecture.model_dump()}
    hf = NativeForCausalLM(config).to(device)
    model, every = Swapped(hf), every_sequence().to(device)
    others, n = outside(model.heads), options.batch_size
    optimiser = torch.optim.Adam(hf.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    progress, rows = cli.Progress("training", options.steps, "steps"), []
    for step in range(1, options.steps + 1):
        base, source = every[rng.integers(len(every), size=(2, n))]
        where = torch.tensor(rng.random((n, every.shape[1])) < 0.5, device=device)
        part, other = (IS_X, SHARE)[rng.integers(2)], others[rng.integers(len(others))]
        found = errors(model, base, source, part, other, where)
        optimiser.zero_grad()
        sum(found.values()).backward()
        optimiser.step()
        schedule.step()
        if step % 10 == 0 or step == options.steps:
            rows.append({"step": step} | {k: float(v.detach()) for k, v in found.items()})
        progress.at(step)
    return hf.eval().requires_grad_(False), pd.DataFrame(rows)


def checks(hf: NativeForCausalLM, seed: int) -> pd.DataFrame:
    """A row a node: its error on all sequences; blank for behaviour."""
    model, device = Swapped(hf), next(hf.parameters()).device
    rng = np.random.default_rng(seed)
    base = every_sequence().to(device)
    source = base[rng.permutation(len(base))]
    where = torch.tensor(rng.random(tuple(base.shape)) < 0.5, device=device)
    rows = []
    others = outside(model.heads)
    for i in range(max(2, len(others))):
        part, other = (IS_X, SHARE)[i % 2], others[i % len(others)]
        found = {k: float(v) for k, v in errors(model, base, source, part, other, where).items()}
        named = {"behaviour": Node("", -1), "interchange": part, "strict": other}
        rows += [
            {"check": k, "kind": n.kind, "layer": n.layer, "head": n.head, "error": found[k]}
            for k, n in named.items()
        ]
    return pd.DataFrame(rows).drop_duplicates()


def main() -> None:
    parser = cli.parser(
        "siit", __doc__, checkpoint="folder of the model",
        history="history.parquet", checks="checks.parquet",
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        options = job.section("own.siit", Options)
        made: dict[str, list[pd.DataFrame]] = {"history": [], "checks": []}
        root, files = Path(job.args.checkpoint), {}
        for seed in options.seeds:
            hf, history = train(options, seed, job.device())
            with torch.no_grad():
                made["checks"].append(checks(hf, seed + 1).assign(seed=seed))
            made["history"].append(history.assign(seed=seed))
            folder = root / str(seed)
            hf.cpu().save_pretrained(folder)
            certificate = job.certificate([], seed=seed)
            tables.stamp_safetensors(folder / "model.safetensors", certificate)
            written = sorted(f for f in folder.iterdir() if f.is_file())
            files |= {str(f.relative_to(root)): provenance.sha256_file(f) for f in written}
        certificate = job.certificate([])
        tables.write_json(root / "provenance.json", {"files": files}, certificate)
        for name, frames in made.items():
            frame = pd.concat(frames, ignore_index=True)
            tables.write_table(getattr(job.args, name), frame, certificate)

    cli.run("siit", parser.parse_args(), work)


if __name__ == "__main__":
    main()
