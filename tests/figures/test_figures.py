"""Figures: what papers may ask for, what each kind plots, and what a figure's file holds."""

import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import synthetic
import yaml

from pipeline.errors import RetraceError
from pipeline.figures import drawing, theme
from pipeline.figures.kinds import KINDS
from pipeline.papers import papers
from pipeline.sharing import verify
from pipeline.store import embed, provenance

ROOT = Path(__file__).parents[2]
PLOT = re.compile(r'class="retrace-plot">(.*?)</script>', re.S)


def plot_of(page: Path) -> dict:
    return json.loads(PLOT.search(page.read_text())[1])


def frames_of(made_up, *names: str) -> dict[str, pd.DataFrame]:
    root, paper = made_up
    return {n: drawing.read(root / paper.tables()[n]) for n in names}


# --- check ---------------------------------------------------------------------------------


def card_with(tmp_path: Path, figure: dict, own: str = "") -> Path:
    """A paper folder with one figure, `shape`, and a figures.py."""
    card = yaml.safe_load((synthetic.CARD / "paper.yaml").read_text())
    card["figures"] = {"shape": {"title": "T", "caption": "C", "tables": ["metrics"], **figure}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(card, sort_keys=False))
    if own:
        (tmp_path / "figures.py").write_text(own)
    return tmp_path


@pytest.mark.parametrize(
    "figure, own, said",
    [
        ({"kind": "paretto"}, "", "figures.shape: no kind 'paretto' (did you mean 'pareto'?)"),
        ({}, "", "figures.shape: no function 'shape' in figures.py"),
        ({}, "def shap(tables, options): ...", "in figures.py (did you mean 'shap'?)"),
        (
            {"kind": "pareto", "tables": ["evaluation/traned"]},
            "",
            "figures.shape: no table 'evaluation/traned' (did you mean 'evaluation/trained'?)",
        ),
    ],
)
def test_check_names_the_fault_and_the_nearest(tmp_path, figure, own, said):
    with pytest.raises(RetraceError) as e:
        papers.load(card_with(tmp_path, figure, own), "smoke")
    assert said in str(e.value) and str(tmp_path / "paper.yaml") in str(e.value)


@pytest.mark.parametrize("figure", [{}, {"kind": "common"}, {"kind": "pareto"}])
def test_check_accepts_own_functions_and_kinds(tmp_path, figure):
    own = "def shape(t, o): ...\ndef common(t, o): ..."
    assert papers.load(card_with(tmp_path, figure, own), "smoke").spec.figures["shape"]


