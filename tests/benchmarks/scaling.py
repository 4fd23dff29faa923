"""Time and memory of each stage against tokens, latents, layers and papers; a figure of both.

    python tests/benchmarks/scaling.py                         ten minutes on two quiet cores
    python tests/benchmarks/scaling.py --axes tokens --steps 3
    python tests/benchmarks/scaling.py --figure scaling.png    or .svg; needs Chromium
    python tests/benchmarks/scaling.py --of scaling.json --figure scaling.png    nothing is measured
    python tests/benchmarks/scaling.py --of scaling.json graphs.json --figure scaling.png

ours     the exponent p of size^p, by least squares over the sizes but the smallest, of the seconds
         that a stage takes for its own work: what its log calls work less the imports in it
memory   the same of the peak of its process; a constant part, torch's, pulls it towards 0

All of the tokens, latents or layers have to be touched, so 1 is linear and the floor.
A size is 1, 2, 4 … times the smallest; what does not grow stays at the smallest but one. The text
is random words, the model a random Llama. Papers are the calls of growth.py, in processor seconds.
"""

import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from harness import ROOT, Row, arguments, environment, report
from workflow import DONE, IMPORT

from pipeline.store import tables

sys.path.insert(0, str(ROOT / "tests"))

PEAK = re.compile(r"peak ([\d.]+) GiB")
# The smallest size of each axis, and the stages whose work it can change.
AXES = {
    "papers": (20, ["snakemake"]),  # first: the system tells the peak of all processes so far
    "tokens": (32_768, ["corpus", "activations", "sae", "evaluation", "features"]),
    "latents": (256, ["sae", "evaluation", "features"]),
    "layers": (1, ["activations"]),
}
N_CTX, D_MODEL, K = 128, 64, 16


def model_of(folder: Path, n_layers: int) -> Path:
    """model.json of a random Llama."""
    import torch
    from conftest import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=D_MODEL, intermediate_size=4 * D_MODEL,
        num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=N_CTX, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    info = {"name": "random", "processing": "raw", "bos_id": 0, "n_ctx": N_CTX, "files": {}}
    tables.write_json(folder / "model.json", info, {"stage": "model"})
    return folder / "model.json"


def text_of(path: Path, n_bytes: int) -> Path:
    """So many bytes of documents of random words."""
    draw, size, lines = random.Random(0), 0, []
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(2000)]
    while size < n_bytes:
        text = " ".join(draw.choices(words, k=200))
        lines.append(json.dumps({"text": text}))
        size += len(text)
    path.write_text("\n".join(lines) + "\n")
    return path


