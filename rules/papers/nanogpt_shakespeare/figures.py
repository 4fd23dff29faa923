"""Figures of the nanoGPT paper: loss curves, text that the models write, the logit lens; no torch.

Each takes the paper's tables and the figure's options, and returns a plotly figure and the numbers
that it plots.
"""

import html
import textwrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.report.theme import DASHES, GRID, PALETTE, axis, colour, literal, selector

Drawn = tuple[go.Figure, pd.DataFrame]
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SETS = {"val": "held out", "train": "training text"}
MEASURES = {
    "kl": ("KL of the prediction from the lens", "nats"),
    "loss": ("cross entropy of the next character", "nats"),
    "accuracy": ("share of next characters that are right", ""),
    "agreement": ("share that agrees with the prediction", ""),
}


def loss(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss against step of every recipe, with the published values and a uniform guess.

    Options: published, recipe -> best held-out loss that nanoGPT's README states.
    """
    runs = {n.split("/")[1]: t for n, t in tables.items() if n.startswith("training/")}
    frame = pd.concat([t.assign(recipe=r) for r, t in runs.items()], ignore_index=True)
    figure = go.Figure()
    for i, recipe in enumerate(runs):
        for dash, (name, what) in zip(DASHES[::2], SETS.items(), strict=False):
            rows = frame[(frame["recipe"] == recipe) & (frame["set"] == name)]
            for j, (member, curve) in enumerate(rows.groupby("member")):
                figure.add_scatter(
                    x=curve["step"],
                    y=curve["loss"],
                    mode="lines+markers",
                    line={"color": colour(i), "dash": dash, "width": 1.8},
                    marker={"size": 5},
                    name=f"{literal(recipe)}, {what}",
                    legendgroup=f"{recipe} {name}",
                    showlegend=j == 0,
                    hovertemplate=f"{literal(member)}, step %{{x}}: %{{y:.4f}} nats<extra></extra>",
                )
    lines = {f"README, {r}": v for r, v in options.get("published", {}).items() if r in runs}
    uniform = float(tables["language/text"]["ln_vocab"].iloc[0])
    for name, value in lines.items():
        recipe = list(runs).index(name.removeprefix("README, "))
        level(figure, value, f"{name}: {value:g}", colour(recipe), "bottom left")
    level(figure, uniform, f"uniform guess: {uniform:.3f}", PALETTE[-1], "top right")
    every = [*frame["loss"], *lines.values(), uniform]
    ends = [min(every) - 0.2, max(every) + 0.2]  # room for the names of the dotted lines
    figure.update_layout(xaxis=axis("step"), yaxis=axis("loss", "nats a character", range=ends))
    columns = ["recipe", "member", "seed", "step", "tokens", "set", "loss", "accuracy"]
    return figure, frame[columns]


def level(figure: go.Figure, value: float, text: str, line: str, where: str) -> None:
    """A dotted line at a loss, with its name at an end that the falling curves leave free."""
    figure.add_hline(
        y=value,
        line={"color": line, "dash": "dot", "width": 1.2},
        annotation={"text": literal(text), "font": {"size": 11}, "bgcolor": "rgba(0,0,0,0)"},
        annotation_position=where,
    )


def samples(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What each arm writes, and held-out text, side by side; the reader chooses the sample.

    Options: characters of each text (default 500), width of a column in characters (default 40).
    """
    frame = tables["language/samples"].copy()
    by_model = frame["writer"] == "model"
    order = sorted(frame["arm"].unique(), reverse=True)  # untrained, trained
    frame["writer"] = frame["arm"].where(by_model, frame["writer"])
    frame = frame[by_model | (frame["arm"] == order[0])]
    frame = frame.sort_values(
        "writer", key=lambda c: c.map([*order, "held out"].index), kind="stable"
    )
    n, width = options.get("characters", 500), options.get("width", 40)
    shown = {
        int(i): [[as_lines(t[:n], width)] for t in rows["text"]]
        for i, rows in frame.groupby("sample")
    }
    longest = max(t.count("<br>") + 1 for texts in shown.values() for (t,) in texts)
    writers = list(dict.fromkeys(frame["writer"]))
    cell = {"align": "left", "fill": {"color": "rgba(0,0,0,0)"}, "line": {"color": GRID}}
    figure = go.Figure(
        go.Table(
            header={"values": [f"<b>{literal(w)}</b>" for w in writers], **cell},
            cells={
                "values": next(iter(shown.values())),
                "font": {"family": MONO, "size": 11},
                "height": 20,
                **cell,
            },
        )
    )
    choices = {f"sample {i + 1}": [{"cells.values": [v]}, {}] for i, v in shown.items()}
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    figure.update_layout(
        margin={"l": 4, "r": 4, "t": 8, "b": 4},
        height=round(60 + 14.5 * longest),
        meta={"min_width": round(len(writers) * (6.7 * width + 18))},  # a phone scrolls sideways
    )
    return figure, frame


def as_lines(text: str, width: int) -> str:
    """Text with its own line breaks, long lines broken, and nothing of it read as markup."""
    lines = [
        part
        for line in text.strip("\n").split("\n")
        for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]
    ]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def lens(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The logit lens by layer, one line an arm; the reader chooses the measure."""
    table = tables["language/lens"].sort_values("layer")
    arms = dict(iter(table.groupby("arm")))
    figure, first = go.Figure(), next(iter(MEASURES))
    for i, (arm, rows) in enumerate(arms.items()):
        figure.add_scatter(
            x=rows["layer"],
            y=rows[first],
            mode="lines+markers",
            name=literal(arm),
            line={"color": colour(i), "dash": DASHES[i % len(DASHES)]},
            marker={"symbol": ["circle", "diamond"][i % 2], "size": 8},
            hovertemplate=f"{literal(arm)}, after %{{x}} layers: %{{y:.4~g}}<extra></extra>",
        )
    choices = {
        what: [{"y": [t[m].tolist() for t in arms.values()]}, {"yaxis.title.text": title(m)}]
        for m, (what, _) in MEASURES.items()
    }
    figure.update_layout(
        updatemenus=[selector(choices)],
        xaxis=axis("layers before the lens (0: embeddings; last: the prediction)", dtick=1),
        yaxis=axis(*MEASURES[first], rangemode="tozero"),
    )
    return figure, table


def title(measure: str) -> str:
    return axis(*MEASURES[measure])["title"]["text"]


def excerpt(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The likeliest next character after every layer, along an excerpt; right ones are framed."""
    table = tables["language/excerpt"]
    arms = dict(iter(table.groupby("arm")))
    data = {arm: (field(t), right(t)) for arm, t in arms.items()}
    fields, marks = next(iter(data.values()))
    figure = go.Figure(
        [
            go.Heatmap(
                **fields,
                zmin=0,
                zmax=1,
                texttemplate="%{text}",
                textfont={"family": MONO, "size": 12},
                colorbar={"title": {"text": "probability", "side": "right"}},
                hovertemplate="after %{y} layers, behind “%{customdata[0]}”: “%{text}” with "
                "%{z:.2f}<br>it is “%{customdata[1]}”, given %{customdata[2]:.2f}<extra></extra>",
            ),
            go.Scatter(
                **marks,
                mode="markers",
                marker={
                    "symbol": "square-open",
                    "size": 15,
                    "color": PALETTE[1],
                    "line": {"width": 2},
                },
                name="right",
                hoverinfo="skip",
            ),
        ]
    )
    choices = {
        arm: [{k: [f.get(k), m.get(k)] for k in ("x", "y", "z", "text", "customdata")}, {}]
        for arm, (f, m) in data.items()
    }
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    one = next(iter(arms.values()))
    top = one[one["layer"] == one["layer"].max()].sort_values("position")
    ticks = {"tickvals": top["position"].tolist(), "ticktext": shown(top["token"])}
    ticks |= {"range": [top["position"].min() - 0.5, top["position"].max() + 0.5]}
    depth = [-0.5, one["layer"].max() + 0.5]
    figure.update_layout(
        xaxis=axis("character read", tickangle=0, tickfont={"family": MONO}, **ticks),
        yaxis=axis("layers before the lens", dtick=1, range=depth),
        height=140 + 38 * one["layer"].nunique(),
        margin={"t": 32},
        meta={"min_width": 130 + 18 * len(top)},  # a phone scrolls sideways
    )
    return figure, table


def field(table: pd.DataFrame) -> dict[str, Any]:
    """x, y, z, text and customdata of the heat map."""
    grid = {c: table.pivot(index="layer", columns="position", values=c)
            for c in ("p_top", "top", "token", "target", "p_target")}  # fmt: skip
    z = grid["p_top"]
    text = [shown(row) for row in grid["top"].to_numpy()]
    more = [
        [list(cell) for cell in zip(shown(a), shown(b), p, strict=True)]
        for a, b, p in zip(
            *(grid[c].to_numpy() for c in ("token", "target", "p_target")), strict=True
        )
    ]
    return {
        "x": z.columns.tolist(),
        "y": z.index.tolist(),
        "z": z.to_numpy().tolist(),
        "text": text,
        "customdata": more,
    }


def right(table: pd.DataFrame) -> dict[str, Any]:
    """x and y of the cells whose likeliest character is the next one."""
    hits = table[table["top"] == table["target"]]
    return {"x": hits["position"].tolist(), "y": hits["layer"].tolist()}


def shown(characters: Any) -> list[str]:
    """Characters that can be seen: a space as ␣, a line break as ↵; never markup."""
    return ["␣" if c == " " else literal(c) for c in characters]
