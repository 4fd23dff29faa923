"""Crosscoders: loss and gradients, what is shared and what is not, the stages, export, faults."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from synthetic import call
from test_sae import contents, one_thread  # noqa: F401
from test_sae_jobs import store

from pipeline.crosscoders import scaling
from pipeline.crosscoders.crosscoder_evaluation import Judged
from pipeline.crosscoders.model import SourceStream, columns, crosscoder, inference_state
from pipeline.errors import RetraceError
from pipeline.sae import steps, steps_batch
from pipeline.sae.sparse import Scratch
from pipeline.sharing import export_layouts
from pipeline.spec.paper import PaperSpec
from pipeline.spec.sae import CrosscoderSpec, SaeSpec
from pipeline.store import tables
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.shards import PairedRows, Rows

HOOK = "blocks.0.hook_resid_post"
SPARSITY = {"standard": {"l1_coefficient": 0.5}, "batchtopk": {"k": 3, "topk_threshold_lr": 0.1}}
SHARED, EXCLUSIVE = 12, 4  # true features: of both sources, and of each alone


def spec(architecture: str, d_sae: int = 32, **more) -> SaeSpec:
    return SaeSpec(architecture=architecture, d_sae=d_sae, **SPARSITY[architecture] | more)


# --- loss and gradients --------------------------------------------------------------------


def plainly(sae, x: torch.Tensor, architecture: str, widths: list[int], l1: float) -> torch.Tensor:
    """The loss as the papers write it, source by source."""
    rows = list(zip(x.split(widths, 1), sae.b_dec.split(widths), strict=True))
    encoders, decoders = sae.W_enc.split(widths, 0), sae.W_dec.split(widths, 1)
    f = sum((x_s - b) @ W for (x_s, b), W in zip(rows, encoders, strict=True))
    f = torch.relu(f + sae.b_enc)
    norms = sum(W.norm(dim=1) for W in decoders)
    if architecture == "batchtopk":
        weighed = (f * norms).detach()
        least = weighed.flatten().topk(int(sae.cfg.k * len(x))).values.min()
        f = f * (weighed >= least)
    error = sum((f @ W + b - x_s).pow(2).sum(1) for (x_s, b), W in zip(rows, decoders, strict=True))
    return error.mean() + l1 * (f * norms).sum(1).mean()


@pytest.mark.parametrize("widths", [[6, 6], [5, 7, 3]])
@pytest.mark.parametrize("architecture", SPARSITY)
def test_the_step_has_the_loss_and_gradients_of_the_papers_formula(architecture, widths):
    sae = crosscoder(spec(architecture, aux_loss_coefficient=0.0), widths).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, l1 = torch.randn(40, sum(widths), dtype=torch.float64), 0.7 * (architecture == "standard")
    loss = plainly(sae, x, architecture, widths, l1)
    loss.backward()
    want = {n: p.grad.clone() for n, p in sae.named_parameters()}
    sae.zero_grad()
    step = {"standard": steps.standard, "batchtopk": steps_batch.batchtopk}[architecture]
    scratch = Scratch(False)
    out = step(sae, x, dead=None, coefficients={"l1": l1}, step=0, scratch=scratch)
    torch.testing.assert_close(out.loss, loss)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, want[name])


def test_a_latent_of_two_sources_costs_as_much_as_two_of_one_each():
    """sum |d^s|, and not |d|, which would make sharing cheap."""
    sae = crosscoder(spec("standard"), [6, 6])
    whole = sae.W_dec.norm(dim=1)
    parts = sae.W_dec[:, :6].norm(dim=1) + sae.W_dec[:, 6:].norm(dim=1)
    torch.testing.assert_close(steps.decoder_norm(sae), parts)
    assert (parts > whole).all()


# --- data ----------------------------------------------------------------------------------


def rows_of_two(n: int, copies: bool = False, d: int = 24, seed: int = 0) -> list[np.ndarray]:
    """Rows of two models: shared features have a direction in each, exclusive ones in one."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(1)
    n_true = SHARED + 2 * EXCLUSIVE
    directions = truth.normal(size=(2, n_true, d))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    directions[0, SHARED + EXCLUSIVE :] = 0
    directions[1, SHARED : SHARED + EXCLUSIVE] = 0
    codes = np.where(rng.random((n, n_true)) < 0.12, rng.uniform(0.5, 1.5, (n, n_true)), 0)
    x = [(10 * codes @ D + 2).astype(np.float32) for D in directions]
    return [x[0], x[0].copy()] if copies else x


