# Which heads, MLPs and paths tell two prompts apart, by several methods.
rule circuits:
    input:
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        prompts=own_file_of("prompts.py"),
        activations=circuit_input_of("activations", "manifest.json"),
        saes=circuit_input_of(DICTIONARIES, "manifest.json"),
        folders=circuit_input_of(DICTIONARIES, "saes"),
    output:
        nodes="results/{scale}/{paper}/circuits/{arm}_nodes.parquet",
        edges="results/{scale}/{paper}/circuits/{arm}_edges.parquet",
        methods="results/{scale}/{paper}/circuits/{arm}_methods.parquet",
    log:
        "results/logs/{scale}/{paper}/circuits_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/circuits_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=120,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("circuits"),
        code=code_of("circuits", "prompts.py"),
    shell:
        "{PYTHON:q} -m pipeline circuits --spec {params.spec:q} --model {input.model:q}"
        " --prompts {input.prompts:q} --code {input.prompts:q} --saes {input.saes:q}"
        " --activations {input.activations:q} --nodes {output.nodes:q}"
        " --edges {output.edges:q} --methods {output.methods:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
