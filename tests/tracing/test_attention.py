"""QK attributions: they sum to the score, and a pair that is removed takes its term away."""

from contextlib import ExitStack
from dataclasses import replace

import drawn
import pytest
import torch

from pipeline.errors import RetraceError
from pipeline.models import hooks, inner
from pipeline.tracing import attention
from pipeline.tracing.attention import Bilinear, Place

AT = Place(layer=2, head=3, query=5, key=2)
CASES = [
    ("llama", "cross"),  # rotary, shared keys
    ("gpt2", "skip"),  # no rotary; biases
    ("gpt_neox", "each"),  # a joint projection
]


def score(hf, at, edits):
    """The model's own score, with q or k of the head changed."""
    name = f"blocks.{at.layer}."
    wanted = f"{name}attn.hook_attn_scores"
    n_heads, d = 4, 8

    def less(position, head, change):
        def edit(x):
            x = x.clone()
            x[:, position, head * d : (head + 1) * d] -= change
            return x

        return edit

    with ExitStack() as stack:
        for slot, position, head, change in edits:
            edit = less(position, head, change)
            stack.enter_context(hooks.edited(hf, f"{name}attn.hook_{slot}", edit))
        found = hooks.run_to(hf, drawn.TOKENS[None], [wanted])[wanted]
    return float(inner.by_head(found, n_heads)[0, at.head, at.query, at.key])


@pytest.mark.parametrize(("kind", "sort"), CASES)
def test_a_pair_that_is_removed_takes_its_term_away(kind, sort):
    hf = drawn.model(kind)
    model = attention.Replacement.of(hf, drawn.TOKENS, drawn.dictionaries(sort))
    found = Bilinear.of(hf, model, AT)
    queries, keys = attention.strongest(model, found, 6)
    table = attention.pairs(model, found, queries, keys)
    n_key = hf.config.to_dict().get("num_key_value_heads") or 4
    key_head = AT.head // (4 // n_key)
    q = found.q_of(attention._arrived(model, AT.layer, queries))
    k = found.k_of(attention._arrived(model, AT.layer, keys))
    whole = score(hf, AT, [])
    for i, j in ((0, 0), (1, 4), (5, 2)):
        of_q, of_k = ("q", AT.query, AT.head, q[i]), ("k", AT.key, key_head, k[j])
        both = score(hf, AT, [of_q, of_k])
        removed = whole - score(hf, AT, [of_q]) - score(hf, AT, [of_k]) + both
        assert removed == pytest.approx(float(table[i, j]), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(("kind", "sort"), CASES)
def test_pairs_of_all_sources_and_biases_sum_to_the_score(kind, sort):
    hf = drawn.model(kind)
    model = attention.Replacement.of(hf, drawn.TOKENS, drawn.dictionaries(sort))
    found = Bilinear.of(hf, model, AT)
    n = len(model.features)
    n_below = AT.layer * len(drawn.TOKENS)
    every = torch.arange(n + n_below + len(drawn.TOKENS))
    layers = model.features.layer
    every = every[torch.cat([layers < AT.layer, torch.ones(len(every) - n, dtype=torch.bool)])]
    x = attention._arrived(model, AT.layer, every)
    # What no source makes of the stream is biases: the affine map with nothing embedded or written.
    below = replace(model.linear, layers=model.linear.layers[: AT.layer])

    def fixed(layer, read):
        skip = model.linear.layers[layer].W_skip
        return model.fixed[layer] if skip is None else model.fixed[layer] + read @ skip.T

    _, biases = below.forward(fixed, torch.zeros_like(model.linear.embed))
    pre = hooks.run_to(hf, drawn.TOKENS[None], ["blocks.2.hook_resid_pre"])
    pre = pre["blocks.2.hook_resid_pre"][0]
    torch.testing.assert_close(x.sum(0) + biases, pre, rtol=1e-4, atol=1e-5)

    def both(stream):
        """Query and key of a stream, with the projections' own biases."""
        normed, whole = found.norm.forward(stream), found.norm.forward(pre)
        b_Q = found.q - whole[AT.query] @ found.W_Q.T
        b_K = found.k - whole[AT.key] @ found.W_K.T
        return normed[AT.query] @ found.W_Q.T + b_Q, normed[AT.key] @ found.W_K.T + b_K

    q, k = both(biases)
    table = attention.pairs(model, found, every, every)
    total = table.sum() + q @ found.B @ found.k + (found.q - q) @ found.B @ k
    assert float(total) == pytest.approx(found.score, rel=1e-3, abs=1e-3)
    # the strongest of a side are those whose row, with the key whole, is largest
    queries, _ = attention.strongest(model, found, 3)
    whole = (found.q_of(x) @ found.B @ found.k).abs()
    top = every[whole.topk(3).indices]
    assert queries.tolist() == top.tolist()
    names = attention.names(model, AT.layer, queries)
    assert all(name.startswith(("L", "embed@")) for name in names)


def test_a_query_before_its_key_and_normalised_heads_are_refused():
    hf = drawn.model()
    model = attention.Replacement.of(hf, drawn.TOKENS, drawn.dictionaries())
    with pytest.raises(RetraceError, match="a query at 1 does not see a key at 4"):
        Bilinear.of(hf, model, Place(1, 0, 1, 4))
    hf = drawn.model("qwen3")
    model = attention.Replacement.of(hf, drawn.TOKENS, drawn.dictionaries())
    with pytest.raises(RetraceError, match="is not bilinear in its query and key"):
        Bilinear.of(hf, model, AT)
