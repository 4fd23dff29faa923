"""Checkpoints that are no plain causal LM: with an image tower, or with quantised weights."""

import json

import pytest
import torch
from conftest import byte_tokenizer, stage
from safetensors.torch import load_file, save_file

from pipeline.errors import RetraceError
from pipeline.families import tiny_models
from pipeline.models import hooks, loader
from pipeline.spec import families
from pipeline.spec.sources import ModelSpec
from pipeline.weights import model, towers

TOKENS = torch.tensor([[1, 3, 4, 15, 9, 26, 5, 35], [1, 8, 9, 7, 9, 3, 23, 8]])
QUICK = ["gemma3", "mistral3", "qwen3_5", "smolvlm", "internvl"]
SIZES = {**tiny_models.TINY, "image_size": 28, "patch_size": 14, "projection_dim": 32,
         "out_hidden_size": 32, "depth": 1, "embed_dim": 32}  # fmt: skip
MARK = 39  # every token that stands for an image; the tokens above have none


def small(settings: dict) -> dict:
    """A config as a dictionary with small sizes, those of its parts, too."""
    out = {}
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config"):
            out[key] = small(value)
        elif key.endswith(("token_id", "token_index")) and value is not None:
            out[key] = SIZES.get(key, MARK)
        elif key != "layer_types":
            out[key] = SIZES[key] if key in SIZES and isinstance(value, int | float) else value
    return out


