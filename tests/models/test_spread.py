"""Models whose layers lie on several devices: the same numbers, and no tensor where it is not.

There is one device here, so that devices are names: a mode of torch notes for each tensor where it
would lie, and refuses a function of tensors that lie apart, as torch does with two GPUs.
"""

import weakref

import families_check as check
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from pipeline.circuits import acdc, atp_star, direct_logit, eap, head_inputs
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.patching import activation_patching, path_patching
from pipeline.errors import RetraceError
from pipeline.models import hooks, loader, modules, places, proof, splice
from pipeline.models.pairs import Node, Pairs, Task

KINDS = ["gemma2", "llama", "gpt2", "gpt_neox", "opt", "mixtral", "bloom", "phi3"]
PROMPTS = {
    "clean": [[3, 11, 4, 11, 5], [9, 21, 6, 5, 30]],
    "corrupt": [[3, 11, 7, 11, 8], [9, 21, 7, 5, 1]],
    "answer": [1, 2],
    "foil": [3, 4],
    "positions": {"name": [2, 2]},
}
# Of a tensor these ask for no number.
SAY = {"__get__", "dim", "size", "stride", "numel", "requires_grad_", "is_floating_point"}


class Apart(TorchFunctionMode):
    """Inside: every tensor has a place, and functions of tensors in two places fail."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, tuple] = {}

    def put(self, x: Tensor, where: str) -> Tensor:
        self.at[id(x)] = (weakref.ref(x), where)
        return x

    def of(self, x: Tensor) -> str | None:
        ref, where = self.at.get(id(x), (lambda: None, None))
        return where if ref() is x else None

    def moved(self, x: Tensor, device: str | None) -> Tensor:
        here = self.of(x) or "home"
        return x if device in (None, here) else self.put(x.clone(), device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = [t for t in _pytree.tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in SAY:
            return out
        found = {w for t in given if t.dim() and (w := self.of(t))}
        assert len(found) < 2, f"{func} of tensors at {sorted(found)}"
        if found:
            for t in _pytree.tree_leaves(out):
                if isinstance(t, Tensor) and self.of(t) is None:
                    self.put(t, *found)
        return out


@pytest.fixture
def apart(monkeypatch):
    mode = Apart()
    monkeypatch.setattr(places, "moved", mode.moved)
    monkeypatch.setattr(places, "where", lambda x: mode.of(x) or "home")
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, _: self)
    return mode


def spread(hf, mode: Apart, names=("home", "away")) -> None:
    modules.spread(hf, "home", list(names))
    for p in [*hf.parameters(), *hf.buffers()]:
        mode.put(p, "home")
    for layer, name in zip(modules.layers_of(hf), names, strict=True):
        for p in [*layer.parameters(), *layer.buffers()]:
            mode.put(p, name)


def everything(hf) -> dict[str, object]:
    """What stages compute, of a proved model."""
    tokens = check.TOKENS
    assert proof.prove(hf) == {} and hf.retrace_fails == {}
    wide = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"]
    proof.prove_patterns(hf, wide[:1])
    out = dict(hooks.run_to(hf, tokens, [*hooks.hook_names(hf), *wide]))
    out["logits"] = hf(input_ids=tokens, use_cache=False).logits
    for hook in (*hooks.hook_names(hf), *wide):
        with hooks.edited(hf, hook, lambda x: 0.5 * x + 0.1):
            out[f"edited {hook}"] = hf(input_ids=tokens, use_cache=False).logits
        if hook.endswith(("resid_pre", "resid_mid", "resid_post", "mlp.hook_post")):
            x = splice.stream(hf, hook, tokens).requires_grad_(True)
            with torch.enable_grad():
                m = splice.resume(hf, hook, tokens, x, last=1)[:, -1, 3].sum()
                out[f"gradient {hook}"] = torch.autograd.grad(m, x)[0]
        if hook.endswith(("mlp.hook_post", "attn.hook_z")):
            d = hooks.width(hf, hook)
            out[f"written {hook}"] = splice.written(hf, hook, torch.ones(1, d))
    return out


def circuits(hf) -> dict[str, object]:
    """What the stage circuits computes."""
    task = Task.of(hf, Pairs.of(PROMPTS, 0, "cpu"))
    parts = [*(Node("head", i, 1) for i in range(2)), Node("mlp", 0), Node("attn", 1)]
    parts.append(Node("resid", 1, -1, "name"))
    inputs = head_inputs.input_nodes(task)
    out = {"total": task.total, "patched": activation_patching(task, parts)}
    out["estimated"] = eap.attribution_patching(task, parts + inputs)
    out["inputs"] = head_inputs.input_patching(task, inputs)
    out["paths"] = path_patching(task, [(0, 1), (1, 0)])
    out["sizes"] = atp_star.atp_star(task, parts)
    edges, out["edges"] = eap.edges(task, [0.5])
    out["exact edges"] = head_inputs.many_edges(task, edges[::7])
    if not task.metric.cap:
        out |= {f"direct {n}": x for n, x in direct_logit.direct_logit(task, task.base).items()}
    graph = EdgeGraph(hf, task.pairs.base, task.pairs.source)
    out["cut"] = graph.run(graph.everything() * 0.5)
    loss = acdc.kl_divergence(graph.clean, task.pairs.end)
    out["alone"] = acdc.exact(graph, loss)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [everything, circuits])
def test_layers_that_lie_apart_give_the_same_numbers(kind, what, apart):
    if what is circuits and kind == "mixtral":
        pytest.skip("the fixture of tiny experts has its circuits in test_circuits_families.py")
    with torch.no_grad():
        want = what(check.model_of(kind, 0))
        hf = check.model_of(kind, 0)
        spread(hf, apart)
        with apart:
            found = what(hf)
    assert want.keys() == found.keys()
    for name, x in want.items():
        assert torch.equal(found[name], x), name
        assert (apart.of(found[name]) or "home") == "home", name


# --- which device takes what ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "rest", "rooms", "want"),
    [
        ([2, 2, 2, 2], 0, [8, 8], [0, 0, 1, 1]),
        ([2, 2, 2, 2], 4, [6, 6], [0, 1, 1, 1]),  # what is no layer lies on the first
        ([2, 2, 2, 2], 0, [6, 2], [0, 0, 0, 1]),  # by room
        ([2] * 6, 0, [4, 4, 4], [0, 0, 1, 1, 2, 2]),
        ([2] * 6, 0, [40, 40, 40], [0, 0, 1, 1, 2, 2]),
        ([2, 2], 3, [2, 9], None),
        ([9, 1], 0, [5, 5], None),
    ],
)
def test_layers_are_divided_by_room(sizes, rest, rooms, want):
    assert loader.divided(sizes, rest, rooms) == want


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, of which `room` says how many bytes of weights each takes."""
    room = {0: 0.0, 1: 0.0}
    monkeypatch.setattr(loader, "room_of", lambda device: room[device.index])
    monkeypatch.setattr(loader, "others", lambda _: iter([torch.device("cuda", 1)]))
    return room


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "opt", "gpt_neox"])
def test_every_weight_has_one_place(kind, two_gpus, tmp_path):
    from transformers import AutoModelForCausalLM

    hf = check.model_of(kind, 0)
    hf.save_pretrained(tmp_path)
    size = loader.bytes_of(hf)
    assert size == sum(p.numel() * 4 for p in hf.parameters())
    args = tmp_path, AutoModelForCausalLM, torch.float32, torch.device("cuda", 0), None
    two_gpus.update({0: 3 * size, 1: 0})
    assert loader.placement(*args).map == {"": torch.device("cuda", 0)}
    two_gpus.update({0: 1.01 * size, 1: 0})
    assert loader.placement(*args).layers == ()
    two_gpus.update({0: 0.8 * size, 1: 0.8 * size})
    where = loader.placement(*args)
    assert [d.index for d in where.layers] == [0, 1]
    for name, _ in hf.named_parameters():
        fits = [d for path, d in where.map.items() if name.startswith(f"{path}.")]
        assert len(fits) == 1, name
        layer = name.removeprefix(f"{modules.family(hf).layers}.")
        assert fits[0].index == (layer != name and layer.startswith("1.")), name
    two_gpus.update({0: 0.4 * size, 1: 0.4 * size})
    with pytest.raises(RetraceError, match=r"have room for .* GB; .*model\.dtype: bfloat16"):
        loader.placement(*args)


def test_what_is_put_in_the_place_of_a_layer_goes_again():
    hf = check.model_of("llama", 0)
    modules.spread(hf, torch.device("cpu"), [torch.device("cpu")] * 2)
    layer = modules.layers_of(hf)[0]
    before = layer.forward
    with modules.instead([(layer, len), (hf.lm_head, len)]):
        assert layer.forward is hf.lm_head.forward is len
    assert layer.forward is before and "forward" not in hf.lm_head.__dict__
