# Crosscoders that share their sources, trained in one job, and each arm's on held-out tokens.
rule crosscoder:
    input:
        activations=item_inputs_of("crosscoder", "manifest.json"),
        shards=item_inputs_of("crosscoder", "shards"),
    output:
        manifest="results/store/crosscoder/{crosscoder}/manifest.json",
        saes=directory("results/store/crosscoder/{crosscoder}/saes"),
        history="results/store/crosscoder/{crosscoder}/history.parquet",
    log:
        "results/logs/crosscoder/{crosscoder}.log",
    benchmark:
        "results/benchmarks/crosscoder/{crosscoder}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=480,
        gpu=1,
    params:
        spec=item_spec_of("crosscoder"),
        code=code_of("crosscoder"),
    shell:
        "{PYTHON:q} -m pipeline crosscoder --spec {params.spec:q}"
        " --activations {input.activations:q} --out {output.manifest:q} --saes {output.saes:q}"
        " --history {output.history:q} --device {DEVICE} --threads {threads} 2> {log:q}"


rule crosscoder_evaluation:
    input:
        activations=crossed_input_of("manifest.json"),
        shards=crossed_input_of("shards"),
        saes=arm_input_of(CROSSED, "manifest.json"),
        folders=arm_input_of(CROSSED, "saes"),
    output:
        table="results/{scale}/{paper}/crosscoders/{arm}.parquet",
        latents="results/{scale}/{paper}/crosscoders/{arm}_latents.parquet",
    log:
        "results/logs/{scale}/{paper}/crosscoders_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/crosscoders_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=1,
    params:
        spec=spec_of(),
        code=code_of("crosscoder_evaluation"),
    shell:
        "{PYTHON:q} -m pipeline crosscoder_evaluation --spec {params.spec:q}"
        " --activations {input.activations:q} --saes {input.saes:q} --out {output.table:q}"
        " --latents {output.latents:q} --device {DEVICE} --threads {threads} 2> {log:q}"
