# Stages of papers' own, as own.<stage> of paper.yaml declares them: pipeline/papers/own.py.


def product(path):
    """An output of an own stage, which is a folder where its path ends in a slash."""
    return directory(path[:-1]) if own.is_folder(path) else path


def own_input_of(stage):
    """Named inputs of an own stage: its script, its code, and what it needs."""
    given = {"script": ask(OWN.script, undated)(stage), "code": ask(OWN.code_files, undated)(stage)}
    needs = ask(OWN.inputs)(stage)
    return unpack(lambda wildcards: {k: f(wildcards) for k, f in given.items()} | needs(wildcards))


def own_resources_of(stage, name):
    """What an own stage asks for; at smoke scale a job is mostly start-up, which has one thread."""
    asked = ask(OWN.resources)(stage)
    return lambda w: 1 if name == "threads" and w.scale == "smoke" else getattr(asked(w), name)


def options(wildcards, input, output):
    """The files of an own stage as options of its command."""
    return own.options(input, output)


for MADE in own.rules(RUN):

    rule:
        name:
            MADE.name
        input:
            own_input_of(MADE.stage),
        output:
            **{name: product(path) for name, path in MADE.outputs.items()},
        log:
            MADE.beside("logs", "log"),
        benchmark:
            MADE.beside("benchmarks", "tsv")
        wildcard_constraints:
            paper=MADE.paper,
            scale=MADE.scales,
        threads: own_resources_of(MADE.stage, "threads")
        resources:
            mem_mb=own_resources_of(MADE.stage, "mem_mb"),
            runtime=own_resources_of(MADE.stage, "runtime"),
            gpu=own_resources_of(MADE.stage, "gpu"),
        params:
            spec=own_spec_of(MADE.stage),
            code=own_code_of(MADE.stage),
            options=options,
            stage=MADE.stage,
        shell:
            "{PYTHON:q} -m pipeline own {params.stage} {input.script:q} --spec {params.spec:q}"
            " --code {input.code:q} {params.options:q} --device {DEVICE} --threads {threads} 2> {log:q}"
