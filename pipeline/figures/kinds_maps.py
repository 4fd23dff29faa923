"""Kinds laid out on a grid: `matrix`, `trajectories` of a prediction, `traced`: a graph to walk.

After nostalgebraist 2020 and Belrose et al. 2023 (2303.08112), Figure 1, a trajectory has the
likeliest next token at every layer and position of a text.
"""

from typing import Any

import numpy as np

from pipeline.errors import RetraceError, nearest
from pipeline.figures import theme
from pipeline.figures.kinds_common import need, rows_of, worded
from pipeline.spec.figures import Matrix, Traced, Trajectories

LONGEST = 8  # characters of a token in a cell
NUMBER = 52  # pixels of a cell with a number in it, and of a name below it
WIDE, ROW = 40, 30  # pixels: a cell that has room for a probability, too; the height of a row
BARE = {"showgrid": False, "showline": False, "ticks": ""}


def matrix(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A map of two columns, the mean where rows are several; see `spec_figures.Matrix`."""
    import plotly.graph_objects as go

    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Matrix.model_validate(options), tables.items()
    chosen = [what.choose] if what.choose else []
    need(table, [what.x, what.y, *what.z, *chosen], name)
    table, zs = rows_of(table, name, what), list(what.z)
    mean = table.groupby([*chosen, what.y, what.x])[zs].mean().reset_index()
    places: dict[str, dict[str, list]] = {}
    for case, rows in [("", mean)] if not chosen else mean.groupby(what.choose, sort=False):
        if chosen and what.cases and case not in what.cases:
            continue
        for z, title in what.z.items():
            texts = [what.cases.get(str(case)) or case_of(what.choose, case)] if chosen else []
            texts += [title] if len(zs) > 1 else []
            places[", ".join(texts)] = _field(rows, z, what)
    places = {k: places[k] for k in _in_order(places, what)}
    ends = f"{what.y_title} %{{y}}, {what.x_title} %{{x}}" if what.x_title else "%{y} with %{x}"
    gap = 2 if what.numbers else None
    look: dict[str, Any] = {"hover": f"{ends}: %{{z:.3~g}} {what.unit}".rstrip()}
    look |= {"xgap": gap, "ygap": gap}
    look |= {"texttemplate": "%{z:.2f}", "showscale": False} if what.numbers else {}
    look |= dict(zip(("zmin", "zmax"), what.range, strict=True)) if what.range else {"zmin": 0}
    bar = {"title": {"text": f"{what.z[zs[0]]} ({what.unit})" if what.unit else what.z[zs[0]]}}
    bar["title"]["side"] = "right"
    scale = theme.scale(theme.SEQUENTIAL)
    field = parts.heat(**next(iter(places.values())) | look, colorscale=scale, colorbar=bar)
    change = {n: [{k: [v] for k, v in place.items()}, {}] for n, place in places.items()}
    figure = parts.chosen(go.Figure(field), change)
    axes = {"type": "category", "showgrid": False}
    figure.update_layout(
        xaxis=theme.axis(what.x_title, tickangle=-30 if what.names else None, **axes),
        yaxis=theme.axis(what.y_title, **axes),
        height=170 + max(28 * len(field.y), 320 if what.x_title else 0),
        margin={"t": 36},
    )
    if what.numbers:  # which nobody reads in a sliver: a phone scrolls sideways
        figure.update_layout(meta={"min_width": 150 + NUMBER * len(field.x)})
    return figure, table[what.columns] if what.columns else mean


def named(value: Any, names: dict[str, str]) -> str:
    """What paper.yaml calls a value, else the value in words."""
    return theme.literal(names[str(value)]) if str(value) in names else worded(value)


def case_of(column: str, value: Any) -> str:
    """A case in words; a number says of what: 'layer 3'."""
    text = str(value).replace("_", " ")
    return f"{column.replace('_', ' ')} {text}" if isinstance(value, int | np.integer) else text


def _in_order(places: dict[str, Any], what: Matrix) -> list[str]:
    """The cases in the order of paper.yaml."""
    order = list(what.cases.values())
    rank = {n: i for i, n in enumerate(order)}
    return sorted(places, key=lambda text: rank.get(text.split(", ")[0], len(order)))


def _field(rows: Any, z: str, what: Matrix) -> dict[str, Any]:
    """x, y and z of the map; with `symmetric` a cell also stands for the other way round."""
    values = rows.set_index([what.x, what.y])[z].to_dict()
    if what.symmetric:
        values = {(b, a): v for (a, b), v in values.items()} | values
    x, y = (sorted(rows[c].unique()) for c in (what.x, what.y))
    y = sorted({*x, *y}) if what.symmetric else y
    if what.names:
        x, y = ([n for n in what.names if n in side] for side in (x, y))
        y = y[::-1]  # the first on top
        for column, side in ((what.x, x), (what.y, y)):
            if not side:
                told = f"none of {', '.join(what.names)} is a value of {column}"
                there = ", ".join(map(str, dict.fromkeys(rows[column])))
                raise RetraceError(f"options.names: {told}; it has {there}")
    out = {
        "x": [named(a, what.names) for a in x],
        "y": [named(b, what.names) for b in y],
        "z": [[values.get((a, b)) for a in x] for b in y],
    }
    if what.range is None:
        most = max(v for row in out["z"] for v in row if v is not None)
        out["zmax"] = min(most, what.most or most)
    return out


# --- a prediction through the layers -------------------------------------------------------


def trajectories(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """The likeliest token at every layer and position; see `spec_figures.Trajectories`."""
    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Trajectories.model_validate(options), tables.items()
    given = ["layer", "position", "token", "target", "p_target", "top", "p_top"]
    need(table, [*given, what.choose, *filter(None, [what.panels, what.label])], name)
    table = rows_of(table, name, what)
    if isinstance(table["top"].iloc[0], str):  # one, not the likeliest few
        table = table.assign(**{c: [[v] for v in table[c]] for c in ("top", "p_top")})
    layers = sorted(table["layer"].unique())
    layers = [layers[i] for i in parts.evenly(len(layers), what.rows)]
    table = table[table["layer"].isin(layers)]
    names = list(what.titles) or [""]
    cases = dict(iter(table.groupby(what.choose, sort=False)))
    fields = {case: [_cells(rows if not what.panels else rows[rows[what.panels] == n], layers, what)
                     for n in names] for case, rows in cases.items()}  # fmt: skip
    panels = parts.Panels(
        [what.titles.get(n, "") for n in names], 1, gap=(0, 0.07), shared_xaxes=True
    )
    shown, ticks = next(iter(cases)), {case: _read(rows) for case, rows in cases.items()}
    y, wide = [*map(str, layers[:-1]), "output"], what.cell >= WIDE
    for i, cells in enumerate(fields[shown]):
        font = {"size": 10} if wide else {"family": theme.MONO, "size": 12}
        look = {"texttemplate": "%{text}", "textfont": font, "coloraxis": "coloraxis"}
        panels.add(i, parts.heat(**cells, y=y, zmin=0, zmax=1, hover="%{customdata}", **look))
    choices = {}
    for case, rows in cases.items():
        change = {k: [f[k] for f in fields[case]] for k in ("x", "z", "text", "customdata")}
        axes = [f"xaxis{i or ''}" for i in [0, *range(2, len(names) + 1)]]
        layout = {f"{axis}.{k}": v for axis in axes for k, v in ticks[case].items()}
        text = rows[what.label].iloc[0] if what.label else case
        choices[beginning(text)] = [change, layout]
    figure = parts.chosen(panels.figure, choices)
    figure.update_xaxes(**ticks[shown], **BARE, tickangle=0)
    figure.update_xaxes(tickfont={"size": 10} if wide else {"family": theme.MONO})
    figure.update_yaxes(type="category", **BARE)
    figure.update_yaxes(title={"text": "layers before the lens"}, row=len(names))
    figure.update_xaxes(title={"text": "token read"}, row=len(names))
    figure.update_annotations(font={"size": 14}, x=0, xanchor="left")
    bar = {"title": {"text": "probability", "side": "right"}, "thickness": 10}
    most = max(rows["position"].nunique() for rows in cases.values())
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": 1, "colorbar": bar}, margin={"t": 34},
        height=130 + len(names) * (30 + ROW * len(layers)),
        meta={"min_width": 130 + what.cell * most},  # a phone scrolls sideways
    )  # fmt: skip
    flat = table.assign(top=table["top"].str[0], p_top=table["p_top"].str[0])
    return figure, flat[what.columns or list(flat.columns)].reset_index(drop=True)


def beginning(text: Any) -> str:
    """A text for a list: its beginning, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= 44 else f"{line[:43]}…"


def seen(token: str) -> str:
    """A token that can be seen, and is never markup: a leading space as it is, a lone one as ␣."""
    text = token.strip(" ") or ("␣" if token else "")
    return theme.literal(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def _whole(token: str) -> str:
    return theme.literal(token.replace(" ", "␣"))


def _read(table: Any) -> dict[str, Any]:
    """The tokens read, under their columns."""
    read = table.drop_duplicates("position").sort_values("position")
    places = read["position"].tolist()
    ends = [places[0] - 0.5, places[-1] + 0.5]
    return {"tickvals": places, "ticktext": [seen(t) for t in read["token"]], "range": ends}


def _cells(table: Any, layers: list[int], what: Trajectories) -> dict[str, Any]:
    """x, z, text and customdata of one map, layers upwards."""
    if table.empty:
        raise RetraceError(f"options.titles: column {what.panels} has not all of them")
    rows = {(r["layer"], r["position"]): r for r in table.to_dict("records")}
    places = sorted(table["position"].unique().tolist())
    out: dict[str, Any] = {"x": places, "z": [], "text": [], "customdata": []}
    for layer in layers:
        here = [rows[layer, at] for at in places]
        last = [rows[layers[-1], at]["top"][0] for at in places]
        out["z"].append([float(r["p_top"][0]) for r in here])
        out["text"].append([_shown(r, end, what) for r, end in zip(here, last, strict=True)])
        out["customdata"].append([_about(r, layer, layers[-1]) for r in here])
    return out


def _shown(row: dict[str, Any], last: str, what: Trajectories) -> str:
    """The likeliest token; bold where the model ends with it, underlined where it comes next."""
    token = seen(row["top"][0])
    token = f"<b>{token}</b>" if row["top"][0] == last else token
    token = f"<u>{token}</u>" if what.right and row["top"][0] == row["target"] else token
    share = f'<br><span style="font-size:8px">{100 * row["p_top"][0]:.0f} %</span>'
    return token + (share if what.cell >= WIDE else "")


def _about(row: dict[str, Any], layer: int, last: int) -> str:
    """The likeliest tokens, what was read, and what came next."""
    top = zip(row["top"], row["p_top"], strict=True)
    said = ["the model's prediction" if layer == last else f"after {layer} layers"]
    said += [f"{p:.3f}  {_whole(t)}" for t, p in top]
    if row["target"]:
        said.append(f"next: {_whole(row['target'])}, given {row['p_target']:.3f}")
    if layer != last and "kl" in row:
        said.append(f"KL to the prediction: {row['kl']:.2f} nats")
    return "<br>".join(said)


def traced(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """An attribution graph to walk: tokens across, layers upwards; see `spec_figures.Traced`.

    Its tables are graphs/<arm>_nodes and graphs/<arm>_edges. Effects are direct ones, in the unit
    of what the target reads.
    """
    from pipeline.figures.kinds_graph import attribution_graph

    what, found = Traced.model_validate(options), {}
    for end in ("nodes", "edges"):
        name = next((n for n in tables if n.endswith(f"_{end}")), None)
        if name is None:
            raise RetraceError(
                f"the figure names no table graphs/<arm>_{end}; add it to its tables"
            )
        frame = tables[name]
        need(frame, ["dictionary", "prompt"], name)
        for column in ("dictionary", "prompt"):
            wanted, there = getattr(what, column), list(dict.fromkeys(frame[column]))
            if wanted not in there:
                raise RetraceError(
                    f"table {name}: no {column} '{wanted}'{nearest(wanted, there)}; it has "
                    f"{', '.join(there)}"
                )
            frame = frame[frame[column] == wanted]
        found[end] = frame
    return attribution_graph(found["nodes"], found["edges"], what.most), found["edges"]
