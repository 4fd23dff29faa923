"""Replacement models: with errors the model itself; dictionaries that do not fit are refused."""

from dataclasses import replace

import drawn
import pytest
import torch

from pipeline.errors import RetraceError
from pipeline.models import splice
from pipeline.tracing import dictionaries, replacement
from pipeline.tracing.linear import Linear

CASES = [
    ("llama", "each", "mlp.hook_in"),
    ("llama", "cross", "ln2.hook_normalized"),
    ("gpt2", "skip", "hook_resid_mid"),
    ("gpt2", "cross", "mlp.hook_in"),
    ("gemma2", "each", "ln2.hook_normalized"),  # norms behind attention, a soft cap
    ("gpt_neox", "skip", "mlp.hook_in"),  # attention and MLP in parallel
    ("olmo2", "cross", "mlp.hook_in"),  # no norm before attention
    ("granite", "each", "hook_resid_mid"),  # factors on attention and logits
]


@pytest.mark.parametrize(("kind", "sort", "reads"), CASES)
@pytest.mark.parametrize("skip_first", [0, 2])
def test_with_errors_in_it_gives_the_models_logits(kind, sort, reads, skip_first):
    hf = drawn.model(kind)
    found = drawn.dictionaries(sort, reads, skip_first)
    ours = replacement.Replacement.of(hf, drawn.TOKENS, found).logits(errors=True)
    cap = splice.tail(hf)[1]
    ours = cap * torch.tanh(ours / cap) if cap else ours
    theirs = hf(drawn.TOKENS[None]).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("sort", ["each", "skip", "cross"])
def test_without_errors_it_is_the_model_with_its_mlps_replaced(sort):
    """Where dictionaries write what the MLPs do, both give the model; errors are 0."""
    hf, found = drawn.model(), drawn.dictionaries(sort)
    plain = replacement.Replacement.of(hf, drawn.TOKENS, found)
    left_out = plain.logits(errors=False)
    assert (left_out - plain.logits(errors=True)).abs().max() > 0.1
    # The same by hand: the stream of the frozen model, layer by layer.
    linear, written = plain.linear, torch.zeros(drawn.N_LAYERS, len(drawn.TOKENS), drawn.D)
    stream = linear.embed
    for layer in range(drawn.N_LAYERS):
        at = linear.layers[layer]
        mid = stream + at.attention.forward(stream)
        x = at.read.forward(mid)
        f = torch.relu(x @ found.W_enc[layer].T + found.b_enc[layer])
        for out in range(found.W_dec[layer].shape[1]):
            written[layer + out] += f @ found.W_dec[layer][:, out]
        skip = x @ found.W_skip[layer].T if found.W_skip else 0.0
        stream = mid + written[layer] + found.b_dec[layer] + skip
    torch.testing.assert_close(left_out, linear.unembedded(stream))


def test_spliced_computes_attention_anew_and_keeps_untrained_positions():
    hf = drawn.model()
    found = drawn.dictionaries("cross", skip_first=len(drawn.TOKENS))
    kept = replacement.spliced(hf, drawn.TOKENS[None], found)
    torch.testing.assert_close(kept, hf(drawn.TOKENS[None]).logits)
    found = drawn.dictionaries("cross")
    free = replacement.spliced(hf, drawn.TOKENS[None], found)[0]
    frozen = replacement.Replacement.of(hf, drawn.TOKENS, found).logits(errors=False)
    torch.testing.assert_close(
        replacement.spliced(hf, drawn.TOKENS[None].expand(2, -1), found)[1], free
    )
    assert (free - frozen).abs().max() > 1e-2  # patterns and norms are others now


def test_fidelity_of_a_shift_and_of_another_order():
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    assert replacement.fidelity(logits, logits + 5.0) == pytest.approx((0.0, 1.0), abs=1e-6)
    other = logits[:, [2, 1, 0]]
    kl, agreement = replacement.fidelity(logits, other)
    p, q = logits.softmax(-1), other.softmax(-1)
    assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert agreement == 0.0


def _without(found, layer):
    keep = [i for i in range(found.n_layers) if i != layer]
    hooks = {k: [getattr(found, k)[i] for i in keep] for k in ("hooks", "output_hooks")}
    return replace(found, **hooks)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (_without(drawn.dictionaries(), 1), "'plt' has no dictionary of layer 1 of the model's 3"),
        (drawn.dictionaries(n_layers=5), "'plt' has layers 0, 1, 2, 3, 4, the model 3"),
        (drawn.dictionaries(reads="attn.hook_z"), "reads blocks.0.attn.hook_z for layer 0, which"),
        (
            replace(drawn.dictionaries(), W_enc=[torch.zeros(24, 64)] * 3),
            "rows of 32, 64 numbers at layer 0, the model of 32: they are another model's",
        ),
    ],
    ids=["missing layer", "more layers", "no read hook", "another width"],
)
def test_dictionaries_that_do_not_fit_the_model_are_refused(found, sentence):
    with pytest.raises(RetraceError, match=sentence):
        dictionaries.check(drawn.model(), found, "plt")


def test_activations_that_are_no_products_are_refused():
    found = drawn.dictionaries()
    scaled = replace(found, encoders=[lambda x, e=e: 2 * e(x) for e in found.encoders])
    with pytest.raises(RetraceError, match="fold the scales"):
        replacement.Replacement.of(drawn.model(), drawn.TOKENS, scaled)


def test_a_model_whose_attention_is_more_than_pattern_times_values_is_refused():
    hf = drawn.model()
    linear = Linear.of(hf, drawn.TOKENS, drawn.dictionaries().hooks)
    gated = replace(linear.layers[1].attention, W_O=2 * linear.layers[1].attention.W_O)
    layers = [linear.layers[0], replace(linear.layers[1], attention=gated), linear.layers[2]]
    with pytest.raises(RetraceError, match="do not give its stream at layer 1"):
        replace(linear, layers=layers).check("gated", linear.embed, torch.float32)
