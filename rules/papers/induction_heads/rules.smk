# Heads and circuits of all runs, in one job: the models are small, and torch takes seconds to start.
rule induction_heads_heads:
    input:
        stage=own_file_of("heads.py"),
        held=own_file_of("held.py"),
        attention=own_file_of("attention.py"),
        circuits=own_file_of("circuits.py"),
        phases=own_file_of("phase.py"),
        data=own_file_of("data.py"),
        runs=trainings_of("manifest.json"),
        checkpoints=trainings_of("checkpoints"),
        corpus=trainings_of("tokens.parquet", "corpus"),
    output:
        training="results/{scale}/{paper}/heads/training.parquet",
        scores="results/{scale}/{paper}/heads/scores.parquet",
        phase="results/{scale}/{paper}/heads/phase.parquet",
        heads="results/{scale}/{paper}/heads/heads.parquet",
        eigenvalues="results/{scale}/{paper}/heads/eigenvalues.parquet",
        composition="results/{scale}/{paper}/heads/composition.parquet",
        ablation="results/{scale}/{paper}/heads/ablation.parquet",
        patterns="results/{scale}/{paper}/heads/patterns.parquet",
    log:
        "results/logs/{scale}/{paper}/heads.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/heads.tsv"
    wildcard_constraints:
        paper="induction_heads",
    threads: THREADS
    resources:
        mem_mb=6000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.heads"),
        code=code_of(
            "heads", "heads.py", "held.py", "attention.py", "circuits.py", "phase.py", "data.py"
        ),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --runs {input.runs:q}"
        " --code {input.stage:q} {input.held:q} {input.attention:q} {input.circuits:q}"
        " {input.phases:q} {input.data:q} --corpus {input.corpus:q} --training {output.training:q}"
        " --scores {output.scores:q} --phase {output.phase:q} --heads {output.heads:q} --eigenvalues {output.eigenvalues:q}"
        " --composition {output.composition:q} --ablation {output.ablation:q}"
        " --patterns {output.patterns:q} --device {DEVICE} --threads {threads} 2> {log:q}"
