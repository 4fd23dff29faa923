"""Every hook of every family against TransformerBridge, and what `edited` does to the stream."""

import copy

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.activations import rows
from pipeline.errors import RetraceError
from pipeline.families import tiny_models
from pipeline.models import hooks, modules
from pipeline.spec import families

SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32,
        "initializer_range": 0.3}  # fmt: skip
GQA = {**SIZE, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "mistral": MistralConfig(**GQA, sliding_window=None),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=4),
    "gpt2": GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3
    ),
    "gpt_neox": GPTNeoXConfig(**SIZE, use_parallel_residual=True),
    "gpt_neox_sequential": GPTNeoXConfig(**SIZE, use_parallel_residual=False),
}
TOKENS = torch.tensor([[0, 3, 1, 4, 1, 5, 9, 2], [0, 6, 5, 3, 5, 8, 9, 7]])


@pytest.fixture(scope="module")
def models():
    """Family -> a tiny random causal LM."""
    out = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        out[name] = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return out


@pytest.fixture(params=CONFIGS)
def hf(request, models):
    return models[request.param]


@pytest.mark.parametrize("mode", ["raw", "compatibility"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_hook_equals_the_bridges(name, mode, models, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    models[name].save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    hf = models[name]
    if mode == "compatibility":
        bridge.enable_compatibility_mode()
        hf = bridge.original_model  # our hooks on the modules that the bridge has changed
    with torch.no_grad():
        names = hooks.hook_names(hf)
        _, cache = bridge.run_with_cache(TOKENS)
        acts = hooks.run_to(hf, TOKENS, names)
    for hook in names:
        # Ours and the bridge's attention add float32 numbers in another order: a few ulps, which
        # two layers of weights of size 0.3 amplify little.
        torch.testing.assert_close(
            acts[hook],
            cache[hook].reshape(acts[hook].shape),  # of q, k, v and z it keeps heads apart
            atol=2e-5,
            rtol=2e-5,
            msg=lambda m, hook=hook: f"{hook}: {m}",
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_saelens_bridge_reads_every_hook_under_the_bridges_own_name(name, models, tmp_path):
    """By TransformerLens's names, which are aliases, run_with_cache of this class gives nothing."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    models[name].save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    bridge = SAETransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    known = hooks.hook_names(models[name])
    names = modules.family(models[name])
    own = [families.bridge_name(hook, names) for hook in known]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS, names_filter=own)
        acts = hooks.run_to(models[name], TOKENS, known)
    assert set(cache.keys()) == set(own) and len(set(own)) == len(known)
    for hook, theirs in zip(known, own, strict=True):
        plain = cache[theirs].reshape(acts[hook].shape)
        torch.testing.assert_close(acts[hook], plain, atol=2e-5, rtol=2e-5)


def test_residual_stream_adds_up(hf):
    acts = hooks.run_to(hf, TOKENS, hooks.hook_names(hf))
    close = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order
    for i in range(2):
        at = lambda h, i=i: acts[f"blocks.{i}.{h}"]  # noqa: E731
        post = at("hook_resid_pre") + at("hook_attn_out") + at("hook_mlp_out")
        torch.testing.assert_close(at("hook_resid_post"), post, **close)
        if f"blocks.{i}.hook_resid_mid" in acts:
            mid = at("hook_resid_pre") + at("hook_attn_out")
            torch.testing.assert_close(at("hook_resid_mid"), mid, **close)
    assert torch.equal(acts["blocks.1.hook_resid_pre"], acts["blocks.0.hook_resid_post"])


def test_stopping_changes_no_value_and_runs_no_later_layer(hf):
    with hooks.capture(hf, hooks.hook_names(hf)) as full:
        hf(TOKENS)
    layers = hf.get_submodule(modules.family(hf).layers)
    ran = []
    handle = layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    wanted = ["blocks.0.hook_resid_post", "hook_embed"]
    acts = hooks.run_to(hf, TOKENS, wanted)
    handle.remove()
    assert not ran
    assert all(torch.equal(acts[h], full[h]) for h in wanted)


def test_hooks_are_gone_afterwards(hf):
    before = hf(TOKENS).logits
    hooks.run_to(hf, TOKENS, ["blocks.1.hook_resid_pre"])
    with hooks.edited(hf, "blocks.0.hook_resid_post", torch.zeros_like):
        assert not torch.equal(hf(TOKENS).logits, before)
    assert torch.equal(hf(TOKENS).logits, before)


def test_identity_edit_changes_nothing(hf):
    before = hf(TOKENS).logits
    for hook in hooks.hook_names(hf):
        with hooks.edited(hf, hook, lambda x: x.clone()):
            # resid_mid is edited as a difference of two float32 numbers: their rounding stays
            torch.testing.assert_close(
                hf(TOKENS).logits,
                before,
                atol=2e-5,
                rtol=2e-5,
                msg=lambda m, hook=hook: f"{hook}: {m}",
            )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identity_edit_inside_a_processed_bridge(name, models, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    models[name].save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    bridge.enable_compatibility_mode()
    hf = bridge.original_model
    with torch.no_grad():
        before = hf(TOKENS).logits
        for hook in hooks.hook_names(hf):
            with hooks.edited(hf, hook, lambda x: x.clone()):
                same = hf(TOKENS).logits
            # resid_mid is edited as a difference of two float32 numbers: their rounding stays
            torch.testing.assert_close(same, before, atol=2e-5, rtol=2e-5)
            # larger where it is: a shift of all keys alike would leave attention as it was
            with hooks.edited(hf, hook, lambda x: 2 * x + torch.linspace(-1, 1, x.shape[-1])):
                assert not torch.allclose(hf(TOKENS).logits, before, atol=1e-3), hook


def test_an_edit_reaches_every_reader_of_the_stream(hf):
    """Adding a vector at resid_mid adds it to resid_post, and again what the MLP makes of it."""
    shift = torch.linspace(-1, 1, 16)
    for hook in hooks.hook_names(hf):
        if not hook.endswith(("resid_pre", "resid_mid", "resid_post")):
            continue
        with hooks.edited(hf, hook, lambda x: x + shift), hooks.capture(hf, [hook]) as seen:
            hf(TOKENS)
        plain = hooks.run_to(hf, TOKENS, [hook])[hook]
        torch.testing.assert_close(
            seen[hook], plain + shift, atol=1e-5, rtol=1e-5, msg=lambda m, hook=hook: f"{hook}: {m}"
        )
        layer = hook.split(".")[1]
        parts = [f"blocks.{layer}.{h}" for h in ("hook_resid_post", "hook_mlp_out")]
        with hooks.edited(hf, hook, lambda x: x + shift), hooks.capture(hf, parts) as edited:
            hf(TOKENS)
        with hooks.capture(hf, parts) as unedited:
            hf(TOKENS)
        moved = edited[parts[0]] - unedited[parts[0]]
        if hook.endswith("resid_mid"):
            moved = moved - (edited[parts[1]] - unedited[parts[1]])
        if not hook.endswith("resid_pre"):
            torch.testing.assert_close(moved, shift.expand_as(moved), atol=2e-5, rtol=1e-4)


def test_gradients_flow_through_an_edit(models):
    hf = models["llama"]
    x = torch.zeros(16, requires_grad=True)
    with hooks.edited(hf, "blocks.0.hook_resid_post", lambda s: s + x):
        hf(TOKENS).logits[0, -1, 3].backward()
    eps = 1e-3
    nudged = []
    for sign in (1, -1):
        step = torch.zeros(16)
        step[2] = sign * eps
        with hooks.edited(hf, "blocks.0.hook_resid_post", lambda s, step=step: s + step):
            nudged.append(hf(TOKENS).logits[0, -1, 3].item())
    # a central difference of float32 logits: rounding of 1e-7 over 2e-3
    assert x.grad[2].item() == pytest.approx(
        (nudged[0] - nudged[1]) / (2 * eps), rel=0.02, abs=2e-3
    )


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("blocks.0.hook_resid_pots", "did you mean 'blocks.0.hook_resid_post'"),
        ("blocks.2.hook_resid_post", "has 2 layers"),
        ("blocks.0.attn.hook_zz", "did you mean 'blocks.0.attn.hook_z'"),
        ("ln_final.hook_scales", "did you mean 'ln_final.hook_scale'"),
        ("hook_embedd", "did you mean 'hook_embed'"),
    ],
)
def test_unknown_hook(models, hook, says):
    with pytest.raises(RetraceError, match=says):
        hooks.site(models["llama"], hook)


def test_parallel_layers_have_no_resid_mid(models):
    with pytest.raises(RetraceError, match="resid_mid"):
        hooks.site(models["gpt_neox"], "blocks.0.hook_resid_mid")
    assert hooks.site(models["gpt_neox_sequential"], "blocks.0.hook_resid_mid").side == "input"


def test_unknown_family():
    class Other(torch.nn.Module):
        config = GPT2Config(vocab_size=8)

    Other.config.model_type = "gpt22"
    with pytest.raises(RetraceError, match=r"did you mean 'gpt2'.*model\.family in paper\.yaml"):
        hooks.site(Other(), "hook_embed")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_round_trip(dtype):
    x = torch.randn(5, 3).to(getattr(torch, dtype))
    raw = rows.to_numpy(x, dtype)
    raw.flags.writeable = False
    assert torch.equal(rows.to_tensor(raw, dtype), x)


def test_bfloat16_keeps_every_bit_pattern():
    patterns = np.arange(2**16, dtype=np.uint32).astype(np.uint16)[:, None]
    back = rows.to_numpy(rows.to_tensor(patterns, "bfloat16"), "bfloat16")
    assert np.array_equal(back, patterns)  # NaN payloads and signed zeros included


def test_a_copied_model_counts_its_own_sequences():
    """OPT's MLP sees sequences run together; a copy was read as those that the model saw last."""
    hf = tiny_models.tiny_model(tiny_models.with_architecture(tiny_models.tiny_config("opt")))
    name, tokens = "blocks.1.mlp.hook_post", torch.tensor([[1, 3, 4], [1, 5, 6]])
    want = hooks.run_to(hf, tokens, [name])[name]
    copied = copy.deepcopy(hf)
    assert torch.equal(hooks.run_to(copied, tokens.repeat(2, 1), [name])[name][:2], want)
    assert torch.equal(hooks.run_to(hf, tokens, [name])[name], want)