def cost(stage: str, spec: dict, **paths: object) -> tuple[float, float]:
    """(seconds of its own work, peak GiB) of a stage."""
    command = [sys.executable, "-m", "pipeline", stage, "--spec", json.dumps(spec)]
    command += [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    env = environment(PYTHONPROFILEIMPORTTIME="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    work, start = map(float, DONE.search(done.stderr).groups())
    imports = sum(map(int, IMPORT.findall(done.stderr))) / 1e6
    return work - max(imports - start, 0), float(PEAK.search(done.stderr)[1])


def stages(at: Path, wanted: list[str], text: Path, size: dict[str, int], threads: int) -> dict:
    """Stage -> cost, of the stages up to the last that is wanted."""
    at.mkdir()
    hook = f"blocks.{size['layers'] - 1}.hook_resid_post"
    n_rows = size["tokens"] // N_CTX * (N_CTX - 1)
    dictionary = {"architecture": "topk", "d_sae": size["latents"], "k": K, "hook": hook}
    model_json = model_of(at, size["layers"])
    common = {"device": "cpu", "threads": threads}
    corpus = {"source": "local", "path": str(text), "n_ctx": N_CTX, "n_tokens": size["tokens"]}
    corpus |= {"n_eval_tokens": size["tokens"] // 8}
    specs = {
        "corpus": {"corpus": corpus},
        "activations": {"activations": {"hooks": [hook]}},
        "sae": {
            "sae": {
                "hook": hook,
                "training": {"n_rows": 4 * n_rows, "batch_size": 2048, "checkpoint_seconds": 1e9},
                "dictionaries": {"a": dictionary},
            }
        },
        "evaluation": {"evaluation": {}},
        "features": {"features": {"saes": ["a"]}, "latents": "a"},
    }
    made = {"model": model_json, "corpus": at / "tokens.parquet"}
    made_acts = made | {"activations": at / "activations/manifest.json"}
    paths = {
        "corpus": {"tokenizer": model_json, "out": at / "tokens.parquet",
                   "documents": at / "documents.parquet"},
        "activations": made | {"out": at / "activations/manifest.json",
                               "shards": at / "activations/shards"},
        "sae": {"activations": at / "activations/manifest.json", "out": at / "sae/manifest.json",
                "saes": at / "sae/saes", "history": at / "sae/history.parquet"},
        "evaluation": made_acts | {"saes": at / "sae/manifest.json", "out": at / "ev.parquet",
                                   "history": at / "evh.parquet"},
        "features": made_acts | {"documents": at / "documents.parquet",
                                 "sae": at / "sae/manifest.json", "out": at / "features.parquet"},
    }  # fmt: skip
    last = max(list(specs).index(stage) for stage in wanted)
    costs = {s: cost(s, specs[s], **paths[s], **common) for s in list(specs)[: last + 1]}
    return {stage: costs[stage] for stage in wanted}


def papers(at: Path, n: int) -> dict:
    """What a call of snakemake with nothing to do takes with n papers."""
    import resource

    from growth import project, snakemake

    seconds = snakemake(project(at, n))
    return {"snakemake": (seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)}


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(value) over log(size), without the smallest size where three are left."""
    import numpy as np

    few = slice(1 if len(sizes) > 3 else 0, None)
    return float(np.polyfit(np.log(sizes[few]), np.log(values[few]), 1)[0])


def kept(path: Path) -> dict:
    """What `--out` kept: axis -> stage -> sizes, (seconds, GiB) of each."""
    found: dict[str, dict] = defaultdict(dict)
    runs = [
        (row["case"].split(" against "), row["runs"])
        for row in json.loads(path.read_text())["rows"]
        if " against " in row["case"]
    ]
    for ((stage, axis), time), (_, memory) in zip(runs[::2], runs[1::2], strict=True):
        found[axis][stage] = time["sizes"], list(zip(time["seconds"], memory["gib"], strict=True))
    return found


def sizes_of(stages: dict) -> list[int]:
    """The sizes of an axis."""
    return next(iter(stages.values()))[0]


def shortened(n: int) -> str:
    """A number as a tick says it."""
    return f"{n / 1000:.0f}k" if n >= 10_000 else str(n)


def drawn(found: dict, path: Path) -> None:
    """The figure: seconds above, memory below, an axis a column."""
    from plotly.subplots import make_subplots

    from pipeline.figures import drawing, theme

    axes = list(found)
    figure = make_subplots(
        rows=2, cols=len(axes), shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.05,
        vertical_spacing=0.08,
    )  # fmt: skip
    names = sorted({stage for stages in found.values() for stage in stages})
    shown, ends = set(), defaultdict(list)
    for column, axis in enumerate(axes, 1):
        for stage, (sizes, costs) in found[axis].items():
            for row in (1, 2):
                values = [c[row - 1] for c in costs]
                power, colour = exponent(sizes, values), theme.colour(names.index(stage))
                figure.add_scatter(
                    x=sizes, y=values, name=stage, legendgroup=stage,
                    showlegend=row == 1 and stage not in shown,
                    line={"color": colour}, mode="lines+markers",
                    hovertemplate=f"{stage}, exponent {power:.2f}<br>%{{x}}: %{{y}}<extra></extra>",
                    row=row, col=column,
                )  # fmt: skip
                ends[row, column].append((values[-1], f"{power:.2f}", colour))
            shown.add(stage)
        texts = [shortened(n) if i % 2 == 0 else "" for i, n in enumerate(sizes)]
        ticks = {"type": "log", "tickvals": sizes, "ticktext": texts, "tickangle": 0}
        ticks["range"] = [math.log10(0.8 * sizes[0]), math.log10(2.2 * sizes[-1])]
        figure.update_xaxes(ticks, col=column)
        figure.update_xaxes(title=axis, row=2, col=column)
    for (row, column), labels in ends.items():
        height = -math.inf
        for value, text, colour in sorted(labels):  # apart by a line's height
            height = max(math.log10(value), height + (0.18 if row == 1 else 0.11))
            figure.add_annotation(
                x=math.log10(sizes_of(found[axes[column - 1]])[-1]), y=height, text=text,
                font={"color": colour}, showarrow=False, xanchor="left", xshift=8,
                row=row, col=column,
            )  # fmt: skip
    for row, title, ticks in (
        (1, "time (s)", [0.2, 0.5, 1, 2, 5, 10]),
        (2, "peak memory (GiB)", [0.1, 0.2, 0.5, 1]),
    ):
        every = [c[row - 1] for s in found.values() for _, costs in s.values() for c in costs]
        figure.update_yaxes(
            type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], row=row,
            range=[math.log10(0.7 * min(every)), math.log10(1.6 * max(every))],
        )  # fmt: skip
        figure.update_yaxes(title=title, row=row, col=1)
    title = "Time and memory of each stage as the work grows"
    caption = (
        "Own work of a stage, its imports left out; memory is the whole process's. Beside each "
        "line the exponent p of size^p, without the smallest size: 1 is linear."
    )
    page = path.with_suffix(".html")
    page.write_text(drawing.page("scaling", title, caption, drawing.plain(figure), "figures.js"))
    draw = ROOT / "pipeline/report/templates/draw.js"
    for command in (
        ["pipeline", "figures_js", "--draw", draw, "--out", page.parent / "figures.js"],
        ["pipeline", "slide", page, "--out", path],
    ):
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=4, help="sizes, each twice the one before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="a .png or .svg; its page goes beside it")
    parser.add_argument("--of", type=Path, nargs="+", help="what --out kept; nothing is measured")
    args = parser.parse_args()
    if args.of:
        found = {axis: of for path in args.of for axis, of in kept(path).items()}
        return drawn(found, args.figure.resolve())
    base = {axis: smallest * 2 for axis, (smallest, _) in AXES.items()}
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        largest = AXES["tokens"][0] * 2**args.steps
        text = text_of(Path(folder) / "text.jsonl", 2 * largest)
        for axis in sorted(args.axes, key=list(AXES).index):
            smallest, wanted = AXES[axis]
            sizes = [smallest * 2**i for i in range(args.steps)]
            costs = []
            for n in sizes:
                at = Path(folder) / f"{axis}_{n}"
                if axis == "papers":
                    costs.append(papers(at, n))
                else:
                    costs.append(stages(at, wanted, text, base | {axis: n}, args.threads))
                print(f"{n} {axis}: {costs[-1]}", flush=True)
            found[axis] = {stage: (sizes, [c[stage] for c in costs]) for stage in wanted}
    rows = []
    for axis, of_stage in found.items():
        for stage, (sizes, costs) in of_stage.items():
            seconds, gib = zip(*costs, strict=True)
            rows.append(
                Row(f"{stage} against {axis}", exponent(sizes, list(seconds)), "exponent of time",
                    target="ours <= 1.1", higher_is_better=False,
                    runs={"sizes": sizes, "seconds": list(seconds)})
            )  # fmt: skip
            rows.append(
                Row(f"{stage} against {axis}", exponent(sizes, list(gib)), "exponent of memory",
                    target="ours <= 1.1", higher_is_better=False,
                    runs={"sizes": sizes, "gib": list(gib)})
            )  # fmt: skip
    report("scaling", rows, args.out)
    if args.figure:
        drawn(found, args.figure.resolve())


if __name__ == "__main__":
    main()
