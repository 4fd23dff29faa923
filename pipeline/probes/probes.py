"""Stage `probes`: what can be read off activations, and whether the probe learned it. [torch]

Labels of tokens or documents (text/labels.py) are read off stored activations by probes:

    logistic            L-BFGS, all layers and tasks in one solve        (logistic.py)
    ridge, mean_difference, mass_mean     in closed form                 (closed.py)
    mlp                 one hidden layer                                 (mlp.py)

1. labels      how many rows, documents and word types each class has.
2. scores      accuracy on documents that were held out, for each hook, label, method and seed.
               Beside it the accuracy on the control task (Hewitt & Liang 2019; controls.py), the
               difference of the two, selectivity, and the online codelength of both (Voita & Titov
               2020; codelength.py).
3. Baselines that see no activations: the most frequent class, and the token ids alone. Arms without
   training, and the hook of the embeddings, are the others.
4. directions  the linear probes of the first seed, for the stage steering.

A seed draws which documents are held out, the control labels and the first weights of the MLP.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.job import cli
from pipeline.probes import measured, rows
from pipeline.probes.directions import Directions
from pipeline.spec.measured import ProbesSpec
from pipeline.store import tables
from pipeline.store.shards import Rows
from pipeline.text import labels as text_labels
from pipeline.text.labels import Corpus, Labels
from pipeline.text.tokens import Texts, load_tokenizer

SCORES = (
    "hook label per split probe seed n_train n_test n_classes n_types accuracy balanced_accuracy "
    "loss train_loss r2 control_accuracy control_r2 selectivity codelength control_codelength "
    "compression control_compression"
).split()


def label_rows(bench: rows.Bench, found: Labels) -> list[dict[str, Any]]:
    """Rows of the table labels: what each class has."""
    values, out = bench.labels(found), []
    for code, name in enumerate(found.classes):
        mine = values == code
        row = {"label": found.name, "per": bench.per, "class": name, "rows": int(mine.sum())}
        row |= {"documents": len(np.unique(bench.document[mine]))}
        out.append(row | {"types": len(np.unique(bench.token[mine]))})
    return out


def measure(
    benches: dict[str, rows.Bench],
    labels: dict[str, Labels],
    names: list[str],
    spec: ProbesSpec,
    device: torch.device,
) -> tuple[pd.DataFrame, Directions]:
    """The table scores, and the linear probes of the first seed.

    Args:
        benches: one for each `per`: token, document or last.
        names: hooks.
    """
    out, kept = [], Directions()
    total = len(names) * len(spec.splits) * len(spec.seeds) * len(benches)
    progress, done = cli.Progress("probes", total, "fits"), 0
    for per, bench in benches.items():
        mine = {n: found for n, found in labels.items() if found.per == per}
        draws = [
            measured.draw(bench, mine, spec, split, seed)
            for split in spec.splits
            for seed in spec.seeds
        ]
        out += [row for drawn in draws for row in measured.baselines(drawn)]
        widths = [Rows(bench.manifest, hook).d_model for hook in names]
        for group in measured.groups(names, len(bench), widths, device):
            X = torch.stack([bench.acts(hook, device) for hook in group])
            for drawn in draws:
                for row, weights in measured.measure(drawn, group, X, spec):
                    out.append(row)
                    first = drawn.seed == spec.seeds[0] and drawn.split == "document"
                    if first and weights is not None:
                        classes = mine[row["label"]].classes
                        kept.add(row["label"], row["probe"], row["hook"], classes, weights)
                done += len(group)
                progress.at(done)
    return pd.DataFrame(out).reindex(columns=SCORES), kept


def work(job: cli.Job) -> None:
    args, device = job.args, job.device()
    spec = job.section("probes", ProbesSpec)
    corpus = Corpus.read(args.corpus, args.documents)
    needs_text = any(not label.column and not label.file for label in spec.labels.values())
    texts = Texts(load_tokenizer(args.model)) if needs_text else None
    own = args.labels_py[0] if args.labels_py else None
    files = dict(zip(spec.label_files(), args.label_files, strict=True))
    labels = {
        name: text_labels.make(name, label, corpus, texts, own, files.get(label.file))
        for name, label in spec.labels.items()
    }
    names = spec.hooks or list(tables.read_json(args.activations)["hooks"])
    benches = {}
    with torch.no_grad():
        for per in dict.fromkeys(found.per for found in labels.values()):
            known = [found.known for found in labels.values() if found.per == per]
            benches[per] = rows.bench(args.activations, per, names, corpus, known, spec.n_rows)
        scores, kept = measure(benches, labels, names, spec, device)
    described = [row for found in labels.values() for row in label_rows(benches[found.per], found)]
    columns = ["label", "per", "class", "rows", "documents", "types"]
    inputs = [args.activations, args.corpus, args.documents, args.model, *args.label_files]
    made = job.certificate(inputs, seed=spec.seeds)
    tables.write_table(args.scores, scores, made)
    tables.write_table(args.labels, pd.DataFrame(described, columns=columns), made)
    kept.write(args.directions, made)


def main() -> None:
    parser = cli.parser(
        "probes",
        __doc__,
        activations="manifest.json of the activations",
        corpus="tokens.parquet",
        documents="documents.parquet",
        model="model.json, whose tokenizer cut the text",
        labels_py="the paper's labels.py, if it has one*",
        label_files="files with labels, in the order of spec*",
        scores="one row for each hook, label, method, split and seed",
        labels="one row for each class of a label",
        directions="linear probes, safetensors",
    )
    cli.run("probes", parser.parse_args(), work)
