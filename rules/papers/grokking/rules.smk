# All measures of the paper, from the checkpoints of both runs.
rule grokking_fourier:
    input:
        stage=own_file_of("fourier.py"),
        measured=own_file_of("measured.py"),
        circuit=own_file_of("circuit.py"),
        waves=own_file_of("waves.py"),
        ablations=own_file_of("ablations.py"),
        phases=own_file_of("phases.py"),
        data=own_file_of("data.py"),
        decay=training_of("decay", "manifest.json"),
        no_decay=training_of("no_decay", "manifest.json"),
        decay_checkpoints=training_of("decay", "checkpoints"),
        no_decay_checkpoints=training_of("no_decay", "checkpoints"),
    output:
        progress="results/{scale}/{paper}/fourier/progress.parquet",
        phases="results/{scale}/{paper}/fourier/phases.parquet",
        spectrum="results/{scale}/{paper}/fourier/spectrum.parquet",
        circle="results/{scale}/{paper}/fourier/circle.parquet",
        frequencies="results/{scale}/{paper}/fourier/frequencies.parquet",
        neurons="results/{scale}/{paper}/fourier/neurons.parquet",
        edits="results/{scale}/{paper}/fourier/edits.parquet",
    log:
        "results/logs/{scale}/{paper}/fourier.log",
    benchmark:
        "results/benchmarks/{scale}/{paper}/fourier.tsv"
    wildcard_constraints:
        paper="grokking",
    threads: THREADS
    resources:
        mem_mb=6000,
        runtime=60,
        gpu=1,
    params:
        spec=spec_of("own.fourier"),
        code=code_of(
            "fourier",
            "fourier.py",
            "measured.py",
            "circuit.py",
            "waves.py",
            "ablations.py",
            "phases.py",
            "data.py",
        ),
    shell:
        "{PYTHON:q} {input.stage:q} --spec {params.spec:q}"
        " --code {input.stage:q} {input.measured:q} {input.circuit:q} {input.waves:q}"
        " {input.ablations:q} {input.phases:q} {input.data:q}"
        " --names decay no_decay --runs {input.decay:q} {input.no_decay:q} --data {input.data:q}"
        " --progress {output.progress:q} --phases {output.phases:q}"
        " --spectrum {output.spectrum:q} --circle {output.circle:q}"
        " --frequencies {output.frequencies:q} --neurons {output.neurons:q}"
        " --edits {output.edits:q} --device {DEVICE} --threads {threads} 2> {log:q}"
