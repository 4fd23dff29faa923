# The text of a corpus -> a tokenizer, for models that are trained here.
rule tokenizer:
    input:
        text=item_source_of("tokenizer", "text"),
    output:
        model="results/store/tokenizer/{tokenizer}/model.json",
        checkpoint=directory("results/store/tokenizer/{tokenizer}/checkpoint"),
    log:
        "results/logs/tokenizer/{tokenizer}.log",
    benchmark:
        "results/benchmarks/tokenizer/{tokenizer}.tsv"
    threads: THREADS
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        spec=item_spec_of("tokenizer"),
        code=code_of("tokenizer"),
    shell:
        "{PYTHON:q} -m pipeline tokenizer --spec {params.spec:q} --out {output.model:q}"
        " --checkpoint {output.checkpoint:q} --threads {threads} 2> {log:q}"