def whole(kind: str) -> torch.nn.Module:
    """A tiny random model of a type, with its tower."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    settings = small(transformers.AutoConfig.for_model(kind).to_dict())
    del settings["model_type"]
    settings["text_config"] = tiny_models.tiny_config(families.WITH_TOWER[kind]).to_dict()
    if settings.get("vision_config") is None:
        settings["vision_config"] = small(
            transformers.AutoConfig.for_model(f"{kind}_vision").to_dict()
        )
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    made = getattr(transformers, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])
    hf = made._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return hf.eval().requires_grad_(False)


def saved(hf: torch.nn.Module, folder) -> ModelSpec:
    hf.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSpec(source="folder", path=str(folder))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in families.WITH_TOWER],
)
def test_the_language_model_gives_the_logits_of_the_whole(kind, tmp_path):
    hf = whole(kind)
    opened, *_ = model.open_source(saved(hf, tmp_path / "whole"), tmp_path / "none", None)
    model.save(opened, None, tmp_path / "alone", {"stage": "model"})
    opened = loader.from_folder(tmp_path / "alone", torch.float32)  # as later stages have it
    assert opened.config.model_type == families.WITH_TOWER[kind]
    opened.set_attn_implementation("eager")
    want = hf(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(opened.eval()(input_ids=TOKENS, use_cache=False).logits, want)
    assert sum(p.numel() for p in opened.parameters()) < sum(p.numel() for p in hf.parameters())


def test_types_that_a_whole_model_has_are_listed():
    assert set(families.WITH_TOWER.values()) <= set(families.types())
    assert not set(families.WITH_TOWER) & set(families.types())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_dtype_and_the_unembedding_are_those_of_the_files(dtype, is_tied, tmp_path):
    hf = whole("gemma3").to(dtype)
    spec = saved(hf, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = torch.randn(40, 32).to(dtype)
    if not is_tied:  # as older releases named it
        save_file({**tensors, "language_model.lm_head.weight": head}, file, {"format": "pt"})
    opened, *_ = model.open_source(spec, tmp_path / "none", None)
    embedding = hf.get_input_embeddings().weight
    assert opened.lm_head.weight.dtype == dtype
    assert torch.equal(opened.lm_head.weight, embedding if is_tied else head)
    assert torch.equal(opened.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("language_model.model.layers.1.mlp.up_proj.weight"),
         r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"language_model.model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
         r"unexpected: .*model\.layers\.2\.mlp\.up_proj\.weight"),
    ],
)  # fmt: skip
def test_every_tensor_of_the_language_model_is_accounted_for(change, says, tmp_path):
    spec = saved(whole("gemma3"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RetraceError, match=says):
        model.open_source(spec, tmp_path / "none", None)


def test_a_language_model_of_a_type_without_hooks_is_told(tmp_path):
    config = {"model_type": "llava", "text_config": {"model_type": "t5"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RetraceError, match=r"model type 't5'.* has no hooks here"):
        model.open_source(ModelSpec(source="folder", path=str(tmp_path)), tmp_path / "x", None)
    assert towers.has_tower(tmp_path)


@pytest.mark.workflow
def test_later_stages_see_a_causal_model(tmp_path):
    hf, out = whole("gemma3"), tmp_path / "item"
    spec = saved(hf, tmp_path / "weights")
    given = {"model": spec.model_dump(exclude_defaults=True) | {"source": "folder"}}
    stage("model", given, out=out / "model.json", checkpoint=out / "checkpoint")
    loaded = loader.load(out / "model.json")
    assert loaded.info["architecture"] == "Gemma3ForCausalLM"
    assert loaded.hf.retrace_refused == {} and loaded.hf.retrace_fails == {}
    hook, seen = "blocks.1.mlp.hook_post", []
    down = hf.model.language_model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hf(input_ids=TOKENS, use_cache=False)
    torch.testing.assert_close(hooks.run_to(loaded.hf, TOKENS, [hook])[hook], seen[0])


# --- quantised weights ---------------------------------------------------------------------

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocks, scales, weights) as OCP Microscaling 1.0 has them, of experts [experts in out].

    Two numbers of 4 bits (E2M1) a byte, the lower half first; 32 share a scale 2^(e - 127).
    """
    n, d_in, d_out = like.shape
    blocks = torch.randint(0, 256, (n, d_out, d_in // 32, 16), dtype=torch.uint8)
    scales = torch.randint(122, 126, (n, d_out, d_in // 32), dtype=torch.uint8)
    numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
    weights = numbers * 2.0 ** (scales[..., None].float() - 127)
    return blocks, scales, weights.flatten(-2).mT


def quantised(folder, config: dict, tensors: dict) -> ModelSpec:
    """A saved folder with other tensors, and a config that says how they are quantised."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return ModelSpec(source="folder", path=str(folder))


def as_later(spec: ModelSpec, folder) -> torch.nn.Module:
    """The model of a source, saved to a store and loaded again."""
    opened, *_ = model.open_source(spec, folder / "none", None)
    model.save(opened, None, folder / "stored", {"stage": "model"})
    return loader.from_folder(folder / "stored", torch.float32)


def test_gpt_oss_as_it_is_published(tmp_path):
    hf = tiny_models.tiny_model(tiny_models.tiny_config("gpt_oss", intermediate_size=64))
    saved(hf, tmp_path / "given")
    tensors, want = load_file(tmp_path / "given" / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales, want[name] = mxfp4(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    spec = quantised(tmp_path / "given", {"quant_method": "mxfp4"}, tensors)
    found = as_later(spec, tmp_path).state_dict()
    assert len(want) == 4
    for name, weights in want.items():  # all are exact in bfloat16
        assert torch.equal(found[name], weights), name


def test_weights_in_float8(tmp_path):
    """A block of 16 x 16 has one scale."""
    hf = tiny_models.tiny_model(tiny_models.tiny_config("llama"))
    saved(hf, tmp_path / "given")
    tensors, want = load_file(tmp_path / "given" / "model.safetensors"), {}
    for name in [n for n in tensors if "_proj" in n]:
        small, shape = tensors[name].to(torch.float8_e4m3fn), tensors[name].shape
        scale = torch.rand(shape[0] // 16, shape[1] // 16) + 0.5
        spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
        want[name] = small.float() * spread
        tensors |= {name: small, f"{name}_scale_inv": scale}
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    found = as_later(quantised(tmp_path / "given", config, tensors), tmp_path).state_dict()
    for name, weights in want.items():
        torch.testing.assert_close(found[name], weights)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"are quantised \(gptq\)"),
        ({"quant_method": "of_2027"}, r"are quantised \(of_2027\)"),
        ({"load_in_4bit": True}, r"are quantised \(bitsandbytes\)"),
        ({"bits": 4}, r"are quantised \(by no named method\)"),
    ],
)
def test_other_quantised_weights_are_refused_before_they_are_read(config, says, tmp_path):
    given = {"model_type": "llama", "quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(RetraceError, match=rf"{says}, .* take the checkpoint that it was made"):
        model.open_source(ModelSpec(source="folder", path=str(tmp_path)), tmp_path / "x", None)
