"""The report and the index: what they say, what they link to, and what they never let through."""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from pipeline.claims import costs, scalars
from pipeline.claims.summary import tally
from pipeline.errors import RetraceError
from pipeline.figures.kinds import KINDS
from pipeline.report import catalogue, definitions, pages, report
from pipeline.sharing import verify
from pipeline.store import embed, provenance, tables

BASE = Path("results/laptop/made_up")


@pytest.fixture(scope="module")
def text(made_up) -> str:
    root, _ = made_up
    return (root / BASE / "report.html").read_text()


@pytest.fixture(scope="module")
def index(made_up) -> str:
    root, _ = made_up
    return (root / BASE.parent / "index.html").read_text()


def words(page: str) -> str:
    """The text of a page: no scripts, styles or tags, one space between words."""
    page = page.replace("<wbr>", "")  # it may break there, and reads as one word
    page = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


# --- content -------------------------------------------------------------------------------


def test_report_says_what_the_card_says(text):
    said = words(text)
    for part in (
        "Nobody & Somebody, 2024 · https://example.org/paper",
        "Numbers out of formulas",
        "What was done Model trained: SmolLM2-135M-Instruct.Q4_1, out of the package",
        "random: every weight redrawn with the trained tensor's mean and variance",
        "the residual stream after block 12 stored as float16",
        "Tokens 20,000 to train on 20,000 held out in blocks of 128",
        "TopK: 1,152, 2,304 and 4,608 latents; k 16, 32 and 64",
        "4 L1: 2,304 latents 1 TopK with a frozen random decoder: 4,608 latents; k 32",
        "Claims: 2 of 3",
        "2 of 3 claims judged are reproduced 1 not reproduced 1 not comparable",
        "tolerance ± 0.02",
        "why this tolerance spread of three seeds",
        "in the paper Sec. 2.4 (second-hand)",
        "“Second-hand”: read in a note that quotes the paper, not in the paper itself.",
        "No model was trained",
        "One person wrote the formulas.",
        "mean number of non-zero latents a held-out row",
        "Corpus: CC BY-SA 4.0.",
        "results/store/corpus/made_up-0123456789ab/documents.parquet",
    ):
        assert part in said, part


def claim_texts(page: str) -> dict[str, str]:
    """id -> the words of a claim's row."""
    found = re.split(r'<li class="claim" id="claim-(\w+)">', page)[1:]
    return {
        i: words(row.split("</details>")[0]) for i, row in zip(found[::2], found[1::2], strict=True)
    }


def test_claims_stand_in_words_with_numbers_and_verdicts(text):
    said = claim_texts(text)
    rises = r"rises from topk k16 d4608 0\.\d+ over topk k32 d4608 0\.\d+ to topk k64 d4608 0\.\d+"
    assert re.search(rf"explained variance \(trained\): {rises}", said["ev_grows"])
    assert "Fig. 1" in said["ev_grows"] and "is below topk k32 d1152 0." in said["wrong_way"]
    assert said["dead_7"].startswith("7 % of the latents are dead paper 0.07 ours 0.06 tolerance")
    assert "GPT-4 is not public" in said["gpt4"]
    verdicts = re.findall(r'<div class="judged"><span class="verdict ([\w-]+)">', text)
    assert sorted(verdicts) == ["not-comparable", "not-reproduced", "reproduced", "reproduced"]


def test_what_cannot_be_judged_is_folded(text):
    fold = text[text.index('<details class="fold">') :]
    assert words(fold).startswith("1 claim not comparable")
    assert 'id="claim-gpt4"' in fold and 'id="claim-ev_grows"' not in fold
    assert "<details open" not in text


def test_the_headline_stands_above_the_claims_and_once(made_up, text):
    first = next(iter(made_up[1].spec.figures))
    order = ['id="done"', f'id="figure-{first}"', 'id="claims"', 'id="figures"']
    places = [text.index(part) for part in order]
    assert places == sorted(places) and text.count(f'id="figure-{first}"') == 1


