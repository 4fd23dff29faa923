"""Figures of the probes: layers, control tasks, steering, and what a steered model says."""

import textwrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.claims.scalars import site
from pipeline.figures.parts import Drawn, Panels, bars, chosen, line, mean_of, whiskers
from pipeline.figures.theme import GRID, INK, PALETTE, literal, rgba

MEASURES = {"accuracy": "accuracy, R² of numbers", "selectivity": "selectivity"}
CODES = {"codelength": "labels", "control_codelength": "control"}
TASKS = {
    "accuracy": ("labels", PALETTE[0]),
    "control_accuracy": ("control task", rgba(INK, 0.45)),
}
WIDTH = 25  # characters of a line of a sample: four columns fit a page


def scores(tables: dict[str, Any]) -> pd.DataFrame:
    """The scores of every arm, held-out documents, with the arm and a short name of the hook."""
    frames = [
        table.assign(arm=name.removeprefix("probes/").removesuffix("_scores"))
        for name, table in tables.items()
        if name.endswith("_scores")
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame = frame[(frame["split"] == "document") & (frame["per"] == "token")]
    return frame.assign(site=[site(h) if h else "text" for h in frame["hook"]])


def layers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Accuracy and selectivity by layer, a line an arm and method; the reader chooses the label."""
    frame = scores(tables).dropna(subset=["selectivity"])
    frame = frame.assign(accuracy=frame["accuracy"].fillna(frame["r2"]))
    frame = frame.sort_values("n_classes", ascending=False, kind="stable")  # numbers come last
    hooked = frame[frame["hook"] != ""]
    methods, arms = list(dict.fromkeys(hooked["probe"])), list(dict.fromkeys(hooked["arm"]))
    panels = Panels(list(MEASURES.values()), gap=(0.12, 0.16))
    labels = list(dict.fromkeys(hooked["label"]))
    dashes = ["solid", "dot", "dash"]
    for case, label in enumerate(labels):
        own = hooked[hooked["label"] == label]
        for i, measure in enumerate(MEASURES):
            mean = mean_of(own, ["arm", "probe", "site"], measure)
            for (arm, probe), rows in mean.groupby(["arm", "probe"], sort=False):
                colour = PALETTE[methods.index(probe)]
                reach = whiskers(rows[measure], rows["min"], rows["max"], width=0,
                                 color=rgba(colour, 0.5))  # fmt: skip
                name = f"{probe.replace('_', ' ')}, {arm}"
                panels.add(i, line(
                    rows["site"], rows[measure], name, colour, dash=dashes[arms.index(arm) % 3],
                    marker={"size": 5}, error_y=reach, hover=f"{name}, %{{x}}: %{{y:.3f}}",
                ), case=case)  # fmt: skip
            ids = frame[(frame["label"] == label) & (frame["probe"] == "bag_of_ids")][measure]
            at = list(dict.fromkeys(own["site"]))
            panels.add(i, line([at[0], at[-1]], [ids.mean()] * 2, "token id alone", dash="longdash",
                               width=1, hover="token id alone: %{y:.3f}"), case=case)  # fmt: skip
    panels.choose([label.replace("_", " ") for label in labels])
    panels.axes(x="hook")
    columns = ["arm", "label", "hook", "probe", "seed", *MEASURES, "control_accuracy"]
    return panels.finish(430, legend=62, top=110), frame[columns]


def control(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Real task beside control task, mean over layers; a control that is ahead was learned."""
    frame = scores(tables)
    frame = frame[(frame["hook"] != "") & frame["control_accuracy"].notna()]
    frame = frame[frame["arm"] == options.get("arm", "trained")]
    methods = list(dict.fromkeys(frame["probe"]))
    labels = list(dict.fromkeys(frame["label"]))
    titles = [label.replace("_", " ") for label in labels]
    panels = Panels(titles, min(2, len(labels)), gap=(0.06, 0.2), shared_yaxes=True)
    seeds = frame.groupby(["label", "probe", "seed"])[["accuracy", "control_accuracy"]].mean()
    for i, label in enumerate(labels):
        for column, (name, colour) in TASKS.items():
            own = seeds.loc[label][column].groupby(level="probe")
            mean = own.mean().reindex(methods)
            reach = whiskers(mean, own.min().reindex(methods), own.max().reindex(methods))
            x = [m.replace("_", " ") for m in methods]
            panels.add(i, bars(x, mean, name, colour, error_y=reach,
                               hover=f"{name}, %{{x}}: %{{y:.3f}}"))  # fmt: skip
    panels.axes(y="accuracy")
    height = 100 + 230 * panels.rows
    figure = panels.finish(height, legend=26, top=64).update_layout(barmode="group")
    return figure, seeds.reset_index()


def codes(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Codelength of the labels and of their control, by layer; the reader chooses the arm."""
    frame = scores(tables).dropna(subset=["control_codelength"])
    labels, arms = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["arm"]))
    panels = Panels([label.replace("_", " ") for label in labels])
    for case, arm in enumerate(arms):
        for i, label in enumerate(labels):
            own = frame[(frame["arm"] == arm) & (frame["label"] == label)]
            for column, name in CODES.items():
                mean = mean_of(own, ["site"], column)
                colour = PALETTE[0] if column == "codelength" else rgba(INK, 0.6)
                hover = f"{name}, %{{x}}: %{{y:.1f}} kbit"
                panels.add(i, line(mean["site"], mean[column], name, colour, hover=hover,
                                   marker={"size": 5}), case=case)  # fmt: skip
    panels.choose(arms)
    panels.figure.update_yaxes(rangemode="tozero")
    panels.axes(x="hook", y="kbit")
    columns = ["arm", "label", "hook", "seed", *CODES]
    return panels.finish(400, legend=44, top=90), frame[columns]


def steering(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What a coefficient does to the class's text, to other text, to its typical tokens."""
    frame = tables["steering/effects"]
    titles = {"own_loss": "loss on the class's text", "other_loss": "loss on other text",
              "words": "log-probability of typical tokens"}  # fmt: skip
    added = frame[frame["mode"] == "add"]
    zero = added.drop_duplicates(["direction", "class", "hook", "seed"]).assign(coefficient=0.0)
    added = pd.concat([added, zero.assign(**dict.fromkeys(titles, 0.0))])
    names = list(dict.fromkeys(frame["direction"]))
    panels = Panels(list(titles.values()), gap=(0.07, 0.16))
    for i, measure in enumerate(titles):
        by = ["direction", "coefficient"]
        per_seed = added.groupby([*by, "seed"], as_index=False)[measure].mean()
        mean = mean_of(per_seed, by, measure).sort_values("coefficient")
        for k, name in enumerate(names):
            rows, colour = mean[mean["direction"] == name], PALETTE[k % len(PALETTE)]
            reach = whiskers(rows[measure], rows["min"], rows["max"], width=0,
                             color=rgba(colour, 0.5))  # fmt: skip
            shown = name.replace("_", " ")
            hover = f"{shown}, %{{x}}: %{{y:.3f}}"
            panels.add(i, line(rows["coefficient"], rows[measure], shown, colour, error_y=reach,
                               marker={"size": 5}, hover=hover))  # fmt: skip
    panels.axes(x="coefficient, mean norms of the stream", y="change, nats a token")
    return panels.finish(400, legend=44, top=80), frame


def samples(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Continuations, a row a direction, a column a coefficient; the reader chooses the prompt."""
    frame = tables["steering/samples"]
    added = frame[frame["mode"] == "add"]
    coefficients = sorted(added["coefficient"].unique())
    cell = {"align": "left", "fill": {"color": "rgba(0,0,0,0)"}, "line": {"color": GRID}}
    shown: dict[str, list] = {}
    for (target, prompt), rows in frame.groupby(["class", "prompt"], sort=False):
        plain = rows.loc[rows["mode"] == "none", "text"].iloc[0]
        own = rows[rows["mode"] == "add"]
        names = list(dict.fromkeys(own["direction"]))
        grid = own.pivot(index="direction", columns="coefficient", values="text").loc[names]
        columns = [[broken(t) for t in grid[c]] for c in coefficients]
        first = [f"<b>{n.replace('_', ' ')}</b>" for n in names]
        shown[f"{target}: {prompt}"] = [["unsteered", *first], [broken(plain), *columns[0]],
                                        *(["", *c] for c in columns[1:])]  # fmt: skip
    header = {"values": ["", *(f"<b>{c:+g}</b>" for c in coefficients)], **cell}
    values = next(iter(shown.values()))
    wide = [120, *([7 * WIDTH + 16] * len(coefficients))]
    look = {"values": values, "height": 22, **cell}
    figure = go.Figure(go.Table(header=header, cells=look, columnwidth=wide))
    chosen(figure, {literal(k): [{"cells.values": [v]}, {}] for k, v in shown.items()})
    lines = max(sum(max(c[i].count("<br>") + 1 for c in v) for i in range(len(v[0])))
                for v in shown.values())  # fmt: skip
    figure.update_layout(
        margin={"l": 4, "r": 4, "t": 8, "b": 4},
        height=int(80 + 19 * lines + 12 * len(values[0])),
        meta={"min_width": sum(wide)},  # a phone scrolls sideways
    )
    return figure, frame


def broken(text: str) -> str:
    """Text in short lines, nothing of it read as markup."""
    return "<br>".join(
        literal(part) for part in textwrap.wrap(text.strip(), WIDTH) or ["(nothing)"]
    )
