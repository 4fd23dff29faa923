"""Stage `fourier`: what Nanda et al. 2023 measure of a run's checkpoints.

1. The last checkpoint of each model names its key frequencies by their effect (ablations.py). They
   are then used for all its checkpoints, as in the paper.
2. progress     one row a checkpoint: losses, restricted and excluded loss, sparsity in the Fourier
                basis, weights (Sections 5.1 and 5.2).
3. phases       one row a model: where memorisation, circuit formation and cleanup end (phases.py).
4. spectrum     norm of each frequency in W_E, neurons and W_L, at some checkpoints (Figures 3-5).
   circle       of the first model of the first run: numbers and sums on the circle of each key
                frequency, at the same checkpoints.
5. frequencies  one row a frequency: its effect, norms, neurons, readout.
   edits        one row an ablation and a set of pairs (Section 4.4). Both are medians over the
                checkpoints of the run's end (phases.ending), so that no single one decides.
   neurons      one row a neuron of the first and the last checkpoint: which frequency explains it.

A run of paper.yaml's section training is an arm here; "model" is one seed of an arm.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.spec.paper import Section
from pipeline.store import tables

HERE = Path(__file__).parent
TABLES = ("progress", "phases", "spectrum", "circle", "frequencies", "neurons", "edits")
phases = import_file(HERE / "phases.py")


class Options(Section):
    """Section own.fourier of paper.yaml."""

    tables: list[str]
    key_ratio: float = Field(
        default=10.0,
        gt=1,
        description="a frequency is key where its removal from the logits makes the test loss at "
        "least so many times as large",
    )
    frames: int = Field(default=20, ge=2, description="checkpoints in spectrum and circle")


class Model:
    """One trained model: its identity, its pairs, and its circuit at any checkpoint."""

    def __init__(self, arm: str, run: Any, member: str, data: Path, device: Any) -> None:
        self.measured = import_file(HERE / "measured.py")  # imports torch
        self.run, self.member, self.device = run, member, device
        self.who = {"arm": arm, "seed": run.seed(member)}
        tokens = run.batches(member, data, device).evaluation["train"][0]
        self.pairs = self.measured.ablations.Pairs.of(tokens, run.info["d_vocab"] - 1)

    def circuit(self, state: dict) -> Any:
        """The circuit at a checkpoint, out of the stacked weights of the run."""
        own = {n: t[self.run.index(self.member)] for n, t in state.items()}
        return self.measured.circuit.run(own, self.run.spec.architecture.n_heads, self.device)


def medians(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The last of several frames of the same rows, every measured number the median of theirs."""
    out = frames[-1].copy()
    for name in out.select_dtypes("float"):
        out[name] = np.median([frame[name] for frame in frames], axis=0)
    return out


def measure(models: list[Model], options: Options, told: Any) -> dict[str, pd.DataFrame]:
    """Table -> frame, of the models of one run; `circle` is of the first model."""
    run, measured = models[0].run, models[0].measured
    rows: dict[str, list] = {t: [] for t in TABLES}
    end = [run.stacked(int(step)) for step in phases.ending(np.array(run.steps))]
    for m in models:
        circuits = [m.circuit(state) for state in end]
        m.key = measured.key_frequencies(circuits[-1], m.pairs, options.key_ratio)
        found = {
            "frequencies": medians([measured.frequencies(c, m.pairs, m.key) for c in circuits]),
            "neurons": measured.neurons(circuits[-1]).assign(step=run.steps[-1]),
            "edits": medians([measured.edits(c, m.pairs, m.key) for c in circuits]),
        }
        for name, frame in found.items():
            rows[name].append(frame.assign(**m.who))
    for step in run.steps:
        state = run.stacked(step)
        for m in models:
            circuit = m.circuit(state)
            progress = measured.progress(circuit, m.pairs, m.key)
            rows["progress"].append(pd.DataFrame([{**m.who, "step": step, **progress}]))
            if step == run.steps[0]:
                frame = measured.neurons(circuit).assign(step=step, **m.who)
                rows["neurons"].append(frame)
            told(1)
    curves = pd.concat(rows["progress"])
    ends = {}
    for m in models:
        own = curves[curves["seed"] == m.who["seed"]]
        columns = ("step", "test_loss", "excluded_train", "test_accuracy")
        ends[m.member] = phases.borders(*(own[c].to_numpy() for c in columns))
        rows["phases"].append(pd.DataFrame([m.who | ends[m.member]]))
    until = ends[models[0].member]["cleaned"]
    for step in phases.frames(np.array(run.steps), until, options.frames):
        state = run.stacked(int(step))
        for i, m in enumerate(models):
            circuit, at = m.circuit(state), m.who | {"step": int(step)}
            rows["spectrum"].append(measured.spectrum(circuit).assign(**at))
            if i == 0:
                rows["circle"].append(measured.circle(circuit, m.pairs, m.key).assign(**at))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in rows.items()}


def main() -> None:
    parser = cli.parser(
        "fourier",
        __doc__,
        runs="manifest.json of each training run*",
        names="its name*",
        data="the paper's data.py",
        **{t: f"{t}.parquet" for t in TABLES},
    )

    def work(job: cli.Job) -> None:
        from pipeline.weights import trained

        args, options, device = job.args, job.section("own.fourier", Options), job.device()
        runs = {n: trained.open_run(f) for n, f in zip(args.names, args.runs, strict=True)}
        total = sum(len(r.steps) * len(r.members) for r in runs.values())
        progress, done = cli.Progress("fourier", total, "checkpoints"), 0

        def told(n: int) -> None:
            nonlocal done
            done += n
            progress.at(done)

        frames: dict[str, list] = {t: [] for t in TABLES}
        for arm, run in runs.items():
            models = [Model(arm, run, m, Path(args.data), device) for m in run.members]
            for name, frame in measure(models, options, told).items():
                frames[name].append(frame)
        frames["circle"] = frames["circle"][:1]
        certificate = job.certificate(args.runs)
        for name, parts in frames.items():
            frame = pd.concat(parts, ignore_index=True)
            tables.write_table(getattr(args, name), frame, certificate)

    cli.run("fourier", parser.parse_args(), work)


if __name__ == "__main__":
    main()
