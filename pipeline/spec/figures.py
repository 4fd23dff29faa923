"""Options of the core kinds of figures, as paper.yaml has them: kind -> model.

A kind reads its options through its model, `pipeline.papers.lint` and snakemake check them before
anything runs, and the JSON schema has them for an editor.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline.spec.base import Section, told

Column = Annotated[str, Field(min_length=1)]
Dash = Literal["solid", "dot", "dash", "dashdot", "longdash"]
Several = Annotated[list[Column], Field(max_length=2)]

Span = Annotated[list[float], Field(min_length=2, max_length=2)] | None


class Look(Section):
    """What a value of a column is called, and how it is drawn."""

    name: str = Field(min_length=1)
    colour: Annotated[int, Field(ge=0)] | Literal["ink"] | None = Field(
        default=None, description="place in the palette, from 0; ink: as text; default: in turn"
    )
    dash: Dash = "solid"
    width: float = Field(default=2, gt=0, description="pixels")
    symbol: str = Field(default="", description="plotly's name of a marker; default: a circle")


def unpaired(value: Any) -> Any:
    """A mapping that was written as a list of pairs, as a mapping."""
    pairs = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)
    return {str(k): v for k, v in value} if pairs else value


Names = Annotated[dict[str, str | Look], BeforeValidator(unpaired)]
Titles = Annotated[dict[str, str], BeforeValidator(unpaired)]


class Rows(Section):
    """Which rows of the table are drawn, and what the CSV keeps of them."""

    where: dict[str, Any] = Field(default={}, description="column: value, or list of values")
    seeds: Literal["all", "first"] = Field(default="all", description="rows of which seeds")
    columns: list[Column] = Field(default=[], description="of the CSV, in order; default: all")


class Lines(Rows):
    """Lines over x, one a value of a column, in panels; the reader chooses between measures."""

    x: Column
    y: Titles = Field(min_length=1, description="column: title; the reader chooses if several")
    lines: Column = Field(description="the column of which each value has a line")
    names: Names = Field(default={}, description="of the lines, in order; default: all, in turn")
    panels: Several = Field(default=[], description="columns: across, and down")
    titles: Titles = Field(default={}, description="what panels are called, in order")
    across: int = Field(default=0, ge=0, description="panels side by side; 0: all")
    several: Literal["", "mean", "min"] = Field(
        default="", description="rows at one x: their mean with its spread, or the least"
    )
    x_title: str = ""
    log: list[Literal["x", "y"]] = []
    levels: list[float] = Field(default=[], description="thin horizontal lines")
    range: Span = Field(default=None, description="of the y axis")
    format: str = Field(default="", description="of numbers on the y axis, such as .0%")
    marker: float = Field(default=4, description="pixels")

    @model_validator(mode="after")
    def _one_mean(self) -> "Lines":
        if self.several and len(self.y) > 1:
            raise ValueError(f"several: {self.several} is of one y, not of {', '.join(self.y)}")
        return self


class Learning(Section):
    """Loss or accuracy of the models of `training`, through training, one line a model."""

    measures: list[Literal["loss", "accuracy"]] = Field(default=["loss"], min_length=1)
    runs: Titles = Field(default={}, description="run: title; a panel each; default: one for all")
    run: Column = Field(default="run", description="the column of the CSV that names the run")
    columns: list[Column] = Field(default=[], description="of the CSV, in order; default: all")
    sets: Titles = Field(default={"train": "training text", "val": "held out"}, min_length=1)
    unit: str = Field(default="nats a token", description="of the loss")
    published: dict[str, float] = Field(default={}, description="run: loss; a dotted line")
    chance: str = Field(default="", description="table/column of the loss of a uniform guess")
    log: bool = Field(default=False, description="whether the loss has a log axis")
    points: int = Field(default=0, ge=0, description="of a curve at most; 0: all")


class Agreement(Rows):
    """Estimates against exact values, with the line on which they are equal."""

    x: Column = "exact"
    y: Titles = Field(min_length=1, description="column: title; a panel each if several")
    panels: Column | Literal[""] = Field(default="", description="a column, a panel a value")
    titles: Titles = Field(default={}, description="what panels are called, in order")
    other: dict[str, Annotated[list[Column], Field(min_length=2, max_length=2)]] = Field(
        default={}, description="panel: its x and y, where they are other columns"
    )
    across: int = Field(default=0, ge=0, description="panels side by side; 0: all")
    points: Column = Field(description="the column that gives points their colour")
    names: Names = Field(default={}, description="of the points, in order; default: all, in turn")
    choose: list[Column] = Field(default=[], description="columns whose cases the reader chooses")
    cases: Titles = Field(default={}, description="what values of these are called, in order")
    sizes: bool = Field(
        default=False, description="absolute values on log axes; a cross where the sign is wrong"
    )
    about: Column | Literal[""] = Field(default="", description="column told of a point as well")
    unit: str = "logits"


class Bars(Rows):
    """Bars at each x, in panels; the reader chooses between the values of a column."""

    x: Titles = Field(min_length=1, description="column: name; one group of bars each")
    bars: Several = Field(min_length=1, description="columns whose values have a bar each")
    names: Names = Field(min_length=1, description="of the bars, in order; two columns: a/b")
    panels: Several = Field(default=[], description="columns: across, and down")
    titles: Titles = Field(default={}, description="what panels are called, in order")
    choose: Column | Literal[""] = ""
    cases: Titles = {}
    y_title: str
    range: Span = Field(default=None, description="of the y axis")
    published: list[dict[str, Any]] = Field(
        default=[], description="values of panels and choose, and a value a column of x"
    )


class Heads(Section):
    """Every head, or the stream at every position, by layer, a panel a method."""

    what: Literal["head", "position"] = "head"
    methods: Titles = {
        "direct_logit": "direct logit attribution",
        "activation_patching": "activation patching",
        "attribution_patching": "attribution patching",
    }


class Estimates(Section):
    """Cheap scores of nodes and edges against exact patching. It has no options."""


class Pareto(Section):
    x: Column = "l0"
    y: Column | list[Column] = []


class Scaling(Section):
    x: Literal["k", "d_sae"] = "k"
    y: Column = "explained_variance"


class Training(Section):
    y: Column | list[Column] = ["explained_variance", "l0", "dead_share", "loss"]
    points: int = Field(default=40, ge=2, description="of a curve")
    saes: list[str] = Field(default=[], description="names or their beginnings; default: all")


class Density(Section):
    bins: int = Field(default=40, ge=1)


class Attribution(Section):
    x: Column = "exact"
    y: Column = "attribution"


class Completeness(Section):
    suffix: Literal["", "_ig"] = Field(default="", description="one estimate; default: both")


class Dead(Section):
    y: Column = "dead_share"


class Verdicts(Section):
    """It has no options."""


OPTIONS: dict[str, type[Section]] = {
    m.__name__.lower(): m
    for m in (
        Lines, Learning, Agreement, Bars, Heads, Estimates, Pareto, Scaling, Training, Density,
        Attribution, Completeness, Dead, Verdicts,
    )
}  # fmt: skip


# What a kind that every paper draws alike brings along; paper.yaml may say otherwise.
STANDARD: dict[str, dict[str, Any]] = {
    "verdicts": {
        "title": "How sure the verdicts are",
        "caption": "Each judged claim, in the unit of its own border: an order holds right of "
        "zero, a value within the band. Bars are intervals over seeds; a claim of one seed has "
        "none.",
        "tables": ["claims"],
    }
}
# Mappings whose order counts: it is that of panels, of lines and of the legend.
ORDERED = ("names", "titles", "cases", "x", "y", "runs", "sets", "methods")


def completed(figure: Any) -> Any:
    """A figure of paper.yaml with what its kind brings along, and its options `paired`."""
    kind = figure.get("kind") if isinstance(figure, dict) else None
    if not isinstance(kind, str):
        return figure
    options = paired(kind, figure.get("options", {}))
    return STANDARD.get(kind, {}) | figure | {"options": options}


def paired(kind: str, options: Any) -> Any:
    """Options of a core kind with ordered mappings as lists of pairs.

    A job is handed its options as JSON with sorted keys, which would lose the order.
    """
    if kind not in OPTIONS or not isinstance(options, dict):
        return options
    lists = {k: [[n, w] for n, w in v.items()] for k, v in options.items()
             if k in ORDERED and isinstance(v, dict)}  # fmt: skip
    return options | lists


def faults(kind: str, options: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the options of a core kind, a sentence each."""
    try:
        OPTIONS[kind].model_validate(options)
    except ValidationError as e:
        for fault in e.errors():
            yield told(fault, ".".join(map(str, ("options", *fault["loc"]))))
