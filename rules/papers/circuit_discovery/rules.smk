# Small transformers trained to have a known circuit: a program's, and no other.
rule circuit_discovery_siit:
    input:
        stage=own_file_of("siit.py"),
    output:
        checkpoint=directory("results/{scale}/{paper}/siit/checkpoint"),
        history="results/{scale}/{paper}/siit/history.parquet",
        checks="results/{scale}/{paper}/siit/checks.parquet",
    log:
        "results/logs/{scale}/{paper}/siit.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/siit.tsv"
    wildcard_constraints:
        paper="circuit_discovery",
    threads: 1  # more only wait for each other on tensors so small
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.siit"),
        code=code_of("siit", "siit.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input.stage:q}"
        " --checkpoint {output.checkpoint:q} --history {output.history:q}"
        " --checks {output.checks:q} --device {DEVICE} --threads {threads} 2> {log:q}"


# Circuits of the compiled models, by every method, in one job: they are small.
rule circuit_discovery_discovery:
    input:
        stage=own_file_of("discovery.py"),
        sequences=own_file_of("sequences.py"),
        truth=own_file_of("truth.py"),
        models=models_of("model.json"),
        checkpoints=models_of("checkpoint"),
        siit="results/{scale}/{paper}/siit/checkpoint",
    output:
        edges="results/{scale}/{paper}/discovery/edges.parquet",
        truth="results/{scale}/{paper}/discovery/truth.parquet",
        sets="results/{scale}/{paper}/discovery/sets.parquet",
        areas="results/{scale}/{paper}/discovery/areas.parquet",
    log:
        "results/logs/{scale}/{paper}/discovery.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/discovery.tsv"
    wildcard_constraints:
        paper="circuit_discovery",
    threads: 1  # more only wait for each other on tensors so small
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.discovery", "arms"),
        code=code_of("discovery", "discovery.py", "sequences.py", "truth.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --models {input.models:q}"
        " --siit {input.siit:q}"
        " --code {input.stage:q} {input.sequences:q} {input.truth:q} --edges {output.edges:q}"
        " --truth {output.truth:q} --sets {output.sets:q} --areas {output.areas:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
