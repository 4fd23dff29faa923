# All dictionaries of the paper, trained on one stream of samples and measured, in one job. The job
# takes one GPU; at the paper's scale, its command started once more a GPU, with --train-only added,
# divides the work.
rule synth_sae_bench_recovery:
    input:
        stage=own_file_of("recovery.py"),
        world=own_file_of("world.py"),
        learner=own_file_of("learner.py"),
        steps=own_file_of("steps.py"),
        pursuit=own_file_of("pursuit.py"),
        measures=own_file_of("measures.py"),
    output:
        dictionaries="results/{scale}/{paper}/recovery/dictionaries.parquet",
        latents="results/{scale}/{paper}/recovery/latents.parquet",
        features="results/{scale}/{paper}/recovery/features.parquet",
        history="results/{scale}/{paper}/recovery/history.parquet",
        saes=directory("results/{scale}/{paper}/recovery/saes"),
    log:
        "results/logs/{scale}/{paper}/recovery.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/recovery.tsv"
    wildcard_constraints:
        paper="synth_sae_bench",
    threads: THREADS
    resources:
        mem_mb=16000,
        runtime=120,
        gpu=1,
    params:
        spec=spec_of("own.recovery"),
        code=code_of(
            "recovery",
            "recovery.py",
            "world.py",
            "learner.py",
            "steps.py",
            "pursuit.py",
            "measures.py",
        ),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q} --code {input:q}"
        " --dictionaries {output.dictionaries:q} --latents {output.latents:q}"
        " --features {output.features:q} --history {output.history:q} --saes {output.saes:q}"
        " --device {DEVICE} --threads {threads} 2> {log:q}"
