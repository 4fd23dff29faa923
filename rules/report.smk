# One offline page a paper, an index of all claims, and a catalogue of what there is.
rule report_html:
    input:
        figures=report_input("figures"),
        pages=report_input("pages"),
        claims="results/{scale}/{paper}/claims.csv",
        certificate="results/{scale}/{paper}/claims.csv.json",
        metrics="results/{scale}/{paper}/metrics.json",
        tables=tables_of(),
        yaml=yaml_of,
        upstream=upstream_of,
    output:
        page=report(
            "results/{scale}/{paper}/report.html",
            category="{paper}",
            subcategory="report",
            caption="captions/report.rst",
        ),
        costs="results/{scale}/{paper}/costs.html",
    log:
        "results/logs/{scale}/{paper}/report.log",
    params:
        spec=report_spec,
        code=code_of("report"),
    shell:
        "{PYTHON:q} -m pipeline report --spec {params.spec:q} --figures {input.figures:q}"
        " --pages {input.pages:q} --claims {input.claims:q} --metrics {input.metrics:q}"
        " --tables {input.tables:q} --yaml {input.yaml:q} --benchmarks results/benchmarks"
        " --out {output.page:q} --costs {output.costs:q} 2> {log:q}"


rule index:
    input:
        claims=[f"results/{{scale}}/{p}/claims.csv" for p in RUN.config.papers],
        reports=[f"results/{{scale}}/{p}/report.html" for p in RUN.config.papers],
    output:
        page=report(
            "results/{scale}/index.html",
            category="index",
            caption="captions/index.rst",
        ),
        catalogue="results/{scale}/catalogue.html",
    log:
        "results/logs/{scale}/index.log",
    params:
        spec=index_spec,
        others=others_made,
        code=code_of("index"),
    shell:
        "{PYTHON:q} -m pipeline index --spec {params.spec:q} --claims {input.claims:q} {params.others:q}"
        " --out {output.page:q} --catalogue {output.catalogue:q} 2> {log:q}"


# With strict: true, the last job of a run: it fails where a claim is not reproduced.
rule strict:
    input:
        claims=rules.index.input.claims,
        index="results/{scale}/index.html",
    output:
        "results/{scale}/strict.json",
    log:
        "results/logs/{scale}/strict.log",
    params:
        code=code_of("strict"),
    shell:
        "{PYTHON:q} -m pipeline strict --spec {{}} --claims {input.claims:q} --out {output:q}"
        " 2> {log:q}"
