"""The sections circuits, probes and steering: what is measured inside a model, and how.

circuits   what heads, MLPs and the paths between them do to an output
probes     what can be read off stored activations
steering   what writing a direction into the stream does
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import nearest
from pipeline.spec.base import Name, Section, Seeds

# --- circuits ----------------------------------------------------------------------------

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
    patterns: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="what each head attends to is a node, too, of kind pattern: the attention of "
        "the other prompt on the values of this one",
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


Share = Annotated[float, Field(gt=0, lt=1)]

# --- graphs -------------------------------------------------------------------------------


class TracedPrompt(Section):
    """A prompt whose next token is explained."""

    prompt: str = Field(min_length=1)
    answer: str = Field(
        default="",
        description="a single token; the graph explains it, however probable it is",
    )


NODE = r"^(L\d+\.(\d+|error)@\d+|embed@\d+|logit\.\d+)$"


class GraphsSpec(Section):
    """Attribution graphs of prompts through dictionaries of all layers (Ameisen et al. 2025)."""

    dictionaries: dict[Name, str] = Field(
        default={},
        description="a name in tables and metrics, and the dictionaries that it means: a "
        "dictionary over all layers, or the names of one per layer with {layer} in the place of "
        "its number; default: every dictionary over all layers, under its own name",
    )
    prompts: dict[Name, TracedPrompt] = Field(min_length=1)
    without: list[Name] = Field(default=[], description="arms that are left out")
    n_logits: int = Field(default=10, ge=1, description="tokens that are explained, at most")
    logit_share: Share = Field(
        default=0.95, description="of probability that the explained tokens have together"
    )
    max_features: int = Field(
        default=7500, ge=0, description="features of largest influence that are nodes; 0: all"
    )
    batch_size: int = Field(default=256, ge=1, description="targets a backward pass")
    node_share: Share = Field(default=0.8, description="of influence that kept nodes hold")
    edge_share: Share = Field(default=0.98, description="of influence that kept edges hold")
    n_suppressed: int = Field(
        default=16, ge=0, description="features taken out of the true model, a prompt"
    )
    n_heads_edges: int = Field(
        default=32, ge=0, description="strongest edges between positions whose heads are named"
    )
    n_qk: int = Field(
        default=4, ge=0, description="of these heads, whose attention is divided among pairs"
    )
    n_blocks: int = Field(
        default=8, ge=1, description="held-out blocks that the replacement model reads"
    )
    seed: int = Field(default=0, description="of the features of the null")
    supernodes: dict[str, dict[str, list[Annotated[str, Field(pattern=NODE)]]]] = Field(
        default={},
        description="<dictionary>.<prompt> -> name -> nodes that stand together on its page, "
        "such as L3.120@5, L3.error@5, embed@2 and logit.318",
    )

    @model_validator(mode="after")
    def _known(self) -> "GraphsSpec":
        graphs = [f"{d}.{p}" for d in self.dictionaries for p in self.prompts]
        if graphs:
            _in("supernodes", "graph", list(self.supernodes), graphs)
        for graph, groups in self.supernodes.items():
            nodes = [node for group in groups.values() for node in group]
            for node in nodes:
                if nodes.count(node) > 1:
                    raise ValueError(f"supernodes.{graph}: '{node}' stands twice; name it once")
        return self

    def of_all(self, names: list[str]) -> "GraphsSpec":
        """With every dictionary over all layers where it names none.

        Raises:
            ValueError: there is none.
        """
        if self.dictionaries:
            return self
        if not names:
            raise ValueError(
                "graphs.dictionaries: sae.dictionaries has none over all layers; add one with "
                "`layers: each` or `layers: cross`, or name one per layer: {plt: 'plt_{layer}'}"
            )
        return GraphsSpec.model_validate(
            self.model_dump() | {"dictionaries": {n: n for n in names}}
        )

    def among(self, name: str, known: list[str]) -> list[str]:
        """Those of some dictionaries that a name means, whatever the number of layers is."""
        before, several, behind = self.dictionaries[name].partition("{layer}")
        pattern = re.escape(before) + (r"\d+" + re.escape(behind) if several else "")
        return [one for one in known if re.fullmatch(pattern, one)]

    def layered(self, name: str, n_layers: int) -> list[str]:
        """The dictionaries that a name means."""
        pattern = self.dictionaries[name]
        if "{layer}" not in pattern:
            return [pattern]
        return [pattern.replace("{layer}", str(layer)) for layer in range(n_layers)]


# --- probes ------------------------------------------------------------------------------

ProbeMethod = Literal["logistic", "ridge", "mean_difference", "mass_mean", "mlp"]
Column = Literal["label", "title"]


class LabelSpec(Section):
    """What is to be read off the activations: one of the first four says where it stands."""

    column: Column | Literal[""] = Field(
        default="", description="a column of the corpus's documents; each token has its document's"
    )
    pattern: str = Field(
        default="",
        description="a regular expression over a document's text; a token is labelled by the group "
        "of the match that it overlaps: the name of a named group, else yes; other tokens: no",
    )
    function: Name | Literal[""] = Field(
        default="",
        description="of the paper's labels.py: a document -> a label for each token, None where "
        "it has none",
    )
    file: str = Field(
        default="",
        description="a .csv or .parquet beside paper.yaml: label, and block, position and token, "
        "or title",
    )
    kind: Literal["class", "number"] = Field(
        default="class", description="number: only ridge reads it, and its score is R^2"
    )
    per: Literal["token", "document", "last"] = Field(
        default="token",
        description="token: every stored row; document: the mean of a document's rows; last: the "
        "last row of a document",
    )
    classes: list[str] = Field(default=[], description="those that count; default: all")
    least: int = Field(default=10, ge=2, description="rows of a class; rarer ones are left out")

    @model_validator(mode="after")
    def _one_source(self) -> "LabelSpec":
        given = [k for k in ("column", "pattern", "function", "file") if getattr(self, k)]
        if len(given) != 1:
            told = " and ".join(given) or "none"
            raise ValueError(f"needs one of column, pattern, function and file, got {told}")
        try:
            found = re.compile(self.pattern)
        except re.error as e:
            raise ValueError(f"pattern: no regular expression ({e}); correct it") from None
        if self.pattern and found.match(""):
            raise ValueError(f"pattern: '{self.pattern}' fits the empty text, so every place of it")
        if self.kind == "number" and (self.pattern or self.classes):
            raise ValueError("kind: number takes a function or a file, and has no classes")
        return self


class MlpSpec(Section):
    """A probe with one hidden layer of ReLUs, trained by Adam."""

    hidden: int = Field(default=64, ge=1, description="units; Hewitt & Liang (2019) take 1,000")
    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=512, ge=1, description="rows a step")
    lr: float = Field(default=1e-3, gt=0, description="falls to 0 along a line")


class ProbesSpec(Section):
    """Probes of stored activations, with control tasks and baselines."""

    labels: dict[Name, LabelSpec] = Field(min_length=1)
    hooks: list[str] = Field(default=[], description="of activations.hooks; default: all")
    methods: list[ProbeMethod] = Field(default=["logistic", "mean_difference"], min_length=1)
    without: list[Name] = Field(default=[], description="arms that are left out")
    seeds: Seeds = Field(
        default=[0, 1, 2],
        description="of which documents are held out, of control labels, and of first weights",
    )
    splits: list[Literal["document", "token"]] = Field(
        default=["document"],
        min_length=1,
        description="document: held-out rows are of other documents; token: drawn row by row, "
        "which leaks, and the difference is the metric leak, of the first method",
    )
    test: Share = Field(default=0.3, description="share of the documents, or rows, held out")
    n_rows: int = Field(default=20_000, ge=20, description="rows of tokens, at most")
    l2: float = Field(
        default=1.0,
        gt=0,
        description="logistic and ridge: l2 / 2 |W|^2 beside the loss summed over rows, of "
        "standardised activations (C = 1 / l2 in scikit-learn)",
    )
    tolerance: float = Field(
        default=2e-8,
        gt=0,
        exclude_if=lambda value: value == 2e-8,
        description="logistic: nats a row that one more step of the search may still promise; the "
        "default is as exact as float32 allows, and 1e-6 takes a fraction of the passes",
    )
    mlp: MlpSpec = MlpSpec()
    control: bool = Field(
        default=True, description="a control task for each label of tokens (Hewitt & Liang 2019)"
    )
    codelength: bool = Field(
        default=True, description="online code of the logistic probe (Voita & Titov 2020)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ProbesSpec":
        for key in ("methods", "splits", "hooks"):
            given = getattr(self, key)
            for one in given:
                if given.count(one) > 1:
                    raise ValueError(f"{key}: '{one}' stands twice; name it once")
        if self.splits[0] != "document":
            raise ValueError("splits: token leaks, so document has to stand before it")
        numbers = [name for name, label in self.labels.items() if label.kind == "number"]
        if numbers and "ridge" not in self.methods:
            raise ValueError(f"labels.{numbers[0]}: kind: number needs ridge among methods")
        return self

    def label_files(self) -> list[str]:
        """Files with labels, in order, each once."""
        return list(dict.fromkeys(label.file for label in self.labels.values() if label.file))


class DirectionSpec(Section):
    """A direction of the stream that is added to it."""

    source: Literal["probe", "prompts", "dictionary", "random"]
    method: Literal["logistic", "ridge", "mean_difference", "mass_mean"] | Literal[""] = Field(
        default="", description="probe: which one's direction"
    )
    plus: str = Field(
        default="", description="prompts: the text that is added; {class} stands for the class"
    )
    minus: str = Field(
        default=" ",
        min_length=1,
        description="prompts: the text that is taken away (Turner et al. 2023)",
    )
    sae: str = Field(default="", description="dictionary: its expanded name")
    latent: int = Field(
        default=-1,
        ge=-1,
        description="dictionary: a decoder row; -1: the one nearest to the class's difference of "
        "means",
    )

    @model_validator(mode="after")
    def _complete(self) -> "DirectionSpec":
        needs = {"probe": "method", "prompts": "plus", "dictionary": "sae"}
        need = needs.get(self.source, "")
        if need and not getattr(self, need):
            raise ValueError(f"source: {self.source} needs {need}")
        for other in ("method", "plus", "sae"):
            if other != need and getattr(self, other):
                raise ValueError(f"source: {self.source} has no {other}; remove it")
        return self


class Contrast(Section):
    """A prompt whose next token is one of two."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1, description="its first token counts")
    foil: str = Field(min_length=1, description="the token it is compared with")