def test_a_claim_stands_beside_the_figure_that_shows_it(text):
    row = text[text.index('id="claim-dead_7"') :]
    thumb = row[: row.index("</li>")]
    assert '<a class="thumb" href="#figure-dead"' in thumb and '<use href="#thumb-dead"/>' in thumb
    assert text.count('<symbol id="thumb-dead"') == 1
    assert '<a href="#claim-dead_7" title=' in text[text.index('id="figure-dead"') :]


def test_names_of_metrics_lead_to_their_definitions(text):
    links = set(re.findall(r'<a class="metric" href="#([^"]+)"', text))
    assert "metric-explained_variance" in links
    assert all(f'<dd id="{id}">' in text for id in links)


def test_terms_are_those_that_occur(text):
    terms = re.search(r'<section id="terms">(.*?)</section>', text, re.S)[1]
    listed = [words(t) for t in re.findall(r"<dt>(.*?)</dt>", terms)]
    assert {"TopK", "latent", "AuxK"} <= set(listed) and "induction head" not in listed


def test_the_whole_card_is_in_the_page(made_up, text):
    root, paper = made_up
    (shown,) = re.findall(r"<pre [^>]*>(.*?)</pre>", text, re.S)
    assert html.unescape(shown) == (root / paper.folder / "paper.yaml").read_text()


def test_every_figure_has_its_plot_command_and_csv(made_up, text):
    root, paper = made_up
    for name, figure in paper.spec.figures.items():
        assert f'id="figure-{name}"' in text and html.escape(figure.title, quote=False)[:9] in text
        assert f"snakemake -c1 {BASE}/figures/{name}.html" in text.replace("<wbr>", "")
        assert (root / BASE / f"figures/{name}.csv").exists()
        assert f'href="figures/{name}.csv"' in text
    plots = re.findall(r'class="retrace-plot">(.*?)</script>', text, re.S)
    alone = (root / BASE / "figures/own_bars.html").read_text()
    assert len(plots) == len(paper.spec.figures)
    own = plots[list(paper.spec.figures).index("own_bars")]
    assert json.loads(own) == json.loads(pages.PLOT.search(alone)[1])


def test_links_lead_to_files(made_up, text, index):
    root, _ = made_up
    for page, folder in ((text, BASE), (index, BASE.parent)):
        markup = re.sub(r"<script.*?</script>", " ", page, flags=re.S)
        links = set(re.findall(r'href="([^"#]+)"', markup)) - {"https://example.org/paper"}
        assert links and all((root / folder / link).exists() for link in links), links


def test_costs_are_of_this_paper_only(made_up):
    said = words((made_up[0] / BASE / "costs.html").read_text())
    assert "evaluation_trained 2 min 05 s 42.0 s 1,804 MiB" in said
    assert "corpus made_up-0123456789ab (shared) 1 min 01 s" in said
    assert "attribution 8.1 s 42.0 s –" in said
    assert "another_paper" not in said
    assert "all jobs, one after the other 3 min 14 s" in said


def test_index_has_every_paper(index):
    said = words(index)
    assert "2 of 3 claims judged are reproduced" in said and "Nobody & Somebody, 2024" in said
    assert said.count("7 % of the latents are dead") == 1


def test_the_index_is_folded_to_badges(index):
    (row,) = re.findall(r'<li class="row" id="made_up">(.*?)</details>', index, re.S)
    badge, fold = row.split("<details>")
    assert "2 of 3 reproduced 1 not reproduced" in words(badge) and "<svg" in badge
    assert 'href="made_up/report.html#claim-dead_7"' in fold


def test_the_catalogue_names_every_group_of_core_metrics_in_words():
    assert set(catalogue.TITLES) == set(definitions.METRICS)


def test_the_catalogue_defines_every_metric_and_shows_kinds(made_up):
    page = (made_up[0] / BASE.parent / "catalogue.html").read_text()
    said = words(page)
    for name, definition in scalars.SAE.items():
        assert f"{name} {definition}"[:60] in said
    assert '<a class="thumb" href="made_up/figures/pareto.html">' in page
    assert all(f'id="kind-{kind}"' in page for kind in KINDS)
    assert "gpt2" in said and "blocks.N.hook_resid_post" in said
    assert synthetic.NASTY not in page and synthetic.NASTY in said


