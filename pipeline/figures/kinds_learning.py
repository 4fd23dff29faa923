"""The kind `learning`: loss and accuracy of the models of `training`, through training."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import need
from pipeline.figures.kinds_lines import finished
from pipeline.spec.figures import Learning

MARKED = 60  # points of a curve of which each has its marker
FLOOR = 1e-9  # losses below this are drawn here, where the axis is logarithmic


def learning(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Curves of the models of `training`; see `spec_figures.Learning`."""
    import pandas as pd

    from pipeline.figures import parts as parts

    what = Learning.model_validate(options)
    runs = {n.split("/")[1]: t for n, t in tables.items() if n.startswith("training/")}
    for run, table in runs.items():
        need(table, ["member", "seed", "set", "step", *what.measures], f"training/{run}")
    apart = [r for r in what.runs if r in runs] or [""]
    titles = [what.runs.get(r, "") for r in apart] + [""] * (len(apart) * (len(what.measures) - 1))
    shared = {"shared_xaxes": True, "shared_yaxes": True}
    panels = parts.Panels(titles, len(apart), gap=(0.09, 0.06), **shared)
    thinned = {r: thin(t, what.points) for r, t in runs.items()}
    for number, (run, table) in enumerate(thinned.items()):
        column = apart.index(run) if what.runs else 0
        for j, (some, text) in enumerate(what.sets.items()):
            colour, dash = (j, 0) if what.runs else (number, 2 * j)
            label = text if what.runs else f"{theme.literal(run.replace('_', ' '))}, {text}"
            for member, rows in table[table["set"] == some].groupby("member"):
                for i, measure in enumerate(what.measures):
                    y = rows[measure].clip(lower=FLOOR) if what.log else rows[measure]
                    marks = {"marker": {"size": 5}} if len(rows) <= MARKED else {}
                    trace = parts.line(
                        rows["step"], y, label, theme.rgba(theme.colour(colour), 0.8), width=1.6,
                        dash=theme.DASHES[dash],
                        hover=f"{theme.literal(member)}, {label}<br>step %{{x:,}}: %{{y:.4g}}",
                        **marks,
                    )  # fmt: skip
                    panels.add(i * len(apart) + column, trace)
    frame = pd.concat([t.assign(**{what.run: r}) for r, t in thinned.items()], ignore_index=True)
    levels = dict(_levels(what, tables, list(runs)))
    for text, (value, shade, where) in levels.items():
        _level(panels.figure, value, text, shade, where)
    _scales(panels, what, frame, [v for v, *_ in levels.values()])
    entries = len(what.sets) * (1 if what.runs else len(runs))
    return finished(panels, entries), frame[what.columns or list(frame.columns)]


def thin(table: Any, points: int) -> Any:
    """The table, or at most so many points of each curve, seeds and sets in order."""
    import pandas as pd

    from pipeline.figures.parts import thinned

    if not points:
        return table
    curves = [t.sort_values("step") for _, t in table.groupby(["seed", "set"])]
    return pd.concat([thinned(t, points) for t in curves])


def _levels(what: Learning, tables: dict, runs: list[str]) -> Iterator[tuple[str, tuple]]:
    """Text -> loss, colour and place of the dotted lines that curves are compared with."""
    for run, value in what.published.items():
        if run in runs:
            colour = theme.colour(runs.index(run))
            yield f"published, {theme.literal(run)}: {value:g}", (value, colour, "bottom left")
    if what.chance:
        table, _, column = what.chance.rpartition("/")
        if table not in tables:
            raise RetraceError(f"options.chance: the figure names no table '{table}'")
        need(tables[table], [column], table)
        value = float(tables[table][column].iloc[0])
        yield f"uniform guess: {value:.3f}", (value, theme.PALETTE[-1], "top right")


def _level(figure: Any, value: float, text: str, shade: str, where: str) -> None:
    """A dotted line with its name at an end that falling curves leave free."""
    look = {"color": shade, "dash": "dot", "width": 1.2}
    note = {"text": text, "font": {"size": 11}, "bgcolor": "rgba(0,0,0,0)"}
    figure.add_hline(value, line=look, annotation=note, annotation_position=where)


def _scales(panels: Any, what: Learning, frame: Any, levels: list[float]) -> None:
    """Axes of the curves, with room for the names of the dotted lines."""
    figure, n = panels.figure, len(what.measures)
    for row, measure in enumerate(what.measures, 1):
        axis = theme.axis(measure, what.unit if measure == "loss" else "")
        figure.update_yaxes(**axis, row=row, col=1)
        if measure == "accuracy":
            figure.update_yaxes(range=[-0.03, 1.05], row=row)
        elif what.log:
            figure.update_yaxes(**decades(frame["loss"].clip(lower=FLOOR)), row=row)
        elif levels:
            ends = [*frame["loss"], *levels]
            figure.update_yaxes(range=[min(ends) - 0.2, max(ends) + 0.2], row=row)
    figure.update_xaxes(**theme.axis("step", tickformat="~s", nticks=5), row=n)
    if not levels:  # whose names stand beside the y axis
        figure.update_xaxes(range=[0, None], rangemode="tozero")


def decades(values: Any) -> dict[str, Any]:
    """A log axis about all values: ticks at 1, 2 and 5 where they span less than three decades,
    else at every decade, or every second."""
    values = np.log10(np.asarray(values, dtype=float))
    low, high = float(values.min()), float(values.max())
    span = high - low
    dtick = "D2" if span < 3 else 1 if span < 6 else 2
    about = {"type": "log", "range": [low - 0.06 * span - 0.02, high + 0.06 * span + 0.02]}
    return about | {"dtick": dtick, "exponentformat": "power"}
