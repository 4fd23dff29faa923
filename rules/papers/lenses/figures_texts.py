"""Figures along example texts: prediction trajectories, and direct logit attribution; no torch."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.errors import RetraceError
from pipeline.figures.parts import Drawn, Panels, bars, chosen, evenly, first, heat, line
from pipeline.figures.theme import INK, PALETTE, axis, literal
from pipeline.store.tables import where

LENSES = {"tuned": "tuned lens", "logit": "logit lens"}
LONGEST = 8  # characters of a token in a cell
CELL, ROW = 46, 30  # pixels


def seen(token: str) -> str:
    """A token that can be seen, and is never markup: a leading space as it is, a lone one as ␣."""
    text = token.strip(" ") or ("␣" if token else "")
    return literal(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def whole(token: str) -> str:
    return literal(token.replace(" ", "␣"))


def trajectories(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The likeliest token at every layer and position, the tuned lens above the logit lens.

    The reader chooses the text. Options: model; rows, layers shown at most (default 11).
    """
    table = where(first(tables["lenses/trajectories"]), model=options["model"])
    if table.empty:
        raise RetraceError(f"lenses/trajectories: no model '{options['model']}'")
    layers = sorted(table["layer"].unique())
    layers = [layers[i] for i in evenly(len(layers), options.get("rows", 11))]
    table = where(table, layer=layers)
    names = [*map(str, layers[:-1]), "output"]
    by_text = dict(iter(table.groupby("text", sort=False)))
    fields = {text: [field(where(t, lens=name), layers) for name in LENSES]
              for text, t in by_text.items()}  # fmt: skip
    seen_first = next(iter(by_text))
    panels = Panels(list(LENSES.values()), 1, gap=(0, 0.07), shared_xaxes=True)
    for i, cells in enumerate(fields[seen_first]):
        look = {"texttemplate": "%{text}", "textfont": {"size": 10}, "coloraxis": "coloraxis"}
        panels.add(i, heat(**cells, y=names, zmin=0, zmax=1, hover="%{customdata}", **look))
    figure, choices = panels.figure, {}
    ticks = {text: ticks_of(t) for text, t in by_text.items()}
    for text, t in by_text.items():
        change = {k: [f[k] for f in fields[text]] for k in ("x", "z", "text", "customdata")}
        layout = {f"{a}.{k}": v for a in ("xaxis", "xaxis2") for k, v in ticks[text].items()}
        choices[label(t["words"].iloc[0])] = [change, layout]
    chosen(figure, choices)
    bare = {"showgrid": False, "showline": False, "ticks": ""}
    figure.update_xaxes(**ticks[seen_first], tickangle=-35, **bare)
    figure.update_yaxes(type="category", **bare)
    figure.update_yaxes(title={"text": "layers before the lens"}, row=2)
    figure.update_xaxes(title={"text": "token read"}, row=2)
    figure.update_annotations(font={"size": 14}, x=0, xanchor="left")
    bar = {"title": {"text": "probability", "side": "right"}, "thickness": 10}
    widest = max(t["position"].nunique() for t in by_text.values())
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": 1, "colorbar": bar}, margin={"t": 34},
        height=190 + 2 * ROW * len(layers), meta={"min_width": 130 + CELL * widest},
    )  # fmt: skip
    columns = ["text", "lens", "layer", "position", "token", "target", "p_target", "kl"]
    flat = table[columns].assign(top=table["top"].str[0], p_top=table["p_top"].str[0])
    return figure, flat.reset_index(drop=True)


def label(words: str) -> str:
    """A text for the list: its beginning, on one line."""
    line = " ".join(words.split())
    return line if len(line) <= 44 else f"{line[:43]}…"


def ticks_of(table: pd.DataFrame) -> dict[str, Any]:
    """The tokens read, under their columns."""
    read = table.drop_duplicates("position").sort_values("position")
    places = read["position"].tolist()
    ends = [places[0] - 0.5, places[-1] + 0.5]
    return {"tickvals": places, "ticktext": [seen(t) for t in read["token"]], "range": ends}


