"""The section `training` of paper.yaml: models that a paper trains from scratch, or fine-tunes.

A run trains models of one shape together, its members: one an arm and seed. With `start` it goes on
from the weights of another run, all of them or, with `lora`, a low-rank update of them.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.spec.base import Name, Section


class Architecture(Section):
    """A small transformer. The size of the vocabulary comes from the data."""

    family: Literal["native", "gpt2"] = Field(
        default="native",
        description="native: TransformerLens's NativeModel, for attention-only models, models "
        "without layer norm and smeared keys; gpt2: Hugging Face's GPT-2, for dropout and tied "
        "embeddings",
    )
    n_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    d_head: int = Field(default=0, ge=0, description="default: d_model / n_heads")
    d_mlp: int = Field(default=0, ge=0, description="0: attention only")
    act_fn: Literal["relu", "gelu", "gelu_new", "silu"] = "gelu"
    normalization: Literal["LN", "none"] = "LN"
    positional: Literal["standard", "rotary"] = Field(
        default="standard", description="standard: learned positions, added to the stream"
    )
    n_ctx: int = Field(ge=2, description="positions of a sequence")
    bias: Literal["all", "mlp", "none"] = Field(
        default="all", description="which biases are trained; the others stay 0"
    )
    tied: bool = Field(default=False, description="unembedding = embedding")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    smeared_keys: bool = Field(
        default=False,
        description="k_t <- s k_t + (1 - s) k_(t-1), one s a head (Olsson et al. 2022, Argument 2)",
    )
    init: Literal["gpt2", "inverse_sqrt"] = Field(
        default="gpt2",
        description="gpt2: N(0, 0.02²), output projections over sqrt(2 n_layers); inverse_sqrt: "
        "N(0, 1/d_model), unembedding N(0, 1/d_vocab) (Nanda et al. 2023, released code)",
    )

    @model_validator(mode="after")
    def _fits(self) -> "Architecture":
        if not self.d_head and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is no multiple of n_heads {self.n_heads}; give d_head"
            )
        gpt2 = {
            "normalization": self.normalization == "LN",
            "positional": self.positional == "standard",
            "d_mlp": self.d_mlp > 0,
            "d_head": self.d_head in (0, self.d_model // self.n_heads),
            "smeared_keys": not self.smeared_keys,
        }
        native = {"tied": not self.tied, "dropout": self.dropout == 0}
        for field, fits in (gpt2 if self.family == "gpt2" else native).items():
            if not fits:
                other = {"gpt2": "native", "native": "gpt2"}[self.family]
                raise ValueError(
                    f"family {self.family} has no {field}: {getattr(self, field)}; use {other}"
                )
        return self

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_heads


class TrainingData(Section):
    """Where a run's sequences come from."""

    source: Literal["corpus", "own"] = Field(
        description="corpus: random windows of the training text; own: a function of data.py"
    )
    function: str = Field(default="", description="own: the function's name")
    options: dict[str, Any] = Field(default={}, description="own: what the function takes")
    labels: list[str] = Field(
        default=[],
        exclude_if=lambda value: not value,
        description="corpus: documents of these labels alone, '' those that have none; the "
        "held-out text of the others becomes the evaluation set `other`. Default: all documents",
    )

    @model_validator(mode="after")
    def _complete(self) -> "TrainingData":
        if self.source == "own" and not self.function:
            raise ValueError("source: own needs function: the name of a function of data.py")
        if self.source == "own" and self.labels:
            raise ValueError("labels: are those of a corpus; with source: own, leave them out")
        return self


class Optimiser(Section):
    """AdamW (Loshchilov & Hutter 2019) with a schedule."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    decay: Literal["all", "matrices"] = Field(
        default="all", description="which tensors decay; matrices: those of 2 and more dimensions"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear: step n has lr · n / warmup")
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = Field(default=0.0, ge=0, description="cosine: where it ends")
    decay_steps: int = Field(default=0, ge=0, description="cosine: its end; 0: the last step")
    clip: float = Field(default=0.0, ge=0, description="largest norm of a gradient; 0: any")


class Start(Section):
    """The weights that a run starts from: a model of another run, of the same architecture."""

    run: Name = Field(description="a run of the section training that stands above this one")
    member: str = Field(default="", description="default: the run's first, such as s0")
    step: int = Field(default=-1, ge=-2, description="as model.step: -1 the last, -2 the best")


class LoraSpec(Section):
    """A low-rank update of every matrix of the layers, all else frozen (Hu et al. 2021).

    W = W_0 + (alpha / rank) B A. Checkpoints hold W.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")


