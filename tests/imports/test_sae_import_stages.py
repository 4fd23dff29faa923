"""Evaluation, features and attribution on published dictionaries at every kind of site."""

from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published import CODER, IN, OUT, RESID, Z, bring, brought
from synthetic import call

from pipeline.latents import evaluation
from pipeline.latents.stored import eval_tokens, load_saes
from pipeline.models import loader
from pipeline.store import tables

SITES = {  # name -> format, hooks
    "resid": ("sparsify", {"hook": RESID}),
    "mlp": ("gemma_scope", {"hook": OUT}),
    "heads": ("saelens", {"hook": Z}),
    "coder": ("circuit_tracer", CODER),
}
SKIP = 1  # positions at a block's start that no dictionary is given


@pytest.fixture(scope="module")
def made(tiny_gpt2_json, tiny_text, tmp_path_factory) -> dict[str, Path]:
    """Tokens and activations of the tiny GPT-2, and a dictionary at each site."""
    root = tmp_path_factory.mktemp("theirs")
    at = {
        "model": tiny_gpt2_json,
        "corpus": root / "tokens.parquet",
        "documents": root / "documents.parquet",
        "activations": root / "manifest.json",
    }
    section = {"source": "local", "path": str(tiny_text), "label_field": "label", "n_ctx": 32,
               "n_tokens": 3200, "n_eval_tokens": 640}  # fmt: skip
    call("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
         documents=at["documents"])  # fmt: skip
    section = {"hooks": [RESID, Z, IN, OUT], "dtype": "float32", "skip_first": SKIP}
    same = {"device": "cpu", "threads": 1, "model": at["model"], "corpus": at["corpus"]}
    call("activations", {"activations": section}, **same, out=at["activations"],
         shards=root / "shards")  # fmt: skip
    w = published.draw(7)
    paths = {
        "resid": published.sparsify(root / "layers.1", w),
        "mlp": published.gemma_scope(root / "mlp", w),
        "heads": published.saelens(root / "z", "jumprelu", w, meta={"hook_name": Z},
                                   reshape_activations="hook_z"),
        "coder": published.circuit_tracer(root / "layer_1.safetensors", w),
    }  # fmt: skip
    for name, (format, hooks) in SITES.items():
        at[name] = bring(at["model"], root / name, paths[name], format, **hooks)
    return at


@pytest.fixture(scope="module")
def evaluated(made, tmp_path_factory):
    """The table of stage evaluation, by hook and output hook."""
    out = tmp_path_factory.mktemp("evaluation")
    given = {k: made[k] for k in ("model", "corpus", "activations")}
    call(
        "evaluation",
        {"evaluation": {"n_splice_blocks": 3}},
        **given,
        device="cpu",
        threads=1,
        saes=[made[name] for name in SITES],
        out=out / "t.parquet",
        history=out / "h.parquet",
    )
    assert tables.read_table(out / "h.parquet").empty
    table = tables.read_table(out / "t.parquet")
    return {name: table.iloc[i] for i, name in enumerate(SITES)}


def modules(hf) -> dict[str, tuple]:
    """GPT-2's own module at each site, and whether the rows are what it reads."""
    layer = hf.transformer.h[1]
    return {RESID: (layer, False), OUT: (layer.mlp, False), Z: (layer.attn.c_proj, True),
            IN: (layer.mlp, True)}  # fmt: skip


def streams(hf, tokens: torch.Tensor, hooks: list[str]) -> dict[str, torch.Tensor]:
    """The rows at each site of a forward pass, by plain torch hooks."""
    seen, handles = {}, []

    def before(hook: str):
        return lambda module, args: seen.__setitem__(hook, args[0])

    def after(hook: str):
        def keep(module, args, out) -> None:
            seen[hook] = out[0] if isinstance(out, tuple) else out

        return keep

    for hook in hooks:
        module, reads = modules(hf)[hook]
        put = module.register_forward_pre_hook if reads else module.register_forward_hook
        handles.append(put((before if reads else after)(hook)))
    hf(tokens)
    for handle in handles:
        handle.remove()
    return seen


def loss_with(hf, tokens: torch.Tensor, hook: str, new: torch.Tensor) -> float:
    """Mean loss of GPT-2 with plain torch hooks that put `new` at a site."""
    module, reads = modules(hf)[hook]
    if reads:
        handle = module.register_forward_pre_hook(lambda m, a: (new, *a[1:]))
    else:

        def swap(module, args, out):
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = module.register_forward_hook(swap)
    logits = hf(tokens).logits[:, SKIP:-1]
    handle.remove()
    target = tokens[:, SKIP + 1 :]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))


