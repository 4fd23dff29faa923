"""Indirect object identification: prompts, rules, a planted head, both models end to end."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.circuits import circuits, head_circuits, judged
from pipeline.circuits.knockout import Knockout
from pipeline.claims.judge import judge
from pipeline.claims.scalars import compute, known, parts
from pipeline.errors import RetraceError
from pipeline.job import own as own_stages
from pipeline.job.source import import_file
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import Pairs, Task
from pipeline.papers import papers
from pipeline.spec.paper import parse
from pipeline.spec.training import Architecture
from pipeline.store import tables
from pipeline.text import prompts_ioi as prompts

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/ioi"
SEEDS = [10, 20]  # of the tables; the smoke run has the first
measures, discovery, small, circuit, metrics = (
    import_file(FOLDER / f"{name}.py")
    for name in ("measures", "discovery", "judged", "circuit", "metrics")
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word and mark of the prompts is one token; BOS is token 0."""
    text = " ".join([*prompts.TEMPLATES, *(t for t, *_ in prompts.DEMO)])
    for slot in ("{0}", "{1}", "{S}", "{place}", "{object}"):
        text = text.replace(slot, " ")
    words = text.replace(",", " , ").replace(".", " . ").split()
    words += [*prompts.NAMES, *prompts.PLACES, *prompts.OBJECTS, "Tom", "Dan", "Sid", "Martin"]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<|endoftext|>", *words]))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>")


TOKENIZER = word_tokenizer()

# --- prompts -------------------------------------------------------------------------------


def test_prompts_name_what_they_say():
    made = prompts.draw(TOKENIZER, 60, 0)
    assert sorted(set(made.template)) == list(range(15))
    places = made.positions
    for i, (clean, corrupt) in enumerate(zip(made.clean, made.corrupt, strict=True)):
        at = {name: clean[p[i]] for name, p in places.items()}
        assert at["IO"] == made.answer[i] != made.foil[i] == at["S1"] == at["S2"]
        assert places["S1"][i] + 1 == places["S1_next"][i] <= places["S2"][i]
        assert (places["IO"][i] < places["S1"][i]) == (made.variant[i] == "ABBA")
        assert clean.count(made.answer[i]) == 1 and clean.count(made.foil[i]) == 2
        assert places["END"][i] == len(clean) - 1 == len(corrupt) - 1
        differ = [p for p, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        assert differ == sorted(places[n][i] for n in ("IO", "S1", "S2"))
        assert len({corrupt[p] for p in differ} | {made.answer[i], made.foil[i]}) == 5
        assert not made.text[i].endswith(" ") and made.text[i].endswith(" to")
    assert (
        made.clean == prompts.draw(TOKENIZER, 60, 0).clean != prompts.draw(TOKENIZER, 60, 1).clean
    )


def test_prompts_of_a_template_have_one_length():
    made = prompts.draw(TOKENIZER, 120, 3)
    lengths = {}
    for template, ids in zip(made.template, made.clean, strict=True):
        lengths.setdefault(template, set()).add(len(ids))
    assert all(len(found) == 1 for found in lengths.values()) and len(lengths) == 15


def test_the_demo_flips_its_answer():
    made = prompts.demo(TOKENIZER)
    assert len(made.text) == 8 and made.text[1] == (
        "When John and Mary went to the shops, Mary gave the bag to"
    )
    for i in range(0, 8, 2):  # the flipped prompt is the pair's other prompt
        assert made.corrupt[i] == made.clean[i + 1] and made.corrupt[i + 1] == made.clean[i]
        assert made.answer[i] == made.foil[i + 1]
    assert prompts.trailing(TOKENIZER, made)[0] == made.clean[0]  # this tokenizer drops the space


def test_a_vocabulary_without_names_is_told():
    class Bytes:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(text.encode())}

    with pytest.raises(RetraceError, match="0 names"):
        prompts.draw(Bytes(), 2, 0)
    assert prompts.demo(Bytes()) is None
    with pytest.raises(RetraceError, match="did you mean 'variants'"):
        prompts.ioi({"variant": ["ABBA"]}, TOKENIZER, 2, 0)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [([10, 13], "seeds 10 and 13 share prompts"), ([10, 20, 10], "seed 10 stands twice")],
)
def test_seeds_that_share_prompts_are_told(seeds, said):
    own = papers.load(FOLDER, "smoke").spec.own["circuit"]
    with pytest.raises(RetraceError, match=said):
        parse(circuit.Options, own | {"seeds": seeds}, "paper.yaml")