def test_check_is_cheap():
    """snakemake loads every paper on every call: no plotly, pandas or torch for that."""
    code = (
        "import sys; from pathlib import Path; from pipeline.papers import papers\n"
        f"papers.load(Path({str(synthetic.CARD)!r}), 'smoke')\n"
        "heavy = {'plotly', 'pandas', 'pyarrow', 'jinja2', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- kinds ---------------------------------------------------------------------------------


def test_pareto_has_a_line_a_family_and_every_dictionary(made_up):
    tables = frames_of(made_up, "evaluation/trained", "evaluation/random")
    figure, frame = KINDS["pareto"](tables, {})
    assert len(frame) == sum(map(len, tables.values()))
    assert [t.name for t in figure.data] == [
        "TopK, 1,152 latents · trained",
        "TopK, 2,304 latents · trained",
        "TopK, 4,608 latents · trained",
        "TopK, 4,608 latents · random",
        "L1, 2,304 latents · trained",
        "TopK, 4,608 latents, no AuxK · trained",
        "TopK, 4,608 latents, frozen decoder · trained",
    ]
    line = next(t for t in figure.data if t.name == "TopK, 4,608 latents · trained")
    table = tables["evaluation/trained"].set_index("sae")
    wanted = [table.loc[f"topk_k{k}_d4608", "explained_variance"] for k in (16, 32, 64)]
    assert line.x == (16, 32, 64) and line.y == pytest.approx(wanted)
    assert [c[0] for c in line.customdata] == [f"topk_k{k}_d4608" for k in (16, 32, 64)]


def test_pareto_offers_the_metrics_that_were_measured(made_up):
    (table,) = frames_of(made_up, "evaluation/trained").values()
    figure, _ = KINDS["pareto"](
        {"evaluation/trained": table.assign(loss_recovered_zero=np.nan)}, {}
    )
    labels = [b.label for b in figure.layout.updatemenus[0].buttons]
    assert labels == ["explained variance", "Δ loss (nats a token)"]
    figure, _ = KINDS["pareto"]({"evaluation/trained": table}, {"y": "mse"})
    assert not figure.layout.updatemenus and figure.layout.yaxis.title.text.startswith("squared")


def test_seeds_become_mean_and_error_bars(made_up):
    (table,) = frames_of(made_up, "evaluation/trained").values()
    one = table[table["sae"] == "topk_k32_d4608"]
    three = pd.concat(
        [
            one.assign(sae=f"s{i}", seed=i, explained_variance=v, l0=32.0)
            for i, v in enumerate([0.7, 0.8, 0.9])
        ]
    )
    figure, frame = KINDS["pareto"]({"evaluation/trained": three}, {"y": "explained_variance"})
    assert len(frame) == 1 and frame["n"][0] == 3 and frame["sae"][0] == "s0, s1, s2"
    assert figure.data[0].y == pytest.approx([0.8])
    assert figure.data[0].error_y.array == pytest.approx([0.1])


def test_scaling_shows_one_axis_at_a_time(made_up):
    figure, frame = KINDS["scaling"](frames_of(made_up, "evaluation/trained"), {})
    assert set(frame["architecture"]) == {"topk"} and not frame["frozen_decoder"].any()
    shown = [t for t in figure.data if t.visible]
    assert {t.meta for t in shown} == {"k"}
    assert {"1,152 latents", "2,304 latents", "4,608 latents"} <= {t.name for t in shown}
    other = figure.layout.updatemenus[0].buttons[1]
    assert other.label == "against width"
    assert other.args[0]["visible"] == [t.meta == "d_sae" for t in figure.data]
    assert other.args[1]["xaxis.tickvals"] == [1152, 2304, 4608]


def test_training_keeps_the_ends_of_every_curve(made_up):
    tables = frames_of(made_up, "evaluation/trained_history")
    figure, frame = KINDS["training"](tables, {"points": 7, "saes": ["topk_k16"]})
    whole = tables["evaluation/trained_history"]
    assert {t.name for t in figure.data} == {
        f"TopK, k 16, {d} latents" for d in ("1,152", "2,304", "4,608")
    }
    for sae, curve in frame.groupby("sae"):
        rows = whole.loc[whole["sae"] == sae, "rows"]
        assert len(curve) == 7
        assert (curve["rows"].iloc[0], curve["rows"].iloc[-1]) == (rows.min(), rows.max())
    buttons = {b.label: b.args[0]["y"] for b in figure.layout.updatemenus[0].buttons}
    assert buttons["explained variance"][0] == list(figure.data[0].y)


def test_seeds_of_a_dictionary_share_a_colour_and_a_place_in_the_legend():
    seeds = [f"{kind}_seed{i}" for kind in ("topk_k16", "l1_c4") for i in range(3)]
    table = pd.DataFrame(
        [{"sae": s, "step": t, "rows": 10 * t, "loss": 1 / t} for s in seeds for t in (1, 2)]
    )
    figure, frame = KINDS["training"]({"evaluation/trained_history": table}, {"y": "loss"})
    assert len(figure.data) == 6 and set(frame["sae"]) == set(seeds)
    named = [t.name for t in figure.data if t.showlegend is not False]
    assert sorted(named) == ["L1, L1 coefficient 4", "TopK, k 16"]
    assert len({(t.line.color, t.line.dash) for t in figure.data}) == 2
    assert "seed 2" in figure.data[-1].hovertemplate  # which seed it is, the box says


def test_ticks_of_percents_are_not_rounded():
    label = ".2~%"
    choices = {"a": [{}, {"yaxis.tickformat": ".0%"}], "b": [{}, {"yaxis.tickformat": ".3f"}]}
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 0.005])).update_yaxes(tickformat=".0%")
    figure.update_layout(updatemenus=[theme.selector(choices)])
    layout = drawing.plain(figure)["layout"]
    args = [b["args"][1]["yaxis.tickformat"] for b in layout["updatemenus"][0]["buttons"]]
    assert layout["yaxis"]["tickformat"] == label and args == [label, ".3f"]


