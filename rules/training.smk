# Small models trained from scratch, all members of a run in one job; and the run's curves.
rule training:
    input:
        data=item_source_of("training", "data"),
        corpus=item_input_of("training", "corpus", "tokens.parquet"),
        documents=item_input_of("training", "corpus", "documents.parquet"),
        tokenizer=item_input_of("training", "tokenizer", "model.json"),
        start=item_input_of("training", "start", "manifest.json"),
        weights=item_input_of("training", "start", "checkpoints"),
    output:
        manifest="results/store/training/{training}/manifest.json",
        checkpoints=directory("results/store/training/{training}/checkpoints"),
        history="results/store/training/{training}/history.parquet",
    log:
        "results/logs/training/{training}.log",
    benchmark:
        "results/benchmarks/training/{training}.tsv"
    threads: THREADS
    resources:
        mem_mb=6000,
        runtime=240,
        gpu=1,
    params:
        spec=item_spec_of("training"),
        code=training_code,
    shell:
        "{PYTHON:q} -m pipeline training --spec {params.spec:q} --data {input.data:q}"
        " --code {input.data:q} --corpus {input.corpus:q} --documents {input.documents:q}"
        " --tokenizer {input.tokenizer:q} --start {input.start:q}"
        " --out {output.manifest:q} --checkpoints {output.checkpoints:q}"
        " --history {output.history:q} --device {DEVICE} --threads {threads} 2> {log:q}"


rule training_history:
    input:
        training_of("", "history.parquet"),
    output:
        "results/{scale}/{paper}/training/{run}.parquet",
    log:
        "results/logs/{scale}/{paper}/training_{run}.log",
    shell:
        "cp {input:q} {output:q} 2> {log:q}"
