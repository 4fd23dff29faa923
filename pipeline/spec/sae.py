"""The section sae of paper.yaml: dictionaries, and the training that they share."""

import math
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from pipeline.errors import nearest
from pipeline.spec.base import (
    CROSSED,
    IMPORTED,
    IMPORTED_CROSSED,
    IMPORTED_LAYERS,
    LAYERED,
    TRAINED,
    Name,
    OverSources,
    Section,
    pairs_of_layers,
    sentence,
)
from pipeline.spec.imports import ImportedCrosscoder, ImportedLayers, ImportSpec

MOST = 1_000  # dictionaries of a grid


class SaeTraining(Section):
    """The stream and the schedule that every dictionary of a paper shares."""

    n_rows: int = Field(default=500_000, ge=1, description="rows shown, over all epochs")
    batch_size: int = Field(default=4096, ge=1, description="rows a step")
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, description="Adam's; Gao et al. use 6.25e-10")
    warmup_steps: int = Field(default=20, ge=0, description="linear, from 0 to lr")
    decay_share: float = Field(
        default=0.2, ge=0, le=1, description="last share of the steps, linear to 0"
    )
    dead_rows: int = Field(
        default=100_000, ge=1, description="a latent silent for this many rows is dead"
    )
    normalize: Literal["none", "expected_average_only_in"] = Field(
        default="expected_average_only_in",
        description="scale rows to a mean norm of sqrt(d_in); folded into the saved weights",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the operands of products on a GPU, where an architecture has a fast step; "
        "weights and sums are float32",
    )
    buffer_rows: int = Field(default=65_536, ge=1, description="rows mixed in memory at a time")
    seed: int = Field(default=0, ge=0, description="of the order of rows")
    checkpoint_seconds: float = Field(default=60.0, gt=0, exclude=True)

    @model_validator(mode="after")
    def _complete(self) -> "SaeTraining":
        if self.n_rows < self.batch_size:
            raise ValueError(
                f"n_rows {self.n_rows} is less than one batch of {self.batch_size}; raise n_rows "
                f"or lower batch_size"
            )
        return self


