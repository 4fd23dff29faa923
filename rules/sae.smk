# All dictionaries that share a stream of activations, trained in one job; with --set-resources
# sae:gpu=4 on four GPUs of one machine. With activations.window it makes their training rows itself,
# on its own GPU in turn, or on one of several.
rule sae:
    input:
        activations=item_input_of("sae", "activations", "manifest.json"),
        shards=item_input_of("sae", "activations", "shards"),
        model=item_input_of("sae", "model", "model.json"),
        checkpoint=item_input_of("sae", "model", "checkpoint"),
        corpus=item_input_of("sae", "corpus", "tokens.parquet"),
    output:
        manifest="results/store/sae/{sae}/manifest.json",
        saes=directory("results/store/sae/{sae}/saes"),
        history="results/store/sae/{sae}/history.parquet",
    log:
        "results/logs/sae/{sae}.log",
    benchmark:
        "results/benchmarks/sae/{sae}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=480,
        gpu=1,
    params:
        spec=item_spec_of("sae"),
        code=stream_code,
    shell:
        "{PYTHON:q} -m pipeline sae --spec {params.spec:q} --activations {input.activations:q}"
        " --out {output.manifest:q} --saes {output.saes:q} --history {output.history:q}"
        " --model {input.model:q} --corpus {input.corpus:q} --gpus {resources.gpu}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
