"""The section circuits: what heads, MLPs and the paths between them do to an output."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.spec.base import Name, Section, Seeds

Method = Literal["direct_logit", "activation_patching", "attribution_patching", "path_patching",
                 "eap", "eap_ig", "atp_star", "acdc",
                 "latent_attribution", "latent_ig"]  # fmt: skip
LATENT_METHODS = ("latent_attribution", "latent_ig")


class AcdcSpec(Section):
    """ACDC (Conmy et al. 2023): edges are cut where the loss rises by less than a threshold."""

    ablation: Literal["corrupt", "zero"] = Field(
        default="corrupt",
        description="what a cut edge carries: activations of the corrupt prompt, or 0",
    )
    thresholds: list[Annotated[float, Field(gt=0)]] = Field(
        default=[0.1, 0.01, 0.001], min_length=1, description="tau, nats"
    )


class CircuitsSpec(Section):
    """Pairs of prompts, and the methods that say which parts of a model tell them apart."""

    prompts: Name = Field(description="a function of the paper's prompts.py")
    options: dict[str, Any] = Field(default={}, description="handed to that function")
    n_prompts: int = Field(default=16, ge=1, description="pairs of prompts")
    seeds: Seeds = Field(
        default=[0],
        description="a draw of prompts each, and of the edges of n_drawn; every measure has one "
        "value for each",
    )
    without: list[Name] = Field(default=[], description="arms that are left out")
    methods: list[Method] = Field(
        default=["direct_logit", "activation_patching", "attribution_patching"], min_length=1
    )
    direction: Literal["noising", "denoising"] = Field(
        default="noising",
        description="noising: activations of the corrupt prompt into the clean run (Wang et al. "
        "2022); denoising: of the clean prompt into the corrupt run (Meng et al. 2022)",
    )
    positions: list[Name] = Field(
        default=[], description="where the stream is patched, as the prompts name them"
    )
    ig_steps: int = Field(
        default=5, ge=1, description="eap_ig, latent_ig: points between the two prompts"
    )
    n_exact: int = Field(
        default=24,
        ge=2,
        description="edges or latents of largest score that are patched exactly, a method",
    )
    saes: list[str] = Field(
        default=[],
        exclude_if=lambda value: not value,
        description="latent_attribution, latent_ig: expanded names of dictionaries, one a hook",
    )
    n_drawn: int = Field(
        default=0, ge=0, description="edges drawn at random that are patched exactly as well"
    )
    acdc: AcdcSpec = AcdcSpec()

    @model_validator(mode="after")
    def _once(self) -> "CircuitsSpec":
        for method in self.methods:
            if self.methods.count(method) > 1:
                raise ValueError(f"methods: '{method}' stands twice; name it once")
        wants = [m for m in self.methods if m in LATENT_METHODS]
        if bool(wants) != bool(self.saes):
            raise ValueError(
                f"{wants[0]} needs saes: the dictionaries whose latents are scored"
                if wants
                else f"saes serve {' and '.join(LATENT_METHODS)} only; name one under methods"
            )
        return self
