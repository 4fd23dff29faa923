"""A whole results/<scale>/<paper>/ folder out of made-up tables, through the real stages.

The tables have the columns that the stages write and numbers drawn from formulas, so figures,
reports and pages can be built, opened and tested in seconds, without a model.
"""

import contextlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from pipeline.claims import verdicts
from pipeline.claims.scalars import parts
from pipeline.job import commands
from pipeline.papers import papers
from pipeline.papers.rule_params import Params
from pipeline.papers.workflow import Inputs
from pipeline.spec.paper import PaperSpec
from pipeline.store import provenance, tables

NASTY = "<script>window.hacked=1</script><img src=x onerror=window.hacked=2>"
CARD = Path(__file__).parent / "made_up"  # paper.yaml and figures.py


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, as snakemake's jobs do: certificates name files relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def call(stage: str, spec: dict, **paths) -> None:
    """The main() of a stage, in this process, on one thread; SystemExit where it fails."""
    module = importlib.import_module(commands.MODULES[stage])
    argv = [stage, "--spec", json.dumps(spec)]
    for option, value in ({"threads": 1} | paths).items():
        argv += [f"--{option.replace('_', '-')}"]
        argv += [str(v) for v in (value if isinstance(value, list) else [value])]
    before, sys.argv = sys.argv, argv
    try:
        module.main()
    finally:
        sys.argv = before


def evaluation(spec: PaperSpec, arm: str, rng: np.random.Generator) -> pd.DataFrame:
    """An evaluation table: wider and denser is better, L1 and null arms are worse."""
    rows = []
    for name, sae in spec.saes_of(arm).items():
        l0 = sae.k or 90 / sae.l1_coefficient
        ev = 0.4 + 0.07 * np.log2(l0) + 0.02 * np.log2(sae.d_sae / 1152) + rng.normal(0, 0.002)
        ev -= 0.12 * (sae.architecture == "standard") + 0.2 * sae.frozen_decoder
        ev -= 0.1 * (arm == "random")
        loss, zero = 3.2, 9.0
        spliced = loss + 2.5 * (1 - ev) ** 1.5
        fields = "architecture k d_sae l1_coefficient aux_loss_coefficient frozen_decoder seed hook"
        rows.append(
            {"sae": name, **{f: getattr(sae, f) for f in fields.split()}}
            | {
                "explained_variance": ev,
                "explained_variance_no_outliers": ev - 0.2,
                "l0": float(l0),
                "mse": 100 * (1 - ev),
                "dead_share": 0.06 if sae.aux_loss_coefficient else 0.41,
                "silent_share": 0.2,
                "loss_model": loss,
                "loss_spliced": spliced,
                "loss_zero": zero,
                "loss_mean": 8.0,
                "delta_loss": spliced - loss,
                "loss_recovered_zero": (zero - spliced) / (zero - loss),
                "loss_recovered_mean": (8.0 - spliced) / (8.0 - loss),
                "splice_check": 1e-7,
            }
        )
    return pd.DataFrame(rows)


def history(table: pd.DataFrame, steps: int = 200) -> pd.DataFrame:
    """Curves that rise to each dictionary's explained variance."""
    frames = []
    for row in table.to_dict("records"):
        step = np.arange(1, steps + 1)
        ev = row["explained_variance"] * (1 - np.exp(-step / 30))
        curve = {"sae": row["sae"], "step": step, "rows": step * 2048, "lr": 1e-3}
        curve |= {"mse": 100 * (1 - ev), "explained_variance": ev, "loss": 1.1 * (1 - ev)}
        curve |= {"l0": row["l0"], "dead_share": row["dead_share"] * step / steps}
        frames.append(pd.DataFrame(curve))
    return pd.concat(frames, ignore_index=True)


WORDS = (
    " the of and in was a to The is for as it by Paris king river album species song born"
    " football station city village plant American century film company"
).split()