# --- rules ---------------------------------------------------------------------------------


def test_heads_count_by_size_and_by_error():
    effects = torch.tensor([[-1.0, -1.2], [-3.0, 2.9], [-2.0, -2.1], [0.5, 0.5], [-0.1, -0.1]])
    assert discovery.clear(effects, 0.2, -1, 9) == [2, 0]  # 1 is noise, 4 too small
    assert discovery.clear(effects, 0.2, -1, 1) == [2]
    assert discovery.clear(effects, 0.2, 1, 9) == [3]


def test_the_papers_circuit_has_26_heads_at_their_places():
    parts = discovery.placed(discovery.PUBLISHED)
    whole = frozenset().union(*parts.values())
    assert len(whole) == 26 and (9, 9, "END") in whole and (5, 5, "S2") in whole
    few = small.naive(parts, discovery.PUBLISHED)
    assert len(few) == 3 + 4 + 2 + 2 + 2 and not few & (parts["backup"] | parts["negative"])
    drawn = judged.random_circuit(whole, 12, np.random.default_rng(0))
    assert len(drawn) == 26 and not drawn & whole
    assert sorted((i, p) for i, _, p in drawn) == sorted((i, p) for i, _, p in whole)


class Additive(Knockout):
    """F is the sum of weights of the heads that are kept; two heads back each other up."""

    class heads:
        n_heads = 2

    def __init__(self, weights: dict):
        self.weights = weights

    def whole(self):
        return frozenset(self.weights)

    def metric(self, circuits, told=lambda _: None):
        f = []
        for kept, gone in circuits:
            left = kept - gone
            backed = 2.0 if left & {(0, 0, ""), (0, 1, "")} else 0.0
            f.append(backed + sum(self.weights[n] for n in left))
        return torch.tensor(f)[:, None]


def test_the_search_finds_what_the_circuit_lacks():
    weights = {(0, 0, ""): 0.0, (0, 1, ""): 0.0, (1, 0, ""): 1.0, (1, 1, ""): 0.5}
    knockout = Additive(weights)
    part = frozenset({(0, 0, ""), (1, 0, "")})  # without the backup 0.1
    found = judged.greedy(part, knockout, 2, 9, np.random.default_rng(0))
    (first, m, c), _ = found
    assert first == {(0, 0, "")} and m - c == pytest.approx(2.5)
    roles = {"name_mover": [(0, 0)], "negative": [(1, 0)]}
    parts = {r: frozenset((*h, "") for h in heads) for r, heads in roles.items()}
    others = {"naive": small.naive(parts, roles)}
    cases = judged.cases(parts, others, knockout, 1, np.random.default_rng(0))
    f = dict(
        zip(((c.circuit, c.removed) for c in cases), judged.measure(cases, knockout), strict=True)
    )
    assert (
        f["model", "nothing"] == 3.5
        and f["circuit", "nothing"] == 3
        and f["no head", "nothing"] == 0
    )
    assert f["model", "name_mover"] == 3.5 and f["circuit", "name_mover"] == 1


