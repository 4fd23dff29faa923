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

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from pipeline.circuits import eap
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.latents import sites as latents
from pipeline.latents.subsets import Ablation
from pipeline.latents.units import Latents, Neurons, RandomDirections
from pipeline.models import loader
from pipeline.models.pairs import Pairs, Task
from pipeline.spec.base import Section, Seeds
from pipeline.store import tables
from pipeline.text.tokens import Texts

HERE = Path(__file__).parent
prompts = import_file(HERE / "prompts.py")
curves = import_file(HERE / "curves.py")
graph = import_file(HERE / "graph.py")
TABLES = "behaviour curves nodes sites graph_nodes graph_edges".split()


class Options(Section):
    """own.agreement of paper.yaml."""

    tables: list[str]
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
    seeds: Seeds = Field(
        default=[0],
        description="of prompts, directions and orders drawn; the first has the graphs",
    )


class Structure:
    """The circuits of one structure of prompts, of the prompts of one seed."""

    def __init__(
        self, name: str, loaded: Any, units: dict, options: Options, seed: int, device: Any
    ) -> None:
        self.name, self.loaded, self.units, self.options = name, loaded, units, options
        self.seed = seed
        n, m = options.n_prompts, options.n_judged
        drawn = prompts.draw(loaded.tokenizer, name, n + m, seed)
        self.text = drawn.pop("text")
        self.hooks = {
            "latents": list(units["latents"]),
            "neurons": list(units["neurons"]),
            "random": list(units["random"]),
        }
        self.found, self.judged = (
            self._sites(part(drawn, piece), device) for piece in (slice(0, n), slice(n, n + m))
        )
        self.alphas = {"attribution": [0.0], "ig": eap.midpoints(options.ig_steps)}

    def _sites(self, drawn: dict, device: Any) -> latents.Sites:
        every = dict.fromkeys(h for hooks in self.hooks.values() for h in hooks)
        pairs = Pairs.of(drawn, self.loaded.bos_id, device)
        return latents.Sites(Task.of(self.loaded.hf, pairs), list(every))

    def effects(self, kind: str, method: str) -> dict[str, latents.Effects]:
        """hook -> effects of the nodes of a kind, on the prompts that circuits are found on."""
        alphas = self.alphas[method]
        return {h: latents.effects(self.found, h, u, alphas) for h, u in self.units[kind].items()}

    def behaviour(self) -> dict[str, Any]:
        """A row of the table behaviour, on the prompts that circuits are judged on."""
        task = self.judged.task
        clean, corrupt = task.before, task.before + task.total
        row = {"n": len(clean), "logit_diff": clean.mean(), "corrupt_logit_diff": corrupt.mean()}
        row |= {"accuracy": (clean > 0).float().mean()}
        return {k: v.item() if torch.is_tensor(v) else v for k, v in row.items()} | self.example()

    def example(self) -> dict[str, Any]:
        """The first of the prompts that circuits are found on, and P(answer | answer or foil)."""
        pairs, texts = self.found.task.pairs, Texts(self.loaded.tokenizer)
        answer, foil = int(pairs.answer[0]), int(pairs.foil[0])
        return {
            "example": self.text[0],
            "tokens": texts.context(pairs.base[0].tolist()),
            "answer": texts.alone(answer),
            "foil": texts.alone(foil),
            "answer_id": answer,
            "p_answer": self.found.task.before[0].sigmoid().item(),
        }

    def measured(self, manifest: str) -> dict[str, Any]:
        """Rows of every table; of the graph's at the first seed alone."""
        options, rng = self.options, np.random.default_rng(self.seed)
        found = {
            "latents": self.effects("latents", "ig"),
            "attribution": self.effects("latents", "attribution"),
            "neurons": self.effects("neurons", "ig"),
            "random": self.effects("random", "ig"),
        }
        ablations = {k: Ablation(self.judged, u) for k, u in self.units.items()}
        kinds = curves.kinds(ablations, found, options.most_nodes, options.n_random, rng)
        progress = cli.Progress(f"{self.name}: curves", len(kinds), "kinds")
        out: dict[str, Any] = {"behaviour": [self.behaviour()]}
        out["curves"] = curves.curves(kinds, progress.at)
        out["nodes"], out["sites"] = self.estimates(found)
        if self.seed == options.seeds[0]:
            out |= self.graph(found["latents"], manifest)
        return out

    def graph(self, found: dict[str, latents.Effects], manifest: str) -> dict[str, pd.DataFrame]:
        """The tables graph_nodes and graph_edges, of the effects of latents."""
        options = self.options
        alphas, units, sites = self.alphas["ig"], self.units["latents"], self.found
        progress = cli.Progress(f"{self.name}: edges", options.graph_nodes, "nodes")
        nodes, edges, drawn = graph.graph(
            found, units, sites, alphas, options.graph_nodes, options.graph_edges,
            progress.at,
        )  # fmt: skip
        said = graph.labels(drawn, units, sites, manifest, self.loaded, options.n_label_rows)
        for column in ("tokens", "logits"):
            nodes[column] = [said.get((n.hook, n.number), {}).get(column, "") for n in drawn]
        ids = self.found.task.pairs.base[0].tolist()
        shown = Texts(self.loaded.tokenizer).context(ids)
        nodes["token"] = [shown[n.position] for n in drawn]
        return {"graph_nodes": nodes, "graph_edges": edges}

    def estimates(self, found: dict[str, dict]) -> tuple[list[dict], list[dict]]:
        """Rows of nodes and sites: both estimates beside the exact effects, of latents."""
        by = {"ig": found["latents"], "attribution": found["attribution"]}
        nodes = [
            node
            for hook in self.hooks["latents"]
            for node in dict.fromkeys(
                n
                for method in by.values()
                for n in latents.strongest({hook: method[hook]}, self.options.n_exact, True)
            )
        ]
        progress = cli.Progress(f"{self.name}: exact patching", len(nodes), "nodes")
        exact = latents.exact(self.found, self.units["latents"], nodes, progress.at).mean(-1)
        made = {k: latents.scores(f, nodes).mean(-1).tolist() for k, f in by.items()}
        rows = [
            {"layer": n.layer, "kind": n.kind} | n._asdict()
            | {"exact": e} | {k: v[i] for k, v in made.items()}
            for i, (n, e) in enumerate(zip(nodes, exact.tolist(), strict=True))
        ]  # fmt: skip
        n = len(self.found.task.before)
        sites = [
            {"hook": hook, "whole": float(self.found.whole(hook).mean())}
            | {k: float(f[hook].latents.sum() + f[hook].error.sum()) / n for k, f in by.items()}
            | {"errors": float(by["ig"][hook].error.sum() / n)}
            for hook in self.hooks["latents"]
        ]
        return rows, sites