def features(n: int, rng: np.random.Generator, n_examples: int = 8) -> pd.DataFrame:
    """A features table: latent 0 peaks on a token that is markup; of ten latents the last never
    fires, and the one before it in two documents only."""
    words = [f" {w}" for w in WORDS] + ["\n", "\t", "�", "</script>", "\u2028", ",", ".", "é"]
    topics = ["Music", "Sports", "Geography", "History", "Biology"]
    rows = []
    for i in range(n):
        dead = i % 10 == 9
        largest = 0.0 if dead else float(rng.lognormal(1, 0.6))
        examples = []
        for j in range(0 if dead else 2 if i % 10 == 8 else n_examples):
            acts = np.where(rng.random(23) < 0.15, rng.random(23) * largest, 0)
            tokens = [words[t] for t in rng.integers(0, len(words), 23)]
            acts[16], tokens[16] = largest * (1 - 0.05 * j), NASTY if i == 0 else words[i % 20]
            examples.append(
                {"tokens": tokens, "acts": acts, "peak": 16, "document": j, "title": f"Article {j}"}
            )
        raised = [words[(i + t) % len(words)] for t in range(8)]
        rows.append(
            {
                "latent": i,
                "density": 0.0 if dead else float(10 ** rng.uniform(-5, -0.5)),
                "dead": dead,
                "max_act": largest,
                "mean_act": largest / 3,
                "histogram": [0] * 30 if dead else (100 * np.exp(-np.arange(30) / 6)).astype(int),
                "examples": examples,
                "top_label": "" if dead else topics[i % 5],
                "label_share": 0.0 if dead else float(rng.random()),
                "token_entropy": 0.0 if dead else float(rng.uniform(0, 8)),
                "token_share": 0.0 if dead else float(rng.random()),
                "top_logits": [{"token": t, "value": 1.5} for t in raised],
                "bottom_logits": [{"token": t, "value": -1.5} for t in reversed(raised)],
            }
        )
    return pd.DataFrame(rows)