@pytest.mark.parametrize("name", SITES)
def test_evaluation_splices_it_in_as_plain_hooks_do(name, made, evaluated):
    hooks = SITES[name][1]
    reads, writes = hooks["hook"], hooks.get("output_hook", hooks["hook"])
    hf, sae = loader.load(made["model"]).hf, brought(made[name])
    tokens = eval_tokens(made["corpus"], 3)
    with torch.no_grad():
        seen = streams(hf, tokens, [reads, writes])
        new = seen[writes].clone()
        f = sae.encode(seen[reads][:, SKIP:])
        new[:, SKIP:] = sae.decode(f)
        assert evaluated[name]["loss_spliced"] == pytest.approx(
            loss_with(hf, tokens, writes, new), rel=1e-4
        )
    assert evaluated[name]["loss_spliced"] != pytest.approx(evaluated[name]["loss_model"], rel=1e-3)
    assert evaluated[name]["splice_check"] < 1e-4
    assert np.isnan(evaluated[name]["dead_share"])  # nobody published it
    assert evaluated[name]["l0"] == pytest.approx(float((f > 0).sum(-1).float().mean()), rel=0.2)


@pytest.mark.parametrize("name", SITES)
def test_features_write_through_the_site(name, made, tmp_path):
    """Logits of latents are those that their decoder rows write, through the heads' projection."""
    given = {k: made[k] for k in ("model", "corpus", "documents", "activations")}
    spec = {"features": {"saes": ["x"], "n_logits": 4, "n_examples": 2}, "latents": "x"}
    call("features", spec, **given, device="cpu", threads=1, sae=made[name],
         out=tmp_path / "f.parquet")  # fmt: skip
    table = tables.read_table(tmp_path / "f.parquet")
    hf, sae = loader.load(made["model"]).hf, brought(made[name])
    rows = sae.W_dec
    if name == "heads":
        rows = rows @ hf.transformer.h[1].attn.c_proj.weight  # a Conv1D: [in out]
    centred = (rows - rows.mean(-1, keepdim=True)) * hf.transformer.ln_f.weight
    logits = centred @ hf.lm_head.weight.T
    logits = logits - logits.mean(-1, keepdim=True)
    for latent in range(0, len(table), 7):
        values = [pair["value"] for pair in table["top_logits"][latent]]
        top = logits[latent].topk(4).values
        torch.testing.assert_close(torch.tensor(values), top, rtol=1e-3, atol=1e-4)
    assert (~table["dead"]).sum() > len(table) / 2


@pytest.mark.parametrize("name", SITES)
def test_attribution_adds_up_at_the_site(name, made, tmp_path):
    """Integrated gradients of all latents and the error are the change from b_dec to x."""
    prompt = {"prompt": "the cat sat on", "answer": "s", "foil": "o"}
    spec = {"attribution": {"sae": "x", "prompts": {"p": prompt}, "n_ablate": 12, "ig_steps": 400}}
    call("attribution", spec, device="cpu", threads=1, model=made["model"], sae=made[name],
         activations=made["activations"], out=tmp_path / "p.parquet",
         latents=tmp_path / "l.parquet")  # fmt: skip
    row = tables.read_table(tmp_path / "p.parquet").iloc[0]
    change = row["logit_diff"] - row["baseline_logit_diff"]
    total = row["sum_latents_ig"] + row["error_term_ig"]
    assert total == pytest.approx(change, rel=0.02, abs=0.02)
    latents = tables.read_table(tmp_path / "l.parquet")
    exact = latents["exact"].dropna()
    assert len(exact) == 12 and exact.abs().max() > 0


