# Transcoders of all layers, cross-layer or one of each, trained in one job and judged.
rule transcoders:
    input:
        activations=item_input_of("transcoders", "activations", "manifest.json"),
        shards=item_input_of("transcoders", "activations", "shards"),
    output:
        manifest="results/store/transcoders/{transcoders}/manifest.json",
        saes=directory("results/store/transcoders/{transcoders}/saes"),
        history="results/store/transcoders/{transcoders}/history.parquet",
    log:
        "results/logs/transcoders/{transcoders}.log",
    benchmark:
        "results/benchmarks/transcoders/{transcoders}.tsv"
    threads: THREADS
    resources:
        mem_mb=16000,
        runtime=480,
        gpu=1,
    params:
        spec=item_spec_of("transcoders"),
        code=code_of("transcoders"),
    shell:
        "{PYTHON:q} -m pipeline transcoders --spec {params.spec:q}"
        " --activations {input.activations:q} --out {output.manifest:q} --saes {output.saes:q}"
        " --history {output.history:q} --device {DEVICE} --threads {threads} 2> {log:q}"


rule transcoders_evaluation:
    input:
        activations=arm_input_of("activations", "manifest.json"),
        shards=arm_input_of("activations", "shards"),
        saes=arm_input_of(LAYERED, "manifest.json"),
        folders=arm_input_of(LAYERED, "saes"),
    output:
        table="results/{scale}/{paper}/transcoders/{arm}.parquet",
    log:
        "results/logs/{scale}/{paper}/transcoders_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/transcoders_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=1,
    params:
        spec=spec_of(),
        code=code_of("transcoders_evaluation"),
    shell:
        "{PYTHON:q} -m pipeline transcoders_evaluation --spec {params.spec:q}"
        " --activations {input.activations:q} --saes {input.saes:q} --out {output.table:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
