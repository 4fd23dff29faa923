# One forward pass over the corpus -> Parquet shards of every hook that a paper needs.
rule activations:
    input:
        model=item_input_of("activations", "model", "model.json"),
        checkpoint=item_input_of("activations", "model", "checkpoint"),
        corpus=item_input_of("activations", "corpus", "tokens.parquet"),
    output:
        manifest="results/store/activations/{activations}/manifest.json",
        shards=stored(directory("results/store/activations/{activations}/shards")),
    log:
        "results/logs/activations/{activations}.log",
    benchmark:
        "results/benchmarks/activations/{activations}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(6000),
        runtime=240,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=item_spec_of("activations"),
        code=code_of("activations"),
    shell:
        "{PYTHON:q} -m pipeline activations --spec {params.spec:q} --model {input.model:q}"
        " --corpus {input.corpus:q} --out {output.manifest:q} --shards {output.shards:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