def test_a_transcoders_latents_act_through_what_it_writes(made, tmp_path):
    """The exact effect of a latent is the one of its part of the MLP's output, by plain hooks."""
    prompt = {"prompt": "the cat sat on", "answer": "s", "foil": "o"}
    spec = {"attribution": {"sae": "x", "prompts": {"p": prompt}, "n_ablate": 3, "ig_steps": 2}}
    call("attribution", spec, device="cpu", threads=1, model=made["model"], sae=made["coder"],
         activations=made["activations"], out=tmp_path / "p.parquet",
         latents=tmp_path / "l.parquet")  # fmt: skip
    loaded, sae = loader.load(made["model"]), brought(made["coder"])
    ids = [loaded.bos_id, *loaded.tokenizer("the cat sat on")["input_ids"]]
    tokens, (s, o) = torch.tensor([ids]), (loaded.tokenizer(t)["input_ids"][0] for t in "so")

    def difference(y: torch.Tensor) -> float:
        module, _ = modules(loaded.hf)[OUT]
        handle = module.register_forward_hook(lambda *_: y)
        logits = loaded.hf(tokens).logits[0, -1]
        handle.remove()
        return float(logits[s] - logits[o])

    with torch.no_grad():
        seen = streams(loaded.hf, tokens, [IN, OUT])
        f = sae.encode(seen[IN])
        for row in tables.read_table(tmp_path / "l.parquet").dropna(subset="exact").itertuples():
            y = seen[OUT].clone()
            y[0, row.position] -= f[0, row.position, row.latent] * sae.W_dec[row.latent]
            effect = difference(seen[OUT]) - difference(y)
            assert row.exact == pytest.approx(effect, rel=1e-3, abs=1e-4)
            assert row.activation == pytest.approx(float(f[0, row.position, row.latent]), rel=1e-4)


PROMPTS = """
def two(options, tokenizer, n_prompts, seed):
    ids = lambda text: tokenizer(text)["input_ids"]
    return {"clean": [ids("the cat sat"), ids("two dogs ra")],
            "corrupt": [ids("the mat sat"), ids("one dogs ra")],
            "answer": [ids("s")[0]] * 2, "foil": [ids("o")[0]] * 2,
            "positions": {"end": [11, 11]}}
"""


def test_circuits_score_latents_of_published_dictionaries(made, tmp_path):
    """Each exact effect is that of the latent's part of the stream, exchanged by plain hooks."""
    w = published.draw(7)
    items = {
        "resid": bring(made["model"], tmp_path / "a", published.gemma_scope(tmp_path / "g", w),
                       "gemma_scope", name="resid"),
        "coder": bring(made["model"], tmp_path / "b",
                       published.circuit_tracer(tmp_path / "layer_1.safetensors", w),
                       "circuit_tracer", name="coder", **CODER),
    }  # fmt: skip
    (tmp_path / "prompts.py").write_text(PROMPTS)
    spec = {"prompts": "two", "n_prompts": 2, "methods": ["latent_ig"], "saes": list(items),
            "n_exact": 6, "ig_steps": 4, "positions": ["end"]}  # fmt: skip
    out = {name: tmp_path / f"{name}.parquet" for name in ("nodes", "edges", "methods")}
    call("circuits", {"circuits": spec}, device="cpu", model=made["model"],
         prompts=tmp_path / "prompts.py", activations=made["activations"],
         saes=list(items.values()), **out)  # fmt: skip
    loaded = loader.load(made["model"])
    prompts: dict = {}
    exec(PROMPTS, prompts)
    pairs = prompts["two"]({}, loaded.tokenizer, 2, 0)
    clean, corrupt = (
        torch.tensor([[loaded.bos_id, *ids] for ids in pairs[k]]) for k in ("clean", "corrupt")
    )
    exact = tables.read_table(out["nodes"]).query("method == 'latent_patching' and head >= 0")
    assert set(exact["kind"]) == {"resid_post", "mlp_out"}
    for row in exact.itertuples():
        hooks = {"hook": RESID} if row.kind == "resid_post" else CODER
        reads, writes = hooks["hook"], hooks.get("output_hook", hooks["hook"])
        name = "coder" if writes == OUT else "resid"
        sae = load_saes(items[name], "cpu")[name]
        effect = exchanged(loaded.hf, sae, row.head, clean, corrupt, (reads, writes), pairs)
        assert row.score == pytest.approx(effect, rel=1e-3, abs=1e-4)
    (gap,) = tables.read_table(out["methods"])["completeness_gap"]
    assert abs(gap) < 0.01


@torch.no_grad()
def exchanged(hf, sae, latent, clean, corrupt, hooks, pairs) -> float:
    """What the logit difference gains, on average, with a latent's activations of the other run."""
    (reads, writes), ids = hooks, (pairs["answer"][0], pairs["foil"][0])
    seen, other = (streams(hf, tokens, [reads, writes]) for tokens in (clean, corrupt))
    f, f_other = (sae.encode(run[reads])[..., latent] for run in (seen, other))
    change = (f_other - f)[..., None] * sae.W_dec[latent]
    change[:, :SKIP] = 0
    module, _ = modules(hf)[writes]

    def difference(y: torch.Tensor) -> torch.Tensor:
        put = lambda m, a, out: (y, *out[1:]) if isinstance(out, tuple) else y  # noqa: E731
        handle = module.register_forward_hook(put)
        logits = hf(clean).logits[:, -1]
        handle.remove()
        return logits[:, ids[0]] - logits[:, ids[1]]

    return float((difference(seen[writes] + change) - difference(seen[writes])).mean())


