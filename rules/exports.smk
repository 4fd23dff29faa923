# One dictionary in the formats of other tools: SAELens, SAEBench, Neuronpedia, and libraries.
rule export_saelens:
    input:
        sae=sae_input_of(None, "manifest.json"),
        folders=sae_input_of(None, "saes"),
        model=arm_input_of("model", "model.json"),
    output:
        directory("results/{scale}/{paper}/exports/{arm}.{latents}/saelens"),
    log:
        "results/logs/{scale}/{paper}/export_saelens_{arm}.{latents}.log",
    params:
        spec=export_spec("saelens"),
        code=code_of("exports"),
    shell:
        "{PYTHON:q} -m pipeline exports --spec {params.spec:q} --sae {input.sae:q}"
        " --model {input.model:q} --out {output:q} 2> {log:q}"


rule export_saebench:
    input:
        sae=sae_input_of(None, "manifest.json"),
        folders=sae_input_of(None, "saes"),
        table="results/{scale}/{paper}/evaluation/{arm}.parquet",
    output:
        "results/{scale}/{paper}/exports/{arm}.{latents}/saebench_core.json",
    log:
        "results/logs/{scale}/{paper}/export_saebench_{arm}.{latents}.log",
    params:
        spec=export_spec("saebench"),
        code=code_of("exports"),
    shell:
        "{PYTHON:q} -m pipeline exports --spec {params.spec:q} --sae {input.sae:q}"
        " --table {input.table:q} --out {output:q} 2> {log:q}"


rule export_neuronpedia:
    input:
        sae=sae_input_of(None, "manifest.json"),
        table="results/{scale}/{paper}/features/{latents}.parquet",
    output:
        directory("results/{scale}/{paper}/exports/{arm}.{latents}/neuronpedia"),
    log:
        "results/logs/{scale}/{paper}/export_neuronpedia_{arm}.{latents}.log",
    params:
        spec=export_spec("neuronpedia"),
        code=code_of("exports"),
    shell:
        "{PYTHON:q} -m pipeline exports --spec {params.spec:q} --sae {input.sae:q}"
        " --table {input.table:q} --out {output:q} 2> {log:q}"


rule export_layout:
    input:
        sae=sae_input_of(None, "manifest.json"),
        folders=sae_input_of(None, "saes"),
    output:
        directory("results/{scale}/{paper}/exports/{arm}.{latents}/{layout}"),
    log:
        "results/logs/{scale}/{paper}/export_{layout}_{arm}.{latents}.log",
    params:
        spec=export_spec(),
        code=code_of("exports"),
    shell:
        "{PYTHON:q} -m pipeline exports --spec {params.spec:q} --sae {input.sae:q}"
        " --out {output:q} 2> {log:q}"
