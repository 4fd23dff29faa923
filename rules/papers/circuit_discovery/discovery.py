"""Stage `discovery`: circuits of compiled models, found by every method. [torch]

For each task, for its weights and for a reset network, for zero and corrupt ablation and each seed:

1. edges   ACDC at every threshold, EAP, EAP-IG and exact single cuts (circuits/acdc.py): one row
           per edge, for ACDC one per edge and threshold, whose score is the rise of the loss when
           the edge was tested. ACDC runs twice: in an order of the edges that is drawn, another
           one for each seed (acdc), and in that of the authors' code (acdc_canonical), which their
           published areas are of.
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
from itertools import product
from pathlib import Path
from typing import Literal

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
from pipeline.job import cli, own
from pipeline.models import loader, native
from pipeline.spec.base import Name, Section, Seeds

from . import sequences, truth

TABLES = "edges truth sets areas".split()
READS = {"checkpoint": "folder of the networks that siit.py trained"}
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


class Options(own.Options):
    """own.discovery of paper.yaml."""

    tasks: dict[Name, Task]
    thresholds: Thresholds
    n_examples: int = Field(ge=2, description="sequences, where a task does not have all")
    ablations: list[Literal["zero", "corrupt"]]
    weights: list[Literal["trained", "reset"]]
    seeds: Seeds = Field(description="of sequences, resets, ACDC's order and the trained network")
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
) -> dict[str, pd.DataFrame]:
    """Rows of the tables edges and sets. clean [n pos d_vocab] are the outputs that the loss is
    measured against; seed is of the drawn order in which ACDC cuts edges."""
    where, t = {"first": 1, "n_outputs": task.n_outputs}, options.thresholds
    loss = acdc.squared_distance(clean, **where)
    alone = acdc.exact(graph, loss) - loss(graph.clean[None])
    taus = np.geomspace(t.highest, t.lowest, t.n).tolist()
    orders = {
        "acdc": acdc.drawn_order(graph, np.random.default_rng([seed, ORDER])),
        "acdc_canonical": range(len(graph.edges)),
    }
    rows, sets, distances = [], {}, []
    for method, order in orders.items():
        kept, rises = acdc.acdc(graph, loss, taus, order=order)
        sets[method] = kept.cpu().numpy()
        for tau, rise in zip(taus, rises, strict=True):
            rows.append(edge_rows(method, graph.edges, rise, alone, tau))
    scores = {
        "eap": acdc.attribution(graph, acdc.towards_cut(graph, **where), [0.0]),
        "eap_ig": acdc.attribution(graph, loss, eap.midpoints(options.ig_steps)),
        "exact": alone,
    }
    for method, score in scores.items():
        sets[method] = roc.sets_of_scores(score.cpu().numpy())
        rows.append(edge_rows(method, graph.edges, score, alone))
    for method, some in sets.items():
        present = torch.tensor(some, device=graph.tokens.device).to(graph.off.dtype)
        distance = acdc.losses(graph, loss, present).cpu().numpy()
        about = {"method": method, "n_edges": some.sum(1), "loss": distance}
        distances.append(pd.DataFrame(about))
    return {"edges": pd.concat(rows), "sets": pd.concat(distances)}


def areas(edges: pd.DataFrame, known: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Areas of edges and nodes, a row for each method and truth, of one graph's edges and known
    circuits."""
    rng = np.random.default_rng(seed)
    found = {m: [roc.found_sets(rows)] for m, rows in edges.groupby("method", sort=False)}
    orders = [rng.permutation(len(known)) + 1.0 for _ in range(N_RANDOM)]
    found["random"] = [roc.sets_of_scores(order) for order in orders]
    _, touched = roc.incidence(known)
    rows = []
    for (method, sets), name in product(found.items(), truth.SOURCES):
        circuit = known[name].to_numpy(bool)
        if circuit.any():
            each = pd.DataFrame([roc.areas(touched, some, circuit) for some in sets])
            rows.append({"method": method, "truth": name, **each.mean()})
    return pd.DataFrame(rows)


def truth_rows(graph: EdgeGraph, model: str) -> pd.DataFrame:
    """Rows of the table truth, with a column for each source."""
    nothing = torch.zeros(len(graph.edges))
    rows = edge_rows("", graph.edges, nothing, nothing)[roc.COLUMNS]
    ends = [roc.ends(edge) for edge in rows.itertuples(index=False, name=None)]
    return rows.assign(**truth.truths(graph, ends, model))


def measure(
    name: str, task: Task, models: dict[int, nn.Module], options: Options, out: own.Tables,
    progress: cli.Progress | None = None,
) -> None:  # fmt: skip
    """Add all rows of a task: models has the network of each seed (a compiled model is the same for
    all), and progress counts the graphs of all tasks."""
    for seed in options.seeds:
        model = models[seed]
        drawn = sequences.SEQUENCES[task.sequences](options.n_examples, np.random.default_rng(seed))
        clean, corrupt = (tokens.to(next(model.parameters()).device) for tokens in drawn)
        wanted = model(clean).logits
        known = truth_rows(EdgeGraph(model, clean, positions=True), task.model)
        if seed == options.seeds[0]:
            out.add({"truth": known}, task=name)
        for weights, ablation in product(options.weights, options.ablations):
            hf = model if weights == "trained" else reset(model, seed)
            graph = EdgeGraph(hf, clean, None if ablation == "zero" else corrupt, True)
            made = found(graph, wanted, task, options, seed)
            made["areas"] = areas(made["edges"], known, seed)
            out.add(made, task=name, weights=weights, ablation=ablation, seed=seed)
            if progress:
                progress.at(len(out.parts["areas"]))  # a part for each graph


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


@torch.no_grad()
def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each task in turn."""
    device, out = job.device(), own.Tables(TABLES)
    models = {
        arm: dict.fromkeys(options.seeds, loader.load(file, device).hf)
        for arm, file in own.by_arm(job, job.args.models).items()
    }
    models["siit"] = trained(Path(job.args.checkpoint), options.seeds, device)
    each = len(options.seeds) * len(options.weights) * len(options.ablations)
    progress = cli.Progress("circuits", each * len(options.tasks), "graphs")
    for name, task in options.tasks.items():
        measure(name, task, models[task.model], options, out, progress)
    return out
