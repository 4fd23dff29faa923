"""Stages on a model in bfloat16: what they compute is that of float32, but for rounding."""

import families_check as check
import pandas as pd
import pytest
import test_circuits_families as exact
import torch

from pipeline.circuits import acdc, methods
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.latents import features
from pipeline.latents.splicer import Splicer
from pipeline.models import lens, proof, splice
from pipeline.models.pairs import Pairs, Task
from pipeline.spec.measured import CircuitsSpec

ALL = [m for m in methods.METHODS if not m.startswith("latent")]
KINDS = ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def both(kind: str, **also: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same rounded weights in float32 and in bfloat16, proved."""
    uncapped = {"final_logit_softcapping": None} if kind == "gemma2" else {}
    half = check.model_of(kind, 0, **uncapped, **also)
    half = half.to(torch.bfloat16)
    whole = check.model_of(kind, 0, **also)
    whole.config = half.config
    whole.load_state_dict(half.state_dict())
    for hf in (whole, half):
        assert proof.prove(hf) == {} and hf.retrace_fails == {}
    return whole, half


def compared(models: tuple[torch.nn.Module, torch.nn.Module], wanted: list[str]) -> None:
    """The tables of both models have the same rows, and nearly the same scores."""
    spec = CircuitsSpec(prompts="pairs", methods=wanted, n_exact=5, positions=["name"])
    tables = []
    for hf in models:
        task = Task.of(hf, Pairs.of(exact.PROMPTS, 0, "cpu"))
        tables.append((methods.measure(task, spec, 0), float(task.total.abs().max())))
    (want, size), (found, _) = tables
    for name in ("nodes", "edges"):
        a, b = want[name], found[name]
        keys = [c for c in a if c not in ("score", "sd", "exact")]
        joined = a.merge(b, on=keys, suffixes=("", "_half"))
        assert len(joined) == len(a) == len(b)
        if len(a):
            close(joined["score"], joined["score_half"], size, name)


def close(want: pd.Series, half: pd.Series, size: float, name: str) -> None:
    """Scores are equal but for rounding.

    Args:
        size: the whole effect.
    """
    assert (want - half).abs().median() <= 0.03 * max(size, 1.0), name
    assert want.corr(half) > 0.98, name


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_every_method(kind):
    compared(both(kind), [m for m in ALL if m != "acdc"])


def test_scores_of_acdc():
    """It cuts edges one by one, and asks of a model no more than the next test does of each."""
    compared(both("llama", num_hidden_layers=1), ["acdc"])


@pytest.mark.parametrize("kind", KINDS[:4])
def test_losses_of_graphs_without_one_edge(kind):
    found = []
    for hf in both(kind):
        pairs = Pairs.of(exact.PROMPTS, 0, "cpu")
        graph = EdgeGraph(hf, pairs.base, pairs.source)
        alone = acdc.exact(graph, acdc.kl_divergence(graph.clean, pairs.end))
        found.append(pd.Series(alone.float().numpy()))
    close(*found, 0.0, kind)


@pytest.mark.parametrize("kind", KINDS[:4])  # rounding may turn over what a router chooses
def test_splicing_lenses_and_logit_weights(kind):
    found = []
    for hf in both(kind):
        hook, z, tokens = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", check.TOKENS
        x = splice.stream(hf, hook, tokens)
        assert x.dtype == torch.float32
        splicer = Splicer(hf, hook, tokens, 1)
        losses = splicer.measure([splicer.target, torch.zeros_like])
        streams, logits = lens.streams(hf, tokens)
        values, _ = features.logit_weights(hf, splice.written(hf, z, torch.eye(32)[:4]), 3)
        found.append((torch.tensor(losses), lens.unembed(hf, streams[1]), logits, values))
    for want, half in zip(*found, strict=True):
        assert half.dtype == want.dtype == torch.float32
        torch.testing.assert_close(half, want, atol=0.3, rtol=0.1)