def test_a_head_is_worth_what_it_is_worth_without_the_heads_that_back_it_up():
    """Name movers 0.0 and 0.1 do the same work: 2 logits while one of them is there. 1.0, negative,
    writes 1 logit, and 1.1, a backup of both, nothing."""
    weights = {(0, 0, ""): 0.0, (0, 1, ""): 0.25, (1, 0, ""): 1.0, (1, 1, ""): 0.5}
    knockout = Additive(weights)
    roles = {"name_mover": [(0, 0), (0, 1)], "negative": [(1, 0)], "backup": [(1, 1)]}
    found = small.minimality(roles, dict.fromkeys(roles, ""))
    worth = {}
    for one in found:
        a, b = judged.measure([one.kept, one.lost], knockout)
        worth[one.node, one.kept.removed] = a - b
    assert worth == {
        ((0, 0, ""), "stronger"): 0.0,  # K is empty: 0.1 takes over
        ((0, 0, ""), "class"): 2.0,
        ((0, 1, ""), "stronger"): 2.25,
        ((0, 1, ""), "class"): 2.25,
        ((1, 0, ""), "rest"): 1.0,
        ((1, 0, ""), "class"): 1.0,
        ((1, 1, ""), "movers"): 0.5,
        ((1, 1, ""), "class"): 0.5,
    }
    (backup,) = (w for w in found if (w.role, w.kept.removed) == ("backup", "movers"))
    assert backup.kept.gone == {(0, 0, ""), (0, 1, "")}


def test_the_rule_of_the_sets_is_that_of_the_papers():
    """Every K of the paper's is a set of `companions`, where heads come in the paper's order."""
    backups = [*discovery._BACKUPS, (9, 0), (11, 9)]
    roles = discovery.PUBLISHED | {"name_mover": discovery._MOVERS, "backup": backups}
    assert {k: sorted(v) for k, v in roles.items()} == {
        k: sorted(v) for k, v in discovery.PUBLISHED.items()
    }
    given = small.minimality(discovery.PUBLISHED, discovery.PLACE, discovery.PUBLISHED_K)
    by_rule: dict[tuple, list] = {}
    for one in small.minimality(roles, discovery.PLACE):
        if one.kept.removed != "class":
            by_rule.setdefault(one.node, []).append(one.kept.gone)
    published = {w.node: w.kept.gone for w in given if w.kept.removed == "published"}
    assert len(published) == 26 and published[9, 9, "END"] == frozenset()
    assert published[5, 8, "S2"] == {(10, 7, "END"), (11, 10, "END")}
    pair = {(9, 0, "END"), (11, 9, "END")}  # the paper has them back up each other
    for node, gone in published.items():
        assert gone in by_rule[node] or node in pair
    for one in given:
        assert one.lost.gone == one.kept.gone | {one.node} and one.node not in one.kept.gone


# --- a planted head ------------------------------------------------------------------------


def planted(sign: float) -> NativeForCausalLM:
    """One layer without norm: head 0 copies what it sees (or its opposite), head 1 does nothing."""
    n = len(TOKENIZER)
    shape = {"n_layers": 1, "d_model": 2 * n, "n_heads": 2, "d_mlp": 1, "n_ctx": 32}
    shape |= {"normalization": "none", "positional": "standard", "bias": "none"}
    hf = NativeForCausalLM({"d_vocab": n, **Architecture(**shape).model_dump()}).eval()
    for p in hf.requires_grad_(False).parameters():
        p.zero_()
    hf.model.tok_embed.weight[:, :n] = torch.eye(n)
    hf.model.head.weight[:, n:] = torch.eye(n)
    attn = hf.model.layers[0].attn
    attn.v.weight[:n, :n] = torch.eye(n)
    attn.o.weight[n:, :n] = sign * torch.eye(n)
    return hf


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_copying_head(sign):
    drawn = prompts.draw(TOKENIZER, 6, 0)
    with torch.no_grad():
        task = Task.of(planted(sign), Pairs.of(drawn.data(), 0, "cpu"))
        copies, suppresses = head_circuits.copy_scores(task, 4).values()
        patterns = task.heads.patterns(task.pairs.base)
        looks = head_circuits.attention_between(task, patterns, measures.LOOKS)
        rows = measures.scatter(task, patterns, [(0, 0)])
    assert (copies if sign > 0 else suppresses)[0, 0] == 1
    assert (suppresses if sign > 0 else copies)[0, 0] == 0
    lengths = torch.tensor([len(ids) + 1 for ids in drawn.clean])
    assert looks["end_to_io"][0, 0] == pytest.approx((1 / lengths).mean().item())
    for row in rows:  # S stands twice, and the head writes what it attends to
        share = (1 if row["name"] == "IO" else 2) / lengths[row["prompt"]].item()
        assert row["attention"] == pytest.approx(share)
        assert row["logit"] == pytest.approx(sign * share)


