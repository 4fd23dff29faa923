# Directions written into the stream: what becomes likelier, what it costs, what is said then.
rule steering:
    input:
        model=arm_input_of("model", "model.json", "steering"),
        checkpoint=arm_input_of("model", "checkpoint", "steering"),
        corpus=arm_input_of("corpus", "tokens.parquet", "steering"),
        documents=arm_input_of("corpus", "documents.parquet", "steering"),
        activations=arm_input_of("activations", "manifest.json", "steering"),
        probes=probed_of(),
        saes=steering_input_of(DICTIONARIES, "manifest.json"),
        folders=steering_input_of(DICTIONARIES, "saes"),
    output:
        effects="results/{scale}/{paper}/steering/effects.parquet",
        samples="results/{scale}/{paper}/steering/samples.parquet",
        directions="results/{scale}/{paper}/steering/directions.safetensors",
    log:
        "results/logs/{scale}/{paper}/steering.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/steering.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=120,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("probes", "steering"),
        code=code_of("steering"),
    shell:
        "{PYTHON:q} -m pipeline steering --spec {params.spec:q} --model {input.model:q}"
        " --corpus {input.corpus:q} --documents {input.documents:q}"
        " --activations {input.activations:q} --probes {input.probes:q} --saes {input.saes:q}"
        " --effects {output.effects:q} --samples {output.samples:q}"
        " --directions {output.directions:q} --device {DEVICE} --threads {threads} 2> {log:q}"