def test_a_report_without_benchmarks_says_so(made_up, tmp_path):
    root, paper = made_up
    path = root / BASE / "report.html"
    with synthetic.inside(root):
        synthetic.report(paper)  # afresh: its certificate lists the packages imported by now
        before = path.read_bytes()
        synthetic.report(paper, benchmarks=str(tmp_path))
        assert "Not known here" in words(path.with_name("costs.html").read_text())
    same = path.read_bytes() == before  # a diff of 5 MB would take minutes
    assert same, "the same tables give the same bytes"


def test_a_card_without_claims_figures_or_features(made_up):
    root, paper = made_up
    bare = paper.spec.model_copy(update={"figures": {}, "claims": [], "features": None})
    with synthetic.inside(root):
        card = bare.model_dump(mode="json", exclude_unset=True)
        for optional in ("summary", "deviations", "contributions", "use_of_ai"):
            card.pop(optional)
        nothing = pd.DataFrame(columns=["id", "verdict"])
        made = provenance.certificate("claims", {}, "0" * 64, [])
        tables.write_csv(root / "empty.csv", nothing, made)
        synthetic.call(
            "report",
            {"paper": "made_up", "scale": "laptop", "card": card},
            claims="empty.csv",
            metrics=BASE / "metrics.json",
            yaml=paper.folder / "paper.yaml",
            benchmarks="none",
            out="bare.html",
            costs="costs.html",
        )
        said = words(Path("bare.html").read_text())
    assert "no claim judged at this scale" in said and "states no claims" in said
    assert "Plotly" not in (root / "bare.html").read_text()


def test_what_is_no_figure_is_one_sentence(tmp_path):
    path = tmp_path / "shape.html"
    path.write_text("<p>hello</p>")
    with pytest.raises(RetraceError, match=r"shape.html: is not a figure; delete it"):
        report.figure(path, {}, "smoke", "p")


# --- safety --------------------------------------------------------------------------------


def test_text_stays_text(text, index):
    for page in (text, index):
        assert "<script>window.hacked" not in page and "<img src=x" not in page
        assert synthetic.NASTY in words(page)


def test_only_the_pages_own_scripts_may_run(text, index):
    for page in (text, index):
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        policy = html.unescape(policy)
        scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
        hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()) for s in scripts]
        allowed = policy.split("script-src ")[1].split(";")[0]
        assert allowed == (" ".join(f"'sha256-{h.decode()}'" for h in hashes) or "'none'")
        assert policy.startswith("default-src 'none'")


def test_the_page_is_one_file_with_one_plotly(text):
    assert text.count("* plotly.js v") == 1
    markup = re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.S)
    assert not re.search(r'<(link|iframe|img|script)\b|src="', markup)


def test_certificates_cover_pages(made_up):
    root, _ = made_up
    path = root / BASE / "report.html"
    with synthetic.inside(root):
        assert verify.faults(BASE / "report.html") == []
    assert set(provenance.read(path)["inputs"]) >= {f"{BASE}/claims.csv", f"{BASE}/metrics.json"}


@pytest.mark.parametrize("nasty", ["</script>", "<!--<script>", "\u2028\u2029", "]]>", "&lt;", "é"])
def test_json_in_scripts_cannot_end_them(nasty):
    made = embed.script_json({"k": [nasty, 1.5, None, float("nan")]})
    assert json.loads(made) == {"k": [nasty, 1.5, None, None]}
    assert not set(made) & set("<>&\u2028\u2029")


# --- parts ---------------------------------------------------------------------------------


def metric(mean, sd=None, n=1, definition="d"):
    return {"values": [mean], "mean": mean, "sd": sd, "n": n, "definition": definition}


