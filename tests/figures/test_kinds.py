"""The kinds that are told by their options what to draw, and the parts that figures are made of."""

import json

import jsonschema
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import synthetic
import yaml

from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.figures import parts as parts
from pipeline.figures.kinds import KINDS
from pipeline.figures.kinds_effects import cases_of, nodes_in_words, site
from pipeline.figures.kinds_lines import decades
from pipeline.papers import lint, papers, schema
from pipeline.spec.figures import OPTIONS
from pipeline.spec.paper import Figure

CURVES = pd.DataFrame(
    [
        {"task": t, "kind": k, "seed": s, "n": n, "kept": v + 0.1 * s}
        for t in ("hard", "easy")
        for k, v in (("b", 0.5), ("a", 0.2))
        for s in (0, 1)
        for n in (0, 1, 10)
    ]
)


def drawn(kind: str, tables: dict, **options) -> tuple[go.Figure, pd.DataFrame]:
    """A figure as its job draws it, which is handed options with sorted keys."""
    figure = Figure(kind=kind, title="T", caption="C", tables=list(tables), options=options)
    spec = json.loads(papers.to_json(figure.model_dump(mode="json")))
    made, frame = drawing.make("shape", spec, tables, None)
    drawing.plain(made)
    return made, frame


def lines(**options) -> tuple[go.Figure, pd.DataFrame]:
    given = {"x": "n", "y": {"kept": "share kept"}, "lines": "kind"}
    return drawn("lines", {"curves": CURVES}, **given | options)


# --- lines, bars ---------------------------------------------------------------------------


def test_lines_keep_the_order_of_paper_yaml_and_have_one_legend():
    names = {"b": "the second", "a": {"name": "the first", "colour": "ink", "dash": "dot"}}
    titles = {"hard": "Hard", "easy": "Easy"}
    figure, frame = lines(names=names, panels=["task"], titles=titles, several="mean", log=["x"])
    assert [a.text for a in figure.layout.annotations] == ["Hard", "Easy"]
    shown = [(t.name, t.xaxis, t.showlegend) for t in figure.data]
    assert shown == [("the second", "x", True), ("the first", "x", True),
                     ("the second", "x2", False), ("the first", "x2", False)]  # fmt: skip
    assert figure.data[1].line.dash == "dot"
    assert (frame["n"] > 0).all()  # a log axis has no place for 0
    b = figure.data[0]
    assert list(b.x) == [1, 10] and b.y == pytest.approx([0.55, 0.55])
    assert b.error_y.array == pytest.approx([0.05] * 2) == b.error_y.arrayminus
    assert list(frame.columns) == ["task", "kind", "n", "kept", "min", "max"]


def test_ticks_of_log_lines_are_powers_or_whole_numbers():
    """Never 100µ, and never 2x10."""
    table = CURVES.assign(kept=lambda t: 10.0 ** -(1 + 5 * t["kept"]))
    for x, dtick, form in ((table["n"] + 1, "D2", "none"), (10.0 ** table["n"], 1, "power")):
        given = {"x": "n", "y": {"kept": "kept"}, "lines": "kind", "several": "mean"}
        figure, _ = drawn("lines", {"t": table.assign(n=x)}, **given, log=["x"])
        assert (figure.layout.xaxis.dtick, figure.layout.xaxis.exponentformat) == (dtick, form)


def test_lines_offer_measures_and_keep_what_is_asked_for():
    table = CURVES[CURVES["seed"] == 0].assign(lost=lambda t: 1 - t["kept"])
    y = {"lost": "share lost", "kept": "share kept"}
    options = {"x": "n", "y": y, "lines": "kind", "where": {"task": "easy"}}
    figure, frame = drawn("lines", {"t": table}, **options, columns=["kind", "n", "lost"])
    assert [b.label for b in figure.layout.updatemenus[0].buttons] == list(y.values())
    assert figure.layout.yaxis.title.text == "share lost" and len(frame) == 6
    assert figure.data[0].y[0] == pytest.approx(0.8)  # of a; unnamed lines are sorted
    assert figure.layout.updatemenus[0].buttons[1].args[0]["y"][0][0] == pytest.approx(0.2)


