"""Kinds about effects of nodes: estimates against exact patching, and heads by layer.

`agreement` is told which columns hold the two; `heads` and `estimates` draw the tables of
`circuits`, circuits/<arm>_nodes and circuits/<arm>_edges, which all papers share.
"""

from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import finished, looks, need, rows_of
from pipeline.spec.figures import Agreement, Estimates, Heads, Look

SITES = {"attn_out": "attention", "mlp_out": "MLP", "resid_post": "stream", "resid_pre": "stream"}
WORDS = {"head": "head", "mlp": "MLP", "q": "query", "k": "key", "v": "value", "resid": "stream"}


def place_of(hook: str) -> tuple[int, int]:
    """The order of computation: by layer, and in it attention, MLP, stream."""
    _, layer, name = hook.split(".", 2)
    return int(layer), list(SITES).index(name.removeprefix("hook_"))


def site(hook: str) -> str:
    """'MLP 3' of blocks.3.hook_mlp_out."""
    layer, number = place_of(hook)
    return f"{list(SITES.values())[number]} {layer}"


def nodes_in_words(rows: Any) -> list[str]:
    """'query 3.1', 'stream 5 at END', 'mlp_out 4/17 at 3'; of edges, 'head 0.1 → q 2.3'."""
    out = []
    for r in rows.to_dict("records"):
        if "source_kind" in r:
            end = r["target_input"] or r["target_kind"]
            text = f"{r['source_kind']} {r['source_layer']}.{r['source_head']} → "
            text = (text + f"{end} {r['target_layer']}.{r['target_head']}").replace(".-1", "")
        else:
            number = f".{r['head']}" if r.get("head", -1) >= 0 else ""
            number += f"/{r['number']}" if r.get("number", -1) >= 0 else ""
            kind = WORDS.get(r["kind"], str(r["kind"]).replace("_", " "))
            at = r.get("position", "")
            text = f"{kind} {r['layer']}{number}" + (f" at {at}" if at != "" else "")
        out.append(theme.literal(text))
    return out


# --- estimates against exact patching ------------------------------------------------------