def test_density_counts_every_latent_that_fires(made_up):
    (table,) = frames_of(made_up, "features/topk_k32_d4608").values()
    figure, frame = KINDS["density"]({"features/topk_k32_d4608": table}, {"bins": 11})
    assert frame["latents"].sum() == (~table["dead"]).sum() and len(frame) == 11
    assert f"{table['dead'].sum()} never" in figure.data[0].name


def test_attribution_plots_what_was_ablated_and_escapes_tokens(made_up):
    tables = frames_of(made_up, "attribution/latents")
    figure, frame = KINDS["attribution"](tables, {})
    table = tables["attribution/latents"]
    assert len(frame) == table["exact"].notna().sum() < len(table)
    prompts = [t for t in figure.data if t.mode == "markers"]
    assert [t.name for t in prompts] == list(dict.fromkeys(table["prompt"]))
    hover = [text for t in prompts for _, text, _ in t.customdata]
    assert any("&lt;script&gt;" in text for text in hover)
    assert not any("<script>" in text for text in hover)


def test_attribution_shows_one_prompt_with_its_own_line(made_up):
    figure, frame = KINDS["attribution"](frames_of(made_up, "attribution/latents"), {})
    buttons = {b.label: b.args[0]["visible"] for b in figure.layout.updatemenus[0].buttons}
    assert list(buttons) == ["all prompts", "capital", "plural", "pronoun"]
    for label, visible in buttons.items():
        line, *points = [t for t, seen in zip(figure.data, visible, strict=True) if seen]
        part = frame if label == "all prompts" else frame[frame["prompt"] == label]
        assert sum(len(t.x) for t in points) == len(part)
        ends = part[["exact", "attribution"]]
        assert line.x == line.y == (ends.min().min(), ends.max().max())


def test_completeness_adds_up(made_up):
    tables = frames_of(made_up, "attribution/prompts")
    figure, frame = KINDS["completeness"](tables, {})
    table = tables["attribution/prompts"]
    bars = {t.name: t.y for t in figure.data}
    assert list(bars) == ["latents", "error term", "their sum", "actual change"]
    assert bars["their sum"] == pytest.approx(table["sum_latents"] + table["error_term"])
    change = table["logit_diff"] - table["baseline_logit_diff"]
    assert bars["actual change"] == pytest.approx(change)
    assert frame["estimate"].unique().tolist() == ["gradient × activation", "integrated gradients"]
    other = figure.layout.updatemenus[0].buttons[1].args[0]["y"]
    assert other[0] == pytest.approx(table["sum_latents_ig"])


def test_completeness_of_one_estimate(made_up):
    tables = frames_of(made_up, "attribution/prompts")
    figure, frame = KINDS["completeness"](tables, {"suffix": "_ig"})
    table = tables["attribution/prompts"]
    assert figure.data[0].y == pytest.approx(table["sum_latents_ig"])
    assert len(frame) == len(table) and not figure.layout.updatemenus


def test_dead_sets_auxk_beside_none(made_up):
    figure, frame = KINDS["dead"](frames_of(made_up, "evaluation/trained"), {})
    with_aux, without = figure.data
    assert set(without.y) == {0.41} and set(with_aux.y) == {0.06}
    assert without.x[0] in with_aux.x and "standard" not in set(frame["architecture"])


@pytest.mark.parametrize(
    "kind, table, column",
    [
        ("pareto", "evaluation/trained", "l0"),
        ("training", "evaluation/trained_history", "rows"),
        ("density", "features/topk_k32_d4608", "density"),
        ("attribution", "attribution/latents", "exact"),
        ("completeness", "attribution/prompts", "baseline_logit_diff"),
    ],
)
def test_a_missing_column_is_one_sentence(made_up, kind, table, column):
    (frame,) = frames_of(made_up, table).values()
    with pytest.raises(RetraceError, match=f"table {table}: no column '{column}'"):
        KINDS[kind]({table: frame.drop(columns=column)}, {})