def test_lines_with_levels_have_them_in_every_panel():
    figure, _ = lines(panels=["task"], several="mean", levels=[0, 1])
    assert len(figure.layout.shapes) == 4


def test_bars_are_means_with_least_and_most_and_published_values():
    figure, frame = drawn(
        "bars", {"curves": CURVES}, x={"kept": "kept"}, bars=["kind"], names={"a": "A", "b": "B"},
        choose="task", cases={"easy": "Easy", "hard": "Hard"}, y_title="share",
        published=[{"task": "hard", "kept": 0.9}],
    )  # fmt: skip
    assert [(t.name, t.visible) for t in figure.data] == [
        ("A", True), ("B", True), ("A", False), ("B", False), ("published", False)
    ]  # fmt: skip
    assert figure.data[0].y == pytest.approx([0.25]) and figure.data[4].y == (0.9,)
    assert figure.data[0].error_y.array == pytest.approx([0.05]) and len(frame) == len(CURVES)
    menu = figure.layout.updatemenus[0].buttons
    assert [b.label for b in menu] == ["Easy", "Hard"]
    assert menu[1].args[0]["visible"] == [False, False, True, True, True]


# --- curves of training --------------------------------------------------------------------


def history(n: int = 100) -> pd.DataFrame:
    rows = [
        {"member": f"s{s}", "seed": s, "set": w, "step": i, "loss": 1 / (1 + i), "accuracy": 0.5}
        for s in (0, 1) for w in ("train", "val") for i in range(n)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_learning_has_a_line_a_model_and_names_its_levels():
    tables = {"training/one": history(), "text": pd.DataFrame({"ln_vocab": [2.0]})}
    options = {"published": {"one": 0.5, "other": 3.0}, "chance": "text/ln_vocab", "run": "recipe"}
    figure, frame = drawn("learning", tables, **options)
    assert len(figure.data) == 5 and figure.data[4].name == "published, one: 0.5"
    assert sum(t.showlegend is not False for t in figure.data) == 3
    assert [a.text for a in figure.layout.annotations] == ["uniform guess: 2.000"]
    assert [s.y0 for s in figure.layout.shapes] == [0.5, 2.0]
    assert len(frame) == 400 and set(frame["recipe"]) == {"one"}


def test_learning_side_by_side_is_thinned_and_keeps_its_ends():
    tables = {"training/one": history(), "training/two": history()}
    runs = {"two": "Two", "one": "One"}
    options = {"runs": runs, "measures": ["accuracy", "loss"], "points": 7, "log": True}
    figure, frame = drawn("learning", tables, **options)
    assert [a.text for a in figure.layout.annotations] == ["Two", "One"]
    assert len(frame) == 2 * 4 * 7 and set(frame.groupby("set")["step"].max()) == {99}
    assert len(figure.data) == 2 * 2 * 4 and figure.layout.yaxis3.type == "log"


@pytest.mark.parametrize("values, dtick", [([1, 50], "D2"), ([1, 1e4], 1), ([1e-9, 1], 2)])
def test_ticks_of_a_log_axis_follow_its_decades(values, dtick):
    assert decades(values)["dtick"] == dtick


# --- effects -------------------------------------------------------------------------------

NODES = pd.DataFrame(
    [
        {"arm": a, "task": "ioi", "method": m, "kind": k, "layer": i, "head": 0, "position": "",
         "seed": 0, "score": 0.9 * i + j, "exact": float(i), "sd": 0.1}
        for a in ("random", "model")
        for j, m in enumerate(("attribution_patching", "activation_patching"))
        for k in ("head", "mlp") for i in range(3)
    ]
)  # fmt: skip


def test_agreement_has_the_line_of_equal_values_in_every_panel_and_case():
    figure, frame = drawn(
        "agreement", {"nodes": NODES}, y={"score": "estimate"}, panels="method", points="kind",
        titles={"attribution_patching": "AtP", "activation_patching": "exact"},
        names={"mlp": "MLPs", "head": "heads"}, choose=["task", "arm"],
        cases={"ioi": "names", "model": "the model", "random": "redrawn"},
    )  # fmt: skip
    dotted = [t for t in figure.data if t.mode == "lines"]
    assert len(dotted) == 4 and all(t.x == t.y for t in dotted)
    assert [t.name for t in figure.data if t.showlegend] == ["MLPs", "heads"] * 2
    menu = figure.layout.updatemenus[0].buttons
    assert [b.label for b in menu] == ["names, the model", "names, redrawn"]
    point = next(t for t in figure.data if t.name == "heads")
    assert point.customdata[2] == "head 2.0" and len(frame) == len(NODES)


def test_sizes_stand_on_log_axes_and_a_wrong_sign_is_a_cross():
    table = NODES.assign(hook="blocks.1.hook_mlp_out", number=[-1, 3] * 12, score=-1.0, exact=-2.0)
    table.loc[0, "score"] = 1.0
    options = {"y": {"score": "estimate"}, "points": "hook", "sizes": True}
    figure, _ = drawn("agreement", {"nodes": table}, **options)
    points = figure.data[1]
    assert points.name == "MLP 1" and list(points.marker.symbol[:3]) == [
        "x",
        "circle",
        "triangle-up",
    ]
    assert set(points.x) == {2.0} and set(points.y) == {1.0}
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_heads_and_estimates_draw_the_tables_of_circuits():
    nodes = NODES[NODES["arm"] == "model"].drop(columns=["arm", "task", "exact"])
    figure, frame = drawn("heads", {"circuits/model_nodes": nodes})
    assert [a.text for a in figure.layout.annotations] == [
        "activation patching", "attribution patching"
    ]  # fmt: skip
    np.testing.assert_allclose(figure.data[1].z, [[0], [0.9], [1.8]])
    assert len(frame) == 6  # heads only
    edges = pd.DataFrame({"method": ["eap", "eap_ig"], "score": [1.0, 2.0], "exact": [1.0, None]})
    tables = {"circuits/model_nodes": nodes, "circuits/model_edges": edges}
    figure, frame = drawn("estimates", tables)
    assert frame["method"].value_counts().to_dict() == {
        "attribution patching, nodes": 6, "EAP, edges": 1
    }  # fmt: skip
    with pytest.raises(RetraceError, match="names no table circuits/<arm>_edges"):
        drawn("estimates", {"circuits/model_nodes": nodes})


def test_nodes_and_edges_are_named_and_never_markup():
    node = {"kind": "resid", "layer": 5, "head": -1, "position": "<b>"}
    assert nodes_in_words(pd.DataFrame([node])) == ["stream 5 at &lt;b&gt;"]
    ends = {"source_kind": "mlp", "source_layer": 0, "source_head": -1, "target_kind": "head",
            "target_layer": 2, "target_head": 3, "target_input": "q"}  # fmt: skip
    assert nodes_in_words(pd.DataFrame([ends])) == ["mlp 0 → q 2.3"]
    assert site("blocks.4.hook_attn_out") == "attention 4"
    assert cases_of(NODES, [], {})[0][0] == ""


# --- maps, spread --------------------------------------------------------------------------


def test_a_matrix_has_the_mean_of_each_pair_in_the_order_of_its_names():
    rows = [("a", "b", 1.0, 5), ("a", "b", 3.0, 5), ("b", "b", 0.5, 7), ("a", "null", 0.25, 0)]
    table = pd.DataFrame(rows, columns=["x", "y", "z", "w"])
    names = {"b": "Bee", "a": "<a>", "null": "chance"}
    options = {"x": "x", "y": "y", "z": {"z": "Z", "w": "W"}, "names": names, "range": [0, 4]}
    figure, frame = drawn("matrix", {"t": table}, symmetric=True, **options)
    (field,) = figure.data
    assert list(field.x) == ["Bee", "&lt;a&gt;"]
    assert list(field.y) == ["chance", "&lt;a&gt;", "Bee"]  # from below
    assert [list(row) for row in field.z] == [[None, 0.25], [2.0, None], [0.5, 2.0]]
    assert len(frame) == 3 and figure.layout.updatemenus[0].buttons[1].label == "W"


def test_colours_of_a_matrix_end_at_its_largest_value_or_where_it_is_said():
    table = pd.DataFrame({"x": [0, 1, 0, 1], "y": 0, "z": [1.0, 2.0, 1.0, 9.0], "m": list("bbaa")})
    cases = {"a": "first", "b": "second"}
    options = {"x": "x", "y": "y", "z": {"z": "Z"}, "choose": "m", "cases": cases, "most": 5}
    figure, _ = drawn("matrix", {"t": table}, **options)
    buttons = figure.layout.updatemenus[0].buttons
    assert [b.label for b in buttons] == ["first", "second"]
    assert [b.args[0]["zmax"] for b in buttons] == [[5], [2.0]]
    assert figure.data[0].zmax == 5 and figure.data[0].colorbar.title.text == "Z"


def test_values_without_names_are_in_words():
    rows = [("any_token", "not_<trained>", layer, 0.5) for layer in (0, 3)]
    table = pd.DataFrame(rows, columns=["task", "arm", "layer", "share"])
    options = {"x": "task", "y": "arm", "z": {"share": "share"}, "choose": "layer"}
    names = {"any_token": "a_token", "not_<trained>": "null"}
    figure, frame = drawn("matrix", {"t": table}, **options, names=names)
    assert list(figure.data[0].x) == ["a_token"]  # as paper.yaml has it
    with pytest.raises(RetraceError, match="names: none of any_token is a value of arm"):
        drawn("matrix", {"t": table}, **options, names={"any_token": "a"})
    figure, frame = drawn("matrix", {"t": table}, **options)
    assert list(figure.data[0].x) == ["any token"]
    assert list(figure.data[0].y) == ["not &lt;trained&gt;"]
    assert [b.label for b in figure.layout.updatemenus[0].buttons] == ["layer 0", "layer 3"]
    assert set(frame["task"]) == {"any_token"}  # the CSV keeps what the table has
    lined = {"x": "layer", "y": {"share": "share"}, "lines": "arm", "panels": ["task"]}
    figure, _ = drawn("lines", {"t": table}, **lined)
    assert figure.data[0].name == "not &lt;trained&gt;"
    assert figure.layout.annotations[0].text == "any token"


def test_a_panel_of_one_place_has_one_tick():
    table = pd.DataFrame({"x": [-1, 0, 1], "y": [0.1, 0.2, 0.3], "arm": list("abb"), "line": "l"})
    options = {"x": "x", "y": {"y": "y"}, "lines": "line", "panels": ["arm"]}
    figure, _ = drawn("lines", {"t": table}, **options)
    assert list(figure.layout.xaxis.tickvals) == [-1] and figure.layout.xaxis2.tickvals is None


def words(top: list, **more) -> pd.DataFrame:
    """Two layers and two positions of one text."""
    rows = [
        {"text": 0, "layer": layer, "position": at, "token": " <b>"[at:], "target": "y",
         "p_target": 0.5, "top": top[layer][at], "p_top": more.get("p", 0.75)}
        for layer in range(2) for at in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_trajectory_is_bold_where_the_model_ends_and_underlined_where_it_is_right():
    table = words([["x", "y"], ["y", "y"]])
    figure, frame = drawn("trajectories", {"t": table}, choose="text", right=True, cell=20)
    (field,) = figure.data
    assert [list(row) for row in field.text] == [["x", "<u><b>y</b></u>"], ["<u><b>y</b></u>"] * 2]
    assert list(field.y) == ["0", "output"] and list(field.x) == [0, 1]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "&lt;b&gt;"]
    assert "after 0 layers" in field.customdata[0][0] and len(frame) == 4


def test_a_trajectory_of_the_likeliest_few_names_them_all():
    table = words([[["x", "<"]] * 2, [["y", "x"]] * 2], p=[0.75, 0.125])
    figure, frame = drawn("trajectories", {"t": table}, choose="text")
    text, about = figure.data[0].text[0][0], figure.data[0].customdata[0][0]
    assert text.startswith("x<br>") and "75 %" in text
    assert about.split("<br>")[1:3] == ["0.750  x", "0.125  &lt;"]
    assert frame["top"].tolist() == ["x", "x", "y", "y"]


def test_histograms_of_values_and_of_bins_are_shares_of_each_group():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"kind": ["a"] * 30 + ["null"] * 10, "v": rng.uniform(-0.05, 1, 40)})
    names = {"a": "A", "null": {"name": "chance", "dash": "dot"}}
    figure, frame = drawn("histogram", {"t": table}, x="v", lines=["kind"], names=names,
                          median=True, bins=11)  # fmt: skip
    assert frame.groupby("group")["share"].sum().round(9).tolist() == [1, 1]
    assert frame["low"].min() == pytest.approx(-0.1 if table["v"].min() < 0 else 0)
    assert len(figure.layout.shapes) == 1  # the median, but of no null
    middle = table.loc[table["kind"] == "a", "v"].median()
    assert figure.data[0].name == f"30 A: median {middle:.2f}"
    bins = pd.DataFrame({"kind": ["r", "r", "s"], "of": ["a", "b", "a"], "low": 0.0, "high": 0.5,
                         "n": [1, 3, 2]})  # fmt: skip
    merged = {"s/a": "one", "r": "null"}
    figure, frame = drawn("histogram", {"t": bins}, count="n", lines=["kind", "of"], names=merged)
    assert [t.name for t in figure.data] == ["one", "null"]
    assert frame["share"].tolist() == [1, 1]  # a and b of r are one group


