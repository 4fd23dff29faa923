# Scalars against the paper's numbers -> verdicts.
rule claims:
    input:
        metrics="results/{scale}/{paper}/metrics.json",
        yaml=card_of,
    output:
        table=report(
            "results/{scale}/{paper}/claims.csv",
            category="{paper}",
            subcategory="claims",
            caption="captions/claims.rst",
        ),
        certificate="results/{scale}/{paper}/claims.csv.json",
    log:
        "results/logs/{scale}/{paper}/claims.log",
    params:
        spec=claims_spec,
        code=code_of("claims"),
    shell:
        "{PYTHON:q} -m pipeline claims --spec {params.spec:q} --metrics {input.metrics:q} --paper {input.yaml:q}"
        " --out {output.table:q} 2> {log:q}"
