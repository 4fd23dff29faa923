# What the arms know of the language, in one job: the models are small, and torch takes seconds.
rule nanogpt_language:
    input:
        stage=own_file_of("language.py"),
        samples=own_file_of("samples.py"),
        lens=own_file_of("lens.py"),
        models=models_of("model.json"),
        checkpoints=models_of("checkpoint"),
        corpus=arm_input_of("corpus", "tokens.parquet", "features"),
    output:
        text="results/{scale}/{paper}/language/text.parquet",
        samples="results/{scale}/{paper}/language/samples.parquet",
        lens="results/{scale}/{paper}/language/lens.parquet",
        excerpt="results/{scale}/{paper}/language/excerpt.parquet",
    log:
        "results/logs/{scale}/{paper}/language.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/language.tsv"
    wildcard_constraints:
        paper="nanogpt_shakespeare",
    threads: THREADS
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.language", "arms"),
        code=code_of("language", "language.py", "samples.py", "lens.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q}"
        " --code {input.stage:q} {input.samples:q} {input.lens:q}"
        " --models {input.models:q} --corpus {input.corpus:q} --text {output.text:q}"
        " --samples {output.samples:q} --lens {output.lens:q} --excerpt {output.excerpt:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