def test_a_case_of_a_histogram_has_all_groups():
    rows = [(s, arm, 0.0, 0.5, 4) for s, arm in (("x", "a"), ("x", "b"), ("y", "a"))]
    table = pd.DataFrame(rows, columns=["sae", "arm", "low", "high", "n"])
    figure, _ = drawn("histogram", {"t": table}, count="n", lines=["arm"], choose="sae",
                      names={"a": "A", "b": "B"}, filled=True)  # fmt: skip
    assert [(t.type, t.name) for t in figure.data] == [("bar", "A"), ("bar", "B")]
    assert not figure.layout.updatemenus


def test_cumulative_shares_end_at_one_and_the_reader_chooses_the_measure():
    table = pd.DataFrame({"g": list("aab"), "v": [2.0, 1.0, 5.0], "w": [0.0, np.nan, 1.0]})
    figure, frame = drawn("cumulative", {"t": table}, x={"v": "V", "w": "W"}, lines=["g"],
                          names={"a": "A", "b": "B"})  # fmt: skip
    assert list(figure.data[0].x) == [1, 2] and list(figure.data[0].y) == [0.5, 1]
    assert frame.groupby(["group", "measure"])["share"].max().eq(1).all()
    assert figure.layout.updatemenus[0].buttons[1].args[0]["x"] == [[0.0], [1.0]]


