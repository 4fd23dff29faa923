"""The paper attribution_patching: prompts, what is compared, both models end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.claims import summary
from pipeline.claims.judge import judge
from pipeline.claims.scalars import compute, known, parts
from pipeline.errors import RetraceError
from pipeline.job import own as own_stages
from pipeline.job.source import import_file
from pipeline.models.native import NativeForCausalLM
from pipeline.papers import papers
from pipeline.store import tables
from pipeline.text import prompts_ioi as names
from pipeline.weights.batches import IGNORED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/attribution_patching"
data, prompts, compared, estimates, metrics = (
    import_file(FOLDER / f"{name}.py")
    for name in ("data", "prompts", "compared", "estimates", "metrics")
)
LIST = {"n_tokens": 9, "length": 6}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, and digits, are tokens; BOS is token 0."""
    text = " ".join([prompts.TEMPLATE, *names.TEMPLATES])
    for slot in ("{noun}", "{century}", "{years}", "{0}", "{1}", "{S}", "{place}", "{object}"):
        text = text.replace(slot, " ")
    words = [*text.replace(",", " ").replace(".", " ").split(), *prompts.NOUNS]
    words += [*names.NAMES, *names.PLACES, *names.OBJECTS]
    some = ["<|endoftext|>", *"0123456789,. x", *(w for word in words for w in (word, f" {word}"))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(some))}, "x"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d|[,.]| "), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>")


TOKENIZER = word_tokenizer()

# --- prompts and data ----------------------------------------------------------------------


def test_later_decades_are_right():
    made = prompts.greater_than({}, TOKENIZER, 40, 0)
    assert len({tuple(c) for c in made["clean"]}) > 30
    for i, (clean, corrupt) in enumerate(zip(made["clean"], made["corrupt"], strict=True)):
        assert len(clean) == len(corrupt) == made["positions"]["END"][i] + 1
        at = made["positions"]["decade"][i]
        text = TOKENIZER.convert_ids_to_tokens(clean)
        assert text[at - 2 : at] == text[-2:] and "x" not in text
        decade = int(text[at])
        digits = lambda key, i=i: TOKENIZER.convert_ids_to_tokens(made[key][i])  # noqa: E731
        assert digits("answer") == [str(d) for d in range(decade + 1, 10)] != []
        assert digits("foil") == [str(d) for d in range(decade)] != []
        assert TOKENIZER.convert_ids_to_tokens(corrupt)[at : at + 2] == ["0", "1"]
        assert clean[:at] == corrupt[:at] and clean[at] != corrupt[at]
    assert made == prompts.greater_than({}, TOKENIZER, 40, 0)


def test_vocabularies_that_do_not_fit_are_told():
    whole = lambda text, **_: {"input_ids": [text]}  # noqa: E731
    with pytest.raises(RetraceError, match="a digit is no token"):
        prompts.greater_than({}, whole, 2, 0)
    with pytest.raises(RetraceError, match="unknown key 'noun'"):
        prompts.greater_than({"noun": "war"}, TOKENIZER, 2, 0)


