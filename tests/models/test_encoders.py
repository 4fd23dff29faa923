"""Encoders without a head (BertModel, as MiniLM is): activations, and what they cannot do."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedTokenizerFast,
)

from pipeline.downloads import fetch
from pipeline.errors import RetraceError
from pipeline.models import hooks, inner, loader, proof, splice
from pipeline.spec import families
from pipeline.spec.paper import ModelSpec
from pipeline.store import tables
from pipeline.text.tokens import set_document_token
from pipeline.weights import model

TOKENS = torch.tensor([[1, 3, 4, 15, 9, 26, 5, 35], [1, 8, 9, 7, 9, 3, 23, 8]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 32,
        "initializer_range": 0.3}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny BertModel."""
    out = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZE)).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    (out / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: other\n")
    return out


@pytest.fixture(scope="module")
def loaded(folder, tmp_path_factory):
    """The same out of a package, through the store."""
    at = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "from_package", lambda *_: folder)
        spec = ModelSpec(package="encoder==1.0", file="encoder/model/[!0-9]*", sha256="0" * 64)
        opened, tokenizer, licence, spec = model.open_source(spec, at / "none", None)
    assert licence == "apache-2.0"
    info = model.describe(opened, 0, spec, licence)
    model.save(opened, tokenizer, at / "checkpoint", {"stage": "model"})
    tables.write_json(at / "model.json", info, {"stage": "model"})
    return loader.load(at / "model.json")


