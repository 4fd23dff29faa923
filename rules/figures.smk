from importlib.metadata import version


# plotly.js and our drawing code, once a scale, for figures that are opened by themselves.
rule figures_js:
    input:
        drawing_code,
    output:
        "results/{scale}/figures.js",
    log:
        "results/logs/{scale}/figures_js.log",
    params:
        plotly=version("plotly"),
        code=code_of("figures_js"),
    shell:
        "{PYTHON:q} -m pipeline figures_js --draw {input:q} --out {output:q} 2> {log:q}"


# The tables that a figure names -> a plotly figure, and the plotted numbers as CSV.
rule figures:
    input:
        tables=tables_of("figure"),
        metrics=caption_metrics_of,
        own=own_file_of("figures*.py"),  # figures.py, and what it may be split into
        script="results/{scale}/figures.js",
        yaml=card_of,
    output:
        html=report(
            "results/{scale}/{paper}/figures/{figure}.html",
            category="{paper}",
            subcategory="figures",
            caption="captions/figures.rst",
        ),
        csv="results/{scale}/{paper}/figures/{figure}.csv",
        certificate="results/{scale}/{paper}/figures/{figure}.csv.json",
    log:
        "results/logs/{scale}/{paper}/figures_{figure}.log",
    params:
        spec=figure_spec,
        code=code_of("figures", "figures*.py"),
    shell:
        "{PYTHON:q} -m pipeline figures --spec {params.spec:q} --tables {input.tables:q}"
        " --metrics {input.metrics:q} --own {input.own:q} --paper {input.yaml:q} --code {input.own:q} --script {input.script:q}"
        " --out {output.html:q} --csv {output.csv:q} 2> {log:q}"
