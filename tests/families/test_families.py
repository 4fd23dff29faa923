"""The table of families: equal to the adapters, its hooks equal to the bridge's, its refusals."""

import json

import families_check as check
import pandas as pd
import pytest
import torch

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.errors import RetraceError
from pipeline.families import adapters
from pipeline.models import hooks, modules, proof, splice
from pipeline.spec import families
from pipeline.store import provenance

QUICK = ["gemma2", "gptj", "opt", "phi", "phi3", "olmo", "olmo2", "granite", "mixtral", "mamba"]


@pytest.mark.slow
def test_the_table_is_that_of_the_adapters():
    found, _ = adapters.table()
    assert adapters.text(found) == families.TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "variant"),
    [pytest.param(k, i, marks=[] if k in QUICK else [pytest.mark.slow]) for k, i in check.cases()],
)
def test_every_hook_equals_the_bridges(kind, variant):
    check.row(kind, variant)


@pytest.mark.parametrize("case", check.NO_BRIDGE)
@pytest.mark.slow
def test_bridges_that_cannot_be_compared_still_cannot(case):
    kind, said = check.NO_BRIDGE[case].split(": ")
    with pytest.raises((RuntimeError, ValueError, AttributeError), match=said) as e:
        check.compared(check.model_of(*case))
    assert type(e.value).__name__ == kind


def test_no_table_is_written_by_hand():
    """Each layout is one that the model validates, and none is left over."""
    table = families.table()
    for layout in table["layouts"].values():
        families.Layout(**layout)
    used = {v.get("layout") for each in table["types"].values() for v in each}
    assert used - {None} == set(table["layouts"])
    assert families.TABLE.stat().st_size <= 60_000


def test_the_published_table_and_the_readme_are_of_this_table():
    made, rows = provenance.read(check.OUT)["spec"], pd.read_csv(check.OUT)
    assert made["families"] == provenance.sha256_file(families.TABLE)
    assert list(rows["type"]) == [kind for kind, _ in check.cases()]
    readme, table = (check.ROOT / "README.md").read_text(), families.table()
    assert f"Hooks are known for {len(table['types'])} model types" in readme
    assert f"families.json` has {len(table['layouts'])} to start from" in readme


# --- a model proves itself -----------------------------------------------------------------


def spoiled(kind, **changes):
    """A tiny model whose layout is not its own in one place."""
    hf = check.model_of(kind, 0)
    own = modules.family(hf).model_dump()
    for key, value in changes.items():
        own[key] = {**own[key], **value} if isinstance(value, dict) else value
    hf.retrace_layout = families.Layout(**own)
    return hf


@pytest.mark.parametrize(
    ("kind", "changes", "refused"),
    [
        # the outputs of attention and MLP before their norms, as a family without post-norms has
        ("gemma2", {"hooks": {"hook_attn_out": "self_attn out"}}, "hook_attn_out"),
        ("gemma2", {"hooks": {"hook_mlp_out": "mlp out"}}, "hook_mlp_out"),
        ("granite", {"hooks": {"hook_attn_out": "self_attn out"}}, "hook_attn_out"),
        ("olmo2", {"hooks": {"hook_attn_out": "self_attn out"}}, "hook_resid_mid"),
        ("phi", {"hooks": {"hook_resid_mid": "mlp in"}}, "hook_resid_mid"),
        ("gpt_neox", {"hooks": {"attn.hook_k": "attention.query_key_value k of qkv",
                                "attn.hook_v": "attention.query_key_value v of qkv"}},
         "attn.hook_v"),
    ],
)  # fmt: skip
def test_a_hook_that_stands_elsewhere_is_refused_and_the_others_go_on(kind, changes, refused):
    hf = spoiled(kind, **changes)
    proof.prove(hf)
    for layer in range(2):
        name = f"blocks.{layer}.{refused}"
        with pytest.raises(RetraceError, match=rf"^hook '{name}': "):
            hooks.run_to(hf, check.TOKENS, [name])
        assert name not in hooks.hook_names(hf)
    plain = check.model_of(kind, 0)
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"):
        ours = hooks.run_to(hf, check.TOKENS, [name])[name]
        assert torch.equal(ours, hooks.run_to(plain, check.TOKENS, [name])[name])


