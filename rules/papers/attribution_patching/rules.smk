# Cheap attribution beside exact patching, every task on each of its models, in one job.
rule attribution_patching_estimates:
    input:
        stage=own_file_of("estimates.py"),
        prompts=own_file_of("prompts.py"),
        data=own_file_of("data.py"),
        compared=own_file_of("compared.py"),
        models=models_of("model.json"),
        checkpoints=models_of("checkpoint"),
    output:
        nodes="results/{scale}/{paper}/estimates/nodes.parquet",
        edges="results/{scale}/{paper}/estimates/edges.parquet",
        quality="results/{scale}/{paper}/estimates/quality.parquet",
        search="results/{scale}/{paper}/estimates/search.parquet",
        costs="results/{scale}/{paper}/estimates/costs.parquet",
        totals="results/{scale}/{paper}/estimates/totals.parquet",
    log:
        "results/logs/{scale}/{paper}/estimates.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/estimates.tsv"
    wildcard_constraints:
        paper="attribution_patching",
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.estimates", "arms"),
        code=code_of("estimates", "estimates.py", "prompts.py", "data.py", "compared.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --models {input.models:q}"
        " --code {input.stage:q} {input.prompts:q} {input.data:q} {input.compared:q}"
        " --nodes {output.nodes:q} --edges {output.edges:q} --quality {output.quality:q}"
        " --search {output.search:q} --costs {output.costs:q} --totals {output.totals:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
