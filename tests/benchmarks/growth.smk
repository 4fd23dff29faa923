# The floor of growth.py: the rules, files and jobs of its papers, and nothing of ours. What our
# rules compute stands in given.json: the params of one paper's jobs, which all papers have here.
import json
import sys

PYTHON = sys.executable
with open("given.json") as f:
    GIVEN = json.load(f)
PAPERS, SCALE, PARAMS = GIVEN["papers"], GIVEN["scale"], GIVEN["params"]
HOME = "results/{scale}/{paper}"


wildcard_constraints:
    scale="smoke|laptop|paper",
    paper=r"[A-Za-z]\w*",
    figure=r"\w+",


def param(rule, number):
    return lambda wildcards: PARAMS[rule][number]


def none(wildcards):
    return []


def tables(wildcards):
    return [f"results/{wildcards.scale}/{wildcards.paper}/measure/cosines.parquet"]


def figures(wildcards):
    return [f"results/{wildcards.scale}/{wildcards.paper}/figures/cosines.html"]


def dated(wildcards):
    return [f"rules/papers/{wildcards.paper}/paper.yaml"]


def undated(file):
    return lambda wildcards: [ancient(f"rules/papers/{wildcards.paper}/{file}")]


def products(*papers):
    files = (
        "report.html claims.csv metrics.json figures/cosines.html figures/cosines.csv"
        " measure/cosines.parquet"
    ).split()
    return [f"results/{SCALE}/{paper}/{file}" for paper in papers for file in files]


rule metrics:
    input:
        tables=tables,
        own=undated("metrics.py"),
        yaml=undated("paper.yaml"),
    output:
        f"{HOME}/metrics.json",
    log:
        "results/logs/{scale}/{paper}/metrics.log",
    params:
        spec=param("metrics", 0),
        code=param("metrics", 1),
    shell:
        "{PYTHON:q} metrics {params.spec:q} {input:q} {output:q} 2> {log:q}"


rule claims:
    input:
        metrics=f"{HOME}/metrics.json",
        yaml=undated("paper.yaml"),
    output:
        table=report(
            f"{HOME}/claims.csv", category="{paper}", subcategory="claims", caption="claims.rst"
        ),
        certificate=f"{HOME}/claims.csv.json",
    log:
        "results/logs/{scale}/{paper}/claims.log",
    params:
        spec=param("claims", 0),
        code=param("claims", 1),
    shell:
        "{PYTHON:q} claims {params.spec:q} {input:q} {output:q} 2> {log:q}"


rule figures_js:
    input:
        none,
    output:
        "results/{scale}/figures.js",
    log:
        "results/logs/{scale}/figures_js.log",
    params:
        plotly="6",
        code=param("claims", 1),
    shell:
        "{PYTHON:q} figures_js {output:q} 2> {log:q}"


rule figures:
    input:
        tables=tables,
        metrics=none,
        own=undated("figures.py"),
        script="results/{scale}/figures.js",
        yaml=undated("paper.yaml"),
    output:
        html=report(
            HOME + "/figures/{figure}.html",
            category="{paper}",
            subcategory="figures",
            caption="figures.rst",
        ),
        csv=HOME + "/figures/{figure}.csv",
        certificate=HOME + "/figures/{figure}.csv.json",
    log:
        "results/logs/{scale}/{paper}/figures_{figure}.log",
    params:
        spec=param("figures", 0),
        code=param("figures", 1),
    shell:
        "{PYTHON:q} figures {params.spec:q} {input:q} {output:q} 2> {log:q}"


rule report_html:
    input:
        figures=figures,
        pages=none,
        claims=f"{HOME}/claims.csv",
        certificate=f"{HOME}/claims.csv.json",
        metrics=f"{HOME}/metrics.json",
        tables=tables,
        yaml=dated,
        upstream=none,
    output:
        page=report(
            f"{HOME}/report.html", category="{paper}", subcategory="report", caption="report.rst"
        ),
        costs=f"{HOME}/costs.html",
    log:
        "results/logs/{scale}/{paper}/report.log",
    params:
        spec=param("report_html", 0),
        code=param("report_html", 1),
    shell:
        "{PYTHON:q} report {params.spec:q} {input:q} {output:q} 2> {log:q}"


rule index:
    input:
        claims=[f"results/{{scale}}/{p}/claims.csv" for p in PAPERS],
        reports=[f"results/{{scale}}/{p}/report.html" for p in PAPERS],
    output:
        page=report("results/{scale}/index.html", category="index", caption="index.rst"),
        catalogue="results/{scale}/catalogue.html",
    log:
        "results/logs/{scale}/index.log",
    params:
        spec=param("index", 0),
        others=none,
        code=param("index", 1),
    shell:
        "{PYTHON:q} index {params.spec:q} {input:q} {output:q} 2> {log:q}"


def own_input(paper):
    script = f"rules/papers/{paper}/measure.py"
    return lambda wildcards: {"script": [ancient(script)], "code": [ancient(script)]}


def asked(number):
    return lambda wildcards: number


def options(wildcards, input, output):
    return ["--cosines", output[0]]


for PAPER in PAPERS:
    for AT in ("smoke", "laptop", "paper"):

        rule:
            name:
                f"{PAPER}_measure" + ("" if AT == SCALE else f"_at_{AT}")
            input:
                unpack(own_input(PAPER)),
            output:
                cosines=f"results/{AT}/{PAPER}/measure/cosines.parquet",
            log:
                f"results/logs/{AT}/{PAPER}/measure.log",
            benchmark:
                f"results/benchmarks/{AT}/{PAPER}/measure.tsv"
            threads: 1
            resources:
                mem_mb=asked(8000),
                runtime=asked(120),
                gpu=asked(1),
            params:
                spec=param("measure", 0),
                code=param("measure", 1),
                options=options,
                stage="measure",
            shell:
                "{PYTHON:q} own {params.stage} {params.spec:q} {input:q} {params.options:q} 2> {log:q}"


rule all:
    default_target: True
    input:
        f"results/{SCALE}/index.html",
        products(*PAPERS),


for PAPER in PAPERS:

    rule:
        name:
            PAPER
        input:
            products(PAPER),
