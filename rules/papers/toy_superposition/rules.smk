# All toy models of the paper, in one job: they are small, and torch takes seconds to start.
rule toy_superposition_superposition:
    input:
        stage=own_file_of("superposition.py"),
        models=own_file_of("toymodel.py"),
        measures=own_file_of("measures.py"),
    output:
        intro="results/{scale}/{paper}/superposition/intro.parquet",
        basic="results/{scale}/{paper}/superposition/basic.parquet",
        phase="results/{scale}/{paper}/superposition/phase.parquet",
        theory="results/{scale}/{paper}/superposition/theory.parquet",
        geometry="results/{scale}/{paper}/superposition/geometry.parquet",
        pentagon="results/{scale}/{paper}/superposition/pentagon.parquet",
    log:
        "results/logs/{scale}/{paper}/superposition.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/superposition.tsv"
    wildcard_constraints:
        paper="toy_superposition",
    threads: THREADS
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.superposition"),
        code=code_of("superposition", "superposition.py", "toymodel.py", "measures.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input:q}"
        " --intro {output.intro:q} --basic {output.basic:q} --phase {output.phase:q}"
        " --theory {output.theory:q} --geometry {output.geometry:q}"
        " --pentagon {output.pentagon:q} --device {DEVICE} --threads {threads} 2> {log:q}"
