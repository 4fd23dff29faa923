"""Figures of induction heads; no torch. Circuits and ablations are drawn in figures_circuits.py."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures import parts
from pipeline.figures.parts import PLAIN, Drawn, Panels, first, heat, line, square
from pipeline.figures.theme import PALETTE, axis, rgba
from pipeline.store.tables import where

# Blue is two layers, green one layer with smeared keys, grey one layer; orange the phase change.
RUNS = {
    "two_layer": ("two layers", PALETTE[0]),
    "smeared": ("one layer, smeared keys", PALETTE[2]),
    "one_layer": ("one layer", PALETTE[6]),
}
LAYERS = {"first layer": PALETTE[1], "second layer": PALETTE[0]}
SCORES = {"prefix_matching": "prefix matching", "previous_token": "previous-token attention"}
COLUMNS = ["run", "member", "seed", "step", "tokens", "icl", "loss", "first_copy", "second_copy"]
AXES = {
    "icl": axis("in-context learning", "nats"),
    "loss": axis("held-out loss", "nats"),
    "prefix_matching": axis("best prefix matching", range=[0, 1]),
}
TOKENS = axis("training tokens", "millions")
MILLION = 1e6
ROWS, POSITIONS = 64, 64  # token indices of a heat map, at most; positions of a pattern


# --- through training ----------------------------------------------------------------------


def runs_of(frame: pd.DataFrame, prefix: str = "") -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """(run, its name in words, its colour, its rows) of the runs in a table, in a fixed order."""
    for run, look in RUNS.items():
        if len(rows := where(frame, run=prefix + run)):
            yield prefix + run, *look, rows


def shade(panels: Panels, panel: int, phase: pd.DataFrame, run: str) -> None:
    """The phase change of a run, mean over seeds, as a band behind the lines."""
    rows = where(phase[phase["end"] > 0], run=run)
    if len(rows):
        start, end = rows["start"].mean() / MILLION, rows["end"].mean() / MILLION
        band = {"fillcolor": rgba(PALETTE[4], 0.18), "line_width": 0, "layer": "below"}
        panels.figure.add_vrect(start, end, **band, **panels.place(panel))


def curves(table: pd.DataFrame, phase: pd.DataFrame, prefix: str, columns: list[str]) -> Any:
    """Panels below each other, one per column of the table; the phase change shaded."""
    panels = Panels([""] * len(columns), 1, gap=(0, 0.06), shared_xaxes=True)
    for i, column in enumerate(columns):
        for _, name, colour, rows in runs_of(table, prefix):
            members = rows.pivot(index="tokens", columns="member", values=column)
            x, hover = members.index.to_numpy() / MILLION, "%{x:.2f} M tokens, %{y:.3f}"
            drawn = parts.over_seeds(x, members.to_numpy().T, name, colour, f"{name}<br>{hover}")
            panels.add(i, *drawn)
        shade(panels, i, phase, f"{prefix}two_layer")
        panels.figure.update_yaxes(**AXES[column], row=i + 1)
    panels.figure.update_xaxes(**TOKENS, row=len(columns))
    return panels.finish(140 + 240 * len(columns))


def icl(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """In-context learning score and loss of the three models through training."""
    table = tables["heads/training"]
    figure = curves(table, tables["heads/phase"], "", ["icl", "loss"])
    return figure, where(table, run=list(RUNS))[COLUMNS]


def text(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The same for the models of text, and their best prefix matching."""
    by = ["run", "member", "step"]
    best = tables["heads/scores"].groupby(by, as_index=False)["prefix_matching"].max()
    table = tables["heads/training"].merge(best, on=by)
    figure = curves(table, tables["heads/phase"], "text_", ["icl", "loss", "prefix_matching"])
    return figure, table[table["run"].str.startswith("text_")][[*COLUMNS[:7], "prefix_matching"]]


