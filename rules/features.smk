# Density, top examples, histogram and logits of every latent of a dictionary, and their page.
rule features:
    input:
        model=arm_input_of("model", "model.json", "features"),
        checkpoint=arm_input_of("model", "checkpoint", "features"),
        corpus=arm_input_of("corpus", "tokens.parquet", "features"),
        documents=arm_input_of("corpus", "documents.parquet", "features"),
        activations=arm_input_of("activations", "manifest.json", "features"),
        shards=arm_input_of("activations", "shards", "features"),
        sae=sae_input_of("features", "manifest.json"),
        folder=sae_input_of("features", "saes"),
    output:
        "results/{scale}/{paper}/features/{latents}.parquet",
    log:
        "results/logs/{scale}/{paper}/features_{latents}.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/features_{latents}.tsv"
    threads: THREADS
    resources:
        mem_mb=memory_of(8000),
        runtime=240,
        gpu=gpus_of,
        gpu_mem_mb=gpu_memory_of,
    params:
        spec=spec_of("features"),
        code=code_of("features"),
    shell:
        "{PYTHON:q} -m pipeline features --spec {params.spec:q} --model {input.model:q}"
        " --corpus {input.corpus:q} --documents {input.documents:q}"
        " --activations {input.activations:q} --sae {input.sae:q} --out {output:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"


rule feature_page:
    input:
        features="results/{scale}/{paper}/features/{latents}.parquet",
        upstream=upstream_of,
    output:
        report(
            "results/{scale}/{paper}/features/{latents}.html",
            category="{paper}",
            subcategory="features",
            caption="captions/features.rst",
        ),
    log:
        "results/logs/{scale}/{paper}/feature_page_{latents}.log",
    params:
        spec=spec_of("title"),
        code=code_of("feature_page"),
    shell:
        "{PYTHON:q} -m pipeline feature_page --spec {params.spec:q} --features {input.features:q}"
        " --out {output:q} 2> {log:q}"
