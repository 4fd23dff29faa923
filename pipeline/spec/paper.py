"""What may stand in config.yaml and paper.yaml: the one source of truth.

Frozen pydantic models; an unknown key is an error that names the nearest match.
Lengths are in tokens, rows (one row is one token's activation) or steps, as the names say.
"""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.errors import RetraceError, nearest
from pipeline.spec import once
from pipeline.spec.base import Dtype, Name, Scale, Section, Size, sentence
from pipeline.spec.claims import Budget, Claim
from pipeline.spec.figures import completed
from pipeline.spec.imports import ImportSpec
from pipeline.spec.measured import (
    CircuitsSpec,
    GraphsSpec,
    ProbesSpec,
    SteeringSpec,
    check_probes,
)
from pipeline.spec.own import OwnStage, parted
from pipeline.spec.sae import (
    OfLayers,
    OfSources,
    SaeSection,
    SaeSpec,
    TranscodersSpec,
    check_output,
    check_window,
)
from pipeline.spec.sources import CorpusSpec, ModelSpec, TokenizerSpec
from pipeline.spec.training import TrainingSpec

T = TypeVar("T", bound=BaseModel)
Hook = Annotated[
    str,
    Field(pattern=r"^(hook_embed|(blocks\.\d+|ln_final)\.([a-z]+[12]?[a-z_]*\.)?hook_[a-z_]+)$"),
]


class Config(Section):
    """config.yaml: what to run."""

    papers: list[Name] = Field(min_length=1, description="paper folders to run, by name")
    papers_dirs: list[str] = Field(default=["rules/papers"], description="where paper folders lie")
    roots: list[str] = Field(
        default=["."], description="folders that a paper.yaml may read local models and text from"
    )
    scale: Scale = Field(default="laptop", description="how much of each paper to run")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto takes a GPU where the scheduler gives one",
    )
    gpu_gb: float = Field(
        default=0,
        ge=0,
        description="memory of one GPU in GB: a job whose model needs more asks the scheduler for "
        "several; 0: each asks for one",
    )
    keep_activations: bool = Field(
        default=True, description="false removes shards when their last reader is done"
    )
    hub: bool = Field(
        default=False,
        description="true: run the arms whose weights come from a hub, too; false leaves them out, "
        "and their claims read `not run`",
    )
    strict: bool = Field(default=False, description="true: a claim not reproduced fails the run")

    @model_validator(mode="before")
    @classmethod
    def _one_paper(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("papers"), str):
            return {**data, "papers": [p for p in data["papers"].split(",") if p]}
        return data

    @model_validator(mode="after")
    def _once(self) -> "Config":
        for name in self.papers:
            if self.papers.count(name) > 1:
                raise ValueError(f"papers: '{name}' stands twice; name it once")
        return self


class ActivationsSpec(Section):
    """Which hooks are stored, and how."""

    hooks: list[Hook] = Field(min_length=1, description="TransformerLens names")
    dtype: Dtype = Field(default="float16", description="of the stored activations")
    model_dtype: Dtype = Field(
        default="float32",
        description="of the forward pass, where model.dtype does not name a half one; bfloat16 is "
        "for GPUs",
    )
    skip_first: int = Field(
        default=1, ge=0, description="positions dropped at a block's start (attention sinks)"
    )
    max_norm_ratio: float = Field(
        default=0,
        ge=0,
        description="rows whose norm is above this many times the hook's median norm are dropped: "
        "massive activations, which would hold most of the variance (Sun et al. 2024, "
        "2402.17762); 0 keeps all. 10 drops the attention sinks of SmolLM2's stream and keeps its "
        "' the', which have 3 to 12 times the median norm at layers 3 to 9 (measured)",
    )
    max_dropped: float = Field(
        default=0.02,
        gt=0,
        le=0.5,
        exclude_if=lambda value: value == 0.02,
        description="largest share of a hook's rows that max_norm_ratio may drop: sinks are few "
        "(1 % of SmolLM2's tokens), so a larger share is ordinary text",
    )
    batch_size: int = Field(default=16, ge=1, description="blocks a forward pass")
    shard_rows: int = Field(
        default=16_384, ge=1, description="rows a Parquet shard, at most; a killed job loses one"
    )
    window: Size | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="disk that training rows may take, such as 50GB: they are made that far ahead "
        "of the training of dictionaries and removed behind it; held-out rows are stored as ever. "
        "Default: all rows are stored",
    )


