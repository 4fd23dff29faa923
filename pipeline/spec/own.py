"""How a job of the paper's own is called: what stands under own.<stage> beside the stage's options.

The core has one rule for all own stages (rules/own.smk). What a stage reads, writes and asks for
follows from the few keys below; all others are the stage's options, which the job is handed.
"""

from typing import Any

from pydantic import Field

from pipeline.spec.base import Name, Section


class Resources(Section):
    """What a job asks the scheduler for."""

    mem_mb: int = Field(default=8000, ge=1, description="MB of memory")
    runtime: int = Field(default=120, ge=1, description="minutes, at most")
    gpu: int = Field(default=1, ge=0, le=1, description="0: the stage computes without one")
    threads: int = Field(default=2, ge=1, description="CPU threads; at the scale smoke always 1")


class OwnStage(Section):
    """The job of one own stage. Its tables stand among its options: `tables: [...]`."""

    script: str = Field(
        default="", pattern=r"^(\w+\.py)?$", description="beside paper.yaml; default: <stage>.py"
    )
    needs: list[str] = Field(
        default=[],
        description="models, activations, saes, transcoders, crosscoders, corpora, labels (of "
        "every arm); corpus; training; <stage>.models (of own.<stage>.models), <stage>.corpora; "
        "<stage>/<table or file>",
    )
    makes: dict[Name, str] = Field(
        default={}, description="further outputs: name: file.ending, or folder/"
    )
    code: list[str] = Field(
        default=[], description="files of the folder that it uses and does not import, e.g. data.py"
    )
    resources: Resources = Resources()


def parted(paper: Any) -> Any:
    """The data of a paper.yaml with the keys of `OwnStage` taken out of own and put under stages.

    So options that a job is handed hold nothing about how it is called, and more memory reruns
    nothing.
    """
    own = paper.get("own") if isinstance(paper, dict) else None
    if not isinstance(own, dict):
        return paper
    stages, options = dict(paper.get("stages", {})), dict(own)
    for name, section in own.items():
        if not isinstance(section, dict):
            continue
        called = {k: v for k, v in section.items() if k in OwnStage.model_fields}
        if called:
            stages[name] = called
            options[name] = {k: v for k, v in section.items() if k not in called}
    return paper | {"own": options} | ({"stages": stages} if stages else {})
