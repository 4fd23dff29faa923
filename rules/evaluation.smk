# Every dictionary of an arm on held-out tokens: reconstruction, sparsity, and spliced loss.
rule evaluation:
    input:
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        corpus=arm_input_of("corpus", "tokens.parquet"),
        activations=arm_input_of("activations", "manifest.json"),
        shards=arm_input_of("activations", "shards"),
        saes=arm_input_of(DICTIONARIES, "manifest.json"),
        folders=arm_input_of(DICTIONARIES, "saes"),
        histories=arm_input_of("sae", "history.parquet"),
    output:
        table="results/{scale}/{paper}/evaluation/{arm}.parquet",
        history="results/{scale}/{paper}/evaluation/{arm}_history.parquet",
    log:
        "results/logs/{scale}/{paper}/evaluation_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/evaluation_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=240,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("evaluation"),
        code=code_of("evaluation"),
    shell:
        "{PYTHON:q} -m pipeline evaluation --spec {params.spec:q} --model {input.model:q}"
        " --corpus {input.corpus:q} --activations {input.activations:q} --saes {input.saes:q}"
        " --out {output.table:q} --history {output.history:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