@pytest.mark.parametrize("ln1", [{}, {"ln1": "post_attention_layernorm"}])
def test_heads_are_refused_where_their_inputs_are_read_behind_another_norm(ln1):
    """Edges into queries, keys and values would be cut in another stream than the model's."""
    hf = spoiled("llama", parts=ln1)
    if not ln1:
        del hf.retrace_layout.parts["ln1"]
    assert not {h for h in proof.prove(hf) if not h.split(".", 2)[-1].startswith("ln1.")}
    with pytest.raises(RetraceError, match=r"attn\.hook_q of its layer 0 is not its projection"):
        EdgeGraph(hf, check.TOKENS)
    x = hooks.run_to(hf, check.TOKENS, ["blocks.1.attn.hook_q"])["blocks.1.attn.hook_q"]
    resumed = splice.resume(hf, "blocks.1.attn.hook_q", check.TOKENS, x)
    torch.testing.assert_close(resumed, hf(check.TOKENS).logits)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("post_attention_layernorm in", "mlp.hook_in of its layer 0 is not one norm of the stream"),
        ("mlp.up_proj in", "its MLPs read more of the stream than mlp.hook_in"),  # so does the gate
    ],
)
def test_edges_are_refused_where_an_mlp_does_not_read_its_hook_in(place, says):
    hf = spoiled("llama", hooks={"mlp.hook_in": place})
    assert proof.prove(hf) == {}
    with pytest.raises(RetraceError, match=says) as e:
        EdgeGraph(hf, check.TOKENS)
    assert "\n" not in str(e.value)


def test_a_final_norm_that_runs_before_the_layers_too_has_logits_and_no_hooks():
    hf = check.model_of("nanochat", 0)
    assert proof.prove(hf) == hf.retrace_fails == {}
    last = "blocks.1.hook_resid_post"
    x = hooks.run_to(hf, check.TOKENS, [last])[last]
    torch.testing.assert_close(splice.unembed(hf, x), hf(check.TOKENS).logits)
    with pytest.raises(RetraceError, match=r"^hook 'ln_final\.hook_scale': the model has not"):
        hooks.run_to(hf, check.TOKENS, ["ln_final.hook_scale"])