class EvaluationSpec(Section):
    """How SAEs are judged on held-out tokens."""

    n_splice_blocks: int = Field(
        default=32, ge=1, description="held-out blocks on which SAEs are spliced into the model"
    )


class BenchmarksSpec(Section):
    """Sparse probing of the corpus's labels (SAEBench, Karvonen et al. 2025, 2503.09532)."""

    ks: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 2, 5], min_length=1, description="latents of a probe: SAEBench's default"
    )
    seeds: list[int] = Field(
        default=[42, 43, 44], min_length=1, description="each draws the texts of other labels anew"
    )
    n_labels: int = Field(default=5, ge=2, description="those with most documents; SAEBench's most")
    n_train: int = Field(default=2000, ge=2, description="documents of a label, at most")
    n_test: int = Field(default=500, ge=2, description="held-out documents of a label, at most")
    min_documents: int = Field(default=20, ge=2, description="a label with fewer is left out")
    n_tokens: int = Field(default=128, ge=1, description="first tokens of a document that count")
    tpp: list[Annotated[int, Field(ge=1)]] = Field(
        default=[],
        exclude_if=lambda value: not value,
        description="latents ablated for a label by targeted probe perturbation; SAEBench has 2, "
        "5, 10, 20, 50, 100 and 500; none: it is not measured",
    )


class AbsorptionSpec(Section):
    """Feature absorption of first letters (Chanin et al. 2024, 2409.14507), SAEBench's defaults."""

    template: str = Field(
        default="{word} has the first letter:",
        pattern=r"\{word\}",
        description="of a prompt's lines",
    )
    n_words: int = Field(default=1000, ge=20, description="words; SAEBench takes the vocabulary")
    n_examples: int = Field(default=10, ge=1, description="lines that show the task")
    seeds: list[int] = Field(
        default=[42, 43, 44], min_length=1, description="of words, examples and probes, all anew"
    )
    max_k: int = Field(default=10, ge=1, description="latents that may stand for a letter")
    f1_jump: float = Field(default=0.03, ge=0, description="of F1, by each latent more")
    min_f1: float = Field(default=0.6, ge=0, description="of the probe of a letter that counts")
    min_letters: int = Field(default=20, ge=1, description="that count; with fewer, no number")
    batch_size: int = Field(default=16, ge=1, description="prompts a forward pass")


class FeaturesSpec(Section):
    """Which dictionaries get a feature page."""

    saes: list[str] = Field(min_length=1, description="expanded names, e.g. topk_k32_d4608")
    arm: Name = "trained"
    beside: str | None = Field(
        default=None,
        pattern=r"^\w+\.\w+$",
        description="arm.dictionary of a null arm: its latents stand beside those of every page",
    )
    n_examples: int = Field(default=8, ge=1, description="top activating contexts a latent")
    context: tuple[int, int] = Field(default=(16, 6), description="tokens before and after")
    n_logits: int = Field(default=8, ge=1, description="logits raised and lowered, each")
    n_rows: int = Field(default=1_000_000, ge=1, description="rows scanned, at most")


class Prompt(Section):
    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1, description="a single token, usually with a leading space")
    foil: str = Field(min_length=1, description="the token it is compared with")


class AttributionSpec(Section):
    """Gradient x activation of every latent on a logit difference, and its own error."""

    sae: str
    arm: Name = "trained"
    ig_steps: int = Field(default=16, ge=1, description="points of the integrated gradients")
    n_ablate: int = Field(default=40, ge=2, description="top latents ablated exactly, a prompt")
    prompts: dict[Name, Prompt] = Field(min_length=1)


class Figure(Section):
    kind: str = Field(default="", description="a core kind; default: a function of figures.py")
    title: str = Field(min_length=1)
    caption: str = Field(min_length=1, description="what to see, and the paper's figure number")
    tables: list[str] = Field(min_length=1, description="e.g. evaluation/trained, metrics")
    options: dict[str, Any] = {}

    _of_its_kind = model_validator(mode="before")(completed)


class TryNext(Section):
    """Something that a reader can try with these results."""

    text: str = Field(min_length=1, description="what it shows")
    command: str = Field(min_length=1, description="a command line that works where it was made")