def test_an_empty_comparison_is_one_sentence(made_up):
    (frame,) = frames_of(made_up, "attribution/latents").values()
    with pytest.raises(RetraceError, match="no latent was ablated exactly"):
        KINDS["attribution"]({"attribution/latents": frame.assign(exact=np.nan)}, {})
    (table,) = frames_of(made_up, "evaluation/trained").values()
    only_l1 = table[table["architecture"] == "standard"]
    for kind in ("scaling", "dead"):
        with pytest.raises(RetraceError, match="no TopK dictionary"):
            KINDS[kind]({"evaluation/trained": only_l1}, {})


# --- the file ------------------------------------------------------------------------------


def test_numbers_are_short_and_nothing_else_changes():
    figure = go.Figure(go.Scatter(x=np.arange(3), y=np.array([1 / 3, np.nan, 123456.789])))
    figure.add_heatmap(z=np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), text=[["a", None]])
    data = drawing.plain(figure)["data"]
    assert data[0]["x"] == [0, 1, 2] and data[0]["y"][::2] == [0.33333, 123460.0]
    assert np.isnan(data[0]["y"][1])  # null in the file, see embed.script_json
    assert data[1]["z"] == [[1, 2], [3, 4]] and data[1]["text"] == [["a", None]]
    assert drawing.short(1234567) == 1234567 and drawing.short(True) is True


DAY, SECOND = pd.Timestamp("2026-01-02"), pd.Timedelta(seconds=1)


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (pd.date_range(DAY, periods=2), ["2026-01-02T00:00:00", "2026-01-03T00:00:00"]),
        ([DAY.date(), None], ["2026-01-02", None]),
        ([DAY, pd.NaT], ["2026-01-02T00:00:00", None]),
        (pd.Series([1, pd.NA, 3], dtype="Int64"), [1, None, 3]),
        (pd.Series([0.5, pd.NA], dtype="Float64"), [0.5, None]),
        (pd.Series([True, pd.NA], dtype="boolean"), [True, None]),
        (pd.Series(["a", pd.NA], dtype="string"), ["a", None]),
        (pd.Series(["a", None], dtype="category"), ["a", None]),
        ([Decimal("0.25"), np.float32(0.5)], [0.25, 0.5]),
        ([SECOND, np.timedelta64(2, "s")], [1000, 2000]),
    ],
)
def test_dates_and_missing_values_draw(x, want):
    """As plotly's own JSON has them, but for NaN, which a page has as null."""
    figure = go.Figure(go.Scatter(x=x, y=[1] * len(want)))
    (trace,) = json.loads(embed.script_json(drawing.plain(figure)))["data"]
    found = [v.split(".")[0] if isinstance(v, str) else v for v in trace["x"]]
    assert found == want
    if not isinstance(x, list):
        own = json.loads(figure.to_json())["data"][0]["x"]
        if isinstance(own, list):
            assert [v.split(".")[0] if isinstance(v, str) else v for v in own] == want


def test_a_figure_keeps_no_other_template():
    figure = go.Figure(go.Bar(y=[1]), layout={"title": "t", "template": "plotly_dark"})
    layout = drawing.plain(figure)["layout"]
    assert layout["template"] == drawing.short(theme.template()) and "title" not in layout


@pytest.mark.parametrize(
    "name", ["pareto", "scaling", "density", "completeness", "dead", "own_bars"]
)
def test_files_are_small(made_up, name):
    """About 10 KB each: the limit leaves room for twice the points of this card."""
    root, paper = made_up
    page = root / f"results/laptop/{paper.name}/figures/{name}.html"
    assert page.stat().st_size < 20_000
    assert "Plotly=" not in page.read_text()