# --- the whole -----------------------------------------------------------------------------


def saved(hf, folder: Path) -> Path:
    """A model in the store's layout; its model.json."""
    hf.save_pretrained(folder / "checkpoint")
    TOKENIZER.save_pretrained(folder / "checkpoint")
    about = {"processing": "raw", "bos_id": 0}
    tables.write_json(folder / "model.json", about, {"stage": "test"})
    return folder / "model.json"


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> dict[str, Path]:
    """A random GPT-2 of 12 layers of 12 heads in a folder, and a small Llama twice."""
    root = tmp_path_factory.mktemp("arms")
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=64, n_embd=48, n_layer=12, n_head=12,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return {
        "gpt2": saved(GPT2LMHeadModel(gpt2), root / "gpt2"),
        "random": saved(LlamaForCausalLM(llama), root / "random"),
        "smollm2": saved(LlamaForCausalLM(llama), root / "smollm2"),
    }


def call(monkeypatch, main, *options: object) -> None:
    monkeypatch.setattr(
        sys, "argv", ["stage", *map(str, options), "--device", "cpu", "--threads", "1"]
    )
    threads = torch.get_num_threads()
    main()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(arms, tmp_path_factory) -> tuple[papers.Paper, dict]:
    """The paper at smoke scale with the hub's arm; its tables out of the tiny models, two seeds."""
    out, paper = tmp_path_factory.mktemp("ioi"), papers.load(FOLDER, "smoke", hub=True)
    with pytest.MonkeyPatch.context() as patch:
        own = paper.spec.own["circuit"] | {"threshold": 1e-6, "most": 2, "seeds": SEEDS}
        spec = json.dumps({"own.circuit": own, "arms": paper.spec.arms})
        given = [f for t in circuit.TABLES for f in (f"--{t}", out / f"{t}.parquet")]
        call(
            patch,
            functools.partial(own_stages.stage, "circuit", circuit),
            "--spec",
            spec,
            "--models",
            *arms.values(),
            *given,
            "--threads",
            1,
        )
        for arm in paper.spec.circuit_arms():
            spec = json.dumps(
                {"circuits": paper.spec.circuits.model_dump(mode="json") | {"seeds": SEEDS}}
            )
            parts = ("nodes", "edges", "methods")
            given = [f for p in parts for f in (f"--{p}", out / f"{arm}_{p}.parquet")]
            call(
                patch, circuits.main, "--spec", spec, "--model", arms[arm], "--prompts",
                FOLDER / "prompts.py", *given, "--threads", 1,
            )  # fmt: skip
    files = {t: out / f"{t.split('/')[1]}.parquet" for t in paper.tables()}
    return paper, {t: tables.read_table(f) for t, f in files.items()}


