"""Stage `circuits`: which heads, MLPs and paths tell two prompts apart, by several methods. [torch]

For pairs of prompts out of the paper's prompts.py, and for each method that paper.yaml names, in
the order of methods.METHODS:

    activation_patching     effect of replacing a part, exact              (patching.py)
    attribution_patching    its estimate by one gradient                   (eap.py)
    atp_star                AtP* (QK fix and GradDrop): the size of an effect, without its sign
    direct_logit            what a part writes towards the answer          (direct_logit.py)
    path_patching           effect of a head on the logits past all other heads, exact
    eap, eap_ig             estimated effect of an edge                    (eap.py)
    acdc                    edges cut one by one, at several thresholds    (acdc.py)
    latent_attribution, latent_ig    estimated effect of a dictionary's latent   (latents/sites.py)

1. nodes      scores of heads, MLPs, and the stream at named positions.
2. edges      scores of edges, with the exact effect of those of largest score, and of some that
              are drawn at random: only these tell what a method misses.
3. methods    how right each method is, in one row: completeness over a cut of the graph, and
              agreement with exact patching.

Every seed is a draw of prompts of its own, and has its own rows. ACDC cuts edges in its canonical
order at the first seed, and in another that is drawn at each of the others.
"""

from typing import Any

import pandas as pd
import torch

from pipeline.circuits.methods import measure
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.latents import sites as latents
from pipeline.models import loader
from pipeline.models.pairs import Pairs, Task
from pipeline.models.taps import OF_EDGES, OF_NODES
from pipeline.spec.measured import CircuitsSpec
from pipeline.store import tables


def pairs_of(file: str, spec: CircuitsSpec, loaded: loader.Loaded, seed: int, device: Any) -> Pairs:
    """The pairs that the paper's prompts.py makes for this model's tokenizer and a seed."""
    function = getattr(import_file(file), spec.prompts, None)
    if function is None:
        raise RetraceError(
            f"circuits.prompts: {file} has no function '{spec.prompts}'; write it, or name another"
        )
    prompts = function(spec.options, loaded.tokenizer, spec.n_prompts, seed)
    return Pairs.of(prompts, loaded.bos_id, device, spec.direction == "denoising")


def slopes_of(methods: list[str]) -> tuple[str, ...]:
    """By what the methods take gradients of m on the base run."""
    if {"eap", "atp_star"}.intersection(methods):
        return OF_NODES + OF_EDGES
    return OF_NODES if "attribution_patching" in methods else ()


def work(job: cli.Job) -> None:
    args, device = job.args, job.device()
    spec = job.section("circuits", CircuitsSpec)
    loaded = loader.load(args.model, device)
    with torch.no_grad():
        units = latents.load(args.saes, spec.saes, args.activations[0], device) if spec.saes else {}
        found = []
        for seed in spec.seeds:
            pairs = pairs_of(args.prompts, spec, loaded, seed, device)
            task = Task.of(loaded.hf, pairs, slopes_of(spec.methods))
            found.append(measure(task, spec, seed, units))
    inputs = [args.model, *args.activations, *args.saes]
    certificate = job.certificate(inputs, seed=spec.seeds)
    for name in found[0]:
        frame = pd.concat([frames[name] for frames in found], ignore_index=True)
        tables.write_table(getattr(args, name), frame, certificate)


def main() -> None:
    parser = cli.parser(
        "circuits",
        __doc__,
        model="model.json",
        prompts="the paper's prompts.py",
        activations="manifest.json of the activations that dictionaries were trained on, if any*",
        saes="manifests of the SAE jobs, if any*",
        nodes="scores of nodes",
        edges="scores of edges",
        methods="how right each method is",
    )
    cli.run("circuits", parser.parse_args(), work)
