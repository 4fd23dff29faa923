# Translators of every model; the models of another paper come out of the store.
rule lenses_tuning:
    input:
        stage=own_file_of("tuning.py"),
        translators=own_file_of("translators.py"),
        models=lent_of("tuning", "model", "model.json"),
        checkpoints=lent_of("tuning", "model", "checkpoint"),
        corpora=lent_of("tuning", "corpus", "tokens.parquet"),
    output:
        translators="results/{scale}/{paper}/tuning/translators.safetensors",
        history="results/{scale}/{paper}/tuning/history.parquet",
    log:
        "results/logs/{scale}/{paper}/tuning.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/tuning.tsv"
    wildcard_constraints:
        paper="lenses",
    threads: THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.tuning"),
        code=code_of("tuning", "tuning.py", "translators.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q}"
        " --code {input.stage:q} {input.translators:q} --models {input.models:q}"
        " --corpora {input.corpora:q} --out {output.translators:q} --history {output.history:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"


# All measures of the lenses, in one job: a model is loaded once.
rule lenses_lenses:
    input:
        stage=own_file_of("lenses.py"),
        basis=own_file_of("basis.py"),
        tuning=own_file_of("tuning.py"),
        training=own_file_of("translators.py"),
        models=lent_of("tuning", "model", "model.json"),
        checkpoints=lent_of("tuning", "model", "checkpoint"),
        corpora=lent_of("tuning", "corpus", "tokens.parquet"),
        translators="results/{scale}/{paper}/tuning/translators.safetensors",
    output:
        layers="results/{scale}/{paper}/lenses/layers.parquet",
        transfer="results/{scale}/{paper}/lenses/transfer.parquet",
        trajectories="results/{scale}/{paper}/lenses/trajectories.parquet",
        attribution="results/{scale}/{paper}/lenses/attribution.parquet",
        basis="results/{scale}/{paper}/lenses/basis.parquet",
    log:
        "results/logs/{scale}/{paper}/lenses.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/lenses.tsv"
    wildcard_constraints:
        paper="lenses",
    threads: THREADS
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.tuning", "own.lenses"),
        code=code_of("lenses", "lenses.py", "basis.py", "tuning.py", "translators.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q}"
        " --code {input.stage:q} {input.basis:q} {input.tuning:q} {input.training:q}"
        " --models {input.models:q} --corpora {input.corpora:q}"
        " --translators {input.translators:q} --layers {output.layers:q}"
        " --transfer {output.transfer:q} --trajectories {output.trajectories:q}"
        " --attribution {output.attribution:q} --basis {output.basis:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
