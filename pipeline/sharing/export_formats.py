"""The formats in which a dictionary leaves: what may stand in them, checked before it is written.

* SAELens's folder (sae-lens 6.54): cfg.json and sae_weights.safetensors, shapes by architecture.
* SAEBench's core result (sae-bench 0.6.0, evals/core/eval_output_schema_core.json).
* Feature details as Neuronpedia's attribution graphs and circuit-tracer 0.5.0 read them
  (circuit_tracer/frontend/feature_models.py; its page counts 100 quantile_values).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import RetraceError
from pipeline.spec.base import Section

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
MILLISECONDS = 9_999_999_999_999  # the largest time that SAEBench's own model takes
VECTORS = {  # SAELens architecture -> its vectors [d_sae]
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
    "matching_pursuit": set(),
    "transcoder": {"b_enc"},
    "jumprelu_transcoder": {"b_enc", "threshold"},
}


# --- SAELens -------------------------------------------------------------------------------


class SaeLensMetadata(BaseModel):
    """What a reader needs to know of the stream."""

    model_name: str = Field(min_length=1)
    hook_name: str = Field(min_length=1)
    hook_name_bridge: str = Field(min_length=1)
    hook_name_out: str | None = Field(default=None, min_length=1)
    hook_name_out_bridge: str | None = Field(default=None, min_length=1)
    context_size: int = Field(ge=1)
    prepend_bos: bool
    dataset_path: str = Field(min_length=1)
    seqpos_slice: list[int | None] = Field(description="slice(*this) is what was trained on")

    @model_validator(mode="after")
    def _slice(self) -> "SaeLensMetadata":
        if len(self.seqpos_slice) != 2 or (self.seqpos_slice[0] or 0) < 0:
            raise ValueError(f"seqpos_slice is {self.seqpos_slice}, and not [first position, null]")
        return self


class SaeLensConfig(BaseModel):
    """cfg.json of a SAELens SAE for inference; architectures add keys of their own."""

    model_config = ConfigDict(extra="allow")

    architecture: Literal[tuple(VECTORS)]
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    d_out: int | None = Field(default=None, ge=1)
    dtype: Literal["float32", "float16", "bfloat16"]
    apply_b_dec_to_input: bool
    normalize_activations: Literal["none"]  # our scale is folded into the weights
    metadata: SaeLensMetadata

    @model_validator(mode="after")
    def _d_out(self) -> "SaeLensConfig":
        if ("transcoder" in self.architecture) != (self.d_out is not None):
            raise ValueError(f"architecture {self.architecture}: d_out is {self.d_out}")
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        d_out = self.d_out or self.d_in
        matrices = {"W_dec": (self.d_sae, d_out), "b_dec": (d_out,)}
        if self.architecture != "matching_pursuit":  # its encoder is its decoder
            matrices["W_enc"] = (self.d_in, self.d_sae)
        return matrices | dict.fromkeys(VECTORS[self.architecture], (self.d_sae,))


def check_weights(config: SaeLensConfig, weights: dict[str, Any], file: str) -> None:
    """Raise where tensors are missing, of another shape, or hold NaN or infinity."""
    import numpy as np

    for name, shape in config.shapes().items():
        found = weights[name].shape if name in weights else None
        if found != shape:
            raise RetraceError(
                f"{file}: {name} is {found or 'missing'}, and cfg.json says {shape}; delete the "
                f"folder, then run snakemake again"
            )
        if not np.isfinite(weights[name]).all():
            raise RetraceError(f"{file}: {name} holds NaN or infinity; train it at a lower lr")


# --- SAEBench ------------------------------------------------------------------------------


class Behaviour(Section):
    kl_div_score: float
    kl_div_with_ablation: float
    kl_div_with_sae: float


class Performance(Section):
    ce_loss_score: float
    ce_loss_with_ablation: NotNegative
    ce_loss_with_sae: NotNegative
    ce_loss_without_sae: NotNegative


class Reconstruction(Section):
    explained_variance: float = Field(le=1)
    explained_variance_legacy: float = Field(le=1)
    mse: NotNegative
    cossim: float = Field(ge=-1, le=1)


class Shrinkage(Section):
    l2_norm_in: NotNegative
    l2_norm_out: NotNegative
    l2_ratio: NotNegative
    relative_reconstruction_bias: float


class Sparsity(Section):
    l0: NotNegative
    l1: NotNegative


class TokenStats(Section):
    total_tokens_eval_reconstruction: int = Field(ge=1)
    total_tokens_eval_sparsity_variance: int = Field(ge=1)


class Miscellaneous(Section):
    freq_over_1_percent: Share
    freq_over_10_percent: Share
    normalized_freq_over_1_percent: Share
    normalized_freq_over_10_percent: Share
    average_max_encoder_cosine_sim: float = Field(ge=-1, le=1)
    average_max_decoder_cosine_sim: float = Field(ge=-1, le=1)
    frac_alive: Share


class CoreMetrics(Section):
    model_behavior_preservation: Behaviour
    model_performance_preservation: Performance
    reconstruction_quality: Reconstruction
    shrinkage: Shrinkage
    sparsity: Sparsity
    token_stats: TokenStats
    misc_metrics: Miscellaneous


class CoreConfig(Section):
    model_name: str
    llm_dtype: str
    batch_size_prompts: int = Field(ge=1)
    n_eval_reconstruction_batches: int = Field(ge=1)
    n_eval_sparsity_variance_batches: int = Field(ge=1)
    dataset: str
    context_size: int = Field(ge=2)
    compute_kl: bool = True
    compute_ce_loss: bool = True
    compute_l2_norms: bool = True
    compute_sparsity_metrics: bool = True
    compute_variance_metrics: bool = True
    compute_featurewise_density_statistics: bool = False
    compute_featurewise_weight_based_metrics: bool = False
    exclude_special_tokens_from_reconstruction: bool
    verbose: bool = False


class CoreResult(Section):
    """SAEBench's core result, but for the details of every latent, which it leaves optional."""

    eval_type_id: Literal["core"] = "core"
    eval_config: CoreConfig
    eval_id: str = Field(min_length=1)
    datetime_epoch_millis: int = Field(ge=0, le=MILLISECONDS)
    eval_result_metrics: CoreMetrics
    eval_result_details: list[dict] = Field(default=[], max_length=0)
    sae_bench_commit_hash: str
    sae_lens_id: str | None
    sae_lens_release_id: str | None
    sae_lens_version: str | None
    sae_cfg_dict: dict[str, Any]
    eval_result_unstructured: dict[str, Any]


