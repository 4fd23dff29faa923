# A paper's results as one archive for reviewers: no weights, no activations.
rule release:
    input:
        report="results/{scale}/{paper}/report.html",
        metrics="results/{scale}/{paper}/metrics.json",
        claims=multiext("results/{scale}/{paper}/claims.csv", "", ".json"),
        tables=tables_of(),
        figures=report_input("figures"),
        numbers=report_input("numbers"),
        pages=report_input("pages"),
        script="results/{scale}/figures.js",
        yaml=yaml_of,
        own=own_file_of("*.py"),
        rules=own_file_of("rules.smk"),
    output:
        "results/{scale}/{paper}/release.zip",
    log:
        "results/logs/{scale}/{paper}/release.log",
    params:
        spec=report_spec,
        code=code_of("release"),
    shell:
        "{PYTHON:q} -m pipeline release --spec {params.spec:q} --files {input.report:q}"
        " {input.metrics:q} {input.claims:q} {input.tables:q} {input.figures:q}"
        " {input.numbers:q} {input.pages:q} --own {input.yaml:q} {input.own:q} {input.rules:q}"
        " --script {input.script:q} --out {output:q} 2> {log:q}"
