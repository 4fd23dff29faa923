# Stages of papers' own, as own.<stage> of paper.yaml declares them: pipeline/papers/own.py.


def product(path):
    """An output of an own stage, which is a folder where its path ends in a slash."""
    return directory(path[:-1]) if own.is_folder(path) else path


def own_input_of(made):
    """Named inputs of a job: its script, its code, and what it needs."""
    script, code = ask(OWN.script, undated)(made.stage), ask(OWN.code_files, undated)(made.stage)
    needs = ask(OWN.inputs)(made.stage)
    return unpack(lambda wildcards: {"script": script(made), "code": code(made)} | needs(made))


def own_resource_of(made, name):
    """What a job asks for; at smoke scale it is mostly start-up, which has one thread."""
    asked = ask(OWN.resources)(made.stage)
    if name == "threads" and made.scale == "smoke":
        return 1
    return lambda wildcards: getattr(asked(made), name)


def own_param_of(made, method):
    """The answer of a method of OWN."""
    answer = ask(method)(made.stage)
    return lambda wildcards: answer(made)


def options(wildcards, input, output):
    """The files of an own stage as options of its command."""
    return own.options(input, output)


for MADE in own.rules(RUN):

    rule:
        name:
            MADE.name
        input:
            own_input_of(MADE),
        output:
            **{name: product(path) for name, path in MADE.outputs.items()},
        log:
            MADE.beside("logs", "log"),
        benchmark:
            MADE.beside("benchmarks", "tsv")
        threads: own_resource_of(MADE, "threads")
        resources:
            mem_mb=own_resource_of(MADE, "mem_mb"),
            runtime=own_resource_of(MADE, "runtime"),
            gpu=own_resource_of(MADE, "gpu"),
        params:
            spec=own_param_of(MADE, OWN.spec),
            code=own_param_of(MADE, OWN.code),
            options=options,
            stage=MADE.stage,
        shell:
            "{PYTHON:q} -m pipeline own {params.stage} {input.script:q} --spec {params.spec:q}"
            " --code {input.code:q} {params.options:q} --device {DEVICE} --threads {threads} 2> {log:q}"