def stored(folder: Path, copies: bool = False, seed: int = 0) -> list[Path]:
    """The activations of two models on the same tokens; their manifests."""
    x = rows_of_two(5000, copies, seed=seed)
    return [store(folder / str(i), {HOOK: (a[:4500], a[4500:])}) for i, a in enumerate(x)]


def job(names=tuple(SPARSITY), n_rows: int = 128_000, **more) -> dict:
    training = {"n_rows": n_rows, "batch_size": 128, "lr": 3e-3, "dead_rows": 4000} | more
    kept = {"grid", "arms"}
    return {
        "crosscoder": {
            "sources": [{"name": n, "hook": HOOK, "activations": i} for i, n in enumerate("ab")],
            "training": training,
            "dictionaries": {n: spec(n).model_dump(exclude=kept) for n in names},
        }
    }


def paths(out: Path, activations: list[Path]) -> dict:
    return {
        "activations": activations,
        "out": out / "manifest.json",
        "saes": out / "saes",
        "history": out / "history.parquet",
        "device": "cpu",
    }


def judged(out: Path, activations: list[Path]) -> tuple:
    """The tables of stage crosscoder_evaluation."""
    call(
        "crosscoder_evaluation", {}, activations=activations, saes=[out / "manifest.json"],
        out=out / "table.parquet", latents=out / "latents.parquet", device="cpu",
    )  # fmt: skip
    return tables.read_table(out / "table.parquet"), tables.read_table(out / "latents.parquet")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[Path]]:
    """The store's item of crosscoders of two models that share some features."""
    folder = tmp_path_factory.mktemp("two")
    activations = stored(folder)
    call("crosscoder", job(), **paths(folder / "out", activations))
    return folder / "out", activations


@pytest.fixture(scope="module")
def found(two) -> tuple:
    return judged(*two)


# --- what is shared, and what is not -------------------------------------------------------


@pytest.mark.workflow
def test_two_copies_of_one_model_have_no_latent_of_their_own(tmp_path):
    activations = stored(tmp_path, copies=True)
    call("crosscoder", job(n_rows=64_000), **paths(tmp_path / "out", activations))
    table, latents = judged(tmp_path / "out", activations)
    assert (table["explained_variance"] > 0.8).all()
    assert (table["living"] >= SHARED).all() and (table["exclusive"] == 0).all()
    living = latents[latents["density"] > 0]
    assert (living["kind"] == "shared").all() and living["delta"].between(0.45, 0.55).all()


@pytest.mark.parametrize("name", SPARSITY)
def test_shared_and_exclusive_features_are_found(two, found, name):
    """Each true feature has a latent of its direction, whose kind and source are the feature's."""
    from sae_lens import SAE

    W_dec = SAE.load_from_disk(str(two[0] / "saes" / name)).W_dec.detach().numpy()
    truth = np.random.default_rng(1).normal(size=(2, SHARED + 2 * EXCLUSIVE, 24))
    latents = found[1].query("sae == @name and source == 'a'").set_index("latent")
    right = 0
    for i in range(truth.shape[1]):
        source = int(i >= SHARED + EXCLUSIVE)  # one that has it
        part = W_dec[:, 24 * source : 24 * source + 24]
        along = part @ truth[source, i] / np.linalg.norm(truth[source, i])
        cosine = along / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-9)
        best = latents.loc[int(np.argmax(along))]
        kind = "shared" if i < SHARED else "exclusive"
        own = kind == "shared" or best["own"] == "ab"[source]
        right += best["kind"] == kind and own and cosine.max() > 0.5
    assert right >= truth.shape[1] - 2  # two may be missed or split
    row = found[0].query("sae == @name").set_index("source")
    assert (row["confirmed"] >= EXCLUSIVE - 1).all()
    assert (row["confirmed"] <= row["exclusive"]).all() and (row["explained_variance"] > 0.8).all()


