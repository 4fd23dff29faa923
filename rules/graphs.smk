# Attribution graphs of prompts, and what the true model does when features are taken out.
rule graphs:
    input:
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        corpus=arm_input_of("corpus", "tokens.parquet"),
        activations=arm_input_of("activations", "manifest.json"),
        saes=arm_input_of((*DICTIONARIES, *LAYERED), "manifest.json"),
        folders=arm_input_of((*DICTIONARIES, *LAYERED), "saes"),
    output:
        scores="results/{scale}/{paper}/graphs/{arm}_scores.parquet",
        nodes="results/{scale}/{paper}/graphs/{arm}_nodes.parquet",
        edges="results/{scale}/{paper}/graphs/{arm}_edges.parquet",
        suppressed="results/{scale}/{paper}/graphs/{arm}_suppressed.parquet",
        heads="results/{scale}/{paper}/graphs/{arm}_heads.parquet",
        qk="results/{scale}/{paper}/graphs/{arm}_qk.parquet",
        replacement="results/{scale}/{paper}/graphs/{arm}_replacement.parquet",
    log:
        "results/logs/{scale}/{paper}/graphs_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/graphs_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=120,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("graphs"),
        code=code_of("graphs"),
    shell:
        "{PYTHON:q} -m pipeline graphs --spec {params.spec:q} --model {input.model:q}"
        " --corpus {input.corpus:q} --activations {input.activations:q} --saes {input.saes:q}"
        " --out {output.scores:q} --nodes {output.nodes:q} --edges {output.edges:q}"
        " --suppressed {output.suppressed:q} --heads {output.heads:q}"
        " --qk {output.qk:q} --replacement {output.replacement:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"


# The graph of one prompt, as Neuronpedia and circuit-tracer read it.
rule export_traced:
    input:
        model=arm_input_of("model", "model.json"),
        scores="results/{scale}/{paper}/graphs/{arm}_scores.parquet",
        nodes="results/{scale}/{paper}/graphs/{arm}_nodes.parquet",
        edges="results/{scale}/{paper}/graphs/{arm}_edges.parquet",
    output:
        "results/{scale}/{paper}/exports/graph_{arm}.{dictionary}.{prompt}.json",
    log:
        "results/logs/{scale}/{paper}/export_graph_{arm}.{dictionary}.{prompt}.log",
    wildcard_constraints:
        dictionary=r"\w+",
        prompt=r"\w+",
    params:
        spec=traced_spec,
        code=code_of("attribution_graph"),
    shell:
        "{PYTHON:q} -m pipeline attribution_graph --spec {params.spec:q} --model {input.model:q}"
        " --nodes {input.nodes:q} --edges {input.edges:q} --prompts {input.scores:q}"
        " --out {output:q} 2> {log:q}"