@torch.no_grad()
def test_the_streams_are_the_hidden_states(loaded, folder):
    """Attention looks both ways, and the embedding is that behind its norm."""
    plain = BertModel.from_pretrained(folder).eval()
    states = plain(TOKENS, output_hidden_states=True).hidden_states
    names = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    for ours, theirs in zip(hooks.run_to(loaded.hf, TOKENS, names).values(), states, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@torch.no_grad()
def test_parts_of_a_layer_are_those_of_plain_hooks(loaded, folder):
    plain = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    layer, seen = plain.encoder.layer[1], {}
    places = {
        "attn.hook_q": (layer.attention.self.query, "out"),
        "attn.hook_z": (layer.attention.output.dense, "in"),
        "mlp.hook_pre": (layer.intermediate.dense, "out"),
        "mlp.hook_post": (layer.output.dense, "in"),
    }
    for name, (module, side) in places.items():
        module.register_forward_hook(
            lambda _, args, out, name=name, side=side: seen.update(
                {name: args[0] if side == "in" else out}
            )
        )
    layer.attention.self.register_forward_hook(lambda _, __, out: seen.update(pattern=out[1]))
    plain(TOKENS)
    acts = hooks.run_to(
        loaded.hf, TOKENS, [f"blocks.1.{h}" for h in [*places, "attn.hook_pattern"]]
    )
    for name in places:
        torch.testing.assert_close(acts[f"blocks.1.{name}"], seen[name], **CLOSE)
    pattern = inner.by_head(acts["blocks.1.attn.hook_pattern"], 4)
    torch.testing.assert_close(pattern, seen["pattern"], **CLOSE)
    assert (pattern > 0).all()  # no key is hidden


# --- encoders with BERT's modules ----------------------------------------------------------

KINDS = ["roberta", "xlm-roberta", "camembert", "ernie", "electra"]
FEWER = ["deberta-v2", "mpnet"]  # their queries, keys and values have other names


def saved(kind: str, folder: Path, **more) -> Path:
    config = AutoConfig.for_model(kind, **SIZE | {"embedding_size": 32} | more)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def brought(folder: Path, family: str):
    """The model of a folder, proved, with the layout of a type of the table."""
    spec = ModelSpec(source="folder", path=str(folder), family=family)
    opened, _, _, spec = model.open_source(spec, folder / "none", None)
    opened.retrace_layout = families.given(family, opened.config)
    proof.prove(opened.eval())
    return opened


@pytest.mark.parametrize("kind", KINDS + FEWER)
@torch.no_grad()
def test_an_encoder_with_the_modules_of_bert_takes_its_layout(kind, tmp_path):
    """RoBERTa, and others whose inner module has another name, by plain hooks."""
    folder = saved(kind, tmp_path)
    with pytest.raises(
        RetraceError, match="so write model" if kind in KINDS else "name a file"
    ) as e:
        model.open_source(ModelSpec(source="folder", path=str(folder)), tmp_path / "none", None)
    assert str(e.value).count("model.family: bert") == (kind in KINDS)
    hf, seen = brought(folder, "bert"), {}
    assert {n.split(".")[-1] for n in hf.retrace_refused} == {
        "hook_attn_out", "hook_mlp_out", "hook_resid_mid",
    }  # fmt: skip
    plain = AutoModel.from_pretrained(folder).eval()
    layer = plain.encoder.layer[1]
    layer.output.dense.register_forward_pre_hook(lambda _, args: seen.update(post=args[0]))
    states = plain(TOKENS, output_hidden_states=True).hidden_states
    names = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    acts = hooks.run_to(hf, TOKENS, [*names, "blocks.1.mlp.hook_post"])
    for name, theirs in zip(names, states, strict=True):
        torch.testing.assert_close(acts[name], theirs, **CLOSE)
    torch.testing.assert_close(acts["blocks.1.mlp.hook_post"], seen["post"], **CLOSE)


@pytest.mark.parametrize("kind", KINDS + FEWER)
@torch.no_grad()
def test_the_context_is_the_longest_that_runs(kind, tmp_path):
    """RoBERTa's table of positions begins behind its padding id, which no token has."""
    hf = brought(saved(kind, tmp_path), "bert")
    n_ctx = model.describe(hf, 0, ModelSpec(source="folder", path=str(tmp_path)), "")["n_ctx"]
    longest = TOKENS[0, 1:].repeat(5)[None, : n_ctx + 1]  # without the id of a padding
    assert torch.isfinite(hf(longest[:, :n_ctx])[0]).all()
    with pytest.raises((RuntimeError, IndexError)):
        hf(longest)


@pytest.mark.parametrize(
    ("kind", "family", "says"),
    [
        ("roberta", "llama", r"'roberta': has no 'embed_tokens', which its layout names as embed"),
        ("distilbert", "bert", r"'distilbert': has no 'encoder\.layer', which its layout names"),
        ("t5", "bert", r"not a causal LM that transformers can load"),
    ],
)
def test_a_layout_that_a_model_does_not_have_is_told_in_a_sentence(kind, family, says, tmp_path):
    with pytest.raises(RetraceError, match=says) as e:
        brought(saved(kind, tmp_path), family)
    assert "\n" not in str(e.value)


def test_streams_of_several_widths_are_refused(tmp_path):
    """MobileBERT's attention works in a narrower stream than its layers pass on."""
    hf = brought(saved("mobilebert", tmp_path, embedding_size=16), "bert")
    with pytest.raises(RetraceError, match="of another width than hook_resid_pre"):
        hooks.run_to(hf, TOKENS, ["blocks.0.hook_resid_mid"])


def as_published(name: str) -> str:
    """bert-base-uncased's files have TensorFlow's names of a norm's gain and bias."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize(("kind", "trained"), [("bert", "ForPreTraining"), ("bert", "ForMaskedLM"),
                                               ("roberta", "ForMaskedLM")])  # fmt: skip
@torch.no_grad()
def test_encoders_with_the_heads_that_they_were_trained_with(kind, trained, tmp_path):
    """That of the next sentence, and the pooler below it, are left out of a model of tokens."""
    config, name = AutoConfig.for_model(kind, **SIZE), {"bert": "Bert"}.get(kind, "Roberta")
    torch.manual_seed(0)
    hf = getattr(transformers, name + trained)(config).eval()
    hf.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if kind == "bert":
        file = tmp_path / "model.safetensors"
        weights = {as_published(k): w for k, w in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
        assert any(k.endswith("gamma") for k in weights)
        assert any("pooler" in k for k in weights) == (trained == "ForPreTraining")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"architectures": [f"{name}ForMaskedLM"]}
    file.write_text(json.dumps(config))
    states = hf(TOKENS, output_hidden_states=True).hidden_states
    ours = brought(tmp_path, "bert")
    names = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    acts = hooks.run_to(ours, TOKENS, names)
    for at, theirs in zip(names, states, strict=True):
        torch.testing.assert_close(acts[at], theirs, **CLOSE)
    with pytest.raises(RetraceError, match="looks at later tokens, too"):
        hooks.require(ours, "behind")


# --- what they cannot do -------------------------------------------------------------------


def test_what_needs_logits_is_refused_in_a_sentence(loaded):
    with pytest.raises(RetraceError, match=r"'bert' without a head has no logits; activations"):
        splice.resume(loaded.hf, "blocks.1.hook_resid_post", TOKENS, torch.zeros(2, 8, 32))
    with pytest.raises(RetraceError, match=r"blocks\.0\.hook_attn_out.*do not sum to the stream"):
        hooks.run_to(loaded.hf, TOKENS, ["blocks.0.hook_attn_out"])


def test_the_document_token_of_an_encoder_is_its_cls():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, cls_token="[CLS]")
    assert set_document_token(tokenizer) == 1 and tokenizer.bos_token == "[CLS]"


def test_documents_of_an_encoder_end_with_sep():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    assert set_document_token(tokenizer) == 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[SEP]")


def test_a_head_makes_a_causal_model(tmp_path):
    BertLMHeadModel(BertConfig(**SIZE, is_decoder=True)).save_pretrained(tmp_path)
    assert not loader.is_encoder(tmp_path)
    assert type(loader.from_folder(tmp_path, torch.float32)).__name__ == "BertLMHeadModel"
