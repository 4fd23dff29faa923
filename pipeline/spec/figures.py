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


class Matrix(Rows):
    """A coloured map of two columns; the reader chooses between measures, or between cases."""

    x: Column
    y: Column
    z: Titles = Field(min_length=1, description="column: title; the reader chooses if several")
    symmetric: bool = Field(default=False, description="whether (a, b) stands for (b, a), too")
    names: Titles = Field(default={}, description="of values of x and y, in order; default: all")
    choose: Column | Literal[""] = Field(default="", description="column, a case a value")
    cases: Titles = Field(default={}, description="what cases are called, in order; default: all")
    x_title: str = ""
    y_title: str = ""
    unit: str = Field(default="", description="of z")
    range: Span = Field(default=None, description="of the colours; default: from 0")
    most: float | None = Field(default=None, description="without a range: where colours end")
    numbers: bool = Field(default=False, description="whether they stand in the cells")


class Trajectories(Rows):
    """The likeliest token at every layer and position of a text that the reader chooses."""

    choose: Column = Field(description="the column of which each value is a choice")
    label: Column | Literal[""] = Field(default="", description="column: what a choice is called")
    panels: Column | Literal[""] = Field(default="", description="a column, a panel a value")
    titles: Titles = Field(default={}, description="what panels are called, from above")
    rows: int = Field(default=11, ge=2, description="layers shown, at most")
    cell: int = Field(default=46, ge=10, description="pixels of a cell; below 40 only tokens")
    right: bool = Field(default=False, description="whether tokens that come next are underlined")


class Histogram(Rows):
    """How values are spread: the share in each bin, one outline a group."""

    x: Column | Literal[""] = Field(default="", description="column of the values")
    count: Column | Literal[""] = Field(
        default="", description="of a table that is binned already, with columns low and high"
    )
    lines: Several = Field(min_length=1, description="columns whose values have an outline each")
    names: Names = Field(
        min_length=1, description="of these, in order; two columns: a/b; one name: counted together"
    )
    choose: Column | Literal[""] = Field(default="", description="column, a case a value")
    bins: int = Field(default=40, ge=1, description="of values, from `low` or below to `high`")
    low: float = 0.0
    high: float = 1.0
    filled: bool = Field(default=False, description="bars that lie over each other, not outlines")
    median: bool = Field(default=False, description="a line at it; dotted outlines are nulls")
    levels: dict[str, float] = Field(default={}, description="name: x of a dashed line")
    x_title: str = ""
    y_title: str = ""
    range: Span = Field(default=None, description="of the x axis")


class Cumulative(Rows):
    """The share of each group that is not above a value; the reader chooses the measure."""

    x: Titles = Field(min_length=1, description="column: title; the reader chooses if several")
    lines: Several = Field(min_length=1, description="columns whose values have a line each")
    names: Names = Field(min_length=1, description="of these, in order; two columns: a/b")
    units: str = Field(default="units", description="what is counted")
    points: int = Field(default=300, ge=2, description="of a line, at most")


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


class Traced(Section):
    """One attribution graph of the section graphs, to walk."""

    dictionary: Column = Field(description="a name of graphs.dictionaries")
    prompt: Column = Field(description="a name of graphs.prompts")
    most: int = Field(default=60, ge=1, description="features and errors drawn, by influence")


class Verdicts(Section):
    """It has no options."""


OPTIONS: dict[str, type[Section]] = {
    m.__name__.lower(): m
    for m in (
        Lines, Learning, Agreement, Bars, Matrix, Trajectories, Histogram, Cumulative, Heads,
        Estimates, Pareto, Scaling, Training, Density, Attribution, Completeness, Dead, Traced,
        Verdicts,
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
ORDERED = ("names", "titles", "cases", "x", "y", "z", "runs", "sets", "methods")


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
