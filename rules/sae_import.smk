# A published dictionary, converted and compared with its original.
rule sae_import:
    input:
        model=item_input_of("sae_import", "model", "model.json"),
        checkpoint=item_input_of("sae_import", "model", "checkpoint"),
    output:
        manifest="results/store/sae_import/{sae_import}/manifest.json",
        saes=directory("results/store/sae_import/{sae_import}/saes"),
    log:
        "results/logs/sae_import/{sae_import}.log",
    benchmark:
        "results/benchmarks/sae_import/{sae_import}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        spec=item_spec_of("sae_import"),
        code=code_of("sae_import"),
    shell:
        "{PYTHON:q} -m pipeline sae_import --spec {params.spec:q} --model {input.model:q}"
        " --out {output.manifest:q} --saes {output.saes:q} --threads {threads} 2> {log:q}"


# Published transcoders of all layers, likewise; mem_mb holds those that a laptop can trace.
rule transcoders_import:
    input:
        model=item_input_of("transcoders_import", "model", "model.json"),
        checkpoint=item_input_of("transcoders_import", "model", "checkpoint"),
    output:
        manifest="results/store/transcoders_import/{transcoders_import}/manifest.json",
        saes=directory("results/store/transcoders_import/{transcoders_import}/saes"),
    log:
        "results/logs/transcoders_import/{transcoders_import}.log",
    benchmark:
        "results/benchmarks/transcoders_import/{transcoders_import}.tsv"
    threads: THREADS
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        spec=item_spec_of("transcoders_import"),
        code=code_of("transcoders_import"),
    shell:
        "{PYTHON:q} -m pipeline transcoders_import --spec {params.spec:q}"
        " --model {input.model:q} --out {output.manifest:q} --saes {output.saes:q}"
        " --threads {threads} 2> {log:q}"


# A published crosscoder, converted and compared with its original.
rule crosscoder_import:
    input:
        models=item_inputs_of("crosscoder_import", "model.json", "model"),
        checkpoints=item_inputs_of("crosscoder_import", "checkpoint", "model"),
    output:
        manifest="results/store/crosscoder_import/{crosscoder_import}/manifest.json",
        saes=directory("results/store/crosscoder_import/{crosscoder_import}/saes"),
    log:
        "results/logs/crosscoder_import/{crosscoder_import}.log",
    benchmark:
        "results/benchmarks/crosscoder_import/{crosscoder_import}.tsv"
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        spec=item_spec_of("crosscoder_import"),
        code=code_of("crosscoder_import"),
    shell:
        "{PYTHON:q} -m pipeline crosscoder_import --spec {params.spec:q}"
        " --models {input.models:q} --out {output.manifest:q} --saes {output.saes:q}"
        " --threads {threads} 2> {log:q}"
