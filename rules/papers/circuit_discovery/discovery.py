"""Stage `discovery`: circuits of compiled models, found by every method. [torch]

For each task, for its weights and for a reset network, for zero and corrupt ablation and each seed:

1. edges   ACDC at every threshold, EAP, EAP-IG and exact single cuts (circuits/acdc.py): one row an
           edge, and for ACDC one a threshold, score the rise of the loss at its turn. ACDC runs
           twice: in an order of the edges that is drawn, another one for each seed (acdc), and in
           that of the authors' code (acdc_canonical), of which their published areas are.
2. truth   which edges belong to the circuit, by three sources (truth.py).
3. sets    the squared distance to the whole model's outputs of what each method keeps, by size.
4. areas   under the ROC curves of edges and nodes (claims/roc.py), by truth; of edges in random
           order, too, the mean of 50 orders.

A reset network has the outputs of its queries, keys, values and MLP inputs permuted, each tensor
apart, as in the authors' create_reset_networks.py with scramble_head_outputs; heads are permuted
there, too, but the compiled models have one a layer. Its loss is measured against the outputs of
the model that was reset, as in the authors' runs.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.circuits import acdc, eap
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.table import edge_rows
from pipeline.claims import roc
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.models import loader, native
from pipeline.spec.base import Name, Section, Seeds
from pipeline.store import tables

HERE = Path(__file__).parent
sequences = import_file(HERE / "sequences.py")
truth = import_file(HERE / "truth.py")
TABLES = "edges truth sets areas".split()
N_RANDOM = 50
ORDER = 1  # the stream of random numbers from which orders are drawn, apart from sequences


class Task(Section):
    """A compiled model on some sequences."""

    model: Name = Field(description="an arm, or siit: the model that siit.py trains")
    sequences: Name = Field(description="a function of sequences.py")
    n_outputs: int = Field(ge=1, description="logits that hold the output, see tracr.json")


class Thresholds(Section):
    """Values of tau, evenly spaced in their logarithm."""

    lowest: float = Field(gt=0)
    highest: float = Field(gt=0)
    n: int = Field(ge=2)


class Options(Section):
    """own.discovery of paper.yaml."""

    tables: list[str]
    tasks: dict[Name, Task]
    thresholds: Thresholds
    n_examples: int = Field(ge=2, description="sequences, where a task does not have all")
    ablations: list[Literal["zero", "corrupt"]]
    weights: list[Literal["trained", "reset"]]
    seeds: Seeds = Field(
        description="of sequences, corruptions, resets, the order of ACDC and the trained network",
    )
    ig_steps: int = Field(ge=1, description="EAP-IG: points between clean and cut embeddings")


def reset(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which neurons, and the coordinates of q, k and v of a head, change places.

    Weights and biases are permuted apart from each other, and so are q, k and v.
    """
    generator, out = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for layer in out.base_model.layers:
            attn = layer.attn
            for linear, width in (
                (attn.q, attn.d_head), (attn.k, attn.d_head), (attn.v, attn.d_head),
                (layer.mlp.fc_in, len(layer.mlp.fc_in.bias)),
            ):  # fmt: skip
                for p in linear.parameters():
                    order = torch.randperm(width, generator=generator).to(p.device)
                    p.copy_(p.unflatten(0, (-1, width))[:, order].flatten(0, 1))
    return out


