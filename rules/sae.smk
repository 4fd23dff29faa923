# All dictionaries that share a stream of activations, trained in one job.
rule sae:
    input:
        activations=item_input_of("sae", "activations", "manifest.json"),
        shards=item_input_of("sae", "activations", "shards"),
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
        mem_mb=8000,
        runtime=480,
        gpu=1,
    params:
        spec=item_spec_of("sae"),
        code=code_of("sae"),
    shell:
        "{PYTHON:q} -m pipeline sae --spec {params.spec:q} --activations {input.activations:q}"
        " --out {output.manifest:q} --saes {output.saes:q} --history {output.history:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