def _number(value: Any) -> Any:
    """One sentence in place of pydantic's two for a value that is neither float nor int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"only numbers vary in a grid, got {str(value)[:80]!r}; write a dictionary of its own "
            f"for each such value"
        )
    return value


InGrid = Annotated[float | int, BeforeValidator(_number)]


class SaeSpec(Section):
    """One dictionary, or with grid: one for each combination, named name_k32_d4096."""

    architecture: Literal[
        "standard", "gated", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu",
        "matching_pursuit",
    ] = Field(description="SAELens's name")  # fmt: skip
    hook: str = Field(default="", description="default: the only hook of the activations section")
    output_hook: str = Field(
        default="", description="a transcoder: the hook that is reconstructed; default: hook itself"
    )
    arms: list[Name] = Field(default=[], description="default: all arms")
    d_sae: int = Field(default=0, ge=0, description="latents")
    k: int = Field(
        default=0, ge=0, description="latents active a row: topk, matching_pursuit (at most); in "
        "the mean: batchtopk, matryoshka_batchtopk",
    )  # fmt: skip
    aux_loss_coefficient: float = Field(
        default=1.0,
        ge=0,
        description="topk and its kin: of AuxK (default: SAELens's; Gao et al. 2024, App. A.2, "
        "have 1/32); 0: none",
    )
    topk_threshold_lr: float = Field(
        default=0.01,
        gt=0,
        le=1,
        exclude_if=lambda value: value == 0.01,
        description="batchtopk, matryoshka_batchtopk: share of the way to a batch's smallest score "
        "that the threshold of inference moves (default: SAELens's); it starts at 0, so that a run "
        "of a few hundred steps wants a larger one",
    )
    matryoshka_shares: list[float] = Field(
        default=[1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0],
        description="nested widths as shares of d_sae, rising to 1 (default: the five of Bussmann "
        "et al. 2025, whose parts double)",
    )
    l1_coefficient: float = Field(default=0.0, ge=0, description="standard, gated")
    l1_warmup_steps: int = Field(default=0, ge=0)
    l0_coefficient: float = Field(default=0.0, ge=0, description="jumprelu")
    l0_warmup_steps: int = Field(default=0, ge=0)
    jumprelu_bandwidth: float = Field(default=0.05, gt=0, description="of the kernel (SAELens)")
    jumprelu_init_threshold: float = Field(default=0.01, gt=0, description="SAELens's default")
    resample_steps: list[int] = Field(
        default=[],
        description="standard: steps after which dead latents are resampled (Bricken et al. 2023: "
        "25,000 to 100,000)",
    )
    resample_window: int = Field(
        default=12_500, ge=1, description="steps of silence that count as dead then"
    )
    resample_rows: int = Field(
        default=819_200, ge=1, description="rows among which new directions are drawn"
    )
    jumprelu_ste_to_input: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="pseudo-derivatives train the encoder, too (Anthropic), not only the threshold "
        "(Rajamanoharan et al. 2024)",
    )
    frozen_decoder: bool = Field(
        default=False, description="null arm: decoder directions stay as drawn; the encoder trains"
    )
    seed: int = Field(default=0, ge=0, description="of the initial weights")
    grid: dict[str, list[InGrid]] = Field(default={}, description="field -> values")

    SHORT: ClassVar = {
        "d_sae": "d", "l1_coefficient": "c", "l0_coefficient": "l0", "aux_loss_coefficient": "aux",
    }  # fmt: skip
    NEEDS: ClassVar = {
        "standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient",
    }  # fmt: skip  # all others need k
    TRANSCODERS: ClassVar = ("standard", "jumprelu", "batchtopk", "matryoshka_batchtopk")

    @model_validator(mode="after")
    def _complete(self) -> "SaeSpec":
        if (n := math.prod(map(len, self.grid.values()))) > MOST:
            raise ValueError(f"grid makes {n} dictionaries; {MOST} are the most")
        for field in self.grid:
            if field not in type(self).model_fields or field in ("grid", "architecture"):
                raise ValueError(f"grid: unknown field '{field}'")
        has = lambda f: getattr(self, f) or f in self.grid  # noqa: E731
        if not has("d_sae"):
            raise ValueError("d_sae (the number of latents) is missing")
        if not has(needed := self.NEEDS.get(self.architecture, "k")):
            raise ValueError(f"architecture: {self.architecture} needs {needed}")
        if self.output_hook and self.architecture not in self.TRANSCODERS:
            raise ValueError(
                f"output_hook: SAELens has no {self.architecture} transcoder to save; use "
                f"{', '.join(self.TRANSCODERS)}"
            )
        steps = self.resample_steps
        if steps and (self.architecture != "standard" or self.frozen_decoder):
            raise ValueError("resample_steps: only for architecture standard, decoder not frozen")
        if steps and self.output_hook:
            raise ValueError("resample_steps: not for transcoders; leave output_hook out")
        if sorted(set(steps)) != steps or (steps and steps[0] < 1):
            raise ValueError(f"resample_steps: {steps} do not rise from 1 or more")
        shares = self.matryoshka_shares
        if not shares or sorted(set(shares)) != shares or shares[0] <= 0 or shares[-1] != 1:
            raise ValueError(f"matryoshka_shares: {shares} do not rise from above 0 to 1")
        return self

    @property
    def stream(self) -> str:
        """The rows it is trained on; dictionaries with the same ones share a job."""
        return f"{self.hook} to {self.output_hook}" if self.output_hook else self.hook

    @property
    def widths(self) -> list[int]:
        """matryoshka_batchtopk: latents of each level."""
        return sorted({max(1, round(share * self.d_sae)) for share in self.matryoshka_shares})

    def expand(self, name: str) -> "dict[str, SaeSpec]":
        """Name -> dictionary for every combination of the grid."""
        if not self.grid:
            return {name: self}
        out = {}
        base = self.model_dump(exclude={"grid"})
        for values in product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            label = "_".join(
                f"{self.SHORT.get(f, f)}{v:g}".replace(".", "p").replace("-", "m")
                for f, v in point.items()
            )
            try:
                out[f"{name}_{label}"] = type(self).model_validate({**base, **point})
            except ValidationError as e:
                raise ValueError(f"dictionaries.{name}: grid: {sentence(e)}") from None
        return out


class CrosscoderSpec(SaeSpec, OverSources):
    """One dictionary of several sources: hooks of a model, or a hook of several models.

    Lindsey et al. 2024 (L1), Minder et al. 2025, 2504.02922 (BatchTopK).

    sae:
      dictionaries:
        layers: {architecture: standard, d_sae: 4096, l1_coefficient: 2,
                 hooks: [blocks.2.hook_resid_post, blocks.4.hook_resid_post]}
        tuning: {architecture: batchtopk, models: [base, tuned], hook: blocks.4.hook_resid_post,
                 d_sae: 4096, k: 32}
    """

    hooks: list[str] = Field(default=[], description="hooks of one model, side by side")
    models: list[Name] = Field(
        default=[], description="arms whose models read the same tokens, side by side"
    )

    ARCHITECTURES: ClassVar = ("standard", "batchtopk")

    @model_validator(mode="after")
    def _sources(self) -> "CrosscoderSpec":
        if self.architecture not in self.ARCHITECTURES:
            raise ValueError(
                f"architecture: {self.architecture} is not trained over several sources; use "
                f"{' (L1) or '.join(self.ARCHITECTURES)}"
            )
        for key in ("output_hook", "resample_steps", "frozen_decoder"):
            if getattr(self, key):
                raise ValueError(f"{key}: not for crosscoders; remove it, or hooks and models")
        self.check_sources()
        return self


class TranscodersSpec(SaeSpec):
    """Transcoders of all layers: one of each layer, or a cross-layer transcoder.

    Dunefsky et al. 2024, 2406.11944; Paulo et al. 2025, 2501.18823 (skip); Ameisen et al. 2025.

    activations:
      layers: [0, 1]
      hooks: ["blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out"]
    sae:
      dictionaries:
        single: {layers: each, architecture: topk, d_sae: 1024, k: 16, skip: true}
        cross: {layers: cross, architecture: jumprelu, d_sae: 1024, l0_coefficient: 2}
    """

    layers: Literal["each", "cross"] = Field(
        description="each: a transcoder a layer; cross: a feature writes to all later layers, too"
    )
    reads: str = Field(default="mlp.hook_in", description="the hook of a layer that is read")
    writes: str = Field(default="hook_mlp_out", description="the hook that is reconstructed")
    skip: bool = Field(default=False, description="each: y_hat has a linear term in x, W_skip")
    tanh_scale: float = Field(
        default=4.0, gt=0, description="jumprelu: c of the penalty tanh(c |W_dec| f) (SAELens's)"
    )
    l0_warmup_share: float = Field(
        default=1.0, ge=0, le=1, description="share of the steps over which l0_coefficient rises "
        "from 0 (Ameisen et al. 2025: all)",
    )  # fmt: skip
    pre_act_coefficient: float = Field(
        default=3e-6, ge=0, description="jumprelu: of the pre-activation loss of dead latents "
        "(Anthropic's value, as SAELens states)",
    )  # fmt: skip

    ARCHITECTURES: ClassVar = ("topk", "batchtopk", "jumprelu")

    @model_validator(mode="after")
    def _layered(self) -> "TranscodersSpec":
        if self.architecture not in self.ARCHITECTURES:
            raise ValueError(
                f"architecture: {self.architecture} is not trained over all layers; use "
                f"{', '.join(self.ARCHITECTURES)}"
            )
        for key in ("hook", "output_hook", "resample_steps", "l0_warmup_steps"):
            if getattr(self, key):
                instead = {"l0_warmup_steps": "l0_warmup_share", "resample_steps": "nothing"}
                raise ValueError(
                    f"{key}: not for transcoders of all layers; write "
                    f"{instead.get(key, 'reads and writes')} in its place"
                )
        if self.skip and self.layers == "cross":
            raise ValueError(
                "skip: circuit-tracer's files of a cross-layer transcoder hold no W_skip; leave it "
                "out, or write layers: each"
            )
        return self

    @property
    def stream(self) -> str:
        """What is read and written; sets with the same share a job."""
        return f"{self.reads} to {self.writes}"

    def pairs(self, stored: list[str]) -> list[tuple[str, str]]:
        """(hook read, hook written) of each layer, from 0 on, out of the stored hooks.

        Raises:
            ValueError: a layer of these has one of the two and not the other, or is missing.
        """
        return pairs_of_layers(stored, self.reads, self.writes)


def check_output(output_hook: str, name: str, hooks: list[str], max_norm_ratio: float) -> None:
    """Raise where the activations section cannot serve a transcoder."""
    if output_hook not in hooks:
        raise ValueError(
            f"sae.{name}: output_hook '{output_hook}' is not stored"
            f"{nearest(output_hook, hooks)}; add it to activations.hooks"
        )
    if max_norm_ratio:
        raise ValueError(
            f"sae.{name}: output_hook needs the same tokens at two hooks, and "
            f"activations.max_norm_ratio drops tokens hook by hook; set it to 0"
        )


def _kind(value: Any) -> str:
    """Which kind an entry of dictionaries is, by the keys that only it has."""
    if isinstance(value, ImportedLayers) or (
        isinstance(value, dict) and "source" in value and "layers" in value
    ):
        return IMPORTED_LAYERS
    crossed = isinstance(value, dict) and ("hooks" in value or "models" in value)
    if isinstance(value, ImportedCrosscoder) or (crossed and "source" in value):
        return IMPORTED_CROSSED
    if isinstance(value, ImportSpec) or (isinstance(value, dict) and "source" in value):
        return IMPORTED
    if isinstance(value, TranscodersSpec) or (isinstance(value, dict) and "layers" in value):
        return LAYERED
    return CROSSED if crossed or isinstance(value, CrosscoderSpec) else TRAINED


# Trained here, over one source, several or all layers, or published by others.
Dictionary = Annotated[
    Annotated[SaeSpec, Tag(TRAINED)]
    | Annotated[CrosscoderSpec, Tag(CROSSED)]
    | Annotated[TranscodersSpec, Tag(LAYERED)]
    | Annotated[ImportSpec, Tag(IMPORTED)]
    | Annotated[ImportedLayers, Tag(IMPORTED_LAYERS)]
    | Annotated[ImportedCrosscoder, Tag(IMPORTED_CROSSED)],
    Discriminator(_kind),
]
OfSources = CrosscoderSpec | ImportedCrosscoder  # crosscoders, whoever trained them
OfLayers = TranscodersSpec | ImportedLayers  # transcoders of all layers, whoever trained them


class SaeSection(Section):
    training: SaeTraining = SaeTraining()
    dictionaries: dict[Name, Dictionary] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "SaeSection":
        names = [n for name, spec in self.dictionaries.items() for n in spec.expand(name)]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"the grids make two dictionaries '{min(twice)}'; rename one")
        return self

    def expanded(self) -> dict[str, SaeSpec | ImportSpec | ImportedLayers | ImportedCrosscoder]:
        """Expanded name -> dictionary."""
        return {
            n: s for name, spec in self.dictionaries.items() for n, s in spec.expand(name).items()
        }


def check_window(paper: Any) -> None:
    """ValueError where a section needs training rows that `activations.window` does not keep."""
    if paper.activations is None or paper.activations.window is None:
        return
    rest = "keeps held-out rows alone; remove one of the two"
    named = [s for s in ("probes", "benchmarks") if getattr(paper, s) is not None]
    named += [f"own.{n}" for n, own in paper.stages.items() if "activations" in own.needs]
    saes = paper.sae.expanded() if paper.sae else {}
    named += [f"sae.{name}" for name, spec in saes.items() if isinstance(spec, OfSources)]
    if named:
        raise ValueError(f"{named[0]}: reads all stored rows, and activations.window {rest}")
    if not saes:
        raise ValueError("activations.window: is for dictionaries; add a section sae, or remove it")
    for name, spec in saes.items():
        if isinstance(spec, SaeSpec) and spec.resample_steps:
            raise ValueError(
                f"sae.{name}: resample_steps: reads rows beyond those that activations.window has "
                f"made; remove one of the two"
            )
