"""Retrace: model -> activations -> sparse autoencoders -> attribution -> figures -> verdicts."""

from snakemake.utils import min_version

min_version("9.0")

if workflow.included_stack[-1].path == "Snakefile":  # in a git reference; it has no folder to join
    workflow.included_stack[-1].path = "./Snakefile"


configfile: f"{workflow.current_basedir}/config.yaml"


include: "rules/common.smk"
include: "rules/tokenizer.smk"
include: "rules/corpus.smk"
include: "rules/training.smk"
include: "rules/model.smk"
include: "rules/activations.smk"
include: "rules/sae.smk"
include: "rules/sae_import.smk"
include: "rules/sae_crosscoder.smk"
include: "rules/sae_transcoders.smk"
include: "rules/evaluation.smk"
include: "rules/benchmarks.smk"
include: "rules/absorption.smk"
include: "rules/features.smk"
include: "rules/attribution.smk"
include: "rules/circuits.smk"
include: "rules/graphs.smk"
include: "rules/probes.smk"
include: "rules/steering.smk"
include: "rules/metrics.smk"
include: "rules/claims.smk"
include: "rules/figures.smk"
include: "rules/report.smk"
include: "rules/release.smk"
include: "rules/exports.smk"
include: "rules/own.smk"


for PAPER, smk in INPUTS.rules_files():  # a rules.smk takes the name of its folder from PAPER

    include: smk


onsuccess:
    print_claims()


onerror:  # what failed is told last of all, by pipeline/claims/terminal.py
    if RUN.config.strict:
        print_claims()


rule all:
    default_target: True
    input:
        INPUTS.targets(),
        products_of(*RUN.config.papers),


for name in RUN.available:  # `snakemake -c2 grokking`

    rule:
        name:
            target(name)
        input:
            products_of(name),