def part(drawn: dict[str, Any], piece: slice) -> dict[str, Any]:
    """Some of the prompts."""
    out = {k: v[piece] for k, v in drawn.items() if k != "positions"}
    return out | {"positions": {k: v[piece] for k, v in drawn["positions"].items()}}


def units_of(found: dict[str, Latents], loaded: Any, seed: int) -> dict[str, dict]:
    """latents, neurons, random -> hook -> units, at the hooks of the dictionaries `found`."""
    d_mlp = loaded.hf.config.intermediate_size
    neurons = {}
    for hook, units in found.items():
        at_mlp = hook.endswith("hook_mlp_out")
        own = hook.replace("hook_mlp_out", "mlp.hook_post")
        neurons[own] = Neurons(d_mlp if at_mlp else units.sae.W_dec.shape[1])
    random = {
        hook: Latents(RandomDirections(u.sae, seed + i), u.skip_first, u.max_norm)
        for i, (hook, u) in enumerate(found.items())
    }
    return {"latents": found, "neurons": neurons, "random": random}


def main() -> None:
    parser = cli.parser(
        "agreement", __doc__, model="model.json",
        activations="manifest.json of the activations", saes="manifests of the SAE jobs*",
        **{t: f"{t}.parquet" for t in TABLES},
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, options = job.args, job.section("own.agreement", Options)
        device = job.device()
        made: dict[str, list[pd.DataFrame]] = {t: [] for t in TABLES}
        with torch.no_grad():
            loaded = loader.load(args.model, device)
            found = latents.load(args.saes, options.saes, args.activations, device)
            for seed in options.seeds:
                units = units_of(found, loaded, seed)
                for name in options.structures:
                    structure = Structure(name, loaded, units, options, seed, device)
                    for table, rows in structure.measured(args.activations).items():
                        frame = pd.DataFrame(rows)
                        frame.insert(0, "structure", name)
                        made[table].append(frame.assign(seed=seed))
        inputs = [args.model, args.activations, *args.saes]
        certificate = job.certificate(inputs, seed=options.seeds)
        for table, frames in made.items():
            tables.write_table(
                getattr(args, table), pd.concat(frames, ignore_index=True), certificate
            )

    cli.run("agreement", parser.parse_args(), work)


if __name__ == "__main__":
    main()