# --- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("lines", {"x": "n", "y": {"kept": "k"}, "lnes": "kind"}, "unknown key 'lnes' (did you"),
        ("lines", {"x": "n", "lines": "kind"}, "options.y: Field required"),
        ("lines", {"x": "n", "y": {"k": "k"}, "lines": "a", "several": "median"}, "got 'median'"),
        ("lines", {"x": "n", "y": {"a": "a", "b": "b"}, "lines": "k", "several": "min"}, "one y"),
        ("lines", {"x": "n", "y": {"a": "a"}, "lines": "k", "range": [0]}, "options.range"),
        ("agreement", {"y": {"s": "e"}, "points": "k", "sizes": "much"}, "got 'much'"),
        ("learning", {"measures": ["los"]}, "options.measures.0"),
        ("pareto", {"ys": ["l0"]}, "unknown key 'ys'"),
        ("dead", {"y": ""}, "options.y: String should have at least 1 character"),
    ],
)
def test_options_are_checked_before_anything_runs(tmp_path, kind, options, said):
    card = yaml.safe_load((synthetic.CARD / "paper.yaml").read_text())
    figure = {"kind": kind, "title": "T", "caption": "C", "tables": ["metrics"]}
    card["figures"] = {"shape": figure | {"options": options}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(card, sort_keys=False))
    with pytest.raises(RetraceError) as e:
        papers.load(tmp_path, "smoke")
    assert "figures.shape: " in str(e.value) and said in str(e.value)
    assert any(said in fault for fault in lint.lint(tmp_path))
    found = jsonschema.Draft202012Validator(schema.paper()).iter_errors(card)
    assert said == "one y" or any("options" in map(str, error.absolute_path) for error in found)


