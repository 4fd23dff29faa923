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