def test_metrics_of_one_shape_share_a_table():
    made = report.grids(
        {
            "a.x.l0": metric(32.0),
            "a.x.mse": metric(0.123456),
            "a.y.l0": metric(64.0),
            "a.y.mse": metric(0.5, 0.01234, 3),
            "d_star": metric(float("nan")),
        }
    )
    assert made == [
        {
            "columns": ["l0", "mse"],
            "rows": [
                {"name": "a.x", "cells": ["32", "0.1235"]},
                {"name": "a.y", "cells": ["64", "0.5 ± 0.012 (n = 3)"]},
            ],
            "first": "a.x",
        },
        {"columns": ["value"], "rows": [{"name": "d_star", "cells": ["–"]}], "first": ""},
    ]


def test_definitions_stand_once():
    made = report.definitions(
        {
            "a.x.l0": metric(1.0, definition="active latents"),
            "a.y.l0": metric(1.0, definition="active latents"),
            "mean.l0": metric(1.0, definition="mean over prompts"),
            "cosine.d16": metric(1.0, definition="cosine"),
            "cosine.d64": metric(1.0, definition="cosine"),
        }
    )
    assert made == [
        ("l0", "active latents", "metric-l0"),
        ("mean.l0", "mean over prompts", "metric-mean-l0"),
        ("d16, d64", "cosine", "metric-d16"),
    ]


def test_prose_has_code_and_no_other_markup():
    assert pages.prose("run `a <b>` & <i>") == "run <code>a &lt;b&gt;</code> &amp; &lt;i&gt;"


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.123456, "0.1235"),
        ("0.5", "0.5"),
        (-3, "−3"),
        (12345.0, "12,345"),
        (1e-7, "1e−07"),
        (None, "–"),
        ("", "–"),
        ("0.1 < 0.2", "0.1 < 0.2"),
    ],
)
def test_numbers_for_people(value, shown):
    assert pages.number(value) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (math.nan, "–"),
    ],
)
def test_durations_for_people(seconds, shown):
    assert costs.duration(seconds) == shown


def test_store_items_among_files():
    files = ["results/store/sae/a-1/manifest.json", "results/store/sae/a-1/saes/x/cfg.json"]
    files += ["/big/store/model/m-2/model.json", "results/smoke/p/metrics.json", "store/x"]
    assert costs.store_items(files) == [("model", "m-2"), ("sae", "a-1")]


def test_a_broken_benchmark_is_left_out(tmp_path):
    (tmp_path / "smoke/p").mkdir(parents=True)
    (tmp_path / "smoke/p/empty.tsv").write_text("")
    (tmp_path / "smoke/p/job.tsv").write_text("s\tmax_rss\tcpu_time\n3.5\t-\t1.0\n")
    (cost,) = costs.of_paper(tmp_path, "smoke", "p", [])
    assert (cost.job, cost.seconds, cost.cpu_seconds) == ("job", 3.5, 1.0)
    assert math.isnan(cost.peak_mib)


def test_tally_counts_only_judged_claims():
    count = tally([{"verdict": v} for v in ("reproduced", "not run", "not reproduced", "not run")])
    assert (count["judged"], count["reproduced"], count["not run"]) == (2, 1, 2)


def test_origin_counts_commits():
    made = {"git": {"commit": "a" * 40, "dirty": False}, "device": "", "versions": {"numpy": "2"}}
    assert report.origin([made]) == f"Made from commit {'a' * 12}, with numpy 2."
    other = made | {"git": {"commit": "b" * 40, "dirty": True}, "device": "cpu"}
    said = "Made from 2 commits (listed below) on cpu, with numpy 2. A + marks code that was not"
    assert report.origin([made, other]) == f"{said} committed."
    assert "no certificates" in report.origin([])


def test_licences_once():
    made = [{"stage": "corpus", "licence": "CC BY-SA 4.0", "attribution": "Wikipedia"}] * 2
    assert pages.licences([*made, {"stage": "sae"}]) == ["Corpus: Wikipedia; CC BY-SA 4.0."]
