"""Sparse probing of every dictionary of an arm: how well few latents tell a label. [torch]

SAEBench's evaluation (Karvonen et al. 2025, 2503.09532) on the documents of the corpus and their
labels. Documents of the training split fit the probes, held-out ones judge them.

1. Rows and latents are averaged over the first tokens of each document (labelled.py).
2. Probes on 1, 2 and 5 latents are compared with probes on as many dimensions of the stream, and
   with one on the whole stream (probes.py).
3. Where section benchmarks names `tpp`, latents of each label are ablated, and what its own probe
   loses is set against what the others lose (perturbation.py). Transcoders and encoders alone have
   no decoder into the rows that they read, and are left out.
4. All of it is done for several seeds, which draw the texts of other labels: their spread says
   which differences between dictionaries are more than the draw.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.job import cli
from pipeline.latents.stored import decodes, load_saes
from pipeline.saebench import labelled, perturbation, probes
from pipeline.spec.paper import BenchmarksSpec
from pipeline.store import tables


def split_by(found: Tensor, picked: labelled.Chosen) -> dict[str, Tensor]:
    """Label -> its documents' means, on the CPU."""
    return {name: found[places].cpu() for name, places in picked.of_label.items()}


def of_job(job: cli.Job, manifest: str, documents: Any) -> list[dict[str, Any]]:
    """The rows of the dictionaries of one SAE job."""
    section, device = job.section("benchmarks", BenchmarksSpec), job.device()
    made = tables.read_json(manifest)
    hook = made["hook"]
    given, splits = job.args.activations, ("train", "eval")
    there = [labelled.stored(given, hook, split) for split in splits]
    names = [labelled.by_label(documents, found) for found in there]
    most = (section.n_train, section.n_test)
    picked = labelled.chosen(
        *names, section.n_labels, most, section.min_documents, job.args.documents
    )
    saes = load_saes(manifest, device, alone=True)
    tokens = section.n_tokens
    found = [
        labelled.means(saes, given, hook, split, some, tokens, device)
        for split, some in zip(splits, picked, strict=True)
    ]
    sizes = {"n_train": len(picked[0].of_label[picked[0].labels[0]]),
             "n_test": len(picked[1].of_label[picked[1].labels[0]])}  # fmt: skip
    cli.log.info("%s: labels %s, %s", manifest, ", ".join(picked[0].labels), sizes)

    def splits_of(name: str) -> list[dict[str, Tensor]]:
        return [split_by(part[name], some) for part, some in zip(found, picked, strict=True)]

    def probed(name: str, ks: list[int]) -> list[dict[str, Any]]:
        train, test = splits_of(name)
        return [row | sizes for row in probes.rows(train, test, ks, section.seeds)]

    raw = [{"of": "stream"} | row for row in probed(labelled.RAW, [*section.ks, probes.ALL])]
    out = []
    for name in saes:
        latents = [{"of": "latents"} | row for row in probed(name, section.ks)]
        out += [{"sae": name} | row for row in latents + raw]
        if section.tpp and decodes(made["saes"][name]) and not made.get("output_hook"):
            train, test = zip(splits_of(labelled.RAW), splits_of(name), strict=True)
            lost = perturbation.rows(
                train, test, saes[name].W_dec.cpu(), section.tpp, section.seeds
            )
            out += [{"sae": name, "of": "tpp"} | row | sizes for row in lost]
        cli.log.info("%s: probed", name)
    return out


def work(job: cli.Job) -> None:
    import pandas as pd

    args = job.args
    torch.set_num_threads(args.threads)
    documents = tables.read_table(args.documents, ["document", "label"])
    found = [row for manifest in args.saes for row in of_job(job, manifest, documents)]
    made = job.certificate([args.documents, args.activations, *args.saes])
    tables.write_table(args.out, pd.DataFrame(found), made)


def main() -> None:
    parser = cli.parser(
        "benchmarks",
        __doc__,
        documents="documents.parquet",
        activations="manifest.json of the activations",
        saes="manifests of the SAE jobs*",
        out="one row per dictionary, k, seed and label",
    )
    cli.run("benchmarks", parser.parse_args(), work)