# --- Neuronpedia ---------------------------------------------------------------------------


class Example(Section):
    tokens: list[str] = Field(min_length=1)
    tokens_acts_list: list[float]
    train_token_ind: int = Field(ge=0, description="of the token with the example's peak")
    is_repeated_datapoint: bool

    @model_validator(mode="after")
    def _aligned(self) -> "Example":
        n, acts = len(self.tokens), len(self.tokens_acts_list)
        if acts != n or self.train_token_ind >= n:
            raise ValueError(f"{n} tokens, {acts} activations, peak at {self.train_token_ind}")
        return self


class Quantile(Section):
    quantile_name: str
    examples: list[Example]


class FeatureDetails(Section):
    transcoder_id: str = Field(min_length=1)
    index: int = Field(ge=0)
    examples_quantiles: list[Quantile]
    top_logits: list[str]
    bottom_logits: list[str]
    act_min: float
    act_max: float
    quantile_values: list[float] = Field(description="percentiles 1 to 100; none if silent")
    histogram: list[float]
    activation_frequency: Share

    @model_validator(mode="after")
    def _percentiles(self) -> "FeatureDetails":
        values = self.quantile_values
        if len(values) not in (0, 100) or values != sorted(values):
            raise ValueError(f"quantile_values: {len(values)} values, not 100 that rise")
        return self
