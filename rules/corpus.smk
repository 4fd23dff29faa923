# Text -> blocks of tokens, and the documents they came from.
rule corpus:
    input:
        text=item_source_of("corpus", "text"),
        tokenizer=item_input_of("corpus", "tokenizer", "model.json"),
        checkpoint=item_input_of("corpus", "tokenizer", "checkpoint"),
    output:
        tokens="results/store/corpus/{corpus}/tokens.parquet",
        documents="results/store/corpus/{corpus}/documents.parquet",
    log:
        "results/logs/corpus/{corpus}.log",
    benchmark:
        "results/benchmarks/corpus/{corpus}.tsv"
    threads: THREADS
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        spec=item_spec_of("corpus"),
        code=code_of("corpus"),
    shell:
        "{PYTHON:q} -m pipeline corpus --spec {params.spec:q} --tokenizer {input.tokenizer:q}"
        " --out {output.tokens:q} --documents {output.documents:q} --threads {threads} 2> {log:q}"
