# Stages of this paper alone. PAPER is the name of this folder; PYTHON and the helpers ..._of
# stand in rules/common.smk.
rule:
    name:
        f"{PAPER}_measure"
    input:
        own=own_file_of("measure.py"),
    output:
        "results/{scale}/{paper}/measure/cosines.parquet",
    log:
        "results/logs/{scale}/{paper}/measure.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/measure.tsv"
    wildcard_constraints:
        paper=PAPER,
    params:
        spec=spec_of("own.measure"),
        code=code_of("measure", "measure.py"),
    shell:
        "{PYTHON:q} {input.own:q} --spec {params.spec:q} --code {input.own:q} --out {output:q}"
        " 2> {log:q}"