class SteeringSpec(Section):
    """Directions added to the stream, or taken out of it, and what that does."""

    arm: Name = "trained"
    label: Name = Field(
        description="of probes.labels, a column of documents: its classes are meant"
    )
    classes: list[str] = Field(min_length=1, description="steered towards, one after the other")
    hooks: list[str] = Field(min_length=1, description="of the residual stream, of probes.hooks")
    directions: dict[Name, DirectionSpec] = Field(min_length=1)
    coefficients: list[float] = Field(
        default=[-1, -0.5, 0.5, 1],
        min_length=1,
        description="length of what is added, in mean norms of the stream at the hook",
    )
    ablate: bool = Field(
        default=True, description="also with the direction taken out of the stream"
    )
    seeds: Seeds = Field(default=[0, 1, 2], description="of held-out texts and random directions")
    n_blocks: int = Field(
        default=8, ge=1, description="held-out blocks a seed, half of them on topic"
    )
    n_words: int = Field(default=20, ge=1, description="tokens that are typical of a class")
    reading: str = Field(
        default="", description="a later hook of probes.hooks, where the logistic probe reads"
    )
    contrasts: dict[Name, Contrast] = {}
    prompts: list[str] = Field(default=[], description="texts that are continued, steered and not")
    n_new: int = Field(default=24, ge=1, description="tokens of a continuation")

    @model_validator(mode="after")
    def _consistent(self) -> "SteeringSpec":
        for key in ("classes", "hooks", "coefficients"):
            given = getattr(self, key)
            for one in given:
                if given.count(one) > 1:
                    raise ValueError(f"{key}: '{one}' stands twice; name it once")
        for hook in self.hooks:
            if not re.fullmatch(r"blocks\.\d+\.hook_resid_(pre|post)", hook):
                raise ValueError(
                    f"hooks: '{hook}' is not the stream between layers; name hook_resid_pre or "
                    f"hook_resid_post of a layer"
                )
        if 0 in self.coefficients:
            raise ValueError("coefficients: 0 adds nothing; it is measured anyway")
        return self


