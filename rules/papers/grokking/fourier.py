"""Stage `fourier`: what Nanda et al. 2023 measure of a run's checkpoints.

1. The last checkpoint of each model names its key frequencies by their effect (ablations.py). They
   are then used for all its checkpoints, as in the paper.
2. progress     per checkpoint: losses, restricted and excluded loss, sparsity in the Fourier
                basis, weights (Sections 5.1 and 5.2).
3. phases       per model: where memorisation, circuit formation and cleanup end (phases.py).
4. spectrum     norm of each frequency in W_E, neurons and W_L, at some checkpoints (Figures 3-5).
   circle       of the first model of the first run: numbers and sums on the circle of each key
                frequency, at the same checkpoints.
5. frequencies  per frequency: its effect, norms, neurons, readout.
   edits        per ablation and set of pairs (Section 4.4). Both are medians over the
                checkpoints of the run's end (phases.ending), so that no single one decides.
   neurons      per neuron of the first and the last checkpoint: which frequency explains it.

A run of paper.yaml's section training is an arm here; "model" is one seed of an arm.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from pipeline.job import cli, own
from pipeline.weights import trained

from . import measured, phases

HERE = Path(__file__).parent
TABLES = ("progress", "phases", "spectrum", "circle", "frequencies", "neurons", "edits")


class Options(own.Options):
    """Section own.fourier of paper.yaml."""

    key_ratio: float = Field(
        default=10.0, gt=1, description="rise of the test loss without a frequency, if it is key"
    )
    frames: int = Field(default=20, ge=2, description="checkpoints in spectrum and circle")


class Model:
    """One trained model: its identity, its pairs, and its circuit at any checkpoint."""

    def __init__(self, run: trained.Run, member: str, device: Any) -> None:
        self.run, self.member, self.device = run, member, device
        self.who = {"arm": run.name, "seed": run.seed(member)}
        tokens = run.batches(member, HERE / "data.py", device).evaluation["train"][0]
        self.pairs = measured.ablations.Pairs.of(tokens, run.info["d_vocab"] - 1)

    def circuit(self, step: int) -> Any:
        """The circuit at a checkpoint."""
        return measured.circuit.run(self.run.model(self.member, step).to(self.device))


def medians(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The last of several frames of the same rows, every measured number the median of theirs."""
    out = frames[-1].copy()
    for name in out.select_dtypes("float"):
        out[name] = np.median([frame[name] for frame in frames], axis=0)
    return out


def at_the_end(model: Model, ratio: float) -> dict[str, pd.DataFrame]:
    """The tables of the run's end for one model, whose key frequencies become known."""
    circuits = list(map(model.circuit, phases.ending(np.array(model.run.steps)).tolist()))
    model.key = measured.ablations.key_frequencies(circuits[-1].logits, model.pairs, ratio)
    per_circuit = {"frequencies": measured.frequencies, "edits": measured.edits}
    out = {name: medians([rows(c, model.pairs, model.key) for c in circuits])
           for name, rows in per_circuit.items()}  # fmt: skip
    return out | {"neurons": measured.neurons(circuits[-1]).assign(step=model.run.steps[-1])}


def borders(models: list[Model], progress: pd.DataFrame) -> list[dict[str, float]]:
    """Where the phases of each model end, from its rows of the table progress."""
    columns = ("step", "test_loss", "excluded_train", "test_accuracy")
    curves = [progress[progress["seed"] == m.who["seed"]] for m in models]
    return [phases.borders(*(own[c].to_numpy() for c in columns)) for own in curves]


def measure(
    models: list[Model], options: Options, out: own.Tables, done: Callable[[], None]
) -> list[pd.DataFrame]:
    """Add the rows of the models of one run, calling `done` after each checkpoint of a model;
    return those of `circle`, of its first model."""
    run, progress, circles = models[0].run, [], []
    for m in models:
        out.add(at_the_end(m, options.key_ratio), **m.who)
    for step, m in product(run.steps, models):
        circuit = m.circuit(step)
        numbers = measured.progress(circuit, m.pairs, m.key)
        progress.append({**m.who, "step": step, **numbers})
        if step == run.steps[0]:
            out.add({"neurons": measured.neurons(circuit)}, step=step, **m.who)
        done()
    ends = borders(models, pd.DataFrame(progress))
    rows = [m.who | found for m, found in zip(models, ends, strict=True)]
    out.add({"progress": progress, "phases": rows})
    shown = phases.frames(np.array(run.steps), ends[0]["cleaned"], options.frames).tolist()
    for step, m in product(shown, models):
        circuit, at = m.circuit(step), m.who | {"step": step}
        out.add({"spectrum": measured.spectrum(circuit)}, **at)
        if m is models[0]:
            circles.append(measured.circle(circuit, m.pairs, m.key).assign(**at))
    return circles


def work(job: cli.Job, options: Options) -> own.Tables:
    device, out = job.device(), own.Tables(TABLES)
    runs = list(map(trained.open_run, job.args.runs))
    total = sum(len(r.steps) * len(r.members) for r in runs)
    progress, circles = cli.Progress("fourier", total, "checkpoints"), []
    for run in runs:
        models = [Model(run, member, device) for member in run.members]
        circles.append(measure(models, options, out, progress.add))
    out.parts["circle"] = circles[0]  # which may have no points
    return out