def agreement(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Estimates against exact values; see `spec_figures.Agreement`."""
    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Agreement.model_validate(options), tables.items()
    given = [what.x, *what.y, *filter(None, [what.panels, what.about]), *what.choose]
    need(table, given, name)
    table = rows_of(table, name, what)
    groups = _colours(table, what)
    titles = what.titles if what.panels else what.y
    share = not what.panels  # estimates of the same effects
    gap = (0.06 if share else 0.1, 0.16)
    panels = parts.Panels(list(titles.values()), what.across, gap=gap, shared_yaxes=share)
    found = cases_of(table, what.choose, what.cases)
    for number, (_, rows) in enumerate(found):
        case = number if len(found) > 1 else parts.ALWAYS
        for i, panel in enumerate(titles):
            here = rows[rows[what.panels] == panel] if what.panels else rows
            x, y = what.other.get(panel, (what.x, next(iter(what.y)) if what.panels else panel))
            panels.add(i, _identity(here, x, y, what), case=case)
            for value, look in groups[1].items():
                own = here[groups[0][here.index] == value]
                if len(own):
                    panels.add(i, _compared(own, x, y, look, what), case=case)
    panels.choose([text for text, _ in found])
    size = "|{}|" if what.sizes else "{}"
    unit = f" ({what.unit})" if what.unit else ""
    panels.axes(size.format("exact effect") + unit, size.format("estimate") + unit)
    if what.sizes:
        panels.figure.update_xaxes(type="log", dtick=1, exponentformat="power")
        panels.figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    height = 290 * panels.rows if panels.rows > 1 else 0  # nearly square
    return finished(panels, len(groups[1]), height), table[what.columns or list(table.columns)]


def _colours(table: Any, what: Agreement) -> tuple[Any, dict[Any, Look]]:
    """The value that colours each row, and the look of each; hooks are named in words.

    Of the tables of edges, `target_input` is empty where an edge ends in a whole node.
    """
    need(table, [what.points], "agreement")
    values = table[what.points]
    if what.points == "target_input":
        values = values.where(values != "", table["target_kind"])
    if not what.names and values.astype(str).str.startswith("blocks.").all():
        hooks = sorted(set(values), key=place_of)
        named = {h: Look(name=site(h), colour=i) for i, h in enumerate(hooks)}
        return values, looks(named, hooks)
    return values, looks(what.names, values)


def cases_of(table: Any, columns: list[str], names: dict[str, str]) -> list[tuple[str, Any]]:
    """(name, rows) of every case of some columns, in the order of `names`, last column first."""
    if not columns:
        return [("", table)]
    order = list(names)
    rank = lambda v: order.index(v) if v in order else len(order)  # noqa: E731
    groups = [(k if isinstance(k, tuple) else (k,), rows)
              for k, rows in table.groupby(columns, sort=False)]  # fmt: skip
    groups.sort(key=lambda g: [rank(v) for v in reversed(g[0])])
    return [(", ".join(names.get(v, str(v)) for v in key), rows) for key, rows in groups]


def _identity(rows: Any, x: str, y: str, what: Agreement) -> Any:
    """The line of equal values, from the smallest hundredth of sizes where the axes are log."""
    from pipeline.figures.parts import equal

    if not what.sizes or rows.empty:
        return equal(rows[x], rows[y]) if len(rows) else equal([0, 1])
    low = float(rows[x].abs().quantile(0.01)) or 1e-6
    return equal([low], [float(rows[[x, y]].abs().max().max())])


def _compared(own: Any, x: str, y: str, look: Look, what: Agreement) -> Any:
    """The points of one colour; of sizes, triangles are error terms, which have no number."""
    from pipeline.figures.parts import points

    named, shade = nodes_in_words(own), theme.rgba(look.colour, 0.7)
    if what.about:
        said = [theme.literal(str(v).replace("_", " ")) for v in own[what.about]]
        named = [f"{a}: {n}" for a, n in zip(said, named, strict=True)]
    if not what.sizes:
        hover = "%{customdata}<br>exact %{x:.3~g}, estimate %{y:.3~g}"
        return points(own[x], own[y], look.name, shade, customdata=named, hover=hover)
    shape = np.where(own["number"] < 0, "triangle-up", "circle") if "number" in own else "circle"
    return points(
        own[x].abs(), own[y].abs(), look.name, shade,
        symbol=np.where(np.sign(own[y]) == np.sign(own[x]), shape, "x"),
        customdata=list(zip(named, own[x], own[y], strict=True)),
        hover="%{customdata[0]}<br>exact %{customdata[1]:.3~g}, estimate %{customdata[2]:.3~g}",
    )  # fmt: skip


def estimates(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Scores against exact effects: of heads and MLPs by attribution patching, of edges by EAP."""
    import pandas as pd

    from pipeline.figures import parts as parts

    Estimates.model_validate(options)
    nodes, edges = (_ending(tables, end) for end in ("_nodes", "_edges"))
    keys = ["kind", "layer", "head", "position", "seed"]
    whole = nodes[nodes["kind"].isin(["head", "mlp"])]
    by = {m: f.set_index(keys)["score"] for m, f in whole.groupby("method")}
    frames = []
    if {"attribution_patching", "activation_patching"} <= by.keys():
        joined = pd.concat([by["attribution_patching"], by["activation_patching"]], axis=1)
        joined.columns = ["score", "exact"]
        frames.append(joined.reset_index(drop=True).assign(method="attribution patching, nodes"))
    for method, name in (("eap", "EAP, edges"), ("eap_ig", "EAP-IG, edges")):
        some = edges[(edges["method"] == method) & edges["exact"].notna()]
        frames.append(some[["score", "exact"]].assign(method=name))
    frame = pd.concat(frames, ignore_index=True)
    groups = list(frame.groupby("method", sort=False))
    if not groups:
        return parts.nothing("nothing was patched exactly, so nothing to compare"), frame
    panels = parts.Panels([name for name, _ in groups])
    hover = "exact %{x:.3~g}, estimated %{y:.3~g}"
    for i, (_, some) in enumerate(groups):
        shade = theme.rgba(theme.colour(i), 0.7)
        panels.add(i, parts.equal(some[["score", "exact"]]))
        panels.add(i, parts.points(some["exact"], some["score"], colour=shade, hover=hover))
    panels.axes("exact effect (logits)", "estimate (logits)")
    return panels.finish(360, top=56), frame


def _ending(tables: dict[str, Any], end: str) -> Any:
    for name, table in tables.items():
        if name.endswith(end):
            return table
    raise RetraceError(f"the figure names no table circuits/<arm>{end}; add it to its tables")


# --- heads by layer ------------------------------------------------------------------------


def heads(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Heat maps of heads, or of the stream by position; see `spec_figures.Heads`."""
    what, ((name, nodes), *_) = Heads.model_validate(options), tables.items()
    need(nodes, ["method", "kind", "layer", "head", "position", "score", "sd"], name)
    across = what.what
    rows = nodes[nodes["kind"] == ("head" if across == "head" else "resid")]
    rows = rows[rows["position"] != ""] if across == "position" else rows
    keys = ["method", "layer", across]
    rows = rows.groupby(keys, sort=False, as_index=False, dropna=False)[["score", "sd"]].mean()
    methods = [m for m in what.methods if m in set(rows["method"])]
    if not methods:
        raise RetraceError(f"table {name}: none of the methods {', '.join(what.methods)} is in it")
    panels = maps([what.methods[m] for m in methods], rows["layer"].nunique(), across)
    order = sorted(set(rows["head"])) if across == "head" else list(dict.fromkeys(rows["position"]))
    for i, method in enumerate(methods):
        some = rows[rows["method"] == method]
        grid = some.pivot(index="layer", columns=across, values="score")[order].to_numpy(float)
        hover = "head %{y}.%{x}<br>%{z:.3~g} logits"
        if across == "position":
            hover = "layer %{y}, at %{x}<br>%{z:.3~g} logits"
        trace = by_head(grid, hover, bar_of(i, len(methods)))
        if across == "position":
            trace.x = [theme.literal(p.replace("_next", "+1")) for p in order]
        panels.add(i, trace)
    return tall(panels, rows["layer"].nunique()), rows[[*keys, "score", "sd"]]


def maps(titles: list[str], n_layers: int, across: str = "head") -> Any:
    """Heat maps side by side that share the layer axis, the first layer on top."""
    from pipeline.figures.parts import PLAIN, Panels

    panels = Panels(titles, gap=(0.03, 0.1), shared_yaxes=True)
    panels.figure.update_xaxes(**PLAIN, dtick=1)
    panels.figure.update_yaxes(**PLAIN, range=[n_layers - 0.5, -0.5])
    panels.axes(across, "layer")
    return panels


def bar_of(panel: int, n: int) -> dict[str, Any]:
    """A horizontal colour bar under one of n panels."""
    width = (1 - 0.03 * (n - 1)) / n
    middle = panel * (width + 0.03) + width / 2
    place = {"orientation": "h", "x": middle, "len": 0.9 * width, "y": -0.2, "yanchor": "top"}
    return place | {"thickness": 8, "outlinewidth": 0, "tickformat": "~g"}


def by_head(values: Any, hover: str, bar: dict[str, Any]) -> Any:
    """Values [n_layers n_heads], 0 in the middle of the colours."""
    from pipeline.figures.parts import heat

    most = float(np.nanmax(np.abs(values))) or 1.0
    ends = float(f"{0.8 * most:.1g}")
    return heat(values, reach=most, hover=hover, colorbar=bar | {"tickvals": [-ends, 0, ends]})


def tall(panels: Any, n_layers: int) -> Any:
    """As high as its layers need, with room for the colour bars below."""
    return panels.finish(240 + 12 * n_layers, top=56).update_layout(margin={"b": 110})
