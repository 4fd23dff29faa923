"""A transcoder's latents in a circuit: what is read at one hook and written at another."""

import pytest
import torch
from test_latents import CLOSE, N_POS, PAIRS, D, TopK, moving, nodes_of, patched, plain, tiny

from pipeline.errors import RetraceError
from pipeline.latents import sites as latents
from pipeline.latents.sites import Sites
from pipeline.latents.subsets import Ablation, edges
from pipeline.latents.units import ALL, ERROR, Latent, Latents, TranscoderLatents, reads_of
from pipeline.models.pairs import Pairs, Task

READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
BELOW, ABOVE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_mid"
HOOKS = [BELOW, WRITTEN, ABOVE]


def all_units() -> dict:
    """A transcoder of ReLU latents between two autoencoders; it knows no first position."""
    coder = TranscoderLatents(TopK(5, k=20), READ, skip_first=1)
    return {BELOW: Latents(TopK(3)), WRITTEN: coder, ABOVE: Latents(TopK(4))}


@pytest.fixture(autouse=True)
def double():
    """Models and dictionaries in float64, so that small steps give slopes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["llama", "gpt2", "native"])
def sites(request):
    with torch.no_grad():
        task = Task.of(tiny(request.param), Pairs.of(PAIRS, 0, "cpu"))
        yield Sites(task, HOOKS, reads_of(all_units()))


def test_a_token_is_known_by_what_is_read():
    lengths = torch.tensor([[1.0, 9.0, 1.0], [9.0, 1.0, 9.0]])[..., None]  # bound: 2
    read, written = lengths * torch.nn.functional.normalize(torch.randn(2, 1, 3, D), dim=-1)[:, 0]
    coder = TranscoderLatents(TopK(5, k=20), READ, max_norm=2.0)
    f, e = coder.split(torch.cat([read, written], -1)[None])
    want = coder.sae.encode(read)
    want[1] = 0
    assert torch.equal(f[0], want) and want[[0, 2]].any(-1).all()
    torch.testing.assert_close(e[0], written - coder.sae.decode(want))


def test_what_is_read_stands_beside_what_is_written(sites):
    assert sites.base[WRITTEN].shape[-1] == 2 * D and sites.base[BELOW].shape[-1] == D
    unit = all_units()[WRITTEN]
    f, e = unit.split(sites.base[WRITTEN])
    x, y = sites.base[WRITTEN].split(D, -1)
    torch.testing.assert_close(f[:, 1:], unit.sae.encode(x)[:, 1:])
    assert (f[:, 0] == 0).all()
    torch.testing.assert_close(unit.join(f, e), y)


def test_exact_effects_are_those_of_whole_forward_passes(sites):
    units = all_units()
    nodes = moving(sites, units[WRITTEN], WRITTEN)
    found = latents.exact(sites, units, nodes)
    for node, effect in zip(nodes, found, strict=True):
        want = patched(sites, units[WRITTEN], node) - sites.task.before
        torch.testing.assert_close(effect, want, **CLOSE)
    assert found.abs().max() > 1e-3


def test_integrated_gradients_sum_to_the_effect_of_the_whole_site(sites):
    alphas = [(i + 0.5) / 64 for i in range(64)]
    found = latents.effects(sites, WRITTEN, all_units()[WRITTEN], alphas)
    total = found.latents.sum((1, 2)) + found.error.sum(1)
    torch.testing.assert_close(total, sites.whole(WRITTEN), atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("complement", [False, True])
def test_a_circuit_is_a_forward_pass_with_means_in_the_place_of_other_nodes(sites, complement):
    """The transcoder reads what the ablation below it has left."""
    units = all_units()
    circuit, read = nodes_of(units, 60), {}
    means = {
        h: [p.mean(0) for p in u.split(torch.cat([sites.base[h], sites.source[h]]))]
        for h, u in units.items()
    }

    def keep(x: torch.Tensor) -> torch.Tensor:
        read["x"] = x
        return x

    def edit(hook: str):
        def ablate(x: torch.Tensor) -> torch.Tensor:
            f, e = units[hook].split(torch.cat([read["x"], x], -1) if hook == WRITTEN else x)
            for p in range(N_POS):
                for i in range(units[hook].n):
                    if (Latent(hook, i, p) in circuit) == complement:
                        f[:, p, i] = means[hook][0][p, i]
                if (Latent(hook, ERROR, p) in circuit) == complement:
                    e[:, p] = means[hook][1][p]
            return units[hook].join(f, e)

        return ablate

    want = plain(sites.task, {READ: keep} | {h: edit(h) for h in HOOKS})
    (found,) = Ablation(sites, units).metric([circuit], complement)
    torch.testing.assert_close(found, want, **CLOSE)
    assert (found - sites.task.before).abs().max() > 1e-3


def test_edges_into_a_transcoder_are_slopes_through_what_it_reads(sites):
    """A node below moves a little; how far do the transcoder's latents and error move m?"""
    units, step = all_units(), 1e-3
    nodes = [n for h in (BELOW, WRITTEN) for n in moving(sites, units[h], h)]
    nodes = [n for n in nodes if n.position != ALL]
    found, weights = edges(sites, units, nodes, [0.0])
    of = dict(zip(found, weights.tolist(), strict=True))
    into = [e for e in found if e.target and e.target.hook == WRITTEN]
    assert into and {e.source.hook for e in into} == {BELOW}

    def arriving(u: Latent, share: float) -> torch.Tensor:
        """x and y as they come to the transcoder's site."""
        (f, e), (f2, e2) = (units[BELOW].split(x[BELOW]) for x in (sites.base, sites.source))
        f, e = f.clone(), e.clone()
        if u.number == ERROR:
            e[:, u.position] += share * (e2 - e)[:, u.position]
        else:
            f[:, u.position, u.number] += share * (f2 - f)[:, u.position, u.number]
        seen = {}

        def keep(name: str):
            def edit(x: torch.Tensor) -> torch.Tensor:
                seen[name] = x
                return x

            return edit

        moved = {BELOW: lambda _: units[BELOW].join(f, e)}
        plain(sites.task, moved | {READ: keep(READ), WRITTEN: keep(WRITTEN)})
        return torch.cat([seen[READ], seen[WRITTEN]], -1)

    gradient = sites.gradient(WRITTEN, [0.0])
    for edge in sorted(into, key=lambda e: -abs(of[e]))[:8]:
        v = edge.target
        (f, e), (f2, e2) = (units[WRITTEN].split(arriving(edge.source, s)) for s in (-step, step))
        g = gradient[:, v.position]
        if v.number == ERROR:
            moved = ((e2 - e)[:, v.position] * g).sum(-1)
        else:
            slope = g @ units[WRITTEN].sae.W_dec[v.number]
            moved = (f2 - f)[:, v.position, v.number] * slope
        want = float(moved.mean() / (2 * step))
        assert of[edge] == pytest.approx(want, abs=1e-3, rel=3e-2), edge
    assert max(abs(of[e]) for e in into) > 1e-4


def test_one_that_reads_the_embedding_is_refused():
    task = Task.of(tiny(), Pairs.of(PAIRS, 0, "cpu"))
    with pytest.raises(RetraceError, match="a transcoder that reads hook_embed"):
        Sites(task, [WRITTEN], {WRITTEN: "hook_embed"})
