# Weights from a package, a hub, a folder or a training run -> safetensors, config and tokenizer.
rule model:
    input:
        training=item_input_of("model", "training", "manifest.json"),
        weights=item_input_of("model", "training", "checkpoints"),
        tokenizer=item_input_of("model", "tokenizer", "model.json"),
        vocabulary=item_input_of("model", "tokenizer", "checkpoint"),
    output:
        model="results/store/model/{model}/model.json",
        checkpoint=directory("results/store/model/{model}/checkpoint"),
    log:
        "results/logs/model/{model}.log",
    benchmark:
        "results/benchmarks/model/{model}.tsv"
    threads: THREADS
    resources:
        mem_mb=6000,
        runtime=60,
    params:
        spec=item_spec_of("model"),
        code=code_of("model"),
    shell:
        "{PYTHON:q} -m pipeline model --spec {params.spec:q} --out {output.model:q}"
        " --training {input.training:q} --tokenizer {input.tokenizer:q}"
        " --checkpoint {output.checkpoint:q} --threads {threads} 2> {log:q}"
