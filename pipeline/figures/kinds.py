"""Figures that every paper on sparse autoencoders needs: kind -> function.

A kind takes the tables that paper.yaml names and the figure's options, and returns the figure and
the numbers that it plots. Papers write their own in the same form, in a figures.py beside
paper.yaml. Plotly and pandas are imported where they are used: the names of the kinds are read
while snakemake builds its graph.
"""

from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import in_words, named, need, title_of, without_seed
from pipeline.figures.kinds_effects import agreement, estimates, heads
from pipeline.figures.kinds_lines import bars, learning, lines
from pipeline.figures.kinds_maps import matrix, traced, trajectories
from pipeline.figures.kinds_sae import dead, pareto, scaling
from pipeline.figures.kinds_spread import cumulative, density, histogram
from pipeline.figures.kinds_verdicts import verdicts


def training(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Curves of training, one line a dictionary; the reader chooses the metric.

    Seeds of a dictionary share their look and their place in the legend.

    Options: y, a list of columns (default: explained_variance, l0, dead_share, loss); points a
    curve (default 40); saes, names or their beginnings (default all).
    """
    import pandas as pd
    import plotly.graph_objects as go

    ys = options.get("y", ["explained_variance", "l0", "dead_share", "loss"])
    ys = [ys] if isinstance(ys, str) else list(ys)
    for name, frame in tables.items():
        need(frame, ["sae", "step", "rows", *ys], name)
    frame = pd.concat([f.assign(arm=named(n)) for n, f in tables.items()], ignore_index=True)
    if wanted := options.get("saes"):
        frame = frame[[s.startswith(tuple(wanted)) for s in frame["sae"]]]
        if frame.empty:
            raise RetraceError(f"no dictionary's name begins with {', '.join(wanted)}")
    groups = [_thinned(g, options.get("points", 40)) for _, g in frame.groupby(["arm", "sae"])]
    frame = pd.concat(groups)[["arm", "sae", "step", "rows", *ys]]
    several = frame["arm"].nunique() > 1
    arms = list(dict.fromkeys(frame["arm"]))
    plain = list(dict.fromkeys(map(without_seed, frame["sae"])))
    fig, shown = go.Figure(), set()
    for g in groups:
        arm, sae = g["arm"].iloc[0], g["sae"].iloc[0]
        number = plain.index(without_seed(sae))
        dash = theme.DASHES[(arms.index(arm) + number // 7) % len(theme.DASHES)]
        line = {"color": theme.colour(number), "dash": dash, "width": 1.6}
        words = [f"{in_words(n)} · {arm}" if several else in_words(n) for n in (plain[number], sae)]
        name, whole = map(theme.literal, words)
        fig.add_scatter(
            x=g["rows"], y=g[ys[0]], mode="lines", line=line, name=name, legendgroup=name,
            showlegend=name not in shown, hovertemplate=f"%{{y:.4~g}}<extra>{whole}</extra>",
        )  # fmt: skip
        shown.add(name)
    fig.update_layout(xaxis=theme.axis(title_of("rows")), yaxis=theme.axis(title_of(ys[0])))
    choices = {
        title_of(y): [{"y": [g[y].tolist() for g in groups]}, {"yaxis.title.text": title_of(y)}]
        for y in ys
    }
    if len(ys) > 1:
        fig.update_layout(updatemenus=[theme.selector(choices)])
    return fig, frame


def _thinned(group: Any, points: int) -> Any:
    """At most `points` rows of a curve, evenly spaced, the first and the last among them."""
    group = group.sort_values("step", kind="stable")
    keep = np.unique(np.linspace(0, len(group) - 1, min(points, len(group))).round().astype(int))
    return group.iloc[keep]


def attribution(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Estimated against exact effect of each ablated latent, one colour a prompt.

    The reader chooses a prompt, since prompts differ much in scale.
    Options: x (default exact), y (default attribution; attribution_ig where the table has it).
    """
    import plotly.graph_objects as go

    (name, frame), *_ = tables.items()
    x, y = options.get("x", "exact"), options.get("y", "attribution")
    need(frame, ["prompt", "latent", "position", "token", x, y], name)
    frame = frame[frame[x].notna() & frame[y].notna()]
    if frame.empty:
        raise RetraceError(f"table {name}: no latent was ablated exactly, so nothing to compare")
    groups = list(frame.groupby("prompt", sort=False))
    n = len(groups)
    shown = lambda i: [k == i for k in range(n + 1)] + [i in (0, k + 1) for k in range(n)]  # noqa: E731
    traces = [_identity(g, x, y) for g in [frame, *(g for _, g in groups)]]
    traces += [_effects(g, x, y, p, theme.colour(i)) for i, (p, g) in enumerate(groups)]
    for trace, visible in zip(traces, shown(0), strict=True):
        trace.visible = visible
    fig = go.Figure(traces)
    labels = ["all prompts", *(str(prompt) for prompt, _ in groups)]
    choices = {label: [{"visible": shown(i)}, {}] for i, label in enumerate(labels)}
    if n > 1:
        fig.update_layout(updatemenus=[theme.selector(choices)])
    fig.update_layout(
        xaxis=theme.axis("exact change of the logit difference", "logits"),
        yaxis=theme.axis("estimated change", "logits"),
    )
    return fig, frame[list(dict.fromkeys(["prompt", "latent", "position", "token", x, y]))]


def _effects(group: Any, x: str, y: str, prompt: str, colour: str) -> Any:
    """The ablated latents of one prompt."""
    import plotly.graph_objects as go

    token = map(theme.literal, group["token"])
    return go.Scatter(
        x=group[x],
        y=group[y],
        mode="markers",
        name=theme.literal(prompt),
        marker={"color": theme.rgba(colour, 0.75), "size": 7},
        customdata=list(zip(group["latent"], token, group["position"], strict=True)),
        hovertemplate="latent %{customdata[0]} on “%{customdata[1]}” (position "
        "%{customdata[2]})<br>exact %{x:.3~g}, estimated %{y:.3~g}",
    )


def _identity(group: Any, x: str, y: str) -> Any:
    """The line on which an estimate is right, as long as these points need."""
    import plotly.graph_objects as go

    ends = [float(group[[x, y]].min().min()), float(group[[x, y]].max().max())]
    line = {"color": theme.INK, "dash": "dot", "width": 1}
    return go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip")


def completeness(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Bars a prompt: what latents, error and bias add up to, against the change that happened.

    The reader chooses the estimate where the table has both. Options: suffix (`""` or `_ig`: only
    gradient x activation, or only integrated gradients).
    """
    import pandas as pd
    import plotly.graph_objects as go

    (name, frame), *_ = tables.items()
    need(frame, ["prompt", "logit_diff", "baseline_logit_diff"], name)
    wanted = [options["suffix"]] if "suffix" in options else list(ESTIMATES)
    there = [s for s in wanted if f"sum_latents{s}" in frame] or wanted[:1]
    out = {s: _parts(frame, s, name) for s in there}
    first = out[there[0]]
    bars = [c for c in first.columns if c not in ("prompt", "estimate")]
    colours = {"their sum": theme.PALETTE[-1], "actual change": theme.INK}
    fig = go.Figure()
    for i, bar in enumerate(bars):
        marker = {"color": colours.get(bar, theme.colour(i))}
        prompts = [theme.literal(p) for p in first["prompt"]]
        fig.add_bar(x=prompts, y=first[bar].tolist(), name=bar, marker=marker)
    fig.update_traces(hovertemplate="%{fullData.name}: %{y:.3~g}")
    choices = {ESTIMATES[s]: [{"y": [out[s][b].tolist() for b in bars]}, {}] for s in there}
    if len(choices) > 1:
        fig.update_layout(updatemenus=[theme.selector(choices)])
    fig.update_layout(
        barmode="group", xaxis=theme.axis("prompt"), yaxis=theme.axis("logit difference", "logits")
    )
    return fig, pd.concat(out.values(), ignore_index=True)


def board(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A board to play with: what a probe reads by layer and step, and the next move's chances.

    A tap on a square, or a list, shows what changes after it was flipped; see `spec_figures.Board`.
    """
    from pipeline.figures import kinds_play

    return kinds_play.board(tables, options)


def maze(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A maze to play with: what a probe reads of its connections, and the next cell's chances."""
    from pipeline.figures import kinds_play

    return kinds_play.maze(tables, options)


ESTIMATES = {"": "gradient × activation", "_ig": "integrated gradients"}


def _parts(frame: Any, suffix: str, table: str) -> Any:
    """What each prompt's attribution is made of by one estimate, and what really changed."""
    need(frame, [f"sum_latents{suffix}", f"error_term{suffix}"], table)
    names = {"latents": "sum_latents", "error term": "error_term", "bias": "bias_term"}
    names = {k: c + suffix for k, c in names.items() if c + suffix in frame}
    out = frame[["prompt"]].assign(estimate=ESTIMATES[suffix])
    out = out.assign(**{part: frame[column] for part, column in names.items()})
    total = {"their sum": out[list(names)].sum(axis=1)}
    return out.assign(
        **total, **{"actual change": frame["logit_diff"] - frame["baseline_logit_diff"]}
    )


KINDS = {
    f.__name__: f
    for f in (
        pareto, scaling, training, density, attribution, completeness, dead, verdicts, lines,
        learning, bars, agreement, estimates, heads, matrix, board, maze, trajectories, histogram,
        cumulative, traced,
    )
}  # fmt: skip