class ArmOverlay(Section):
    """What an arm of a run changes."""

    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    rank: int | None = Field(
        default=None, ge=1, exclude_if=lambda value: value is None, description="of lora"
    )
    alpha: float | None = Field(
        default=None, gt=0, exclude_if=lambda value: value is None, description="of lora"
    )


class CheckpointSteps(Section):
    """Steps whose weights are kept; 0 and the last always are."""

    every: int = Field(default=0, ge=0, description="0: only those of `at`")
    at: list[int] = []


MOST = 1_000_000  # evaluations or checkpoints of a run, which are listed


class TrainingSpec(Section):
    """One run: models of one shape, trained together in one job."""

    architecture: Architecture
    start: Start | None = Field(default=None, exclude_if=lambda value: value is None)
    lora: LoraSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    data: TrainingData
    optimiser: Optimiser = Optimiser()
    steps: int = Field(ge=1)
    batch_size: int = Field(default=0, ge=0, description="sequences a step; 0: the data's own")
    seeds: list[int] = Field(default=[0], min_length=1, description="of weights and data")
    arms: dict[Name, ArmOverlay] = Field(
        default={}, description="overlays on the optimiser; members are arms × seeds"
    )
    checkpoints: CheckpointSteps = CheckpointSteps()
    eval_every: int = Field(default=100, ge=1, description="steps between evaluations")
    loss_dtype: Literal["float32", "float64"] = Field(
        default="float32", description="of the logits in the loss and in the evaluation"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast, on a GPU"
    )
    compile: bool = Field(
        default=False, description="torch.compile on a GPU; other sums, the same claims"
    )
    resume_seconds: float = Field(default=60.0, gt=0, exclude=True)

    @model_validator(mode="after")
    def _fits(self) -> "TrainingSpec":
        if self.data.source == "corpus" and not self.batch_size:
            raise ValueError("data: {source: corpus} needs batch_size: sequences a step")
        for key, every in (("checkpoints.every", self.checkpoints.every),
                           ("eval_every", self.eval_every)):  # fmt: skip
            if every and self.steps // every > MOST:
                raise ValueError(f"{key}: {every} of {self.steps} steps; {MOST} are the most")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} name one twice")
        for step in self.checkpoints.at:
            if not 0 <= step <= self.steps:
                raise ValueError(f"checkpoints.at: {step} is not among the {self.steps} steps")
        return self

    @model_validator(mode="after")
    def _low_rank(self) -> "TrainingSpec":
        for name, arm in self.arms.items():
            if self.lora is None and (arm.rank or arm.alpha):
                raise ValueError(f"arms.{name}: rank and alpha are of lora, which the run lacks")
        if self.lora is None:
            return self
        if self.start is None:
            raise ValueError("lora: needs start: the run whose weights it updates")
        decayed = [self.optimiser.weight_decay, *(a.weight_decay for a in self.arms.values())]
        if any(decayed) and self.optimiser.decay != "matrices":
            raise ValueError("lora: weight decay needs optimiser.decay: matrices")
        return self

    def low_rank(self, arm: str) -> tuple[int, float]:
        """(rank, alpha) of an arm's LoRA."""
        own = self.arms.get(arm, ArmOverlay())
        return own.rank or self.lora.rank, own.alpha or self.lora.alpha

    def members(self) -> list[tuple[str, str, int]]:
        """(name, arm, seed) of every model of the run, arms outermost."""
        return [
            (f"{arm}_s{seed}" if arm else f"s{seed}", arm, seed)
            for arm in (self.arms or [""])
            for seed in self.seeds
        ]

    def kept(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        every = self.checkpoints.every
        regular = range(0, self.steps + 1, every) if every else []
        return sorted({0, self.steps, *self.checkpoints.at, *regular})

    def evaluated(self) -> list[int]:
        """Steps of the evaluations, ascending."""
        return sorted({0, self.steps, *range(0, self.steps + 1, self.eval_every)})