def attributions(spec: PaperSpec, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of prompts and of latents whose estimates scatter round their exact effects."""
    prompts, latents = [], []
    for name, prompt in spec.attribution.prompts.items():
        exact = rng.normal(0, 0.3, 60)
        estimate = exact + rng.normal(0, 0.05, 60)
        exact[40:] = np.nan
        words = prompt.prompt.split()
        position = rng.integers(1, len(words), 60)
        latents.append(
            pd.DataFrame(
                {
                    "prompt": name,
                    "latent": rng.integers(0, 4608, 60),
                    "position": position,
                    "token": [f" {words[p]}" if p > 1 else NASTY for p in position],
                    "activation": rng.random(60),
                    "attribution": estimate,
                    "exact": exact,
                }
            )
        )
        card = {"prompt": name, "text": prompt.prompt, "answer": prompt.answer, "foil": prompt.foil}
        parts = {"sum_latents": estimate.sum(), "error_term": 0.4}
        change = sum(parts.values()) * 0.9
        made = {"logit_diff": change + 0.5, "baseline_logit_diff": 0.5, **parts}
        made |= {"completeness_gap": 0.11, "ablation_correlation": 0.97, "sign_agreement": 0.95}
        made |= {"ablation_spearman": 0.9, "ablation_correlation_without_largest": 0.95}
        integrated = [k for k in made if not k.endswith("logit_diff")]
        made |= {f"{k}_ig": 0.9 * made[k] for k in integrated}
        prompts.append(card | made)
    return pd.DataFrame(prompts), pd.concat(latents, ignore_index=True)


def paper(
    root: Path, name: str = "made_up", n_latents: int = 60, scale: str = "laptop"
) -> papers.Paper:
    """Write a paper folder, its tables, benchmarks, figures, claims, report and feature page.

    Args:
        root: becomes the working directory of a run: rules/papers/ and results/ lie in it.
    """
    folder = root / "rules/papers" / name
    folder.mkdir(parents=True)
    card = (CARD / "paper.yaml").read_text("utf-8").replace("NASTY", NASTY)
    (folder / "paper.yaml").write_text(card, "utf-8")
    shutil.copy(CARD / "figures.py", folder)
    with inside(root):
        made = papers.load(Path("rules/papers") / name, scale)
        write_tables(made, n_latents)
        write_benchmarks(made)
        run_stages(made)
    return made


def write_tables(made: papers.Paper, n_latents: int) -> None:
    rng = np.random.default_rng(0)
    corpus = Path("results/store/corpus/made_up-0123456789ab/documents.parquet")
    certificate = provenance.certificate("corpus", {}, "0" * 64, [], licence="CC BY-SA 4.0")
    tables.write_table(corpus, pd.DataFrame({"document": [0]}), certificate)
    frames = {}
    for arm in made.spec.arm_names():
        frames[f"evaluation/{arm}"] = evaluation(made.spec, arm, rng)
        frames[f"evaluation/{arm}_history"] = history(frames[f"evaluation/{arm}"])
    frames["features/topk_k32_d4608"] = features(n_latents, rng)
    prompts, latents = attributions(made.spec, rng)
    frames |= {"attribution/prompts": prompts, "attribution/latents": latents}
    for name, path in made.tables().items():
        stage = name.split("/")[0]
        certificate = provenance.certificate(
            stage, {}, "0" * 64, [corpus], "cpu, 2 threads", seed=0
        )
        tables.write_table(path, frames[name], certificate)


def write_benchmarks(made: papers.Paper) -> None:
    """Benchmarks as snakemake writes them: of the paper, of a store job it rests on, of another."""
    head = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    files = {
        f"{made.scale}/{made.name}/evaluation_trained.tsv": "125.20\t0:02:05\t1804.25",
        f"{made.scale}/{made.name}/attribution.tsv": "8.10\t0:00:08\tNA",
        "corpus/made_up-0123456789ab.tsv": "61.00\t0:01:01\t950.00",
        "sae/another_paper-ffffffffffff.tsv": "999.00\t0:16:39\t1.00",
    }
    for file, start in files.items():
        path = Path("results/benchmarks") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{head}{start}\t0\t0\t0\t0\t0\t100\t42.00\n")


def run_stages(made: papers.Paper) -> None:
    """metrics, claims, figures, feature page, report and index, as the rules call them."""
    base = Path("results") / made.scale / made.name
    paths = made.tables()
    spec = {"tables": list(paths), "parts": parts(made)}
    call("metrics", spec, tables=list(paths.values()), out=base / "metrics.json")
    call(
        "claims", verdicts.for_the_job(made), metrics=base / "metrics.json", out=base / "claims.csv"
    )
    script = base.parent / "figures.js"
    figures_js(script)
    for name in made.spec.figures:
        draw(made, name)
    for sae in made.spec.features.saes:
        page = base / f"features/{sae}.html"
        table = paths[f"features/{sae}"]
        call("feature_page", {"title": made.spec.title}, features=table, out=page)
    report(made)
    index(made)


def index(made: papers.Paper) -> None:
    """The index and the catalogue, as their rule calls them."""
    base = Path("results") / made.scale
    fields = {f: getattr(made.spec, f) for f in ("title", "authors", "year", "url", "summary")}
    card = fields | {"headline": next(iter(made.spec.figures))}
    listed = {"title": made.spec.title, "year": made.spec.year, "folder": str(made.folder)}
    kinds = {f.kind: str(base / made.name / f"figures/{n}.html")
             for n, f in made.spec.figures.items() if f.kind}  # fmt: skip
    spec = {"scale": made.scale, "papers": {made.name: card}}
    spec |= {"listed": {made.name: listed}, "kinds": kinds}
    pages = {"out": base / "index.html", "catalogue": base / "catalogue.html"}
    call("index", spec, claims=base / made.name / "claims.csv", **pages)


def figures_js(script: Path) -> None:
    """What the rule figures_js runs."""
    from pipeline.report import figures_js, pages

    draw = [str(pages.TEMPLATES / name) for name in ("walk.js", "play.js", "draw.js")]
    before, sys.argv = sys.argv, ["figures_js", "--draw", *draw, "--out", str(script)]
    try:
        figures_js.main()
    finally:
        sys.argv = before


def draw(made: papers.Paper, name: str) -> Path:
    """One figure, as its rule calls it; returns its page."""
    base = Path("results") / made.scale / made.name
    spec = made.spec.figures[name].model_dump(mode="json")
    paths = made.tables() | {
        "metrics": str(base / "metrics.json"),
        "claims": str(base / "claims.csv"),
    }
    own = [str(made.folder / "figures.py")]
    call(
        "figures",
        {"name": name, "figure": spec, "scale": made.scale, "paper": made.spec.title},
        tables=[paths[t] for t in made.spec.figures[name].tables],
        own=own,
        code=own,
        script=base.parent / "figures.js",
        out=base / f"figures/{name}.html",
        csv=base / f"figures/{name}.csv",
    )
    return base / f"figures/{name}.html"


def report(made: papers.Paper, benchmarks: str = "results/benchmarks") -> Path:
    """The report, as its rule calls it."""
    base = Path("results") / made.scale / made.name
    spec = Params(Inputs(SimpleNamespace(paper=lambda *_: made), Path()), {}).report_spec(
        SimpleNamespace(paper=made.name, scale=made.scale)
    )
    call(
        "report",
        json.loads(spec),
        figures=[base / f"figures/{f}.html" for f in made.spec.figures],
        pages=[base / f"features/{s}.html" for s in made.spec.features.saes],
        claims=base / "claims.csv",
        metrics=base / "metrics.json",
        tables=list(made.tables().values()),
        yaml=made.folder / "paper.yaml",
        benchmarks=benchmarks,
        out=base / "report.html",
        costs=base / "costs.html",
    )
    return base / "report.html"
