# Indirect object identification in every arm, in one job: behaviour, classes of heads, circuits.
rule ioi_circuit:
    input:
        stage=own_file_of("circuit.py"),
        measures=own_file_of("measures.py"),
        discovery=own_file_of("discovery.py"),
        judged=own_file_of("judged.py"),
        models=models_of("model.json"),
        checkpoints=models_of("checkpoint"),
    output:
        behaviour="results/{scale}/{paper}/circuit/behaviour.parquet",
        heads="results/{scale}/{paper}/circuit/heads.parquet",
        scatter="results/{scale}/{paper}/circuit/scatter.parquet",
        cases="results/{scale}/{paper}/circuit/cases.parquet",
        minimality="results/{scale}/{paper}/circuit/minimality.parquet",
    log:
        "results/logs/{scale}/{paper}/circuit.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/circuit.tsv"
    wildcard_constraints:
        paper="ioi",
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=1,
    params:
        spec=spec_of("own.circuit", "arms"),
        code=code_of("circuit", "circuit.py", "measures.py", "discovery.py", "judged.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --models {input.models:q}"
        " --code {input.stage:q} {input.measures:q} {input.discovery:q}"
        " {input.judged:q} --behaviour {output.behaviour:q} --heads {output.heads:q}"
        " --scatter {output.scatter:q} --cases {output.cases:q}"
        " --minimality {output.minimality:q} --device {DEVICE} --threads {threads} 2> {log:q}"
