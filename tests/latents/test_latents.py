"""Latents as nodes: against plain forward passes, closed forms, and finite differences."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.circuits.eap import midpoints
from pipeline.circuits.methods import measure
from pipeline.errors import RetraceError
from pipeline.latents import sites as latents
from pipeline.latents.sites import Effects, Sites
from pipeline.latents.subsets import Ablation, edges
from pipeline.latents.units import ALL, ERROR, Latent, Latents, Neurons, RandomDirections
from pipeline.models import hooks
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import Pairs, Task
from pipeline.spec.measured import CircuitsSpec
from pipeline.spec.paper import parse
from pipeline.spec.training import Architecture

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
D, D_MLP, N_POS = 16, 24, 6
PAIRS = {  # the third token differs (BOS is put before), and in the second pair the fifth
    "clean": [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]],
    "corrupt": [[3, 1, 7, 1, 5], [9, 2, 7, 5, 8]],
    "answer": [1, 2],
    "foil": [3, 4],
    "positions": {"noun": [2, 2]},
}
HOOKS = [
    "blocks.0.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_mid",
]
NEURONS = "blocks.1.mlp.hook_post"


class TopK:
    """A random dictionary with W_dec, encode and decode, as SAELens's."""

    def __init__(self, seed: int, d: int = D, d_sae: int = 20, k: int = 5) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=draw), dim=-1)
        self.W_enc = self.W_dec.T + 0.1 * torch.randn(d, d_sae, generator=draw)
        self.b_dec, self.k = torch.randn(d, generator=draw), k
        self.cfg = SimpleNamespace(k=k)

    def encode(self, x):
        scores = torch.relu((x - self.b_dec) @ self.W_enc)
        top = scores.topk(self.k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, top.indices, top.values)

    def decode(self, f):
        return f @ self.W_dec + self.b_dec


