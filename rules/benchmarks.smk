# SAEBench's sparse probing of every dictionary of an arm, on the labels of its documents.
rule benchmarks:
    input:
        documents=arm_input_of("corpus", "documents.parquet"),
        activations=arm_input_of("activations", "manifest.json"),
        shards=arm_input_of("activations", "shards"),
        saes=arm_input_of(DICTIONARIES, "manifest.json"),
        folders=arm_input_of(DICTIONARIES, "saes"),
    output:
        "results/{scale}/{paper}/benchmarks/{arm}.parquet",
    log:
        "results/logs/{scale}/{paper}/benchmarks_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/benchmarks_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=1,
    params:
        spec=spec_of("benchmarks"),
        code=code_of("benchmarks"),
    shell:
        "{PYTHON:q} -m pipeline benchmarks --spec {params.spec:q}"
        " --documents {input.documents:q} --activations {input.activations:q}"
        " --saes {input.saes:q} --out {output:q} --device {DEVICE} --threads {threads} 2> {log:q}"
