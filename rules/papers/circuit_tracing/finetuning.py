"""Transcoders fine-tuned on the next tokens of their replacement model. [torch]

After Circuits Research Landscape 2025, "KL Finetuning", which follows Karvonen 2025 (2503.17272):

    loss = NMSE + KL sg(NMSE / KL)

NMSE is the sum over layers of the squared error on true inputs, divided by the variance of what the
MLPs write; KL is from the model's next tokens to those of the replacement model, in which all MLPs
are replaced at once and no error is added; sg stops gradients, so that both terms have one size.

1. `tuned` trains all weights of a set by Adam, the learning rate falling linearly to 0. `kl` is the
   loss above; `mse` is NMSE alone for as many steps, which is what longer training gives by itself;
   `shuffled` has the model's next tokens of other positions in the place of the right ones: a null.
2. `judged` measures on held-out text, and on the graphs of prompts, before and after.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from pipeline.crosscoders.layered_files import LayerWeights, read_layers
from pipeline.errors import RetraceError, nearest
from pipeline.job import cli, own
from pipeline.latents.stored import blocks
from pipeline.models import hooks, loader, splice
from pipeline.spec.base import Name
from pipeline.store import tables
from pipeline.text import tokens as text
from pipeline.tracing import influence
from pipeline.tracing.dictionaries import Dictionaries, from_layers
from pipeline.tracing.graph import cap_of, top_logits, trace
from pipeline.tracing.replacement import Replacement, fidelity, spliced

TABLES = ("tuned", "history")
EVERY = 10  # steps between two rows of the history
Objective = Literal["kl", "mse", "shuffled"]


class Options(own.Options):
    """Section own.finetuning of paper.yaml."""

    arm: Name = Field(default="trained", description="whose dictionaries are tuned")
    dictionaries: list[Name] = Field(min_length=1, description="sets over all layers")
    objectives: list[Objective] = Field(default=["kl", "mse", "shuffled"])
    n_steps: int = Field(default=200, ge=1)
    batch_blocks: int = Field(default=16, ge=1, description="blocks of text a step")
    lr: float = Field(default=0.01, gt=0, description="of each tensor, a share of its RMS")
    n_blocks: int = Field(default=16, ge=1, description="held-out blocks")
    prompts: list[str] = Field(min_length=1, description="whose graphs are scored")
    seed: int = Field(default=0, description="of the order of blocks")


@dataclass(frozen=True)
class Truth:
    """What the model itself does on some blocks.

    Attributes:
        x, y: what MLPs read and write, of each layer.
        logits: of the next tokens.
    """

    x: list[Float[Tensor, "batch pos d_model"]]
    y: list[Float[Tensor, "batch pos d_model"]]
    logits: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    @torch.no_grad()
    def of(cls, hf: nn.Module, block: Int64[Tensor, "batch pos"], d: Dictionaries) -> "Truth":
        last = f"blocks.{d.n_layers - 1}.hook_resid_post"
        acts = hooks.run_to(hf, block, [*dict.fromkeys([*d.hooks, *d.output_hooks, last])])
        read, written = ([acts[h].float() for h in of] for of in (d.hooks, d.output_hooks))
        return cls(read, written, splice.unembed(hf, acts[last]))


def unexplained(d: Dictionaries, truth: Truth) -> Float[Tensor, " layers"]:
    """Share of the variance of what each MLP writes that is left, each layer fed its true input."""
    written: list[Tensor | float] = [0.0] * d.n_layers
    for layer, x in enumerate(truth.x):
        for i, part in enumerate(d.decode(layer, d.encode(layer, x))):
            written[layer + i] = written[layer + i] + part
    left = []
    for layer, (x, y) in enumerate(zip(truth.x, truth.y, strict=True)):
        rows = (y - written[layer] - d.rest(layer, x))[:, d.skip_first :].flatten(0, 1)
        whole = y[:, d.skip_first :].flatten(0, 1)
        left.append(rows.square().sum() / (whole - whole.mean(0)).square().sum())
    return torch.stack(left)


def divergence(
    theirs: Float[Tensor, "batch pos d_vocab"], ours: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, ""]:
    """KL(theirs || ours) in nats, mean over positions."""
    log_p, log_q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def weights_of(d: Dictionaries) -> list[Tensor]:
    """All that is trained."""
    return [*d.W_enc, *d.b_enc, *d.W_dec, d.b_dec, *(d.W_skip or [])]


def adam(d: Dictionaries, lr: float) -> torch.optim.Adam:
    """Adam whose steps are shares of each tensor's size."""
    found = weights_of(d)
    size = [float(w.detach().square().mean().sqrt().clamp(min=1e-4)) for w in found]
    groups = [
        {"params": [w.requires_grad_()], "lr": lr * s} for w, s in zip(found, size, strict=True)
    ]
    return torch.optim.Adam(groups)