def test_a_wrong_final_norm_refuses_logits_and_nothing_else():
    hf = spoiled("llama", final_norm="model.layers.0.input_layernorm")
    proof.prove(hf)
    x = hooks.run_to(hf, check.TOKENS, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    with pytest.raises(RetraceError, match="do not give its logits"):
        splice.unembed(hf, x)
    resumed = splice.resume(hf, "blocks.1.hook_resid_post", check.TOKENS, x)
    torch.testing.assert_close(resumed, hf(check.TOKENS).logits)


HALF = ["gemma2", "olmo2", "mamba", "falcon_mamba", "gpt2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", HALF)
def test_half_weights_prove_what_whole_ones_do(kind, dtype):
    """Norms behind attention have gains to measure; Mamba gives its logits in float32."""
    whole, half = check.model_of(kind, 0), check.model_of(kind, 0).to(dtype)
    assert proof.prove(half) == proof.prove(whole) == {}
    assert half.retrace_fails == whole.retrace_fails


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_weights_prove_no_more_than_whole_ones(dtype):
    hf = spoiled("mamba", final_norm="backbone.layers.0.norm").to(dtype)
    proof.prove(hf)
    assert "unembed" in hf.retrace_fails and "resume" not in hf.retrace_fails


LAST = ["gemma2", "cohere", "granite", "gemma", "phi", "opt", "olmo", "llama4_text"]


@pytest.mark.parametrize("kind", LAST)
def test_logits_of_the_last_stream(kind):
    """Final soft-capping, scales that multiply or divide, gains of 1 + weight, biases."""
    hf = check.model_of(kind, 0, **{"gemma2": {"final_logit_softcapping": 3.0}}.get(kind, {}))
    assert proof.prove(hf) == {} and hf.retrace_fails == {}
    last = "blocks.1.hook_resid_post"
    x = hooks.run_to(hf, check.TOKENS, [last])[last]
    torch.testing.assert_close(splice.unembed(hf, x), hf(check.TOKENS).logits)


def test_neurons_of_a_mixture_of_experts_are_refused():
    """TransformerLens 3.9 gives the input of the whole block there."""
    hf = check.model_of("mixtral", 0)
    with pytest.raises(RetraceError, match=r"a mixture of experts.*mlp\.hook_expert_weights"):
        hooks.site(hf, "blocks.0.mlp.hook_post")
    assert "blocks.0.mlp.hook_in" in hooks.hook_names(hf)
    with pytest.raises(RetraceError, match=r"a mixture of experts.*mlp\.hook_expert_weights"):
        splice.written(hf, "blocks.0.mlp.hook_post", torch.ones(1, 48))


# --- hooks can be replaced -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "gemma2", "opt", "codegen", "falcon"])
def test_an_edit_of_every_hook_reaches_the_logits_and_is_seen(kind):
    hf = check.model_of(kind, 0)
    with torch.no_grad():
        before = hf(check.TOKENS).logits
        for hook in hooks.hook_names(hf):
            plain = hooks.run_to(hf, check.TOKENS, [hook])[hook]
            with hooks.edited(hf, hook, lambda x: x.clone()):
                same = hf(check.TOKENS).logits
            # resid_mid is edited as a difference of two float32 numbers: their rounding stays
            torch.testing.assert_close(same, before, atol=1e-4, rtol=1e-4, msg=hook)
            with hooks.edited(hf, hook, lambda x: 2 * x + torch.linspace(-1, 1, x.shape[-1])):
                assert not torch.allclose(hf(check.TOKENS).logits, before, atol=1e-3), hook
            assert plain.shape[:2] == check.TOKENS.shape


@pytest.mark.parametrize("kind", ["bamba", "jamba", "lfm2", "qwen3_next"])
def test_the_stream_behind_a_layer_without_attention_is_replaced(kind):
    """resid_post is then x + MLP(ln2(x)), by the modules themselves, and the logits follow it."""
    hf, mid, post = check.model_of(kind, 0), "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"
    proof.prove(hf)
    assert "blocks.0.hook_attn_out" not in hooks.hook_names(hf)
    names, layer = modules.family(hf), modules.layers_of(hf)[0]
    new = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp = modules.submodule(layer, names.mlp)(modules.submodule(layer, names.ln2)(new))
        mlp = mlp[0] if isinstance(mlp, tuple) else mlp
        with hooks.edited(hf, mid, lambda _: new), hooks.capture(hf, [post]) as seen:
            logits = hf(check.TOKENS, use_cache=False).logits
        torch.testing.assert_close(seen[post], new + mlp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(splice.resume(hf, post, check.TOKENS, new + mlp), logits)
        x = hooks.run_to(hf, check.TOKENS, [mid])[mid]
        torch.testing.assert_close(
            splice.resume(hf, mid, check.TOKENS, x), hf(check.TOKENS, use_cache=False).logits
        )


def test_a_stream_that_no_sum_is_known_of_is_not_replaced():
    hf = check.model_of("granitemoehybrid", 1)
    with (
        pytest.raises(RetraceError, match="resid_mid': can be read and not replaced"),
        hooks.edited(hf, "blocks.0.hook_resid_mid", lambda x: x),
    ):
        pass


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "gpt_bigcode", "codegen", "falcon"])
def test_values_of_a_joint_projection_by_hand(kind):
    """Columns of v set to one, and of nothing else: z is one wherever attention looks."""
    hf = check.model_of(kind, 0)
    v, z = "blocks.0.attn.hook_v", "blocks.0.attn.hook_z"
    with hooks.edited(hf, v, torch.ones_like), hooks.capture(hf, [z]) as seen:
        hf(check.TOKENS)
    torch.testing.assert_close(seen[z], torch.ones_like(seen[z]))


@pytest.mark.parametrize("kind", ["gemma2", "olmo", "opt", "nemotron", "phi"])
def test_a_norm_with_its_normalized_stream_replaced(kind):
    """Standardised rows are fed to the module itself: it would standardise them to themselves."""
    hf = check.model_of(kind, 0)
    hook, out = "ln_final.hook_normalized", []
    new = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    new = (new - new.mean(-1, keepdim=True)) / new.std(-1, correction=0, keepdim=True)
    norm = splice.final_norm(hf)
    with hooks.edited(hf, hook, lambda _: new):
        handle = norm.register_forward_hook(lambda _, __, y: out.append(y))
        hf(check.TOKENS)
        handle.remove()
    torch.testing.assert_close(out[0], norm(new * 1e3), atol=1e-4, rtol=1e-4)


# --- a layout of a group's own -------------------------------------------------------------