@pytest.mark.parametrize(
    ("said", "sentence"),
    [({}, ""), ({"prepend_bos": True, "context_size": 32, "seqpos_slice": [1, None]}, ""),
     ({"prepend_bos": False}, "was made with prepend_bos False, and is evaluated with True"),
     ({"context_size": 128}, "was made with context_size 128, and is evaluated with 32"),
     ({"seqpos_slice": [None]}, "was made on positions 0 to 31, and is evaluated from 1 on"),
     ({"seqpos_slice": [1, -5]}, "was made on positions 1 to 26"),
     ({"seqpos_slice": [1]}, "was made on positions 0 to 0"),  # Python's slice(1), as SAELens
     ({"model_from_pretrained_kwargs": {"center_writing_weights": True}},
      "set model.processing: compatibility")],
)  # fmt: skip
def test_other_conventions_are_told(said, sentence, tmp_path, caplog):
    tables.write_json(tmp_path / "m.json", {"original": said}, {"stage": "test"})
    stored = {"prepend_bos": True, "n_ctx": 32, "skip_first": SKIP}
    evaluation.warn_of_conventions(str(tmp_path / "m.json"), stored, "raw")
    assert sentence in caplog.text if sentence else not caplog.text


def test_a_transcoder_that_reads_before_the_gain(tiny_model_json, tiny_corpus, tmp_path):
    """Gemma Scope's, in a model with RMS norms: x / rms(x), which no module takes or gives."""
    reads, writes = "blocks.1.ln2.hook_normalized", OUT
    at = tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_5"
    path = published.gemma_scope(at, published.draw(d_in=32, d_out=32))
    hooks = {"hook": reads, "output_hook": writes}
    manifest = bring(tiny_model_json, tmp_path / "item", path, "gemma_scope", **hooks)
    same = {"device": "cpu", "model": tiny_model_json, "corpus": tiny_corpus}
    section = {"hooks": [reads, writes], "dtype": "float32", "skip_first": SKIP}
    stored = tmp_path / "activations.json"
    call("activations", {"activations": section}, **same, out=stored, shards=tmp_path / "shards")
    call("evaluation", {"evaluation": {"n_splice_blocks": 3}}, **same, activations=stored,
         saes=[manifest], out=tmp_path / "t.parquet", history=tmp_path / "h.parquet")  # fmt: skip
    row = tables.read_table(tmp_path / "t.parquet").iloc[0]
    hf, sae, tokens = (
        loader.load(tiny_model_json).hf,
        brought(manifest),
        eval_tokens(tiny_corpus, 3),
    )
    layer, seen = hf.model.layers[1], {}
    norm = layer.post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda m, a: seen.__setitem__("x", a[0]))

    def swap(module, args, out):
        x = seen["x"] / (seen["x"].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return torch.cat([out[:, :SKIP], sae(x)[:, SKIP:]], 1)

    with torch.no_grad():
        other = layer.mlp.register_forward_hook(swap)
        logits = hf(tokens).logits[:, SKIP:-1]
    handle.remove()
    other.remove()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, SKIP + 1 :].flatten())
    assert row["loss_spliced"] == pytest.approx(float(loss), rel=1e-4)
    assert row["loss_spliced"] != pytest.approx(row["loss_model"], rel=1e-3)
    prompt = {"prompt": "the cat sat on", "answer": "s", "foil": "o"}
    spec = {"attribution": {"sae": "x", "prompts": {"p": prompt}, "n_ablate": 4, "ig_steps": 400}}
    out = {"out": tmp_path / "p.parquet", "latents": tmp_path / "l.parquet"}
    call("attribution", spec, device="cpu", model=tiny_model_json, sae=manifest,
         activations=stored, **out)  # fmt: skip
    found = tables.read_table(out["out"]).iloc[0]
    change = found["logit_diff"] - found["baseline_logit_diff"]
    total = found["sum_latents_ig"] + found["error_term_ig"]
    assert total == pytest.approx(change, rel=0.02, abs=0.02)