def test_every_kind_has_options_and_the_verdicts_need_no_words():
    assert OPTIONS.keys() == KINDS.keys()
    figure = Figure(kind="verdicts")
    assert figure.title and figure.caption and figure.tables == ["claims"]
    assert Figure(kind="verdicts", title="Mine").title == "Mine"
    with pytest.raises(ValueError, match="caption"):
        Figure(kind="pareto", title="T", tables=["metrics"])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"x": "m"}, "table curves: no column 'm'"),
        ({"where": {"task": "harder"}}, "no row is as options.where says"),
        ({"columns": ["kepd"]}, "no column 'kepd' (did you mean 'kept'?)"),
    ],
)
def test_a_table_that_does_not_fit_is_told(options, said):
    with pytest.raises(RetraceError, match="figure shape") as e:
        lines(**options)
    assert said in str(e.value)


# --- parts ---------------------------------------------------------------------------------


def test_a_name_is_in_the_legend_once_and_once_in_each_case():
    panels = parts.Panels(["one", "two"])
    for case in (0, 1):
        for panel in (0, 1):
            panels.add(panel, parts.line([0], [0], "a"), case=case)
    panels.add(1, parts.equal([3, 1], [2, np.nan]), parts.line([0], [1], "a"))
    panels.choose(["first", "second"])
    seen = [t.showlegend for t in panels.figure.data]
    assert seen == [True, False, True, False, False, True]
    assert [t.visible for t in panels.figure.data] == [True, True, False, False, None, None]
    shown = panels.figure.layout.updatemenus[0].buttons[1].args[0]["visible"]
    assert shown == [False, False, True, True, True, True]
    assert panels.figure.data[4].x == (1.0, 3.0)


