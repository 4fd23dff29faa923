# Matched decoder directions, of all arms in one job; no GPU, so that it runs beside one that has it.
rule sae_architectures_overlap:
    input:
        stage=own_file_of("overlap.py"),
        saes=arms_of("sae", "manifest.json"),
        folders=arms_of("sae", "saes"),
    output:
        pairs="results/{scale}/{paper}/overlap/pairs.parquet",
        cosines="results/{scale}/{paper}/overlap/cosines.parquet",
    log:
        "results/logs/{scale}/{paper}/overlap.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/overlap.tsv"
    wildcard_constraints:
        paper="sae_architectures",
    threads: 1 if SMOKE else 8
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        spec=spec_of("own.overlap", "arms"),
        code=code_of("overlap", "overlap.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input.stage:q}"
        " --saes {input.saes:q} --pairs {output.pairs:q} --cosines {output.cosines:q}"
        " --threads {threads} 2> {log:q}"


# Token-distribution entropy of the dictionaries that paper.yaml names, on every arm that has them.
rule sae_architectures_entropy:
    input:
        stage=own_file_of("entropy.py"),
        saes=arms_of("sae", "manifest.json"),
        folders=arms_of("sae", "saes"),
        activations=arms_of("activations", "manifest.json"),
        shards=arms_of("activations", "shards"),
    output:
        summary="results/{scale}/{paper}/entropy/summary.parquet",
        histogram="results/{scale}/{paper}/entropy/histogram.parquet",
    log:
        "results/logs/{scale}/{paper}/entropy.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/entropy.tsv"
    wildcard_constraints:
        paper="sae_architectures",
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.entropy", "arms"),
        code=code_of("entropy", "entropy.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input.stage:q}"
        " --saes {input.saes:q} --activations {input.activations:q}"
        " --summary {output.summary:q} --histogram {output.histogram:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