def found(
    graph: EdgeGraph, clean: Tensor, task: Task, options: Options, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the tables edges and sets.

    Args:
        clean: [n pos d_vocab], the outputs that the loss is measured against.
        seed: of the drawn order in which ACDC cuts edges.
    """
    where, t = {"first": 1, "n_outputs": task.n_outputs}, options.thresholds
    loss = acdc.squared_distance(clean, **where)
    taus = np.geomspace(t.highest, t.lowest, t.n).tolist()
    orders = {
        "acdc": acdc.drawn_order(graph, np.random.default_rng([seed, ORDER])),
        "acdc_canonical": range(len(graph.edges)),
    }
    cut = {m: acdc.acdc(graph, loss, taus, order=order) for m, order in orders.items()}
    alone = acdc.exact(graph, loss) - loss(graph.clean[None])
    towards = acdc.towards_cut(graph, **where)
    scores = {
        "eap": acdc.attribution(graph, towards, [0.0]),
        "eap_ig": acdc.attribution(graph, loss, eap.midpoints(options.ig_steps)),
        "exact": alone,
    }
    rows = [
        edge_rows(method, graph.edges, rise, alone, tau)
        for method, (_, rises) in cut.items()
        for tau, rise in zip(taus, rises, strict=True)
    ]
    rows += [edge_rows(m, graph.edges, s, alone) for m, s in scores.items()]
    sets = {m: kept.cpu().numpy() for m, (kept, _) in cut.items()}
    sets |= {m: roc.sets_of_scores(s.cpu().numpy()) for m, s in scores.items()}
    parts = []
    for method, some in sets.items():
        present = torch.tensor(some, device=graph.tokens.device).to(graph.off.dtype)
        distance = acdc.losses(graph, loss, present).cpu().numpy()
        parts.append(pd.DataFrame({"method": method, "n_edges": some.sum(1), "loss": distance}))
    return pd.concat(rows, ignore_index=True), pd.concat(parts, ignore_index=True)


def areas(edges: pd.DataFrame, known: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a method and truth: areas of edges and nodes.

    Args:
        edges: rows of one graph; known: its rows of the table truth.
    """
    rng = np.random.default_rng(seed)
    found = {m: [roc.found_sets(rows)] for m, rows in edges.groupby("method", sort=False)}
    orders = [rng.permutation(len(known)) + 1.0 for _ in range(N_RANDOM)]
    found["random"] = [roc.sets_of_scores(order) for order in orders]
    _, touched = roc.incidence(known)
    rows = []
    for method, sets in found.items():
        for name in truth.SOURCES:
            own = known[name].to_numpy(bool)
            if not own.any():
                continue
            each = pd.DataFrame([roc.areas(touched, some, own) for some in sets])
            rows.append({"method": method, "truth": name, **each.mean()})
    return pd.DataFrame(rows)


def truth_rows(graph: EdgeGraph, model: str) -> pd.DataFrame:
    """Rows of the table truth: a column a source."""
    nothing = torch.zeros(len(graph.edges))
    rows = edge_rows("", graph.edges, nothing, nothing)[roc.COLUMNS]
    return rows.assign(**{k: v.numpy() for k, v in truth.truths(graph, model).items()})


def measured(
    name: str, task: Task, models: dict[int, nn.Module], options: Options, told: Any
) -> dict[str, list[pd.DataFrame]]:
    """All rows of a task.

    Args:
        models: the network of each seed; a compiled model is the same for all.
    """
    out: dict[str, list[pd.DataFrame]] = {t: [] for t in TABLES}
    draw = sequences.SEQUENCES[task.sequences]
    for seed in options.seeds:
        model = models[seed]
        device = next(model.parameters()).device
        drawn = draw(options.n_examples, np.random.default_rng(seed))
        clean, corrupt = (tokens.to(device) for tokens in drawn)
        wanted = model(clean).logits
        known = truth_rows(EdgeGraph(model, clean, positions=True), task.model)
        if seed == options.seeds[0]:
            out["truth"].append(known.assign(task=name))
        for weights in options.weights:
            hf = model if weights == "trained" else reset(model, seed)
            for ablation in options.ablations:
                graph = EdgeGraph(hf, clean, None if ablation == "zero" else corrupt, True)
                key = {"task": name, "weights": weights, "ablation": ablation, "seed": seed}
                edges, sets = found(graph, wanted, task, options, seed)
                out["edges"].append(edges.assign(**key))
                out["sets"].append(sets.assign(**key))
                out["areas"].append(areas(edges, known, seed).assign(**key))
                told()
    return out


def trained(folder: Path, seeds: list[int], device: torch.device) -> dict[int, nn.Module]:
    """The trained network of each seed; RetraceError for a seed that siit.py did not train."""
    for seed in seeds:
        if not (folder / str(seed)).is_dir():
            raise RetraceError(
                f"own.discovery.seeds: {folder} has no network of seed {seed}; name it in "
                f"own.siit.seeds, too"
            )
    read = {seed: native.from_folder(folder / str(seed)) for seed in seeds}
    return {seed: hf.to(device).eval().requires_grad_(False) for seed, hf in read.items()}


def main() -> None:
    parser = cli.parser(
        "discovery", __doc__, models="model.json of every arm, sorted by name*",
        siit="folder of the networks that siit.py trained",
        **{t: f"{t}.parquet" for t in TABLES},
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, options = job.args, job.section("own.discovery", Options)
        device = job.device()
        hfs = {
            arm: dict.fromkeys(options.seeds, loader.load(file, device).hf)
            for arm, file in zip(sorted(job.spec["arms"]), args.models, strict=True)
        }
        hfs["siit"] = trained(Path(args.siit), options.seeds, device)
        frames: dict[str, list[pd.DataFrame]] = {t: [] for t in TABLES}
        each = len(options.seeds) * len(options.weights) * len(options.ablations)
        progress, done = cli.Progress("circuits", each * len(options.tasks), "graphs"), [0]

        def told() -> None:
            done[0] += 1
            progress.at(done[0])

        with torch.no_grad():
            for name, task in options.tasks.items():
                for table, some in measured(name, task, hfs[task.model], options, told).items():
                    frames[table] += some
        networks = [Path(args.siit) / str(s) / "model.safetensors" for s in options.seeds]
        certificate = job.certificate([*args.models, *networks])
        for table, some in frames.items():
            frame = pd.concat(some, ignore_index=True)
            tables.write_table(getattr(args, table), frame, certificate)

    cli.run("discovery", parser.parse_args(), work)


if __name__ == "__main__":
    main()