def batches(n: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Numbers of blocks, each once before any comes again."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(n, generator=draw)])
        some, left = left[:size], left[size:]
        yield some


def tuned(
    hf: nn.Module, d: Dictionaries, read: Int64[Tensor, "blocks pos"], objective: str,
    options: Options,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a set in place; rows of its history."""
    draw = torch.Generator().manual_seed(options.seed)
    optimiser, rows = adam(d, options.lr), []
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, options.n_steps)
    order = batches(len(read), min(options.batch_blocks, len(read)), draw)
    for step in range(options.n_steps):
        block = read[next(order).to(read.device)]
        truth = Truth.of(hf, block, d)
        loss = nmse = unexplained(d, truth).sum()
        kl = None
        if objective != "mse":
            theirs = truth.logits[:, d.skip_first :]
            if objective == "shuffled":
                flat = theirs.flatten(0, 1)
                theirs = flat[torch.randperm(len(flat), generator=draw)].view_as(theirs)
            kl = divergence(theirs, spliced(hf, block, d)[:, d.skip_first :])
            loss = nmse + kl * (nmse / kl.clamp(min=1e-6)).detach()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        if not step % EVERY:
            row = {"step": step, "nmse": float(nmse.detach())}
            rows.append(row | {"kl": float("nan") if kl is None else float(kl.detach())})
    for w in weights_of(d):
        w.requires_grad_(False)
    return rows


@torch.no_grad()
def judged(
    hf: nn.Module, d: Dictionaries, held_out: Int64[Tensor, "blocks pos"], prompts: list[Tensor]
) -> dict[str, float]:
    """The measures of a set."""
    truth, near, left = [Truth.of(hf, block[None], d) for block in held_out], [], []
    for block, true in zip(held_out, truth, strict=True):
        ours = spliced(hf, block[None], d)[0, d.skip_first :]
        near.append(fidelity(true.logits[0, d.skip_first :], ours))
    every = Truth(
        *([torch.cat(at, 0) for at in zip(*(getattr(t, of) for t in truth), strict=True)]
          for of in ("x", "y")), torch.empty(0),
    )  # fmt: skip
    left = unexplained(d, every)
    found = [graph_scores(hf, d, ids) for ids in prompts]
    out = {"kl": sum(n.kl for n in near) / len(near)}
    out |= {"agreement": sum(n.agreement for n in near) / len(near)}
    out |= {"unexplained": float(left.mean())}
    return out | {name: sum(f[name] for f in found) / len(found) for name in found[0]}


def graph_scores(hf: nn.Module, d: Dictionaries, ids: Int64[Tensor, " pos"]) -> dict[str, float]:
    """Scores of the graph of a prompt, and the features a token that pruning keeps."""
    model = Replacement.of(hf, ids, d)
    graph = trace(model, top_logits(model, cap_of(hf), 10, 0.95))
    about = graph.edges, graph.levels, graph.logits.probabilities, graph.n_pos
    kept = influence.prune(*about).nodes[: graph.n_chosen].sum()
    scores = influence.scores(*about)
    return {
        "replacement_score": scores.replacement, "completeness_score": scores.completeness,
        "pruned_l0": float(kept) / len(ids),
    }  # fmt: skip


def found_in(manifests: list[Any], name: str, device: Any) -> LayerWeights:
    """The weights of a set.

    Raises:
        RetraceError: no job of the paper made it, or it is not over all layers.
    """
    known = []
    for path in manifests:
        listed = tables.read_json(path)["saes"]
        known += [n for n, about in listed.items() if "layers" in about]
        if name in known:
            return read_layers(Path(path).parent / listed[name]["folder"]).to(device)
    raise RetraceError(
        f"own.finetuning.dictionaries: no set '{name}' over all layers{nearest(name, known)}; name "
        f"one of `sae.dictionaries` that has `layers`"
    )


def work(job: cli.Job, options: Options) -> own.Tables:
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    model, stored, corpus = (
        own.by_arm(job, files)[options.arm] for files in (args.models, args.activations,
                                                          args.corpora)
    )  # fmt: skip
    loaded = loader.load(model, device)
    skip_first = tables.read_json(stored)["skip_first"]
    read = blocks(corpus, "train").to(device)
    held_out = blocks(corpus, "eval", options.n_blocks).to(device)
    front = [] if loaded.bos_id is None else [loaded.bos_id]
    prompts = [
        torch.tensor([*front, *text.encode(loaded.tokenizer, p)], device=device)
        for p in options.prompts
    ]
    for name in options.dictionaries:
        for objective in ("none", *options.objectives):
            d = from_layers(found_in(args.transcoders, name, device), skip_first)
            about = {"dictionary": name, "objective": objective}
            if objective != "none":
                rows = tuned(loaded.hf, d, read, objective, options)
                out.add({"history": rows}, first=about)
            row = judged(loaded.hf, d, held_out, prompts)
            out.add({"tuned": [row]}, first=about)
            cli.log.info("%s, %s: %s", name, objective, {k: round(v, 4) for k, v in row.items()})
    return out
