"""Stage `agreement`: sparse feature circuits of subject-verb agreement (Marks et al. 2024). [torch]

For each structure of prompts, with the dictionaries that own.agreement names as sites:

1. behaviour    logit difference and accuracy on held-out prompts.
2. curves       faithfulness and completeness against the number of nodes (curves.py).
3. nodes        nodes of largest estimated effect, patched exactly: how right the estimates are.
4. sites        sum of all estimates of a site, and the exact effect of patching it whole.
5. graph_nodes, graph_edges    the circuit as a graph (graph.py).

At an MLP whose output is a site the neurons behind its nonlinearity stand beside the latents, at
any other site the coordinates of x, as in the paper.
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field

from pipeline.circuits import eap
from pipeline.errors import RetraceError
from pipeline.job import cli, own
from pipeline.latents import latent_circuits
from pipeline.latents import sites as latents
from pipeline.latents.subsets import Ablation
from pipeline.latents.units import Latents, Neurons, RandomDirections, reads_of
from pipeline.models import loader
from pipeline.models.pairs import Pairs, Task
from pipeline.spec.base import Seeds
from pipeline.text.tokens import Texts

from . import curves, graph, prompts

TABLES = "behaviour curves nodes sites graph_nodes graph_edges".split()


class Options(own.Options):
    """own.agreement of paper.yaml."""

    saes: list[str] = Field(min_length=1, description="dictionaries, one a site")
    structures: list[prompts.Structure] = Field(default=list(prompts.STRUCTURES), min_length=1)
    n_prompts: int = Field(default=32, ge=2, description="pairs on which circuits are found")
    n_judged: int = Field(default=32, ge=2, description="other pairs, on which they are judged")
    ig_steps: int = Field(default=8, ge=1, description="points of the integrated gradients")
    most_nodes: int = Field(default=8192, ge=1, description="of a curve")
    n_exact: int = Field(default=12, ge=1, description="nodes a site patched exactly, a method")
    n_random: int = Field(default=2, ge=1, description="random orders of nodes")
    graph_nodes: int = Field(default=48, ge=1)
    graph_edges: int = Field(default=160, ge=1)
    n_label_rows: int = Field(default=8192, ge=1, description="held-out rows read for labels")
    seeds: Seeds = Field(default=[0], description="of all that is drawn; graphs are of the first")


class Structure:
    """The circuits of one structure of prompts, of the prompts of one seed.

    Attributes:
        found, judged: the sites on the prompts that circuits are found on, and judged on.
    """

    def __init__(
        self, name: str, loaded: Any, units: dict, options: Options, seed: int, device: Any
    ) -> None:
        self.name, self.loaded, self.units = name, loaded, units
        self.options, self.seed = options, seed
        n, m = options.n_prompts, options.n_judged
        drawn = prompts.draw(loaded.tokenizer, name, n + m, seed)
        self.text = drawn.pop("text")
        hooks = list(dict.fromkeys(hook for own_units in units.values() for hook in own_units))
        parts = (part(drawn, piece) for piece in (slice(0, n), slice(n, n + m)))
        tasks = (Task.of(loaded.hf, Pairs.of(p, loaded.bos_id, device)) for p in parts)
        self.found, self.judged = (latents.Sites(task, hooks) for task in tasks)
        self.alphas = {"attribution": [0.0], "ig": eap.midpoints(options.ig_steps)}

    def effects(self, kind: str, method: str = "ig") -> dict[str, latents.Effects]:
        """hook -> effects of the nodes of a kind, on the prompts that circuits are found on."""
        alphas = self.alphas[method]
        return {h: latents.effects(self.found, h, u, alphas) for h, u in self.units[kind].items()}

    def progress(self, what: str, total: int, unit: str) -> Any:
        """Reports how much of a part of the work is done."""
        return cli.Progress(f"{self.name}: {what}", total, unit).at

    def measured(self, manifest: str) -> dict[str, Any]:
        """Rows of every table, of the graph's at the first seed alone; the manifest is that of the
        activations."""
        options, rng = self.options, np.random.default_rng(self.seed)
        found = {
            "latents": self.effects("latents"),
            "attribution": self.effects("latents", "attribution"),
            "neurons": self.effects("neurons"),
            "random": self.effects("random"),
        }
        ablations = {k: Ablation(self.judged, u) for k, u in self.units.items()}
        kinds = curves.kinds(ablations, found, options.most_nodes, options.n_random, rng)
        rows = latent_circuits.curves(kinds, self.progress("curves", len(kinds), "kinds"))
        out = {"behaviour": [self.behaviour()], "curves": rows}
        out |= self.estimates({"ig": found["latents"], "attribution": found["attribution"]})
        if self.seed == options.seeds[0]:
            out |= graph.tables(
                found["latents"], self.units["latents"], self.found, self.alphas["ig"], options,
                self.loaded, manifest, self.progress("edges", options.graph_nodes, "nodes"),
            )  # fmt: skip
        return out

    def behaviour(self) -> dict[str, Any]:
        """A row of the table behaviour, and an example: the first prompt that is found on."""
        task, pairs, texts = self.judged.task, self.found.task.pairs, Texts(self.loaded.tokenizer)
        clean, corrupt = task.before, task.before + task.total
        answer, foil = int(pairs.answer[0]), int(pairs.foil[0])
        return {
            "n": len(clean),
            "logit_diff": clean.mean().item(),
            "corrupt_logit_diff": corrupt.mean().item(),
            "accuracy": (clean > 0).float().mean().item(),
            "example": self.text[0],
            "tokens": texts.context(pairs.base[0].tolist()),
            "answer": texts.alone(answer),
            "foil": texts.alone(foil),
            "answer_id": answer,
            "p_answer": self.found.task.before[0].sigmoid().item(),
        }

    def estimates(self, by: dict[str, dict]) -> dict[str, list[dict]]:
        """Rows of nodes and sites: estimates (estimate -> hook -> effects) beside the exact
        effects, of latents."""
        tops = [
            latents.strongest({hook: effects[hook]}, self.options.n_exact, True)
            for hook in self.units["latents"]
            for effects in by.values()
        ]
        nodes = list(dict.fromkeys(node for top in tops for node in top))
        progress = self.progress("exact patching", len(nodes), "nodes")
        exact = latents.exact(self.found, self.units["latents"], nodes, progress).mean(-1).tolist()
        made = {k: latents.scores(f, nodes).mean(-1).tolist() for k, f in by.items()}
        rows = [
            {"layer": n.layer, "kind": n.kind, **n._asdict(), "exact": exact[i]}
            | {k: v[i] for k, v in made.items()}
            for i, n in enumerate(nodes)
        ]
        n = len(self.found.task.before)
        sites = [
            {"hook": hook, "whole": float(self.found.whole(hook).mean())}
            | {k: float(f[hook].latents.sum() + f[hook].error.sum()) / n for k, f in by.items()}
            | {"errors": float(by["ig"][hook].error.sum() / n)}
            for hook in self.units["latents"]
        ]
        return {"nodes": rows, "sites": sites}


def part(drawn: dict[str, Any], piece: slice) -> dict[str, Any]:
    """Some of the prompts."""
    cut = lambda v: {k: p[piece] for k, p in v.items()} if isinstance(v, dict) else v[piece]  # noqa: E731
    return {name: cut(values) for name, values in drawn.items()}


def units_of(found: dict[str, Latents], loaded: Any, seed: int) -> dict[str, dict]:
    """latents, neurons, random -> hook -> units, at the hooks of the dictionaries `found`."""
    d_mlp = loaded.hf.config.intermediate_size
    neurons, random = {}, {}
    for i, (hook, u) in enumerate(found.items()):
        at_mlp = hook.endswith("hook_mlp_out")
        n = d_mlp if at_mlp else u.sae.W_dec.shape[1]
        neurons[hook.replace("hook_mlp_out", "mlp.hook_post")] = Neurons(n)
        drawn = RandomDirections(u.sae, seed + i)
        random[hook] = Latents(drawn, u.skip_first, u.max_norm)
    return {"latents": found, "neurons": neurons, "random": random}


@torch.no_grad()
def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each seed and structure in turn."""
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    loaded, activations = loader.load(args.models[0], device), args.activations[0]
    found = latents.load(args.saes, options.saes, activations, device)
    if coders := reads_of(found):
        raise RetraceError(
            f"own.agreement.saes: a transcoder writes at {min(coders)}, and random directions and "
            f"neurons of the same site have nothing to read; name dictionaries of one hook"
        )
    for seed in options.seeds:
        units = units_of(found, loaded, seed)
        for name in options.structures:
            structure = Structure(name, loaded, units, options, seed, device)
            out.add(structure.measured(activations), {"structure": name}, seed=seed)
    return out