def tiny(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        hf = LlamaForCausalLM(
            LlamaConfig(vocab_size=40, hidden_size=D, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, intermediate_size=D_MLP, initializer_range=0.3)
        )  # fmt: skip
    elif kind == "gpt2":
        shape = {"vocab_size": 40, "n_positions": 32, "n_embd": D, "n_layer": 4, "n_head": 4}
        hf = GPT2LMHeadModel(GPT2Config(**shape, n_inner=D_MLP, initializer_range=0.3))
    else:
        shape = {"n_layers": 4, "d_model": D, "n_heads": 4, "d_mlp": D_MLP, "n_ctx": 16}
        hf = NativeForCausalLM({"d_vocab": 40, **Architecture(**shape).model_dump()})
        for p in hf.parameters():
            torch.nn.init.normal_(p, std=0.4)
    return hf.eval().requires_grad_(False)


def units_of(names: list[str]) -> dict[str, latents.Units]:
    return {h: Latents(TopK(i)) for i, h in enumerate(names)}


@pytest.fixture(params=["llama", "gpt2", "native"])
def sites(request):
    with torch.no_grad():
        task = Task.of(tiny(request.param), Pairs.of(PAIRS, 0, "cpu"))
        yield Sites(task, [*HOOKS, NEURONS])


def plain(task: Task, edits: dict) -> torch.Tensor:
    """m of a whole forward pass on the base prompts, x at each hook replaced by edit(x)."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        for hook, edit in edits.items():
            stack.enter_context(hooks.edited(task.hf, hook, edit))
        logits = task.hf(task.pairs.base).logits[:, -1]
    rows = torch.arange(len(logits))
    return logits[rows, task.pairs.answer] - logits[rows, task.pairs.foil]


def patched(sites: Sites, units, node: Latent, share: float = 1.0) -> torch.Tensor:
    """m with one node moved by a share of the way to the source run: all latents, plainly."""
    x, source = sites.base[node.hook], sites.source[node.hook]
    (f, e), (f2, e2) = units.split(x), units.split(source)
    at = slice(None) if node.position == ALL else node.position
    f, e = f.clone(), e.clone()
    if node.number == ERROR:
        e[:, at] += share * (e2 - e)[:, at]
    else:
        f[:, at, node.number] += share * (f2 - f)[:, at, node.number]
    return plain(sites.task, {node.hook: lambda _: units.join(f, e)})


def moving(sites: Sites, units, hook: str) -> list[Latent]:
    """Nodes of a hook that differ between the runs: of each position one, the error, and ALL."""
    (f, _), (f2, _) = units.split(sites.base[hook]), units.split(sites.source[hook])
    change = (f2 - f).abs().sum(0)  # [pos units]
    out = [Latent(hook, int(c.argmax()), p) for p, c in enumerate(change) if c.max() > 0]
    return [*out, Latent(hook, ERROR, 3), Latent(hook, int(change.sum(0).argmax()), ALL)]


@pytest.mark.parametrize("hook", [*HOOKS, NEURONS])
def test_exact_effects_are_those_of_whole_forward_passes(sites, hook):
    units = Neurons(D_MLP) if hook == NEURONS else Latents(TopK(0))
    nodes = moving(sites, units, hook)
    assert len(nodes) > 3
    found = latents.exact(sites, {hook: units}, nodes)
    for node, effect in zip(nodes, found, strict=True):
        want = patched(sites, units, node) - plain(sites.task, {})
        torch.testing.assert_close(effect, want, **CLOSE)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("hook", [*HOOKS, NEURONS])
def test_attribution_is_the_slope_of_the_exact_effect(sites, hook):
    units = Neurons(D_MLP) if hook == NEURONS else Latents(TopK(0))
    nodes, step = moving(sites, units, hook), 1e-2
    found = {hook: latents.effects(sites, hook, units, [0.0])}
    for node, effect in zip(nodes, latents.scores(found, nodes), strict=True):
        ends = [patched(sites, units, node, s) for s in (step, -step)]
        torch.testing.assert_close(effect, (ends[0] - ends[1]) / (2 * step), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("hook", [*HOOKS, NEURONS])
def test_integrated_gradients_sum_to_the_effect_of_the_whole_site(sites, hook):
    units = Neurons(D_MLP) if hook == NEURONS else Latents(TopK(0))
    whole = plain(sites.task, {hook: lambda _: sites.source[hook]}) - plain(sites.task, {})
    torch.testing.assert_close(sites.whole(hook), whole, **CLOSE)
    gaps = []
    for steps in (1, 64):
        latent, error = latents.effects(sites, hook, units, midpoints(steps))
        gaps.append((latent.sum((1, 2)) + error.sum(1) - whole).abs().max().item())
    assert gaps[1] < 2e-3 + 0.1 * gaps[0]


def test_neurons_and_the_latents_of_an_mlp_share_a_gradient(sites):
    out = "blocks.1.hook_mlp_out"
    both = Sites(sites.task, [out, NEURONS])
    whole = [
        latents.effects(both, h, u, midpoints(4)).latents.sum((1, 2))
        for h, u in ((out, Neurons(D)), (NEURONS, Neurons(D_MLP)))
    ]
    torch.testing.assert_close(*whole, **CLOSE)
    assert len(both._gradients) == 1


def test_tokens_that_a_dictionary_does_not_know_are_all_error(sites):
    x = sites.base[HOOKS[2]]
    f, e = Latents(TopK(0), skip_first=1, max_norm=float(x.norm(dim=-1).median())).split(x)
    known = x.norm(dim=-1) <= x.norm(dim=-1).median()
    known[:, 0] = False
    assert (f.sum(-1) > 0).equal(known) and f[~known].abs().sum() == 0
    torch.testing.assert_close(f @ TopK(0).W_dec + TopK(0).b_dec + e, x, **CLOSE)


# --- circuits ------------------------------------------------------------------------------


def nodes_of(units: dict, n: int, seed: int = 0) -> frozenset[Latent]:
    draw = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (), generator=draw))  # noqa: E731
    names = list(units)
    return frozenset(
        Latent(hook := names[pick(len(names))], pick(units[hook].n + 1) - 1, pick(N_POS))
        for _ in range(n)
    )


@pytest.mark.parametrize("complement", [False, True])
def test_a_circuit_is_a_forward_pass_with_means_in_the_place_of_other_nodes(sites, complement):
    units = units_of(HOOKS)
    circuit = nodes_of(units, 60)
    means = {
        h: [p.mean(0) for p in u.split(torch.cat([sites.base[h], sites.source[h]]))]
        for h, u in units.items()
    }

    def edit(hook: str):
        def ablate(x: torch.Tensor) -> torch.Tensor:
            f, e = units[hook].split(x)
            for p in range(N_POS):
                for i in range(units[hook].n):
                    if (Latent(hook, i, p) in circuit) == complement:
                        f[:, p, i] = means[hook][0][p, i]
                if (Latent(hook, ERROR, p) in circuit) == complement:
                    e[:, p] = means[hook][1][p]
            return units[hook].join(f, e)

        return ablate

    want = plain(sites.task, {h: edit(h) for h in HOOKS})
    (found,) = Ablation(sites, units).metric([circuit], complement)
    torch.testing.assert_close(found, want, **CLOSE)
    assert (found - sites.task.before).abs().max() > 1e-2


def test_with_all_nodes_a_circuit_is_the_model_and_with_none_it_is_the_same_for_all_units(sites):
    task = sites.task
    kinds = [
        units_of(HOOKS),
        {h: Latents(RandomDirections(TopK(0), 3)) for h in HOOKS},
        {h if h != HOOKS[1] else NEURONS: Neurons(D_MLP if h == HOOKS[1] else D) for h in HOOKS},
    ]
    empty = []
    for units in kinds:
        ablation = Ablation(sites, units)
        every = frozenset(
            Latent(h, i, p) for h, u in units.items() for i in range(-1, u.n) for p in range(N_POS)
        )
        none, whole = ablation.metric([frozenset(), every])
        torch.testing.assert_close(whole, task.before, **CLOSE)
        torch.testing.assert_close(ablation.metric([every], complement=True)[0], none, **CLOSE)
        empty.append(none)
    for other in empty[1:]:
        torch.testing.assert_close(other, empty[0], **CLOSE)
    assert (empty[0] - task.before).abs().max() > 1e-2


def test_edges_are_slopes_of_one_node_through_another(sites):
    """u moves a little, all sites below v but u's stay as they were; how far does v move m?"""
    units, step, alphas = units_of(HOOKS), 1e-2, [0.0]
    nodes = [n for h in HOOKS for n in moving(sites, units[h], h)[:-1]]
    found, weights = edges(sites, units, nodes, alphas)
    of = dict(zip(found, weights.tolist(), strict=True))
    order = {h: i for i, h in enumerate(HOOKS)}
    assert {e.source.hook for e in found if e.target is None} == {HOOKS[2], HOOKS[3]}
    assert all(order[e.source.hook] < order[e.target.hook] for e in found if e.target)

    def reached(u: Latent, target: str | None, share: float) -> torch.Tensor:
        """x as it comes to a hook (or m), u moved and all other sites on the way held."""
        (f, e), (f2, e2) = (units[u.hook].split(x[u.hook]) for x in (sites.base, sites.source))
        f, e = f.clone(), e.clone()
        if u.number == ERROR:
            e[:, u.position] += share * (e2 - e)[:, u.position]
        else:
            f[:, u.position, u.number] += share * (f2 - f)[:, u.position, u.number]
        seen: dict[str, torch.Tensor] = {}

        def hold(hook: str):
            def edit(x):
                seen[hook] = x
                return units[u.hook].join(f, e) if hook == u.hook else sites.base[hook]

            return edit

        m = plain(sites.task, {h: hold(h) for h in HOOKS})
        return m if target is None else seen[target]

    big = sorted(found, key=lambda e: -abs(of[e]))[:12] + found[:4]
    for edge in big:
        hook = edge.target.hook if edge.target else None
        ends = [reached(edge.source, hook, s) for s in (step, -step)]
        if edge.target is None:
            want = (ends[0] - ends[1]).mean() / (2 * step)
        else:
            v = edge.target
            gradient = sites.gradient(v.hook, alphas)[:, v.position]
            parts = [units[v.hook].split(x) for x in ends]
            if v.number == ERROR:
                moved = ((parts[0][1] - parts[1][1])[:, v.position] * gradient).sum(-1)
            else:
                slope = gradient @ units[v.hook].sae.W_dec[v.number]
                moved = (parts[0][0] - parts[1][0])[:, v.position, v.number] * slope
            want = moved.mean() / (2 * step)
        assert of[edge] == pytest.approx(float(want), abs=2e-3, rel=3e-2), edge


# --- choosing and loading ------------------------------------------------------------------


def test_the_strongest_nodes_and_their_scores():
    one = Effects(torch.tensor([[[1.0, -4.0], [0.0, 2.0]]]), torch.tensor([[0.5, 0.0]]))
    two = Effects(torch.tensor([[[3.0, 0.0], [-3.5, 0.0]]]), torch.tensor([[0.0, 0.0]]))
    found = {"blocks.0.hook_mlp_out": one, "blocks.1.hook_mlp_out": two}
    a, b = found
    assert latents.strongest(found, 3, by_position=True) == [
        Latent(a, 1, 0), Latent(b, 0, 1), Latent(b, 0, 0),
    ]  # fmt: skip
    assert len(latents.strongest(found, 99, by_position=True)) == 6  # none without an effect
    summed = latents.strongest(found, 99, by_position=False)
    assert summed[0] == Latent(a, 1, ALL) and Latent(a, ERROR, ALL) in summed
    scores = latents.scores(found, [Latent(a, 1, ALL), Latent(a, ERROR, 0), Latent(b, 0, 1)])
    assert scores[:, 0].tolist() == [-2.0, 0.5, -3.5]
    assert [n.kind for n in (Latent(a, 1), Latent(a, ERROR), Latent(NEURONS, 2))] == [
        "mlp_out", "mlp_out_error", "neuron",
    ]  # fmt: skip


def test_faults_are_told():
    task = Task.of(tiny(), Pairs.of(PAIRS, 0, "cpu"))
    with pytest.raises(RetraceError, match="hook_resid_pre' cannot be a site"):
        Sites(task, ["blocks.1.hook_resid_pre"])
    with pytest.raises(RetraceError, match="has 4 layers"):
        Sites(task, ["blocks.9.hook_mlp_out"])
    uneven = {k: [*v, [3, 1, 4] if k == "clean" else [3, 1, 7]]
              for k, v in PAIRS.items() if k in ("clean", "corrupt")}  # fmt: skip
    uneven |= {"answer": [1, 2, 3], "foil": [3, 4, 5], "positions": {}}
    with torch.no_grad():
        sites = Sites(Task.of(tiny(), Pairs.of(uneven, 0, "cpu")), HOOKS[:1])
        with pytest.raises(RetraceError, match="4 to 6 tokens long"):
            Ablation(sites, units_of(HOOKS[:1]))


def test_dictionaries_are_loaded_by_name(tmp_path, monkeypatch):
    hook = HOOKS[2]
    for job, about in (
        ("a", {"hook": hook, "saes": {"one": {}, "other": {}}}),
        ("b", {"hook": HOOKS[1], "output_hook": hook, "saes": {"coder": {}}}),
    ):
        (tmp_path / job).write_text(json.dumps(about))
    norms = {hook: {"max_norm": 9}, HOOKS[1]: {"max_norm": 7}}
    (tmp_path / "acts").write_text(json.dumps({"skip_first": 1, "hooks": norms}))
    monkeypatch.setattr(latents, "load_saes", lambda m, d, names: {n: TopK(0) for n in names})
    manifests = [str(tmp_path / "a"), str(tmp_path / "b")]
    cpu = torch.device("cpu")
    load = lambda *names: latents.load(manifests, list(names), tmp_path / "acts", cpu)  # noqa: E731
    found = load("one")
    assert list(found) == [hook] and (found[hook].skip_first, found[hook].max_norm) == (1, 9)
    with pytest.raises(RetraceError, match="no dictionary 'ones'"):
        load("ones")
    coder = load("coder")[hook]
    assert (coder.reads, coder.skip_first, coder.max_norm) == (HOOKS[1], 1, 7)
    with pytest.raises(RetraceError, match="two dictionaries at"):
        load("one", "other")


# --- the stage circuits --------------------------------------------------------------------


def test_the_stage_scores_latents_beside_exact_patching():
    section = {
        "prompts": "p", "methods": ["latent_attribution", "latent_ig"], "saes": ["x"],
        "ig_steps": 32, "n_exact": 6,
    }  # fmt: skip
    spec = CircuitsSpec.model_validate(section)
    units = units_of(HOOKS[1:3])
    with torch.no_grad():
        task = Task.of(tiny(), Pairs.of(PAIRS, 0, "cpu"))
        frames = measure(task, spec, 0, units)
        sites = Sites(task, list(units))
        top = latents.strongest(
            {h: latents.effects(sites, h, u, [0.0]) for h, u in units.items()}, 1, False
        )[0]
        exact = float(latents.exact(sites, units, [top]).mean())
    methods = frames["methods"].set_index("method")
    assert list(methods.index) == spec.methods
    total = sum(float(sites.whole(h).mean()) for h in units)
    assert methods["total"].tolist() == pytest.approx([total] * 2)
    assert abs(methods.loc["latent_ig", "completeness_gap"]) < 0.02
    assert (methods["n_compared"] >= 6).all() and (methods["n"] == 2 * 21).all()
    rows = frames["nodes"].set_index(["method", "kind", "layer", "head"])
    found = rows.loc[("latent_patching", top.kind, top.layer, top.number), "score"]
    assert float(found) == pytest.approx(exact, abs=1e-5)
    assert frames["edges"].empty


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"methods": ["latent_ig"]}, "latent_ig needs saes"),
        ({"methods": ["eap"], "saes": ["x"]}, "saes serve latent_attribution and latent_ig only"),
    ],
)
def test_latents_need_dictionaries_and_dictionaries_serve_them(over, said):
    with pytest.raises(RetraceError, match=said):
        parse(CircuitsSpec, {"prompts": "p", **over}, "paper.yaml")
