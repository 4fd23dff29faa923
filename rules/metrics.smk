# A paper's tables -> named scalars with definitions.
rule metrics:
    input:
        tables=tables_of(),
        own=own_file_of("metrics.py"),
        yaml=card_of,
    output:
        "results/{scale}/{paper}/metrics.json",
    log:
        "results/logs/{scale}/{paper}/metrics.log",
    params:
        spec=metrics_spec,
        code=code_of("metrics", "metrics.py"),
    shell:
        "{PYTHON:q} -m pipeline metrics --spec {params.spec:q} --tables {input.tables:q}"
        " --own {input.own:q} --paper {input.yaml:q} --code {input.own:q} --out {output:q} 2> {log:q}"
