# Which text was read: a claim about the published text is held against no other.
rule nanogpt_facts:
    input:
        stage=own_file_of("facts.py"),
        corpus=arm_input_of("corpus", "tokens.parquet", "features"),
        model=arm_input_of("model", "model.json", "features"),
    output:
        "results/{scale}/{paper}/facts/text.parquet",
    log:
        "results/logs/{scale}/{paper}/facts.log",
    wildcard_constraints:
        paper="nanogpt_shakespeare",
    params:
        spec=spec_of("own.facts"),
        code=code_of("facts", "facts.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input.stage:q}"
        " --corpus {input.corpus:q} --model {input.model:q} --out {output:q} 2> {log:q}"


# Text that each arm writes.
rule nanogpt_samples:
    input:
        stage=own_file_of("samples.py"),
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        corpus=arm_input_of("corpus", "tokens.parquet"),
    output:
        "results/{scale}/{paper}/samples/{arm}.parquet",
    log:
        "results/logs/{scale}/{paper}/samples_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/samples_{arm}.tsv"
    wildcard_constraints:
        paper="nanogpt_shakespeare",
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.samples"),
        code=code_of("samples", "samples.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input.stage:q}"
        " --model {input.model:q} --corpus {input.corpus:q} --out {output:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"


# What each arm would say after each of its layers.
rule nanogpt_lens:
    input:
        stage=own_file_of("lens.py"),
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        corpus=arm_input_of("corpus", "tokens.parquet"),
    output:
        table="results/{scale}/{paper}/lens/{arm}.parquet",
        excerpt="results/{scale}/{paper}/lens/{arm}_excerpt.parquet",
    log:
        "results/logs/{scale}/{paper}/lens_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/lens_{arm}.tsv"
    wildcard_constraints:
        paper="nanogpt_shakespeare",
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.lens"),
        code=code_of("lens", "lens.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input.stage:q}"
        " --model {input.model:q} --corpus {input.corpus:q} --out {output.table:q}"
        " --excerpt {output.excerpt:q} --device {DEVICE} --threads {threads} 2> {log:q}"
