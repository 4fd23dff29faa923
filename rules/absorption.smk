# How far other latents take over from those of first letters, of every dictionary of an arm.
rule absorption:
    input:
        model=arm_input_of("model", "model.json"),
        checkpoint=arm_input_of("model", "checkpoint"),
        saes=arm_input_of(DICTIONARIES, "manifest.json"),
        folders=arm_input_of(DICTIONARIES, "saes"),
    output:
        "results/{scale}/{paper}/absorption/{arm}.parquet",
    log:
        "results/logs/{scale}/{paper}/absorption_{arm}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/absorption_{arm}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=240,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("absorption"),
        code=code_of("absorption"),
    shell:
        "{PYTHON:q} -m pipeline absorption --spec {params.spec:q} --model {input.model:q}"
        " --saes {input.saes:q} --out {output:q} --device {DEVICE} --threads {threads} 2> {log:q}"