def test_scaling_is_the_least_squares_fit_of_each_latent():
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    decoders, f = [draw(9, 5), 0.3 * draw(9, 5)], torch.relu(draw(60, 9))
    x = [draw(60, 5), draw(60, 5)]
    recon = [f @ W + draw(5) for W in decoders]
    sums = scaling.LatentScaling(decoders)
    for rows in (slice(0, 25), slice(25, 60)):
        sums.add(f[rows], [a[rows] for a in x], [a[rows] for a in recon])
    nu_r, nu_e = sums.nu()
    for j in range(9):
        own = int(sums.own[j])
        d = decoders[own][j]
        regressor = torch.outer(f[:, j], d).flatten()[:, None]

        def beta(y, regressor=regressor):
            return torch.linalg.lstsq(regressor, y.flatten()[:, None]).solution.item()

        without = [x[s] - recon[s] + torch.outer(f[:, j], decoders[s][j]) for s in (0, 1)]
        assert nu_r[1 - own, j] == pytest.approx(beta(recon[1 - own]) / beta(recon[own]))
        assert nu_e[1 - own, j] == pytest.approx(beta(without[1 - own]) / beta(without[own]))
        assert nu_r[own, j] == nu_e[own, j] == 1


def test_kinds_are_those_of_the_published_delta():
    norms = np.array([[1, 1, 1, 0.19, 0.3, 1.0], [0.19, 0.21, 0.81, 1, 1, 0.79]])
    assert scaling.kinds(norms).tolist() == [
        "exclusive", "between", "shared", "exclusive", "between", "between",
    ]  # fmt: skip
    d = scaling.delta(norms)
    assert ((d < 0.1) | (d > 0.9)).tolist() == [True, False, False, True, False, False]
    assert ((d >= 0.4) & (d <= 0.6)).tolist() == [False, False, True, False, False, False]


def test_the_borders_of_kinds_are_those_of_the_published_delta():
    """Shared from 0.4 to 0.6 with both ends; exclusive below 0.1 or above 0.9 without them."""
    norms = np.array([[1, 1, 0.8, 0.2], [0.8, 0.2, 1, 1]])
    np.testing.assert_allclose(scaling.delta(norms), [0.4, 0.1, 0.6, 0.9])
    assert scaling.kinds(norms).tolist() == ["shared", "between", "shared", "between"]


def test_shrinkage_is_seen_and_not_confirmed():
    """A direction that the other source has, but its decoder lost, stands in its error."""
    f = torch.rand(200, 1)
    decoders = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    x = [f @ decoders[0], f @ decoders[0]]
    sums = scaling.LatentScaling(decoders)
    sums.add(f, x, [f @ W for W in decoders])
    nu_r, nu_e = sums.nu()
    assert nu_r[1, 0] == pytest.approx(0) and nu_e[1, 0] == pytest.approx(1)
    kind = scaling.kinds(np.array([[1.0], [0.0]]))
    assert kind[0] == "exclusive"
    assert not scaling.confirmed(kind, np.array([0]), nu_r, nu_e)[0]


class Scaled:
    """A crosscoder of two sources of two columns, whose weights read rows as they are."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.W_dec, self.cfg = torch.randn(3, 4, generator=draw), SimpleNamespace(d_sae=3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_dec.T)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec


def test_latents_are_scaled_on_rows_of_one_unit():
    """Sources of other sizes: rows, reconstructions and directions times the sources' scales."""
    sae, x = Scaled(), torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    sources = [{"name": n, "d_in": 2, "scale": s} for n, s in (("a", 3.0), ("b", 0.5))]
    sums = Judged(sae, sources)
    sums.add(x[:20])
    sums.add(x[20:])
    table = sums.latents("x").set_index(["source", "latent"])
    f = sae.encode(x).double()
    recon, W = sae.decode(sae.encode(x)).double(), sae.W_dec.double()
    d = {"a": 3 * W[:, :2], "b": 0.5 * W[:, 2:]}
    y = {"a": 3 * recon[:, :2], "b": 0.5 * recon[:, 2:]}
    for j in range(3):
        norms = {s: d[s][j].norm().item() for s in d}
        own = max(norms, key=norms.get)
        fit = {s: torch.linalg.lstsq((f[:, j, None] * d[own][j]).reshape(-1, 1),
                                     y[s].reshape(-1, 1)).solution.item() for s in d}  # fmt: skip
        for s in d:
            assert table.loc[(s, j), "norm"] == pytest.approx(norms[s])
            assert table.loc[(s, j), "nu_r"] == pytest.approx(fit[s] / fit[own], rel=1e-4)
            assert table.loc[(s, j), "own"] == own