class PaperSpec(Section):
    """paper.yaml: declaration and card in one file."""

    title: str
    authors: str
    year: int
    url: str = Field(pattern=r"^https?://")
    summary: str = ""
    deviations: list[str] = Field(default=[], description="what we do differently, and why")
    contributions: str = ""
    use_of_ai: str = ""
    model: ModelSpec | None = None
    arms: dict[Name, dict[str, Any]] = Field(
        default={}, description="overlays on model; under the key corpus, on corpus"
    )
    training: dict[Name, TrainingSpec] = Field(default={}, description="models trained here")
    corpus: CorpusSpec | None = None
    tokenizer: TokenizerSpec | None = Field(
        default=None, description="default: the tokenizer of the model"
    )
    activations: ActivationsSpec | None = None
    sae: SaeSection | None = None
    evaluation: EvaluationSpec = EvaluationSpec()
    benchmarks: BenchmarksSpec | None = None
    absorption: AbsorptionSpec | None = None
    features: FeaturesSpec | None = None
    attribution: AttributionSpec | None = None
    circuits: CircuitsSpec | None = None
    graphs: GraphsSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    probes: ProbesSpec | None = None
    steering: SteeringSpec | None = None
    own: dict[Name, dict[str, Any]] = Field(
        default={}, description="the paper's own stages: their tables and options"
    )
    stages: dict[Name, OwnStage] = Field(
        default={}, exclude=True, description="how they are called: keys of `OwnStage` under own"
    )
    figures: dict[Name, Figure] = {}
    headline: str = Field(
        default="", description="the figure at the head of the report; default: the first"
    )
    try_next: list[TryNext] = Field(
        default=[], description="what a reader can try next, before what is said of every paper"
    )
    budget: dict[Name, Budget] = Field(
        default={}, description="the paper's own budget beside ours, by a name that claims use"
    )
    claims: list[Claim] = []

    _written_out = model_validator(mode="before")(once.expanded)
    _own_parted = model_validator(mode="before")(parted)

    @model_validator(mode="after")
    def _consistent(self) -> "PaperSpec":
        for section, needs in (
            ("corpus", ["model"]),
            ("tokenizer", ["corpus"]),
            ("activations", ["model", "corpus"]),
            ("sae", ["activations"]),
            ("benchmarks", ["sae"]),
            ("absorption", ["sae"]),
            ("features", ["sae"]),
            ("attribution", ["sae"]),
            ("circuits", ["model", *(["sae"] if self.circuits and self.circuits.saes else [])]),
            ("graphs", ["sae"]),
            ("probes", ["activations"]),
            ("steering", ["probes"]),
        ):
            for need in needs:
                if getattr(self, section) is not None and getattr(self, need) is None:
                    raise ValueError(f"section {section} needs a section {need}")
        training = [(f"training.{n}", run, "resume_seconds") for n, run in self.training.items()]
        if self.sae is not None:
            training.append(("sae.training", self.sae.training, "checkpoint_seconds"))
        for where, section, key in training:
            if key in section.model_fields_set:
                raise ValueError(
                    f"{where}.{key}: is no setting of a paper, since it changes no result: a "
                    f"checkpoint is kept each minute, or less often where writing it takes more "
                    f"than a tenth of the time; remove it"
                )
        for stage, own in self.own.items():
            named = own.get("tables")
            if not isinstance(named, list) or not named:
                raise ValueError(f"own.{stage}: needs tables: the names of the tables it writes")
            for table in named:
                if not re.fullmatch(r"[A-Za-z]\w*", str(table)):
                    raise ValueError(f"own.{stage}: '{table}' cannot name a table")
        for arm in self.arms:
            try:
                self.model_of(arm)
            except ValidationError as e:
                raise ValueError(f"arms.{arm}: {sentence(e)}") from None
            try:
                self.corpus_of(arm)
            except ValidationError as e:
                raise ValueError(f"arms.{arm}: corpus: {sentence(e)}") from None
        for key in ("tokens_column", "chat") if self.tokenizer is not None else ():
            if getattr(self.corpus, key):
                raise ValueError(
                    f"corpus.{key}: is for a model that has a tokenizer of its own; a section "
                    f"tokenizer makes one from text, so remove one of the two"
                )
        if self.tokenizer is not None and self.tokenizer.kind == "char":
            for key in ("prepend_bos", "close_documents"):
                if getattr(self.corpus, key):
                    raise ValueError(
                        f"corpus.{key}: true needs a special token, and tokenizer: {{kind: char}} "
                        f"has none; set corpus.{key}: false"
                    )
        self._check_training()
        for section in ("circuits", "graphs"):
            for arm in getattr(getattr(self, section), "without", []):
                if arm not in self.arm_names():
                    raise ValueError(
                        f"{section}.without: unknown arm '{arm}'{nearest(arm, self.arm_names())}"
                    )
        self._check_claims()
        self._check_saes()
        if self.graphs:
            layered = [
                n for n, s in self.sae.expanded().items()
                if isinstance(s, OfLayers) and not isinstance(s.layers, list)
            ]  # fmt: skip
            object.__setattr__(self, "graphs", self.graphs.of_all(layered))
        for name in self.graphs.dictionaries if self.graphs else []:
            if not self.graphs.among(name, list(known := self.sae.expanded())):
                meant = self.graphs.dictionaries[name]
                raise ValueError(
                    f"graphs.dictionaries.{name}: no dictionary '{meant}'{nearest(meant, known)}"
                )
        check_probes(self)
        check_window(self)
        return self

    def _check_claims(self) -> None:
        ids = [c.id for c in self.claims]
        if twice := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"claim id '{sorted(twice)[0]}' stands twice")
        for key, name in [("headline", self.headline)] + [
            (f"claim '{c.id}': figure", c.figure) for c in self.claims
        ]:
            if name and name not in self.figures:
                raise ValueError(f"{key}: no figure '{name}'{nearest(name, self.figures)}")
        for claim in self.claims:
            if claim.budget not in ("", "none", *self.budget):
                raise ValueError(
                    f"claim '{claim.id}': no budget '{claim.budget}'"
                    f"{nearest(claim.budget, self.budget)}; declare it under budget:"
                )
            if "budget" in claim.needs and not self.budget_of(claim):
                raise ValueError(
                    f"claim '{claim.id}': needs.budget: name one of this paper.yaml's budgets "
                    f"under budget:"
                )

    def _check_start(self, name: str) -> None:
        """Raise where a run cannot start from the run that it names."""
        start, names = self.training[name].start, list(self.training)
        above = names[: names.index(name)]
        where = f"training.{name}.start"
        if start.run not in above:
            raise ValueError(
                f"{where}: no run '{start.run}' stands above it{nearest(start.run, above)}"
            )
        source = self.training[start.run]
        if source.architecture != self.training[name].architecture:
            raise ValueError(
                f"{where}: run '{start.run}' has another architecture; its weights do not fit, so "
                f"write the same"
            )
        members = [member for member, _, _ in source.members()]
        if start.member and start.member not in members:
            raise ValueError(
                f"{where}: run '{start.run}' has no member '{start.member}'"
                f"{nearest(start.member, members)}; it has {', '.join(members)}"
            )
        if start.step >= 0 and start.step not in source.kept():
            raise ValueError(
                f"{where}: run '{start.run}' keeps no checkpoint of step {start.step}; add it to "
                f"training.{start.run}.checkpoints.at"
            )

    def _check_training(self) -> None:
        for name, run in self.training.items():
            if run.start:
                self._check_start(name)
            if run.data.source == "corpus" and (self.corpus is None or self.tokenizer is None):
                raise ValueError(
                    f"training.{name}: source: corpus needs sections corpus, tokenizer"
                )
        models = [self.model_of(arm) for arm in self.arm_names()] if self.model else []
        for model in (m for m in models if m.source == "training"):
            if model.run not in self.training:
                raise ValueError(f"model: no run '{model.run}'{nearest(model.run, self.training)}")
            run = self.training[model.run]
            members = [name for name, _, _ in run.members()]
            if model.member and model.member not in members:
                raise ValueError(
                    f"model: run '{model.run}' has no member '{model.member}'"
                    f"{nearest(model.member, members)}; it has {', '.join(members)}"
                )
            if model.step >= 0 and model.step not in run.kept():
                raise ValueError(
                    f"model: run '{model.run}' keeps no checkpoint of step {model.step}; add it to "
                    f"training.{model.run}.checkpoints.at"
                )
            if self.corpus and run.data.source == "own":
                raise ValueError(
                    f"model: run '{model.run}' learns from data.py and has no tokenizer; a corpus "
                    f"needs a run with data: {{source: corpus}}"
                )

    def _check_saes(self) -> None:
        if self.sae is None:
            return
        saes, hooks = self.sae.expanded(), self.activations.hooks
        for name, sae in saes.items():
            if isinstance(sae, OfLayers):
                self._check_layers(name, sae)
                continue
            named = sae.hooks if isinstance(sae, OfSources) and sae.hooks else [sae.hook]
            if not named[0] and len(hooks) > 1:
                raise ValueError(f"sae.{name}: name its hook; activations has {', '.join(hooks)}")
            for hook in filter(None, named):
                if hook not in hooks:
                    raise ValueError(
                        f"sae.{name}: hook '{hook}' is not stored{nearest(hook, hooks)}; "
                        f"add it to activations.hooks"
                    )
            if isinstance(sae, OfSources):
                self._check_sources(name, sae)
            if getattr(sae, "output_hook", ""):
                check_output(sae.output_hook, name, hooks, self.activations.max_norm_ratio)
            self._check_arms(name, sae)
            if isinstance(sae, SaeSpec):
                self._check_widths(name, sae)
        used = (
            [("features.saes", s, self.features.arm) for s in self.features.saes]
            if self.features
            else []
        )
        if self.features and self.features.beside:
            arm, _, sae = self.features.beside.partition(".")
            used.append(("features.beside", sae, arm))
        if self.attribution:
            used.append(("attribution.sae", self.attribution.sae, self.attribution.arm))
        for arm in self.circuit_arms() if self.circuits else []:
            used += [("circuits.saes", name, arm) for name in self.circuits.saes]
        for key, name, arm in used:
            if name not in saes:
                raise ValueError(f"{key}: no SAE '{name}'{nearest(name, saes)}")
            if isinstance(saes[name], OfSources):
                raise ValueError(f"{key}: '{name}' is a crosscoder; name a dictionary of one hook")
            if isinstance(saes[name], OfLayers):
                raise ValueError(
                    f"{key}: '{name}' is a set of transcoders of all layers; name a dictionary of "
                    f"one hook"
                )
            if arm not in (saes[name].arms or self.arm_names()):
                raise ValueError(f"{key}: SAE '{name}' is not trained on arm '{arm}'")
            alone = isinstance(saes[name], ImportSpec) and not saes[name].decodes
            if not key.startswith("features.") and alone:
                raise ValueError(f"{key}: '{name}' has no decoder, and only features do without")

    def _check_arms(self, name: str, sae: SaeSpec | ImportSpec) -> None:
        for arm in sae.arms:
            if arm not in self.arm_names():
                raise ValueError(f"sae.{name}: unknown arm '{arm}'{nearest(arm, self.arm_names())}")

    def _check_widths(self, name: str, sae: SaeSpec) -> None:
        """Raise where a dictionary is too wide for its data, or k for the dictionary."""
        if sae.k > sae.d_sae:
            raise ValueError(f"sae.{name}: k {sae.k} is more than its {sae.d_sae} latents")
        if sae.d_sae > self.sae.training.n_rows:
            raise ValueError(
                f"sae.{name}: {sae.d_sae} latents are wider than {self.sae.training.n_rows} "
                f"training rows can train; raise sae.training.n_rows or lower d_sae"
            )
        if 0 < self.corpus.n_tokens < sae.d_sae:
            raise ValueError(
                f"sae.{name}: {sae.d_sae} latents are wider than {self.corpus.n_tokens} "
                f"tokens can train; raise corpus.n_tokens or lower d_sae"
            )

    def _check_layers(self, name: str, sae: OfLayers) -> None:
        """Raise where the stored hooks cannot serve transcoders of all layers."""
        try:
            sae.pairs(self.activations.hooks)
        except ValueError as e:
            raise ValueError(f"sae.{name}: {e}") from None
        if self.activations.max_norm_ratio:
            raise ValueError(
                f"sae.{name}: transcoders need the same tokens at all hooks, and "
                f"activations.max_norm_ratio drops tokens hook by hook; set it to 0"
            )
        self._check_arms(name, sae)
        if isinstance(sae, TranscodersSpec):
            self._check_widths(name, sae)

    def _check_sources(self, name: str, sae: OfSources) -> None:
        """Raise where the sources of a crosscoder do not hold the same tokens."""
        if self.activations.max_norm_ratio:
            raise ValueError(
                f"sae.{name}: a crosscoder needs the same tokens of all sources, and "
                f"activations.max_norm_ratio drops tokens hook by hook; set it to 0"
            )
        for arm in sae.models:
            if arm not in self.arm_names():
                raise ValueError(
                    f"sae.{name}: models: unknown arm '{arm}'{nearest(arm, self.arm_names())}"
                )
            if self.corpus_of(arm) != self.corpus_of(sae.models[0]):
                raise ValueError(
                    f"sae.{name}: models: arms '{sae.models[0]}' and '{arm}' read different "
                    f"tokens (arms.{arm}.corpus); name arms of one corpus"
                )

    def stage_of(self, name: str) -> OwnStage:
        """How an own stage is called."""
        return self.stages.get(name, OwnStage())

    def budget_of(self, claim: Claim) -> str:
        """The name of the budget that a claim rests on; an empty string where none is meant."""
        if claim.budget:
            return claim.budget.replace("none", "")
        return next(iter(self.budget)) if len(self.budget) == 1 else ""

    def arm_names(self) -> list[str]:
        """The arms, 'trained' where the paper declares none."""
        return list(self.arms) or ["trained"]

    def model_of(self, arm: str) -> ModelSpec:
        """The model section with the arm's overlay."""
        over = {k: v for k, v in self.arms.get(arm, {}).items() if k != "corpus"}
        return ModelSpec.model_validate({**self.model.model_dump(exclude_unset=True), **over})

    def corpus_of(self, arm: str) -> CorpusSpec | None:
        """The corpus section, with what the arm's overlay has under `corpus`."""
        over = self.arms.get(arm, {}).get("corpus", {})
        if not over:
            return self.corpus
        if self.corpus is None or not isinstance(over, dict):
            raise ValueError(f"arms.{arm}: corpus: must be an overlay on a section corpus")
        return CorpusSpec.model_validate({**self.corpus.model_dump(exclude_unset=True), **over})

    def circuit_arms(self) -> list[str]:
        """The arms whose circuits are measured."""
        return [a for a in self.arm_names() if a not in self.circuits.without]

    def graph_arms(self) -> list[str]:
        """The arms whose prompts are traced."""
        return [a for a in self.arm_names() if a not in self.graphs.without]

    def graph_dictionaries(self, arm: str) -> list[str]:
        """The names of graphs.dictionaries that an arm has."""
        own = [*self.saes_of(arm), *self.transcoders_of(arm)]
        return [name for name in self.graphs.dictionaries if self.graphs.among(name, own)]

    def probe_arms(self) -> list[str]:
        """The arms whose activations are probed."""
        return [a for a in self.arm_names() if a not in self.probes.without]

    def saes_of(self, arm: str) -> dict[str, SaeSpec | ImportSpec]:
        """Expanded name -> dictionary, for those of the arm; hooks filled in."""
        hook = self.activations.hooks[0]
        return {
            n: s if s.hook else s.model_copy(update={"hook": hook})
            for n, s in self.sae.expanded().items()
            if not isinstance(s, OfSources | OfLayers) and (not s.arms or arm in s.arms)
        }

    def transcoders_of(self, arm: str) -> dict[str, OfLayers]:
        """Expanded name -> transcoders of all layers, for those of the arm."""
        return {
            n: s
            for n, s in (self.sae.expanded() if self.sae else {}).items()
            if isinstance(s, OfLayers) and (not s.arms or arm in s.arms)
        }

    def crosscoders_of(self, arm: str) -> dict[str, OfSources]:
        """Expanded name -> crosscoder, for those that stand under the arm's name."""
        return {
            n: s
            for n, s in (self.sae.expanded() if self.sae else {}).items()
            if isinstance(s, OfSources) and arm in s.owners(self.arm_names())
        }


def parse(cls: type[T], data: Any, file: str | Path) -> T:
    """Validate `data` from `file`; every fault is one sentence that names key, value and file."""
    try:
        return cls.model_validate(data)
    except ValidationError as e:
        raise RetraceError(f"{file}: {sentence(e)}") from None
    except OverflowError as e:
        raise RetraceError(f"{file}: a number in it is too large ({e})") from None