def test_what_followed_before_follows_again():
    options = data.checked(LIST)
    tokens, targets = data.sequences(80, options, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (80, 12)
    starts = set()
    for row, want in zip(tokens.tolist(), targets.tolist(), strict=True):
        first, again = row[1:7], row[7:]
        assert row[0] == 9 and len(set(first)) == 6 and max(first) < 9
        starts.add(first.index(again[0]))
        followed = dict(zip(first, [*first[1:], IGNORED], strict=True))
        assert want == [IGNORED] * 7 + [followed[token] for token in again]
    assert starts == set(range(6))
    batches = data.lookup(LIST, 0, 5, 12, torch.device("cpu"))
    assert batches.d_vocab == 10 and batches.batch(3)[0].equal(batches.batch(3)[0])
    assert not batches.batch(3)[0].equal(batches.batch(4)[0])


def test_exchanged_tokens_exchange_the_answers():
    made = prompts.lookup(LIST, None, 30, 0)
    for i, (clean, corrupt) in enumerate(zip(made["clean"], made["corrupt"], strict=True)):
        at = {name: where[i] for name, where in made["positions"].items()}
        for row, answer in ((clean, made["answer"][i]), (corrupt, made["foil"][i])):
            assert len(row) == 8 and row[row.index(row[at["END"]]) + 1] == answer
        assert clean[at["asked"]] == clean[-1] == corrupt[-1] == corrupt[at["other"]]
        assert clean[at["next"]] == made["answer"][i] == corrupt[at["next"]]
        assert clean[at["other_next"]] == made["foil"][i] != made["answer"][i]


@pytest.mark.parametrize(
    ("options", "n_ctx", "said"),
    [
        ({**LIST, "length": 10}, 20, "n_tokens is 9; raise it"),
        (LIST, 15, "sequences have 12 tokens, n_ctx is 15"),
        ({**LIST, "n_token": 3}, 12, "did you mean 'n_tokens'"),
    ],
)
def test_faults_of_options_are_told(options, n_ctx, said):
    with pytest.raises(RetraceError, match=said):
        data.lookup(options, 0, 2, n_ctx, torch.device("cpu"))


# --- what is compared ----------------------------------------------------------------------


def rows_of(score: list[float], exact: list[float]) -> pd.DataFrame:
    frame = pd.DataFrame({"score": score, "exact_score": exact})
    frame = frame.assign(kind="head", layer=range(len(frame)), head=1, position="")
    return frame.assign(size=frame["score"].abs(), exact_size=frame["exact_score"].abs())


def test_a_right_estimate_and_one_that_misses():
    exact = [5.0, -4.0, 3.0, 2.0, -1.0, *[0.001] * 15]
    found = compared.right(rows_of(exact, exact), "eap", total=10)
    want = {"n": 20, "correlation": 1, "error": 0, "recall": 1, "effort": 5 / 20, "matter": 5,
            "missed": 0, "sign": 1}  # fmt: skip
    # the first has the largest influence, but leaving it out changes nothing: they agree
    want |= {"spearman": 1, "correlation_without_largest": 1}
    assert found.pop("largest").startswith("head ") and found == pytest.approx(want)
    blind = [0.0, 4.0, 3.0, 2.0, -1.0, 0.1, *[0.001] * 14]  # the first is missed, the second turned
    found = compared.right(rows_of(blind, exact), "eap", total=10)
    assert found["missed"] == pytest.approx(1 / 5) and found["sign"] == pytest.approx(3 / 5)
    assert found["error"] == pytest.approx((5 + 8 + 0.099) / 15.015)
    assert found["recall"] == pytest.approx(4 / 5) and found["effort"] == pytest.approx(1)
    sized = compared.right(rows_of(np.abs(exact), exact), "atp_star", total=10)
    assert sized["correlation"] == pytest.approx(1) and np.isnan(sized["sign"])


def test_one_node_that_makes_an_estimate_wrong_is_named():
    exact = [0.1 * i for i in range(20)]
    rows = rows_of([50.0, *exact[1:]], exact).assign(kind="mlp", head=-1)
    found = compared.right(rows, "attribution_patching", total=10)
    assert found["largest"] == "mlp 0" and found["correlation"] < 0
    assert found["correlation_without_largest"] == pytest.approx(1)
    # ranks: the first moves by 19 places, the other 19 by one
    assert found["spearman"] == pytest.approx(1 - 6 * (19**2 + 19) / (20 * (20**2 - 1)))
    edge = {"source_kind": "head", "source_layer": 2, "source_head": 4, "target_kind": "head",
            "target_layer": 3, "target_head": 1, "target_input": "q"}  # fmt: skip
    assert compared.named(pd.Series(edge)) == "head 2.4 → head 3.1 q"
    last = {"target_kind": "logits", "target_layer": -1, "target_head": -1, "target_input": ""}
    assert compared.named(pd.Series(edge | last)) == "head 2.4 → logits"


def test_a_search_ends_when_all_is_found():
    rows = rows_of([1.0, 9.0, 2.0, 3.0, 4.0, 5.0, 0.0], [9.0, 8.0, 7.0, 6.0, 5.0, 0.0, 0.1])
    found = compared.search(rows)
    assert found["checked"].tolist() == [1, 3, 4, 5, 6]
    assert found["found"].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


def test_groups_are_by_kind_depth_and_attention():
    nodes = pd.DataFrame(
        [("head", 0, np.nan), ("q", 1, 0.95), ("k", 2, 0.5), ("mlp", 2, np.nan), ("resid", 2, 0)],
        columns=["kind", "layer", "peak"],
    ).assign(n_layers=3)
    found = {name: rows["layer"].tolist() for name, rows in compared.groups(nodes).items()}
    assert found == {
        "all": [0, 1, 2, 2], "early": [0], "late": [2, 2], "qk": [1, 2], "saturated": [1],
        "even": [2], "head": [0], "mlp": [2], "q": [1], "k": [2], "resid": [2],
    }  # fmt: skip


# --- end to end ----------------------------------------------------------------------------


def saved(model, folder: Path, bos_id: int | None) -> Path:
    """A folder as the stage model leaves it."""
    model.save_pretrained(folder / "checkpoint")
    if bos_id is not None:
        TOKENIZER.save_pretrained(folder / "checkpoint")
    about = {"processing": "raw", "bos_id": bos_id}
    tables.write_json(folder / "model.json", about, {"stage": "test"})
    return folder / "model.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[papers.Paper, dict]:
    """The paper at laptop scale, smaller, and its tables out of tiny models."""
    out, paper = tmp_path_factory.mktemp("estimates"), papers.load(FOLDER, "laptop")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    shape = paper.spec.training["lookup"].architecture.model_dump()
    arms = {}
    for arm in paper.spec.arms:
        if arm.startswith("small_") or arm == "small":
            model = NativeForCausalLM({"d_vocab": 49, **shape})
            for name, p in model.named_parameters():
                if "ln" not in name:
                    torch.nn.init.normal_(p, std=0.2)
            arms[arm] = saved(model.eval(), out / arm, None)
        else:
            arms[arm] = saved(LlamaForCausalLM(llama), out / arm, 0)
    own = json.loads(json.dumps(paper.spec.own["estimates"])) | {"seeds": [10, 20]}
    for task in own["tasks"].values():
        task |= {"n_prompts": 2, "n_edges": min(task.get("n_edges", 0), 30)}
    spec = json.dumps({"own.estimates": own, "arms": paper.spec.arms})
    files = {t: out / f"{t}.parquet" for t in estimates.TABLES}
    given = [x for t, f in files.items() for x in (f"--{t}", str(f))]
    with pytest.MonkeyPatch.context() as patch:
        models_ = [str(arms[a]) for a in sorted(arms)]
        given += ["--device", "cpu", "--threads", "1"]
        patch.setattr(sys, "argv", ["stage", "--spec", spec, "--models", *models_, *given])
        threads = torch.get_num_threads()
        own_stages.stage("estimates", estimates)
        torch.set_num_threads(threads)
    return paper, {f"estimates/{t}": tables.read_table(f) for t, f in files.items()}


@pytest.mark.workflow
def test_every_node_and_edge_has_an_estimate_and_an_effect(made):
    _, frames = made
    nodes, edges = frames["estimates/nodes"], frames["estimates/edges"]
    cases = {("ioi", "smollm2"), ("greater_than", "random"), ("greater_than", "smollm2"),
             ("lookup", "small"), ("lookup", "small_random")}  # fmt: skip
    assert set(zip(nodes["task"], nodes["arm"], strict=True)) == cases
    assert not np.allclose(*(rows["score"] for _, rows in nodes.groupby("seed")))
    every, (nodes, edges) = frames, (f[f["seed"] == 20] for f in (nodes, edges))
    small = nodes[nodes["arm"] == "small"]
    one = small[small["method"] == "atp_star"]
    # 2 layers: 4 heads and an MLP; 5 places in the stream; queries, keys, values of 4 heads
    assert len(one) == 2 * 5 + 2 * 5 + 2 * 12 and (one["score"] >= 0).all()
    assert small.groupby("method").size().to_dict() == dict.fromkeys(
        ("attribution_patching", "attribution_ig", "qk_fix", "atp_star"), len(one)
    )
    numbers = ["score", "size", "exact_score", "exact_size"]
    assert np.isfinite(nodes[numbers]).all().all()
    heads = nodes[nodes["kind"].isin(["q", "k", "v"])]
    assert heads["peak"].between(0, 1).all() and nodes["peak"].isna().any()
    of_small = edges[(edges["arm"] == "small") & (edges["method"] == "eap")]
    assert len(of_small) == of_small["n_edges"].iloc[0] == 12 + 5 + 6 * 12 + 10 + 11
    assert (edges[edges["task"] == "ioi"].groupby(["arm", "method"]).size() == 30).all()
    assert np.isfinite(edges[["score", "exact"]]).all().all()
    costs = every["estimates/costs"]
    assert (costs["seconds"] > 0).all() and len(costs) == 2 * 5 * (5 + 3)
    exact = costs[(costs["method"] == "activation_patching") & (costs["unit"] == "node")]
    assert (exact["forwards"] == exact["n"] + 2).all()


@pytest.mark.workflow
def test_metrics_claims_and_figures(made, every_figure):
    paper, frames = made
    found = compute(frames, known(parts(paper)), FOLDER / "metrics.py")
    assert all(m["definition"] and m["n"] == 2 for m in found.values())
    for claim in paper.spec.claims:
        verdict = judge(claim, found, "laptop")["verdict"]
        if claim.id != "saturated":  # no head of the tiny models is
            assert verdict in summary.JUDGED, claim.id
    every_figure(paper, frames)


@pytest.mark.workflow
def test_a_share_of_no_logit_difference_is_undefined(made):
    _, frames = made
    totals = frames["estimates/totals"]
    for clean, total, kept, gap in ((2.0, -1.0, 0.5, 1.5), (0.0, 0.0, np.nan, np.nan)):
        changed = totals.assign(clean=clean, total=total, corrupt=clean + total)
        changed = changed.assign(into_logits_eap=0.5, into_logits_eap_ig=0.5)
        found = metrics.metrics(frames | {"estimates/totals": changed})
        every = {m: v for m, v in found.items() if m.endswith((".kept", ".completeness_gap"))}
        assert bool(every) == np.isfinite(kept)  # what no seed has is left out
        for name, values in every.items():
            assert values == [kept if name.endswith("kept") else gap] * 2, name


def test_an_arm_or_a_function_that_is_not_there_is_told():
    what = estimates.TaskOptions(arms=["small"], prompts="lokup", n_prompts=1)
    with pytest.raises(RetraceError, match=r"prompts\.py has no function 'lokup'"):
        estimates.given("lookup", what, None, 0, "cpu")