def check_probes(paper: Any) -> None:
    """ValueError where the sections probes and steering of a paper.yaml do not fit the others."""
    probes, steering = paper.probes, paper.steering
    if probes is None:
        return
    stored, arms = paper.activations.hooks, paper.arm_names()
    _in("probes.hooks", "stored hook", probes.hooks, stored)
    _in("probes.without", "arm", probes.without, arms)
    for name, label in probes.labels.items():
        if label.column == "label" and not paper.corpus.label_field:
            raise ValueError(f"probes.labels.{name}: column: label needs corpus.label_field")
        if label.column == "title" and not paper.corpus.title_field:
            raise ValueError(f"probes.labels.{name}: column: title needs corpus.title_field")
    if steering is None:
        return
    hooks = probes.hooks or stored
    _in("steering.arm", "arm with probes", [steering.arm], paper.probe_arms())
    _in("steering.label", "label of probes", [steering.label], probes.labels)
    if not probes.labels[steering.label].column:
        raise ValueError(f"steering.label: '{steering.label}' is no column of documents")
    read = [steering.reading] if steering.reading else []
    _in("steering.hooks", "hook of probes", [*steering.hooks, *read], hooks)
    if steering.reading and "logistic" not in probes.methods:
        raise ValueError("steering.reading: needs logistic among probes.methods")
    saes = paper.saes_of(steering.arm) if paper.sae else {}
    for name, direction in steering.directions.items():
        at = f"steering.directions.{name}"
        if direction.source == "probe":
            _in(at, "method of probes", [direction.method], probes.methods)
        if direction.source == "dictionary":
            _in(at, "SAE", [direction.sae], saes)
            hook = saes[direction.sae].output_hook or saes[direction.sae].hook
            if steering.hooks != [hook]:
                raise ValueError(f"{at}: '{direction.sae}' writes at {hook}; steer at that hook")
            if direction.latent < 0 and "mean_difference" not in probes.methods:
                raise ValueError(f"{at}: latent: -1 needs mean_difference among probes.methods")


def _in(key: str, what: str, names: list[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: no {what} '{name}'{nearest(name, known)}")