def test_a_file_is_deterministic_certified_and_escaped(made_up):
    root, paper = made_up
    page = root / f"results/laptop/{paper.name}/figures/pareto.html"
    with synthetic.inside(root):
        synthetic.draw(paper, "pareto")  # the certificate names the packages imported by now
        before = page.read_bytes(), page.with_suffix(".csv").read_bytes()
        synthetic.draw(paper, "pareto")
        assert (page.read_bytes(), page.with_suffix(".csv").read_bytes()) == before
        assert verify.faults(page.relative_to(root)) == []
    certificate = provenance.read(page)
    assert certificate["stage"] == "figures" and len(certificate["inputs"]) == 2
    assert synthetic.NASTY.encode() not in before[0] and b"<script>window" not in before[0]
    changed = root / "changed.html"
    changed.write_bytes(before[0].replace(b'"data"', b'"date"', 1))
    assert "changed.html: changed since stage figures" in verify.faults(changed, root)[0]


def test_the_csv_holds_what_is_plotted(made_up):
    root, paper = made_up
    base = root / f"results/laptop/{paper.name}/figures"
    frame = pd.read_csv(base / "own_bars.csv")
    (trace,) = plot_of(base / "own_bars.html")["data"]
    assert trace["x"] == frame["name"].tolist()
    assert trace["y"] == pytest.approx(frame["mean"].tolist(), rel=1e-4)  # five digits


def test_a_paper_may_replace_a_kind(tmp_path):
    own = tmp_path / "figures.py"
    own.write_text(
        "import pandas as pd, plotly.graph_objects as go\n"
        "def pareto(tables, options): return go.Figure(), pd.DataFrame({'mine': [1]})\n"
    )
    _, frame = drawing.make("shape", {"kind": "pareto", "options": {}}, {}, own)
    assert frame.columns.tolist() == ["mine"]


def test_a_figure_may_stand_in_a_file_that_figures_py_is_split_into(tmp_path):
    made = "import pandas as pd, plotly.graph_objects as go\nN = 3\n"
    made += "def shape(tables, options): return go.Figure(), pd.DataFrame({'n': [N]})\n"
    (tmp_path / "figures_more.py").write_text(made)
    (tmp_path / "figures.py").write_text("from .figures_more import N\ndef other(): return N\n")
    found = drawing.own_functions(tmp_path / "figures.py")
    assert {n: f.name for n, f in found.items()} == {
        "other": "figures.py", "shape": "figures_more.py"
    }  # fmt: skip
    spec = {"kind": "", "options": {}}
    _, frame = drawing.make("shape", spec, {}, tmp_path / "figures.py")
    assert frame["n"].tolist() == [3]


def test_a_function_that_returns_no_pair_is_one_sentence(tmp_path):
    own = tmp_path / "figures.py"
    own.write_text("def shape(tables, options): return 7\n")
    with pytest.raises(RetraceError, match="figure shape: shape returned int"):
        drawing.make("shape", {"kind": "", "options": {}}, {}, own)


def test_contexts_are_not_read_for_figures(made_up):
    (frame,) = frames_of(made_up, "features/topk_k32_d4608").values()
    assert "histogram" in frame and not {"examples", "top_logits"} & set(frame.columns)


def test_roles_of_colour_are_those_that_draw_js_replaces():
    script = (ROOT / "pipeline/report/templates/draw.js").read_text()
    roles = re.search(r"DARK = \{(.*?)\}", script)[1]
    assert re.findall(r'"(#\w+)":', roles) == [theme.INK, theme.GRID, theme.PAGE]
    assert not {theme.INK, theme.GRID, theme.PAGE} & {*theme.PALETTE, *theme.SEQUENTIAL}


@pytest.mark.workflow
def test_a_figure_needs_no_torch(made_up):
    root, _ = made_up
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from pathlib import Path; import synthetic; from pipeline.papers import papers\n"
        "made = papers.load(Path('rules/papers/made_up'), 'laptop')\n"
        "synthetic.draw(made, 'own_bars')\n"
        "heavy = {'torch', 'transformers', 'sae_lens', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_figure_by_itself_has_no_place_for_a_number_and_no_backtick():
    caption = "From {a.b.c} by `x & y`, not {this one} <b>"
    page = drawing.page("one", "One", caption, {"data": []}, "figures.js")
    assert "<code>x &amp; y</code>, not {this one} &lt;b&gt;" in page
    assert 'From <a href="../report.html#figure-one"' in page and "a.b.c" not in page