def test_a_layout_of_ones_own_is_that_of_the_table(tmp_path):
    file = tmp_path / "family.json"
    file.write_text(json.dumps(families.table()["layouts"]["gemma2"]))
    hf = check.model_of("gemma2", 0)
    assert families.of_file(file) == modules.family(hf)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hooks": {"hook_resid_pots": "out"}}, "did you mean 'hook_resid_post'"),
        ({"hooks": {"hook_mlp_out": "mlp output"}}, "'mlp output' is no place"),
        ({"hooks": {"ln1.hook_scale": "ln1 out"}}, "those of norms follow from parts"),
        ({"parts": {"attention": "attn"}}, "parts: 'attention'"),
        ({"layer": "h"}, "unknown key 'layer' (did you mean 'layers'?)"),
    ],
)
def test_what_is_no_layout_is_told_in_a_sentence(change, says, tmp_path):
    file = tmp_path / "family.json"
    file.write_text(json.dumps({**families.table()["layouts"]["gemma2"], **change}))
    with pytest.raises(RetraceError) as e:
        families.of_file(file)
    assert says in str(e.value) and str(file) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_what_is_no_json_object_is_told(text, tmp_path):
    file = tmp_path / "family.json"
    file.write_text(text)
    with pytest.raises(RetraceError, match=r"family\.json"):
        families.of_file(file)


def opened(folder, family=""):
    """A folder as the stage model takes it in, and as later stages load it."""
    from pipeline.models import loader
    from pipeline.spec.sources import ModelSpec
    from pipeline.store import tables
    from pipeline.weights import model

    spec = ModelSpec(source="folder", path=str(folder), family=family)
    hf, tokenizer, *_ = model.open_source(spec, folder / "none", None)
    info, made, item = model.describe(hf, 0, spec, ""), {"stage": "model"}, folder / "item"
    model.save(hf, tokenizer, item / "checkpoint", made)
    tables.write_json(item / "model.json", info, made)
    return loader.load(item / "model.json").hf


@pytest.mark.parametrize("way", ["a file", "llama"])
def test_a_type_that_the_table_lacks(way, tmp_path):
    """Helium has Llama's layout; TransformerLens has no adapter of it."""
    from conftest import byte_tokenizer

    from pipeline.families.tiny_models import tiny_config, tiny_model

    hf = tiny_model(tiny_config("helium"))
    hf.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RetraceError, match=r"'helium'.* has no hooks here.*model\.family: llama"):
        opened(tmp_path)
    if way == "a file":
        file = tmp_path / "helium.json"
        (llama,) = families.table()["types"]["llama"]
        file.write_text(json.dumps(families.table()["layouts"][llama["layout"]]))
        way = str(file)
    loaded = opened(tmp_path, way)
    assert loaded.retrace_refused == {} and loaded.retrace_fails == {}
    hook = "blocks.1.mlp.hook_post"
    ours, theirs = hooks.run_to(loaded, check.TOKENS, [hook])[hook], []
    layer = hf.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: theirs.append(args[0]))
    hf(check.TOKENS)
    torch.testing.assert_close(ours, theirs[0])


def test_the_type_with_the_same_modules_is_found_by_their_names():
    """Of the layouts of the table all but a few are found again, and the nearest in their place."""
    other = []
    for kind, i in check.cases():
        hf = check.model_of(kind, i)
        found = modules.alike(hf)
        if families.layout(hf.config, found) != families.layout(hf.config):
            other.append((kind, found))
    assert other == [("olmo_hybrid", "llama"), ("qwen2_moe", "minimax_m2"),
                     ("qwen3_moe", "minimax_m2"), ("qwen3_next", "minimax_m2")]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "like"),
    [("cwm", "llama"), ("granite_swa", "granite"), ("dots1", "ernie4_5_moe"),
     ("granitemoeshared", "granitemoe"), ("phimoe", "gpt_oss"), ("solar_open", "minimax_m2"),
     ("persimmon", "")],
)  # fmt: skip
def test_types_with_the_modules_of_another_prove_themselves(kind, like):
    """A residual multiplier of Granite's is told from none."""
    from pipeline.families.tiny_models import tiny_config, tiny_model

    more = {"residual_multiplier": 0.5} if "granite" in kind else {}
    hf = tiny_model(tiny_config(kind, **more))
    assert modules.alike(hf) == like
    if like:
        hf.retrace_layout = families.given(like, hf.config)
        refused = {name.split(".", 2)[-1] for name in proof.prove(hf)}
        # its router draws one expert after another
        assert refused == ({"mlp.hook_expert_weights"} if kind == "phimoe" else set())
        assert hf.retrace_fails == {}
    if "granite" in kind:
        hf.retrace_layout = families.given(
            "llama" if kind == "granite_swa" else "mixtral", hf.config
        )
        assert any(h.endswith("hook_attn_out") for h in proof.prove(hf))
