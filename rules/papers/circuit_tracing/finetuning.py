"""Transcoders before and after fine-tuning on the KL of their replacement model, as
pipeline/tracing/finetuned.py does it, on held-out text and on the graphs of prompts. [torch]
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor, nn

from pipeline.crosscoders.layered_files import LayerWeights, read_layers
from pipeline.errors import RetraceError, nearest
from pipeline.job import cli, own
from pipeline.latents.stored import blocks
from pipeline.models import loader
from pipeline.spec.base import Name
from pipeline.store import tables
from pipeline.text import tokens as text
from pipeline.tracing import influence
from pipeline.tracing.dictionaries import Dictionaries, from_layers
from pipeline.tracing.finetuned import Objective, Truth, tuned, unexplained
from pipeline.tracing.graph import cap_of, top_logits, trace
from pipeline.tracing.replacement import Replacement, fidelity, spliced

TABLES = ("tuned", "history")


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


@torch.no_grad()
def judged(
    hf: nn.Module, d: Dictionaries, held_out: Int64[Tensor, "blocks pos"], prompts: list[Tensor]
) -> dict[str, float]:
    """The measures of a set."""
    truth, near = [Truth.of(hf, block[None], d) for block in held_out], []
    for block, true in zip(held_out, truth, strict=True):
        ours = spliced(hf, block[None], d)[0, d.skip_first :]
        near.append(fidelity(true.logits[0, d.skip_first :], ours))
    every = Truth(
        *([torch.cat(at, 0) for at in zip(*(getattr(t, of) for t in truth), strict=True)]
          for of in ("x", "y")), torch.empty(0),
    )  # fmt: skip
    found = [graph_scores(hf, d, ids) for ids in prompts]
    kl, agreement = (sum(x) / len(near) for x in zip(*near, strict=True))
    out = {"kl": kl, "agreement": agreement, "unexplained": float(unexplained(d, every).mean())}
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
    listed = {
        n: Path(path).parent / about["folder"] for path in manifests
        for n, about in tables.read_json(path)["saes"].items() if "layers" in about
    }  # fmt: skip
    if name not in listed:
        raise RetraceError(
            f"own.finetuning.dictionaries: no set '{name}' over all layers{nearest(name, listed)}"
        )
    return read_layers(listed[name]).to(device)


def work(job: cli.Job, options: Options) -> own.Tables:
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    given = (args.models, args.activations, args.corpora)
    model, stored, corpus = (own.by_arm(job, files)[options.arm] for files in given)
    loaded = loader.load(model, device)
    skip_first = tables.read_json(stored)["skip_first"]
    read = blocks(corpus, "train").to(device)
    held_out = blocks(corpus, "eval", options.n_blocks).to(device)
    front = [] if loaded.bos_id is None else [loaded.bos_id]
    ids = [[*front, *text.encode(loaded.tokenizer, p)] for p in options.prompts]
    prompts = [torch.tensor(one, device=device) for one in ids]
    for name in options.dictionaries:
        for objective in ("none", *options.objectives):
            d = from_layers(found_in(args.transcoders, name, device), skip_first)
            about = {"dictionary": name, "objective": objective}
            if objective != "none":
                how = options.model_dump(include={"n_steps", "batch_blocks", "lr", "seed"})
                rows = tuned(loaded.hf, d, read, objective, **how)
                out.add({"history": rows}, first=about)
            row = judged(loaded.hf, d, held_out, prompts)
            out.add({"tuned": [row]}, first=about)
            cli.log.info("%s, %s: %s", name, objective, {k: round(v, 4) for k, v in row.items()})
    return out
