# Sparse feature circuits of subject-verb agreement, of all structures of prompts, in one job.
rule sfc_agreement:
    input:
        stage=own_file_of("agreement.py"),
        prompts=own_file_of("prompts.py"),
        curves=own_file_of("curves.py"),
        graph=own_file_of("graph.py"),
        model=arms_of("model", "model.json"),
        checkpoint=arms_of("model", "checkpoint"),
        activations=arms_of("activations", "manifest.json"),
        shards=arms_of("activations", "shards"),
        saes=arms_of("sae", "manifest.json"),
        folders=arms_of("sae", "saes"),
    output:
        behaviour="results/{scale}/{paper}/agreement/behaviour.parquet",
        curves="results/{scale}/{paper}/agreement/curves.parquet",
        nodes="results/{scale}/{paper}/agreement/nodes.parquet",
        sites="results/{scale}/{paper}/agreement/sites.parquet",
        graph_nodes="results/{scale}/{paper}/agreement/graph_nodes.parquet",
        graph_edges="results/{scale}/{paper}/agreement/graph_edges.parquet",
    log:
        "results/logs/{scale}/{paper}/agreement.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/agreement.tsv"
    wildcard_constraints:
        paper="sparse_feature_circuits",
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=1,
    params:
        spec=spec_of("own.agreement"),
        code=code_of("agreement", "agreement.py", "prompts.py", "curves.py", "graph.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --model {input.model:q}"
        " --code {input.stage:q} {input.prompts:q} {input.curves:q} {input.graph:q}"
        " --activations {input.activations:q} --saes {input.saes:q}"
        " --behaviour {output.behaviour:q} --curves {output.curves:q} --nodes {output.nodes:q}"
        " --sites {output.sites:q} --graph-nodes {output.graph_nodes:q}"
        " --graph-edges {output.graph_edges:q} --device {DEVICE} --threads {threads} 2> {log:q}"


# The graph of one structure of prompts, as Neuronpedia and circuit-tracer read it.
rule sfc_export_graph:
    input:
        model=arms_of("model", "model.json"),
        nodes="results/{scale}/{paper}/agreement/graph_nodes.parquet",
        edges="results/{scale}/{paper}/agreement/graph_edges.parquet",
        prompts="results/{scale}/{paper}/agreement/behaviour.parquet",
    output:
        "results/{scale}/{paper}/exports/graph_{structure}.json",
    log:
        "results/logs/{scale}/{paper}/export_graph_{structure}.log",
    wildcard_constraints:
        paper="sparse_feature_circuits",
        structure=r"\w+",
    params:
        spec=graph_spec,
        code=code_of("attribution_graph"),
    shell:
        "{PYTHON:q} -m pipeline attribution_graph --spec {params.spec:q} --model {input.model:q}"
        " --nodes {input.nodes:q} --edges {input.edges:q} --prompts {input.prompts:q}"
        " --out {output:q} 2> {log:q}"
