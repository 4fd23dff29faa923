"""Heads through training, and what they attend to at its end."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import PALETTE, axis, rgba, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
LAYERS = [PALETTE[1], PALETTE[0]]  # first vermillion, second blue
SCORES = {"prefix_matching": "prefix matching", "previous_token": "previous-token attention"}
SHOWN = 64  # positions of a pattern


def heads(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """A line a head: rows are the two scores, columns the runs; a list chooses the seed."""
    table, phase = tables["heads/scores"], tables["heads/phase"]
    table = table[table["run"].isin(common.RUNS)]
    runs = common.runs_of(table)
    figure = make_subplots(
        rows=2,
        cols=len(runs),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=0.06,
        subplot_titles=[name for _, name, _ in runs],
    )
    seeds = sorted(table["seed"].unique())
    lines: dict[int, list] = {seed: [] for seed in seeds}
    seen: set[int] = set()
    for row, score in enumerate(SCORES, 1):
        for col, (run, _, _) in enumerate(runs, 1):
            of_run = table[table["run"] == run]
            for (layer, head), rows in of_run.groupby(["layer", "head"]):
                per_seed = {s: rows[rows["seed"] == s].sort_values("tokens") for s in seeds}
                for seed, one in per_seed.items():
                    lines[seed].append(one[score].to_numpy())
                one = per_seed[seeds[0]]
                figure.add_trace(line(one, score, layer, head, layer not in seen), row=row, col=col)
                seen.add(layer)
            common.shade(figure, phase, run if run == "two_layer" else "", row=row, col=col)
    for col in range(1, len(runs) + 1):
        figure.update_xaxes(**axis("training tokens", "millions"), row=2, col=col)
    for row, name in enumerate(SCORES.values(), 1):
        figure.update_yaxes(range=[-0.02, 1.02], row=row)
        figure.update_yaxes(title={"text": name}, row=row, col=1)
    choices = {f"seed {seed}": [{"y": ys}, {}] for seed, ys in lines.items()}
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    return common.headed(figure, 560), table.drop(columns="member")


def line(rows: pd.DataFrame, score: str, layer: int, head: int, legend: bool) -> go.Scatter:
    """One head's score through training."""
    name = f"{('first', 'second')[layer]} layer"
    return go.Scatter(
        x=rows["tokens"] / common.MILLION,
        y=rows[score],
        mode="lines",
        line={"color": LAYERS[layer], "width": 1.75},
        name=name,
        legendgroup=name,
        showlegend=legend,
        hovertemplate=f"head {layer}.{head}<br>%{{x:.2f}} M tokens, %{{y:.2f}}<extra></extra>",
    )


def patterns(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Attention of a previous-token head and of each run's head of best prefix matching."""
    table = tables["heads/patterns"]
    table = table[table["seed"] == table["seed"].min()]
    wanted = [("two_layer", "previous token"), ("two_layer", "prefix matching")]
    wanted += [("smeared", "prefix matching"), ("one_layer", "prefix matching")]
    rows = [table[(table["run"] == run) & (table["shown"] == shown)] for run, shown in wanted]
    rows = [r.iloc[0] for r in rows if len(r)]
    figure = make_subplots(
        rows=2,
        cols=2,
        horizontal_spacing=0.1,
        vertical_spacing=0.24,
        subplot_titles=[titled(r) for r in rows],
    )
    frames = []
    for i, row in enumerate(rows):
        n = len(row["sequence"])
        attention = np.asarray(row["attention"], float).reshape(n, n)[:SHOWN, :SHOWN]
        tokens = [str(t) for t in row["sequence"][:SHOWN]]
        tokens[0] = "BOS"
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        figure.add_trace(pattern(attention, tokens), **place)
        plain = {"showgrid": False, "zeroline": False}
        figure.update_xaxes(**plain, constrain="domain", **place)
        x = figure.get_subplot(place["row"], place["col"]).xaxis.plotly_name.removeprefix("xaxis")
        square = {"scaleanchor": f"x{x}", "autorange": "reversed", "constrain": "domain"}
        figure.update_yaxes(**plain, **square, **place)
        query, key = np.tril_indices(len(attention))
        one = {"query": query, "key": key, "attention": attention[query, key]}
        head = {"run": row["run"], "layer": row["layer"], "head": row["head"]}
        frames.append(pd.DataFrame({**head, **one}))
    for i in (1, 2):
        figure.update_xaxes(title={"text": "attended to"}, row=2, col=i)
        figure.update_yaxes(title={"text": "position"}, row=i, col=1)
    bar = {"orientation": "h", "thickness": 12, "outlinewidth": 0, "len": 0.6}
    bar |= {"y": 0, "yref": "container", "yanchor": "bottom"}
    bar |= {"tickvals": [0, 0.5, 1], "ticktext": ["0", "attention", "1"]}
    shades = [[0, rgba(PALETTE[0], 0)], [0.15, rgba(PALETTE[0], 0.35)], [1, PALETTE[0]]]
    figure.update_layout(coloraxis={"colorscale": shades, "cmin": 0, "cmax": 1, "colorbar": bar})
    common.headed(figure, 760).update_layout(margin={"b": 88})  # the bar below the axes' titles
    return figure, pd.concat(frames, ignore_index=True)


def titled(row: pd.Series) -> str:
    """What a panel shows: the run, the head, and its score."""
    column = "previous_token" if row["shown"] == "previous token" else "prefix_matching"
    name = common.RUNS[row["run"]][0].replace("one layer, ", "")
    return f"{name}<br>head {row['layer']}.{row['head']}: {row[column]:.2f}"


def pattern(attention: np.ndarray, tokens: list[str]) -> go.Heatmap:
    """Attention [query, key] with the first token at the top left; the future is left blank."""
    future = np.triu(np.ones_like(attention, bool), 1)
    shown = np.where(future, np.nan, attention.round(2))
    words = np.asarray(tokens)
    named = np.stack(np.broadcast_arrays(words[:, None], words[None]), -1)
    return go.Heatmap(
        z=shown,
        customdata=named if len(tokens) <= 48 else None,
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate="position %{y} to %{x}<br>%{z:.2f}<extra></extra>"
        if len(tokens) > 48
        else "token %{customdata[0]} at %{y} to %{customdata[1]} at %{x}<br>%{z:.2f}"
        "<extra></extra>",
    )