def field(table: pd.DataFrame, layers: list[int]) -> dict[str, Any]:
    """x, z, text and customdata of one heat map, layers upwards."""
    cells = table.set_index(["layer", "position"])
    places = sorted(table["position"].unique().tolist())
    final = {at: cells.loc[(layers[-1], at), "top"][0] for at in places}
    out: dict[str, Any] = {"x": places, "z": [], "text": [], "customdata": []}
    for layer in layers:
        rows = [cells.loc[(layer, at)] for at in places]
        out["z"].append([float(r["p_top"][0]) for r in rows])
        out["text"].append([shown(r, r["top"][0] == final[at])
                            for r, at in zip(rows, places, strict=True)])  # fmt: skip
        out["customdata"].append([hover(r, layer == layers[-1], layer) for r in rows])
    return out


def shown(cell: Any, settled: bool) -> str:
    """The likeliest token and its probability in hundredths; bold where the model ends there."""
    token = seen(cell["top"][0])
    token = f"<b>{token}</b>" if settled else token
    return f'{token}<br><span style="font-size:8px">{100 * cell["p_top"][0]:.0f} %</span>'


def hover(cell: Any, is_output: bool, layer: int) -> str:
    """The five likeliest tokens, what was read, and what came next."""
    top = zip(cell["top"], cell["p_top"], strict=True)
    lines = ["the model's prediction" if is_output else f"after {layer} layers"]
    lines += [f"{p:.3f}  {whole(t)}" for t, p in top]
    if cell["target"]:
        lines.append(f"next: {whole(cell['target'])}, given {cell['p_target']:.3f}")
    if not is_output:
        lines.append(f"KL to the prediction: {cell['kl']:.2f} nats")
    return "<br>".join(lines)


def attribution(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What every attention and MLP adds to the likeliest token's logit, and the sum so far.

    The reader chooses the place. Options: names, a list of [model, what the list calls it]; places,
    of each text: that many with the largest logits, and its last (default 2).
    """
    table, wanted = first(tables["lenses/attribution"]), []
    for model, name in options["names"]:
        for _, rows in where(table, model=model).groupby("text", sort=False):
            logits = rows.groupby("position")["logit"].first()
            largest = logits.drop(logits.index.max()).nlargest(options.get("places", 2)).index
            wanted += [(name, where(rows, position=at)) for at in [logits.index.max(), *largest]]
    figure, choices, frames = go.Figure(), {}, []
    for name, rows in wanted:
        parts = ordered(rows)
        words = label("…" + rows["words"].iloc[0][-20:])
        what = f"{name}: “{words}” → “{rows['top'].iloc[0]}”"
        ys = [parts["contribution"].where(parts["part"] == p).tolist() for p in PARTS]
        ys.append(parts["contribution"].cumsum().tolist())
        if not choices:
            figure.add_traces(traces(parts["place"].tolist(), ys))
        choices[what] = [{"x": [parts["place"].tolist()] * len(ys), "y": ys}, {}]
        frames.append(parts)
    axes = {"xaxis": axis("part of the model, in the order of computation", type="category")}
    axes["yaxis"] = axis("logit over the vocabulary's mean")
    chosen(figure, choices).update_layout(barmode="relative", bargap=0.15, height=460, **axes)
    out = pd.concat(frames, ignore_index=True)
    return figure, out.drop(columns=["number", "within", "place"])


PARTS = {"embedding": PALETTE[2], "attention": PALETTE[0], "MLP": PALETTE[1], "bias": PALETTE[3]}


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Parts in the order of computation, with the place of each on the axis."""
    first = {"embedding": -1, "bias": rows["layer"].max() + 1}
    number = rows["part"].map(first).fillna(rows["layer"])
    within = rows["part"].map({p: i for i, p in enumerate(PARTS)})
    rows = rows.assign(number=number, within=within).sort_values(["number", "within"])
    short = {"attention": "attn ", "MLP": "MLP "}
    parts = zip(rows["part"], rows["layer"], strict=True)
    return rows.assign(place=[f"{short[p]}{int(n)}" if p in short else p for p, n in parts])


def traces(x: list[str], ys: list[list]) -> list[Any]:
    """Bars of each part, and the line of their sum so far."""
    hover = "%{x}: %{y:+.3~g}"
    parts = zip(PARTS.items(), ys, strict=False)
    out: list[Any] = [bars(x, y, part, colour, hover=hover) for (part, colour), y in parts]
    hover = "up to %{x}: %{y:.3~g}"
    return [*out, line(x, ys[-1], "sum so far", INK, width=1.2, shape="hvh", hover=hover)]
