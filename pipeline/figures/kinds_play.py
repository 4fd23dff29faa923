"""Figures that a reader plays with; no torch.

1. `playable` is any figure with lists and sliders, whose every place changes some traces:
   templates/play.js does that, and says in a sentence what is seen. A paper's figures.py may call
   it.
2. `board` and `maze` are played with so: a model's reading of a world by layer and step, where it
   goes next, and both after something was written into it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.errors import RetraceError
from pipeline.figures import parts, theme
from pipeline.figures.kinds_common import need, rows_of
from pipeline.figures.theme import INK, PAGE, PALETTE
from pipeline.spec.figures import Board


class Play:
    """What the places of some controls do to a figure.

    Args:
        controls: name -> its values; those in `sliders` are sliders, others lists. Where a
            combination has no state, later controls are put elsewhere, so the rarest stands last.

    Attributes:
        start: the place of each control at first; the nearest that exists is taken.
    """

    def __init__(self, controls: dict[str, list], sliders: Iterable[str] = ()) -> None:
        self.places = {
            name: {v: i for i, v in enumerate(values)} for name, values in controls.items()
        }
        self.controls = [
            {"name": name, "values": [str(v) for v in values], "slider": name in sliders}
            for name, values in controls.items()
        ]
        self.start = [0] * len(self.controls)
        self.shown: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []

    def key(self, place: dict[str, Any]) -> str:
        """Places of the controls that `place` gives a value."""
        return ",".join(str(self.places[name][v]) for name, v in place.items())

    def by(self, names: Iterable[str]) -> list[int]:
        """The numbers of some controls."""
        return [list(self.places).index(name) for name in names]

    def show(self, traces: list[int], names: list[str], states: dict[tuple, dict]) -> None:
        """Traces that change with some controls.

        Args:
            states: values of `names` -> what Plotly.restyle does to the traces: for each attribute
                a list, an entry a trace.
        """
        found = {self.key(dict(zip(names, k, strict=True))): v for k, v in states.items()}
        self.shown.append({"traces": traces, "by": self.by(names), "states": found})

    def say(self, names: list[str], sentences: dict[tuple, str]) -> None:
        """A sentence that changes with some controls; sentences stand one behind the other."""
        found = {self.key(dict(zip(names, k, strict=True))): v for k, v in sentences.items()}
        self.said.append({"by": self.by(names), "states": found})


def playable(figure: go.Figure, play: Play, tap: tuple[int, str] | None = None) -> go.Figure:
    """The figure, each of its traces drawn in its first state until play.js takes over.

    Args:
        tap: a trace and a list: a tap on a point whose text is a value of the list chooses it.
    """
    for shown in play.shown:
        change = next(iter(shown["states"].values()))
        for i, trace in enumerate(shown["traces"]):
            figure.data[trace].update({k.replace(".", "_"): v[i] for k, v in change.items()})
    meta = {"controls": play.controls, "shown": play.shown, "said": play.said, "start": play.start}
    if tap:
        meta["tap"] = {"trace": tap[0], "control": play.by([tap[1]])[0]}
    return figure.update_layout(meta={"play": meta}, showlegend=False)


def panels(what: Board, size: int) -> parts.Panels:
    """Two square panels with the names of rows and columns."""
    out = parts.Panels(list(what.titles), gap=(0.1, 0.1))
    names = what.names or [str(i) for i in range(size)]
    ticks = {"tickvals": list(range(size)), "range": [-0.5, size - 0.5], **parts.PLAIN}
    for col in (1, 2):
        out.figure.update_xaxes(ticktext=names[:size], **ticks, row=1, col=col)
        down = {"ticktext": [str(i + (1 if what.names else 0)) for i in range(size)]}
        down |= ticks | {"range": [size - 0.5, -0.5]}
        parts.square(out.figure, 1, col, **down)
    return out


def played(tables: dict[str, Any], what: Board) -> tuple[pd.DataFrame, Play, int]:
    """(rows of the first seed, controls without states, cells a side) of a table `play`."""
    (name, table), *_ = tables.items()
    need(table, ["case", "edit", "what", "layer", "step", "row", "column", "value", "mark"], name)
    table = parts.first(rows_of(table, name, what))
    if len(some := [c for c in ("arm", "run") if c in table and table[c].nunique() > 1]):
        raise RetraceError(f"table {name}: several values of {some[0]}; choose one by `where`")
    layers = sorted(table.loc[table["layer"] >= 0, "layer"].unique().tolist())
    controls = {what.case: sorted(table["case"].unique().tolist()),
                what.step: sorted(table["step"].unique().tolist()), "layer": layers,
                what.edit: ["", *sorted(set(table["edit"]) - {""})]}  # fmt: skip
    play = Play(controls, sliders=(what.step, "layer"))
    play.controls[3]["values"][0] = what.none
    play.start = [0, len(controls[what.step]) // 2, len(layers) - 1, 0]
    return table, play, int(table["row"].max()) + 1


def groups(table: pd.DataFrame, *by: str) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """(values, rows in the order of the cells) of each group."""
    ordered = table.sort_values(["row", "column"], kind="stable")
    return iter(ordered.groupby(list(by), sort=True))


def grid(rows: pd.DataFrame, size: int) -> list[list[float | None]]:
    """Values by row and column, None where a cell has none."""
    out: list[list[float | None]] = [[None] * size for _ in range(size)]
    for r, c, v in zip(rows["row"], rows["column"], rows["value"], strict=True):
        out[int(r)][int(c)] = round(float(v), 3)
    return out


def heats(out: parts.Panels, size: int, hovers: tuple[str, ...], diverging: bool) -> None:
    """Empty maps in the panels, from the left."""
    blank = [[0.0] * size for _ in range(size)]
    for i, hover in enumerate(hovers):
        look = {"zmin": 0, "zmax": 1, "colorscale": theme.scale([PAGE, PALETTE[0]])}
        reach = 1 if diverging and i == 0 else None
        look = {"showscale": False} | ({} if reach else look)
        out.add(i + 2 - len(hovers), parts.heat(blank, hover=hover, reach=reach, **look))


def board(tables: dict[str, Any], options: dict[str, Any]) -> parts.Drawn:
    """A board as a probe reads it, and the probabilities of the next move; see `kinds.board`."""
    what = Board.model_validate(options)
    table, play, size = played(tables, what)
    by, out = [what.case, what.step, what.edit], panels(what, size)
    heats(out, size, ("%{x}%{y}: %{z:.2f}", "%{x}%{y}: %{z:.1%}"), diverging=True)
    cells = [(r, c) for r in range(size) for c in range(size)]
    names = [f"{what.names[c] if what.names else c}{r + 1}" for r, c in cells]
    x, y = [c for _, c in cells], [r for r, _ in cells]
    disc = {"line": {"width": 1.5, "color": "#555555"}, "opacity": 0}
    for panel in (0, 1):
        out.add(panel, parts.points(x, y, size=13, hover="%{text}", text=names, marker=disc))
    open_to = {"symbol": "square-open", "line": {"width": 2.5}, "opacity": 0}
    out.add(1, parts.points(x, y, colour=PALETTE[1], size=20, marker=open_to))
    read, moves = table[table["what"] == "read"], table[table["what"] == "move"]
    play.show([0], [what.case, what.step, "layer", what.edit], {
        k: {"z": [grid(rows, size)]} for k, rows in groups(read, "case", "step", "layer", "edit")
    })  # fmt: skip
    play.show(
        [1], by, {k: {"z": [grid(r, size)]} for k, r in groups(moves, "case", "step", "edit")}
    )
    one = read[read["layer"] == read["layer"].min()]
    discs = {}
    for k, rows in groups(one, "case", "step", "edit"):
        mark = rows["mark"].tolist()
        colours = ["#111111" if m == what.first else "#f7f7f7" for m in mark]
        there = [int(m != "") for m in mark]
        discs[k] = {"marker.color": [colours] * 2, "marker.opacity": [there] * 2}
    play.show([2, 3], by, discs)
    legal = {k: {"marker.opacity": [[int(m != "") for m in r["mark"]]]}
             for k, r in groups(moves, "case", "step", "edit")}  # fmt: skip
    play.show([4], by, legal)
    play.say([what.case, what.step, "layer", what.edit], {
        k: f"The probe reads {right(rows, what)} of {len(rows)} squares rightly."
        for k, rows in groups(read, "case", "step", "layer", "edit")
    })  # fmt: skip
    play.say(by, {k: likeliest(r, names) for k, r in groups(moves, "case", "step", "edit")})
    out.finish(400, top=40)
    shown = table[what.columns] if what.columns else table
    return playable(out.figure, play, (2, what.edit)), shown


def right(rows: pd.DataFrame, what: Board) -> int:
    """Squares whose reading is on the side of their mark; -1 is the first mark, 1 the other."""
    sign = np.where(rows["mark"] == "", 0, np.where(rows["mark"] == what.first, -1, 1))
    return int((np.where(rows["value"].abs() < 0.5, 0, np.sign(rows["value"])) == sign).sum())


def likeliest(rows: pd.DataFrame, names: list[str]) -> str:
    """The likeliest next square, whether it is legal, and the probability of legal ones."""
    best, legal = int(rows["value"].to_numpy().argmax()), (rows["mark"] != "").to_numpy()
    return (f"Likeliest next: {names[best]}, {rows['value'].iloc[best]:.0%}, "
            f"{'legal' if legal[best] else 'illegal'}; {rows['value'][legal].sum():.1%} on legal "
            f"squares.")  # fmt: skip


def maze(tables: dict[str, Any], options: dict[str, Any]) -> parts.Drawn:
    """A maze as a probe reads it, and the probabilities of the next cell; see `kinds.maze`."""
    what = Board.model_validate(options)
    table, play, size = played(tables, what)
    out = panels(what, size)
    walls, moves = table[table["what"] == "wall"], table[table["what"] == "move"]
    heats(out, size, ("(%{y},%{x}): %{z:.1%}",), diverging=False)
    first = next(iter(groups(walls, "case", "layer", "edit")))[1]
    ends = [corridor(r, c) for r, c in zip(first["row"], first["column"], strict=True)]
    for xs, ys in ends:  # one a connection: its width cannot change along a line
        out.add(0, parts.line(xs, ys, colour=PALETTE[0], width=11))
    thin = {"colour": INK, "width": 2}
    new = {"colour": PALETTE[1], "width": 3, "dash": "dot"}
    walked = {"colour": PALETTE[1], "width": 4}
    for panel, look in ((0, thin), (1, thin), (0, new), (1, walked)):
        out.add(panel, parts.line([None], [None], **look))
    symbols = ["circle", "x"]  # origin and target
    for panel in (0, 1):
        out.add(panel, parts.points([0, 0], [0, 0], colour=PALETTE[1], size=11, symbol=symbols))
    middles = parts.points(first["column"], first["row"], size=16, hover="%{text}", text="",
                           marker={"opacity": 0})  # fmt: skip
    out.add(0, middles)
    n = len(ends)
    case, step, edit = what.case, what.step, what.edit
    changes = {  # what is drawn -> its traces, and what they depend on
        "read": (list(range(1, n + 1)), [case, "layer", edit]),
        "text": ([n + 7], [case, "layer", edit]), "true": ([n + 1, n + 2], [case]),
        "written": ([n + 3], [case, edit]), "path": ([n + 4], [case, step]),
        "ends": ([n + 5, n + 6], [case]), "move": ([0], [case, step, edit]),
    }  # fmt: skip
    shown: dict[str, dict] = {name: {} for name in changes}
    sentences: dict[str, dict] = {"read": {}, "move": {}}
    for key, rows in groups(walls, "case", "layer", "edit"):
        p, mark, is_new = rows["value"].tolist(), rows["mark"].tolist(), key[2] != ""
        there = [m == "True" or (m == "written" and is_new) for m in mark]
        shown["read"][key] = {"opacity": [round(v, 3) for v in p]}
        shown["text"][key] = {"text": [[f"connected: {v:.0%}" for v in p]]}
        hits = sum((v > 0.5) == t for v, t in zip(p, there, strict=True))
        sentences["read"][key] = f"The probe reads {hits} of {n} connections rightly."
        drawn = joined(ends, [m == "True" for m in mark])
        shown["true"][key[:1]] = {"x": [drawn[0]] * 2, "y": [drawn[1]] * 2}
        drawn = joined(ends, [m == "written" and is_new for m in mark])
        shown["written"][key[0], key[2]] = {"x": [drawn[0]], "y": [drawn[1]]}
    for key, rows in groups(moves, "case", "step", "edit"):
        at = key[1]
        walked = rows[rows["mark"].astype(int) >= 0].sort_values(
            "mark", key=lambda m: m.astype(int)
        )
        x, y = walked["column"].tolist(), walked["row"].tolist()
        shown["move"][key] = {"z": [grid(rows, size)]}
        shown["ends"][key[:1]] = {"x": [[x[0], x[-1]]] * 2, "y": [[y[0], y[-1]]] * 2}
        shown["path"][key[:2]] = {"x": [x[:at] or [None]], "y": [y[:at] or [None]]}
        best = rows.loc[rows["value"].idxmax()]
        sentences["move"][key] = (
            f"Behind {at} cells the likeliest is ({best['row']:.0f},{best['column']:.0f}), "
            f"{best['value']:.0%}; the path goes to ({y[at]:.0f},{x[at]:.0f})."
        )
    for name, (traces, by) in changes.items():
        play.show(traces, by, shown[name])
    play.say([case, "layer", edit], sentences["read"])
    play.say([case, step, edit], sentences["move"])
    out.finish(400, top=40)
    return playable(out.figure, play), table[what.columns] if what.columns else table


def corridor(row: float, column: float) -> tuple[list[float], list[float]]:
    """x and y of the two cells that a connection's middle lies between."""
    down = row % 1 > 0
    return ([column, column], [row - 0.5, row + 0.5]) if down else (
        [column - 0.5, column + 0.5], [row, row])  # fmt: skip


def joined(ends: list[tuple[list, list]], keep: list[bool]) -> tuple[list, list]:
    """Some of the corridors as one broken line."""
    some = [xy for xy, k in zip(ends, keep, strict=True) if k]
    return ([v for xs, _ in some for v in (*xs, None)] or [None],
            [v for _, ys in some for v in (*ys, None)] or [None])  # fmt: skip