def loss_by_index(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Heat maps of the loss by training tokens and token index, and the curves at the end."""
    runs, frames = list(runs_of(tables["heads/training"])), []
    titles = [name for _, name, *_ in runs] + ["at the end of training"]
    panels = Panels(titles, 2, gap=(0.12, 0.2))
    end = len(runs)
    for i, (run, name, colour, rows) in enumerate(runs):
        loss = mean_by_index(rows)
        z, index = blocks(loss.to_numpy(), ROWS)
        hover = "%{x:.2f} M tokens, token %{y:.0f}<br>%{z:.2f} nats"
        field = heat(z.T.round(3), x=loss.index.to_numpy() / MILLION, y=index + 1, hover=hover,
                     coloraxis="coloraxis", xgap=None, ygap=None)  # fmt: skip
        panels.add(i, field)
        hover = f"{name}<br>token %{{x:.0f}}, %{{y:.2f}} nats"
        panels.add(end, line(index + 1, z[-1], name, colour, hover=hover))
        long = loss.rename_axis(index="tokens", columns="index").stack().rename("loss")
        frames.append(long.reset_index().assign(run=run))
        bare = {"showgrid": False}
        named = {} if i % 2 else axis("token index")  # once a row: a phone has room for no more
        panels.axis(i, bare | (TOKENS if i else {}), bare | named)
    panels.axis(end, axis("token index"), axis("loss", "nats", side="right", rangemode="tozero"))
    bar = {"title": {"text": "loss<br>(nats)"}, "len": 0.46, "y": 1, "yanchor": "top"}
    colours = {"colorbar": {**bar, "thickness": 12, "outlinewidth": 0}}
    return panels.finish(680, coloraxis=colours), pd.concat(frames, ignore_index=True)


def mean_by_index(rows: pd.DataFrame) -> pd.DataFrame:
    """Loss, mean over seeds: [training tokens, token index from 1]."""
    mean = rows.groupby("tokens")["by_index"].apply(lambda v: np.mean(np.stack(list(v)), 0))
    out = pd.DataFrame(np.stack(list(mean)), index=mean.index)
    out.columns += 1
    return out


def blocks(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `most` runs of neighbours of the last axis, and their middle places."""
    parts = np.array_split(np.arange(values.shape[-1]), min(most, values.shape[-1]))
    means = np.stack([values[..., p].mean(-1) for p in parts], -1)
    return means, np.array([p.mean() for p in parts])


# --- heads ---------------------------------------------------------------------------------


def heads(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A line per head: rows are the two scores, columns the runs; a list chooses the seed."""
    table, phase = tables["heads/scores"], tables["heads/phase"]
    table = where(table, run=list(RUNS))
    runs, seeds = list(runs_of(table)), sorted(table["seed"].unique())
    titles = [name for _, name, *_ in runs] + [""] * len(runs)
    shared = {"shared_xaxes": True, "shared_yaxes": True}
    panels = Panels(titles, len(runs), gap=(0.06, 0.06), **shared)
    for (row, score), (col, (run, _, _, of_run)) in product(enumerate(SCORES), enumerate(runs)):
        panel = row * len(runs) + col
        by_head = of_run.sort_values("tokens").groupby(["seed", "layer", "head"])
        for (seed, layer, head), rows in by_head:
            name = list(LAYERS)[layer]
            hover = f"head {layer}.{head}<br>%{{x:.2f}} M tokens, %{{y:.2f}}"
            look = {"colour": LAYERS[name], "width": 1.75, "hover": hover}
            trace = line(rows["tokens"] / MILLION, rows[score], name, **look)
            panels.add(panel, trace, case=seeds.index(seed))
        shade(panels, panel, phase, run if run == "two_layer" else "")
    panels.choose(f"seed {seed}" for seed in seeds)
    panels.figure.update_xaxes(**TOKENS, row=2)
    panels.figure.update_yaxes(range=[-0.02, 1.02])
    for row, name in enumerate(SCORES.values(), 1):
        panels.figure.update_yaxes(title={"text": name}, row=row, col=1)
    return panels.finish(560), table.drop(columns="member")


def patterns(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Attention of a previous-token head and of each run's head of best prefix matching."""
    table, best = first(tables["heads/patterns"]), "prefix matching"
    wanted = [("two_layer", "previous token")]
    wanted += [(run, best) for run in ("two_layer", "smeared", "one_layer")]
    found = [where(table, run=run, shown=shown) for run, shown in wanted]
    rows = [r.iloc[0] for r in found if len(r)]
    panels, frames = Panels([titled(r) for r in rows], 2, gap=(0.1, 0.24)), []
    for i, row in enumerate(rows):
        n = len(row["sequence"])
        attention = np.asarray(row["attention"], float).reshape(n, n)[:POSITIONS, :POSITIONS]
        tokens = ["BOS", *(str(t) for t in row["sequence"][1:POSITIONS])]
        panels.add(i, pattern(attention, tokens))
        place = panels.place(i)
        panels.figure.update_xaxes(**PLAIN, **place)
        square(panels.figure, **place, **PLAIN, autorange="reversed")
        query, key = np.tril_indices(len(attention))
        one = {"query": query, "key": key, "attention": attention[query, key]}
        frames.append(pd.DataFrame({**row[["run", "layer", "head"]].to_dict(), **one}))
    panels.axes("attended to", "position")
    bar = {"orientation": "h", "thickness": 12, "outlinewidth": 0, "len": 0.6}
    bar |= {"y": 0, "yref": "container", "yanchor": "bottom"}
    bar |= {"tickvals": [0, 0.5, 1], "ticktext": ["0", "attention", "1"]}
    shades = [[0, rgba(PALETTE[0], 0)], [0.15, rgba(PALETTE[0], 0.35)], [1, PALETTE[0]]]
    colours = {"colorscale": shades, "cmin": 0, "cmax": 1, "colorbar": bar}
    figure = panels.finish(760, coloraxis=colours)
    figure.update_layout(margin={"b": 88})  # the bar below the axes' titles
    return figure, pd.concat(frames, ignore_index=True)


def titled(row: pd.Series) -> str:
    """What a panel shows: the run, the head, and its score."""
    column = "previous_token" if row["shown"] == "previous token" else "prefix_matching"
    name = RUNS[row["run"]][0].replace("one layer, ", "")
    return f"{name}<br>head {row['layer']}.{row['head']}: {row[column]:.2f}"


def pattern(attention: np.ndarray, tokens: list[str]) -> Any:
    """Attention [query, key] with the first token at the top left; the future is left blank."""
    future = np.triu(np.ones_like(attention, bool), 1)
    words = np.asarray(tokens)
    named = np.stack(np.broadcast_arrays(words[:, None], words[None]), -1)
    hover = "token %{customdata[0]} at %{y} to %{customdata[1]} at %{x}<br>%{z:.2f}"
    short = len(tokens) <= 48
    return heat(
        np.where(future, np.nan, attention.round(2)), customdata=named if short else None,
        hover=hover if short else "position %{y} to %{x}<br>%{z:.2f}", hoverongaps=False,
        coloraxis="coloraxis", xgap=None, ygap=None,
    )  # fmt: skip