@pytest.mark.workflow
def test_both_arms_go_through_every_step(made):
    _, frames = made
    assert set(frames["circuit/behaviour"]["arm"]) == {"gpt2", "random", "smollm2"}
    heads = frames["circuit/heads"].groupby("arm").size()
    assert heads.to_dict() == {"gpt2": 2 * 144, "smollm2": 2 * 12}
    cases = frames["circuit/cases"]
    assert set(zip(cases["arm"], cases["source"], strict=True)) == {
        ("gpt2", "found"), ("gpt2", "published"), ("smollm2", "found"),
    }  # fmt: skip
    published = cases[cases["source"] == "published"].set_index(["circuit", "removed"])
    assert (published.loc[("circuit", "nothing"), "n_heads"] == 26).all()
    minimality = frames["circuit/minimality"]
    counted = minimality[minimality["set"] == "published"].groupby(["seed", "source"]).size()
    assert counted.to_dict() == dict.fromkeys(((s, "published") for s in SEEDS), 26)
    for arm in ("gpt2", "smollm2"):
        methods = frames[f"circuits/{arm}_methods"].set_index("method")
        assert methods.loc["direct_logit", "seed"].tolist() == SEEDS
        assert (methods.loc["direct_logit", "completeness_gap"].abs() < 1e-3).all()
        for kind in ("correlation", "spearman", "correlation_without_largest"):
            assert methods.loc["activation_patching", kind].tolist() == pytest.approx([1] * 2)
        assert methods.loc["attribution_patching", "largest"].str.match(r"(head|mlp) \d").all()


def test_random_circuits_are_one_bar_from_the_least_to_the_most():
    rows = pd.DataFrame({
        "removed": "nothing", "n_heads": 3, "f": [4.0, 2.0, -1.0, -3.0],
        "circuit": ["model", "circuit", "random 0", "random 1"],
    })  # fmt: skip
    bar = import_file(FOLDER / "figures.py").by_circuit(rows)
    assert list(bar.x) == ["model", "circuit", "random"] and list(bar.y) == [4, 2, -2]
    assert list(bar.error_y.array) == [0, 0, 1] and list(bar.error_y.arrayminus) == [0, 0, 1]


@pytest.mark.workflow
def test_metrics_claims_and_figures(made, every_figure):
    paper, frames = made
    found = compute(frames, known(parts(paper)), FOLDER / "metrics.py")
    wanted = ("demo.logit_diff", "published.searched", "look.s2")
    assert {f"gpt2.{m}" for m in wanted} <= found.keys()
    assert all(v["n"] == 2 for v in found.values())
    values = found["circuits.smollm2.attribution_patching.correlation"]["values"]
    assert len(set(values)) == 2  # other prompts
    flipped, demo = (found[f"gpt2.{m}.logit_diff"]["mean"] for m in ("flipped", "demo"))
    assert flipped == pytest.approx(-demo, abs=1e-4)
    verdicts = {c.id: judge(c, found, "laptop")["verdict"] for c in paper.spec.claims}
    assert verdicts["gpt2_logit_diff"] in ("not reproduced", "undecided")  # random weights
    assert verdicts["gpt2_incomplete"] == "not comparable"
    here = {k: v for k, v in found.items() if not k.startswith(("gpt2.", "circuits.gpt2"))}
    for claim in papers.load(FOLDER, "laptop").spec.claims:
        row = judge(claim, here, "laptop")
        if claim.id.startswith("gpt2") and claim.comparable:
            assert row["verdict"] == "not run" and "hub=true" in row["reason"]
    every_figure(paper, frames)


def test_the_hubs_arm_is_there_when_asked_for():
    for hub, names in ((False, ["smollm2", "random"]), (True, ["smollm2", "random", "gpt2"])):
        config = {"papers": ["ioi"], "papers_dirs": [str(FOLDER.parent)], "hub": hub}
        run = papers.Run.load(config, [ROOT])
        assert run.paper("ioi", "laptop").spec.arm_names() == names
    raw = papers.load_yaml(FOLDER / "paper.yaml")
    raw["circuits"] = raw["circuits"] | {"without": ["random", "gpt2"]}
    assert papers.load(FOLDER, "laptop", raw).spec.circuit_arms() == ["smollm2"]
    model = run.store("ioi", "laptop", "gpt2")["model"].spec["model"]
    assert model["repo"] == "openai-community/gpt2" and len(model["revision"]) == 40
