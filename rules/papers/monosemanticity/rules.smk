# Latents beside neurons, another model's latents, and wider dictionaries', in one job.
rule monosemanticity_latents:
    input:
        stage=own_file_of("latents.py"),
        tally=own_file_of("tally.py"),
        matching=own_file_of("matching.py"),
        splitting=own_file_of("splitting.py"),
        models=models_of("model.json"),
        checkpoints=models_of("checkpoint"),
        activations=arms_of("activations", "manifest.json"),
        shards=arms_of("activations", "shards"),
        saes=arms_of("sae", "manifest.json"),
        folders=arms_of("sae", "saes"),
    output:
        units="results/{scale}/{paper}/latents/units.parquet",
        matches="results/{scale}/{paper}/latents/matches.parquet",
        splitting="results/{scale}/{paper}/latents/splitting.parquet",
        tree="results/{scale}/{paper}/latents/tree.parquet",
    log:
        "results/logs/{scale}/{paper}/latents.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/latents.tsv"
    wildcard_constraints:
        paper="monosemanticity",
    threads: THREADS
    resources:
        mem_mb=8000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.latents", "arms"),
        code=code_of("latents", "latents.py", "tally.py", "matching.py", "splitting.py"),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q}"
        " --code {input.stage:q} {input.tally:q} {input.matching:q} {input.splitting:q}"
        " --models {input.models:q} --activations {input.activations:q} --saes {input.saes:q}"
        " --units {output.units:q} --matches {output.matches:q}"
        " --splitting {output.splitting:q} --tree {output.tree:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
