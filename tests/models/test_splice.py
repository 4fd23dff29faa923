"""The upper part of a model, run on a replaced stream, against plain forward passes."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.models import hooks, modules, splice
from pipeline.spec.training import Architecture
from pipeline.weights import initial

TOKENS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def tiny(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=32)),
        "native": lambda: initial.build(
            Architecture(n_layers=3, d_model=16, n_heads=2, d_mlp=32, n_ctx=16, act_fn="relu"), 50
        ),
    }[kind]()
    return model.eval().requires_grad_(False)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "native"])
def hf(request):
    return tiny(request.param)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post",
                                  "blocks.1.hook_mlp_out", "blocks.2.hook_attn_out",
                                  "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z",
                                  "blocks.1.mlp.hook_in", "blocks.1.attn.hook_attn_scores",
                                  "blocks.1.attn.hook_pattern",
                                  "blocks.1.attn.hook_result"])  # fmt: skip
def test_resuming_on_the_own_stream_gives_the_own_logits(hf, hook):
    whole = hf(TOKENS).logits
    x = splice.stream(hf, hook, TOKENS)
    resumed = splice.resume(hf, hook, TOKENS, x)
    torch.testing.assert_close(resumed, whole)
    torch.testing.assert_close(hf(TOKENS).logits, whole)  # and the model is as it was


def test_a_replaced_stream_gives_what_a_plain_hook_gives(hf):
    hook, new = "blocks.1.hook_resid_post", torch.randn(3, 7, 16)
    with hooks.edited(hf, hook, lambda _: new):
        plain = hf(TOKENS).logits
    torch.testing.assert_close(splice.resume(hf, hook, TOKENS, new), plain)


def test_lower_layers_do_not_run(hf):
    hook = "blocks.1.hook_resid_post"
    x = splice.stream(hf, hook, TOKENS)
    lower = hf.get_submodule(modules.family(hf).layers)[0]
    calls = []
    attention = getattr(lower, modules.family(hf).attn)
    splice.resume(hf, hook, TOKENS, x)  # the first call runs one token to see what layers return
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    splice.resume(hf, hook, TOKENS, x)
    handle.remove()
    assert calls == []


def test_gradients_are_those_of_the_whole_model(hf):
    hook = "blocks.0.hook_resid_post"
    x = splice.stream(hf, hook, TOKENS).detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(splice.resume(hf, hook, TOKENS, x)[:, -1, 3].sum(), x)
    with hooks.edited(hf, hook, lambda _: x):
        (plain,) = torch.autograd.grad(hf(TOKENS).logits[:, -1, 3].sum(), x)
    assert grad.abs().max() > 0
    torch.testing.assert_close(grad, plain)


def test_final_norm_is_what_the_unembedding_sees(hf):
    seen = []
    handle = splice.final_norm(hf).register_forward_hook(lambda m, a, out: seen.append(out))
    logits = hf(TOKENS).logits
    handle.remove()
    torch.testing.assert_close(hf.get_output_embeddings()(seen[0]), logits)


@pytest.mark.parametrize("hook", ["blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"])
def test_a_direction_writes_into_the_stream_what_it_changes_there(hf, hook):
    x = splice.stream(hf, hook, TOKENS)
    direction = torch.randn(1, x.shape[-1])
    after = "blocks.1.hook_resid_post"
    plain = splice.stream(hf, after, TOKENS)
    with hooks.edited(hf, hook, lambda x: x + direction), hooks.capture(hf, [after]) as seen:
        hf(TOKENS)
    got = splice.written(hf, hook, direction)
    torch.testing.assert_close(seen[after] - plain, got.expand_as(plain), rtol=1e-4, atol=1e-5)


def test_known_tokens_are_those_that_were_stored():
    x = torch.ones(2, 3, 4)
    x[1, 2] *= 100
    assert splice.known(x, 1, 0).tolist() == [[False, True, True]] * 2
    assert splice.known(x, 0, 50).tolist() == [[True, True, True], [True, True, False]]
