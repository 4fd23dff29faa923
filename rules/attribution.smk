# What each latent does to an output, and how right the cheap estimate is.
rule attribution:
    input:
        model=arm_input_of("model", "model.json", "attribution"),
        checkpoint=arm_input_of("model", "checkpoint", "attribution"),
        activations=arm_input_of("activations", "manifest.json", "attribution"),
        sae=sae_input_of("attribution", "manifest.json"),
        folder=sae_input_of("attribution", "saes"),
    output:
        prompts="results/{scale}/{paper}/attribution/prompts.parquet",
        latents="results/{scale}/{paper}/attribution/latents.parquet",
    log:
        "results/logs/{scale}/{paper}/attribution.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/attribution.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(6000),
        runtime=120,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("attribution"),
        code=code_of("attribution"),
    shell:
        "{PYTHON:q} -m pipeline attribution --spec {params.spec:q} --model {input.model:q}"
        " --activations {input.activations:q} --sae {input.sae:q}"
        " --out {output.prompts:q} --latents {output.latents:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