def test_axis_titles_stand_at_the_outer_edges_and_below_narrow_panels_once():
    few, many = parts.Panels([""] * 4, 2), parts.Panels([""] * 4)
    for panels in (few, many):
        panels.axes("x", "y")
    layout = few.figure.layout
    assert (layout.xaxis.title.text, layout.xaxis3.title.text) == (None, "x")
    assert (layout.yaxis.title.text, layout.yaxis2.title.text) == ("y", None)
    assert many.figure.layout.xaxis4.title.text is None
    assert [a.text for a in many.figure.layout.annotations] == ["x"]


def test_seeds_have_a_faint_line_each_and_one_has_only_its_own():
    several = list(parts.over_seeds([0, 1], np.array([[0, 2], [2, 4]]), "a", "#0072B2", "%{y}"))
    assert [t.name for t in several] == [None, None, "a"] and list(several[2].y) == [1, 3]
    assert len(list(parts.over_seeds([0, 1], np.array([[0, 2]]), "a", "#0072B2", "%{y}"))) == 1


def test_tables_are_read_as_said():
    table = pd.DataFrame({"seed": [1, 1, 2], "k": ["a", "b", "a"], "v": [1.0, 2.0, 4.0]})
    assert parts.first(table)["v"].tolist() == [1, 2]
    mean = parts.mean_of(table, ["k"], "v").set_index("k")
    assert mean.loc["a"].tolist() == [2.5, 1, 4] and list(mean) == ["v", "min", "max"]
    assert parts.evenly(31, 11) == [*range(0, 31, 3)] and parts.evenly(2, 9) == [0, 1]
    assert parts.rounded([1.23456, 0]) == [1.23, 0.0]
    assert parts.nothing("no head counts").layout.annotations[0].text == "no head counts"
