# What can be read off an arm's activations, with control tasks, and the probes' directions.
# A paper may be called probes, so the rule is not.
rule probe:
    input:
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        corpus=arm_input_of("corpus", "tokens.parquet"),
        documents=arm_input_of("corpus", "documents.parquet"),
        activations=arm_input_of("activations", "manifest.json"),
        shards=arm_input_of("activations", "shards"),
        own=own_file_of("labels.py"),
        files=label_files_of(),
    output:
        scores="results/{scale}/{paper}/probes/{arm}_scores.parquet",
        labels="results/{scale}/{paper}/probes/{arm}_labels.parquet",
        directions="results/{scale}/{paper}/probes/{arm}_directions.safetensors",
    log:
        "results/logs/{scale}/{paper}/probes_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/probes_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("probes"),
        code=code_of("probes", "labels.py"),
    shell:
        "{PYTHON:q} -m pipeline probes --spec {params.spec:q} --model {input.model:q}"
        " --corpus {input.corpus:q} --documents {input.documents:q}"
        " --activations {input.activations:q} --labels-py {input.own:q} --code {input.own:q}"
        " --label-files {input.files:q} --scores {output.scores:q} --labels {output.labels:q}"
        " --directions {output.directions:q} --device {DEVICE} --threads {threads} 2> {log:q}"