# --- the stages ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SPARSITY)
def test_saved_weights_answer_rows_as_they_are(architecture):
    """Two scales and BatchTopK's norms are folded: the same latents and rows as in training."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    sae, scales = crosscoder(spec(architecture), [6, 4]), [3.0, 0.5]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.2 * torch.randn_like(p))
    threshold = 0.3 if architecture == "batchtopk" else 0.0
    if architecture == "batchtopk":
        sae.topk_threshold += threshold
    x = torch.randn(50, 10)
    factors = torch.tensor([3.0] * 6 + [0.5] * 4)
    norms = steps.decoder_norm(sae)
    with torch.no_grad():
        f = torch.relu((x * factors - sae.b_dec) @ sae.W_enc + sae.b_enc)
        f = f * (f * norms > threshold)
        want = (f @ sae.W_dec + sae.b_dec) / factors
    kind, config = {
        "standard": (StandardSAE, StandardSAEConfig), "batchtopk": (JumpReLUSAE, JumpReLUSAEConfig),
    }[architecture]  # fmt: skip
    made = kind(config(d_in=10, d_sae=32))
    made.load_state_dict(inference_state(sae, scales))
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.encode(x).bool(), f.bool())


def test_the_evaluation_is_each_sources_own(two, found):
    from sae_lens import SAE

    out, _ = two
    x = [torch.from_numpy(a[4500:]) for a in rows_of_two(5000)]
    for name in SPARSITY:
        sae = SAE.load_from_disk(str(out / "saes" / name))
        with torch.no_grad():
            acts = sae.encode(torch.cat(x, 1))
            x_hat = sae.decode(acts).split(24, 1)
        rows = found[0].query("sae == @name").set_index("source")
        for s, source in enumerate("ab"):
            y = x[s].double()
            left = (y - x_hat[s]).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
            assert rows.loc[source, "explained_variance"] == pytest.approx(
                1 - left.item(), abs=1e-6
            )
            assert rows.loc[source, "l0"] == pytest.approx(acts.bool().sum(1).float().mean().item())
    sources = tables.read_json(out / "manifest.json")["sources"]
    assert [s["name"] for s in sources] == ["a", "b"]


@pytest.mark.workflow
def test_an_interrupted_job_ends_with_the_bytes_of_another(two, tmp_path, monkeypatch):
    """Stopped after its second checkpoint, then called again."""
    activations, few = two[1], job(n_rows=25_600, checkpoint_seconds=1e-9)
    call("crosscoder", few, **paths(tmp_path / "whole", activations))
    saved = Checkpoints.save

    def stopped(self, step, things):
        saved(self, step, things)
        if step >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            call("crosscoder", few, **paths(tmp_path / "again", activations))
    assert [f.name for f in (tmp_path / "again/saes.partial").iterdir()] == ["step-000000002"]
    call("crosscoder", few, **paths(tmp_path / "again", activations))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", SPARSITY)
def test_an_export_has_the_latents_and_rows_of_the_documented_formula(two, tmp_path, name):
    from sae_lens import SAE
    from safetensors.torch import load_file

    export = {"format": "crosscoder", "arm": "a", "sae": name, "paper": "p"}
    call("exports", {"export": export}, sae=two[0] / "manifest.json", out=tmp_path / "out")
    w = load_file(tmp_path / "out/crosscoder.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["sources"] == ["a", "b"]
    x = torch.stack([torch.from_numpy(a[:200]) for a in rows_of_two(5000)])
    h = torch.einsum("sbd,sdf->bf", x, w["encoder.weight"]) + w["encoder.bias"]
    f = torch.relu(h) * (h > w["threshold"] if "threshold" in w else 1)
    x_hat = torch.einsum("bf,sfd->sbd", f, w["decoder.weight"]) + w["decoder.bias"][:, None]
    sae = SAE.load_from_disk(str(two[0] / "saes" / name))
    with torch.no_grad():
        torch.testing.assert_close(f, sae.encode(torch.cat(list(x), 1)), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(torch.cat(list(x_hat), 1), sae(torch.cat(list(x), 1)),
                                   rtol=1e-4, atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("name", SPARSITY)
def test_the_state_dict_has_scaled_rows_and_one_threshold(two, tmp_path, name):
    """By the formulas of CrossCoder and its normalizer (Minder et al.); their own classes read it
    in tests/libraries/crosscoders.sh."""
    from sae_lens import SAE

    export = {"format": "crosscoder", "arm": "a", "sae": name, "paper": "p"}
    call("exports", {"export": export}, sae=two[0] / "manifest.json", out=tmp_path / "out")
    w = torch.load(tmp_path / "out/model_final.pt", weights_only=True)
    x = torch.stack([torch.from_numpy(a[:200]) for a in rows_of_two(5000)], 1)
    scale = w["target_rms"] / (w["activation_std"].pow(2).sum(-1) + 1e-8).sqrt()
    torch.testing.assert_close(scale, w["activation_global_scale"])
    scales = [s["scale"] for s in tables.read_json(two[0] / "manifest.json")["sources"]]
    torch.testing.assert_close(scale, torch.tensor(scales))
    scaled = (x - w["activation_mean"]) * scale[:, None]
    f = torch.relu(torch.einsum("bsd,sdf->bf", scaled, w["encoder.weight"]) + w["encoder.bias"])
    norms = w["decoder.weight"].norm(dim=2).sum(0)
    f = f * (f * norms > w["threshold"]) if "threshold" in w else f
    x_hat = torch.einsum("bf,sfd->bsd", f, w["decoder.weight"]) + w["decoder.bias"]
    x_hat = x_hat / scale[:, None] + w["activation_mean"]
    sae = SAE.load_from_disk(str(two[0] / "saes" / name))
    with torch.no_grad():
        torch.testing.assert_close(f, sae.encode(x.flatten(1)), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(x_hat.flatten(1), sae(x.flatten(1)), rtol=1e-4, atol=1e-3)
    if name == "batchtopk":  # whose norms are folded: f is as in training
        torch.testing.assert_close(norms, torch.ones(32))
        assert int(w["k"]) == 3
    assert int(w["code_normalization_id"]) == 1


def test_thresholds_that_are_not_one_are_refused():
    w = {"decoder.weight": np.ones((2, 3, 4))}
    one = export_layouts.one_threshold(np.full(3, 0.5), w, Path("x"))
    assert one == pytest.approx(0.5 * 4)
    with pytest.raises(RetraceError, match="one threshold for all latents"):
        export_layouts.one_threshold(np.array([0.5, 0.5, 0.6]), w, Path("x"))


@pytest.mark.parametrize("format", ["saelens", "sparsify", "saebench", "neuronpedia"])
def test_a_crosscoder_leaves_in_no_format_of_one_source(two, tmp_path, format, capfd):
    export = {"format": format, "arm": "a", "sae": "standard", "paper": "p"}
    with pytest.raises(SystemExit):
        call("exports", {"export": export}, sae=two[0] / "manifest.json", out=tmp_path / "out")
    assert "export it as crosscoder" in capfd.readouterr().err


# --- faults --------------------------------------------------------------------------------


def test_sources_of_other_tokens_or_another_number_are_refused(tmp_path):
    x, y = rows_of_two(400)
    first = store(tmp_path / "x", {HOOK: (x, x[:20])})
    fewer = store(tmp_path / "y", {HOOK: (y[:380], y[:20])})
    with pytest.raises(RetraceError, match=r"y/manifest\.json.*do not hold the same tokens"):
        SourceStream(
            [Rows(first, HOOK), Rows(fewer, HOOK)], normalize=True, batch_size=8, buffer_rows=64,
            seed=0,
        )  # fmt: skip
    other = store(tmp_path / "z", {HOOK: (y, y[:20])}, block=10)
    with pytest.raises(RetraceError, match="do not hold the same tokens"):
        PairedRows(Rows(first, HOOK), Rows(other, HOOK)).read(0, 400)


def test_columns_are_the_sources_widths():
    assert columns([3, 5]) == [slice(0, 3), slice(3, 8)]


CARD = {
    "title": "t", "authors": "a", "year": 2026, "url": "https://x.org", "model": {},
    "corpus": {"n_tokens": 0}, "arms": {"base": {}, "random": {"weights": "reinit"},
                                        "other": {"corpus": {"shuffle": "tokens"}}},
    "activations": {"hooks": ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]},
}  # fmt: skip
L1 = {"architecture": "standard", "d_sae": 64, "l1_coefficient": 1}
FIRST, SECOND = CARD["activations"]["hooks"]
FAULTS = {
    "one hook": ({"hooks": [FIRST]}, "at least two sources"),
    "one model": ({"models": ["base"], "hook": FIRST}, "at least two sources"),
    "none": ({"hooks": []}, "at least two sources"),
    "twice": ({"hooks": [FIRST, FIRST]}, "stands twice"),
    "unknown arm": ({"models": ["base", "randon"], "hook": FIRST}, "unknown arm 'randon'"),
    "other tokens": ({"models": ["base", "other"], "hook": FIRST}, "read different tokens"),
    "not stored": ({"hooks": [FIRST, "blocks.3.hook_resid_post"]}, "is not stored"),
    "no hook": ({"models": ["base", "random"]}, "name its hook"),
    "arms": ({"models": ["base", "random"], "hook": FIRST, "arms": ["base"]}, "remove one of the"),
    "topk": ({"hooks": [FIRST, SECOND], "architecture": "topk", "k": 3}, "not trained over"),
    "output": ({"hooks": [FIRST, SECOND], "output_hook": SECOND}, "output_hook: not for"),
    "mistyped": ({"hooks": [FIRST, SECOND], "modells": []}, "unknown key 'modells'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_declaration_that_cannot_be_is_one_sentence(fault):
    over, said = FAULTS[fault]
    card = CARD | {"sae": {"dictionaries": {"cc": L1 | over}}}
    with pytest.raises(ValidationError) as e:
        PaperSpec.model_validate(card)
    assert said in str(e.value)


def test_tokens_that_are_dropped_hook_by_hook_are_refused():
    card = CARD | {"sae": {"dictionaries": {"cc": L1 | {"hooks": [FIRST, SECOND]}}}}
    card["activations"] = CARD["activations"] | {"max_norm_ratio": 10}
    with pytest.raises(ValidationError, match="set it to 0"):
        PaperSpec.model_validate(card)


def test_a_crosscoder_stands_under_its_arms_and_in_no_other_section():
    dictionaries = {
        "layers": L1 | {"hooks": [FIRST, SECOND]},
        "tuning": L1 | {"models": ["base", "random"], "hook": SECOND},
        "both": L1 | {"models": ["base", "random"], "hooks": [FIRST, SECOND]},
        "plain": L1 | {"hook": FIRST},
    }
    spec = PaperSpec.model_validate(CARD | {"sae": {"dictionaries": dictionaries}})
    assert set(spec.crosscoders_of("base")) == {"layers", "tuning", "both"}
    assert set(spec.crosscoders_of("random")) == {"layers"}
    assert set(spec.saes_of("base")) == {"plain"}
    both = spec.crosscoders_of("base")["both"]
    assert isinstance(both, CrosscoderSpec)
    assert both.sources("base", FIRST) == [
        (a, h) for a in ("base", "random") for h in (FIRST, SECOND)
    ]
    features = {"features": {"saes": ["layers"], "arm": "base"}}
    with pytest.raises(ValidationError, match="is a crosscoder"):
        PaperSpec.model_validate(CARD | features | {"sae": {"dictionaries": dictionaries}})
