"""Transcoders of all layers: gradients by autograd and by SAELens, devices, files, stages."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from synthetic import call
from test_sae import contents, one_thread  # noqa: F401
from test_sae_jobs import store

from pipeline.crosscoders import layered_files, layered_steps, transcoders
from pipeline.crosscoders.layered import Layered, divided
from pipeline.crosscoders.layered_files import read_clt, read_layers
from pipeline.crosscoders.transcoders import LayeredDictionary
from pipeline.errors import RetraceError
from pipeline.sae import split, steps, transcoder
from pipeline.sae.train import build, train
from pipeline.spec.sae import SaeSpec, SaeTraining, TranscodersSpec
from pipeline.store import tables
from pipeline.store.checkpoints import Checkpoints

SPARSITY = {
    "topk": {"k": 3, "aux_loss_coefficient": 0.5},
    "batchtopk": {"k": 3, "aux_loss_coefficient": 0.5, "topk_threshold_lr": 0.1},
    "jumprelu": {
        "l0_coefficient": 0.4, "jumprelu_bandwidth": 0.6, "jumprelu_init_threshold": 0.2,
        "jumprelu_ste_to_input": True, "pre_act_coefficient": 0.1,
    },
}  # fmt: skip
L, D = 3, 8


def spec(architecture: str, layers: str = "cross", d_sae: int = 24, **more) -> TranscodersSpec:
    options = SPARSITY[architecture] | {"layers": layers, "d_sae": d_sae} | more
    return TranscodersSpec(architecture=architecture, **options)


def stirred(made: TranscodersSpec, n_layers: int = L, devices=("cpu",)) -> Layered:
    """A model whose every parameter is off its start, the same for any devices."""
    model, rng = Layered(made, n_layers, D, devices), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("threshold"):
                p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return model


def rows(n: int = 40, n_layers: int = L) -> torch.Tensor:
    return torch.randn(n, 2 * n_layers * D, generator=torch.Generator().manual_seed(2))


# --- loss and gradients --------------------------------------------------------------------


class Jump(torch.autograd.Function):
    """JumpReLU and its pseudo-derivatives (Rajamanoharan et al. 2024; Ameisen et al. 2025)."""

    @staticmethod
    def forward(ctx, p, theta, width):
        ctx.save_for_backward(p, theta)
        ctx.width = width
        return p * (p > theta)

    @staticmethod
    def backward(ctx, g):
        p, theta = ctx.saved_tensors
        near = ((p - theta).abs() < ctx.width / 2) * theta / ctx.width * g
        return (p > theta) * g + near, -near.sum(0), None


def plainly(model: Layered, both: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """The loss as the papers write it, dense, with autograd."""
    made, (x, y) = model.spec, model.split(both)
    norms = [W.flatten(1).norm(dim=1) for W in model.W_dec]
    p = [x[:, i] @ W.T + b for i, (W, b) in enumerate(zip(model.W_enc, model.b_enc, strict=True))]
    scores = torch.stack([a * n for a, n in zip(p, norms, strict=True)]).detach()
    n_kept = made.k * len(x)
    least = None
    if made.architecture == "topk":
        least = scores.topk(made.k, dim=-1).values[..., -1:]
    elif made.architecture == "batchtopk" and model.cross:
        least = scores.flatten().topk(n_kept * L).values[-1]
    elif made.architecture == "batchtopk":
        least = scores.flatten(1).topk(n_kept, dim=-1).values[:, -1][:, None, None]
    if made.architecture == "jumprelu":
        width = made.jumprelu_bandwidth
        f = [Jump.apply(a, t, width) for a, t in zip(p, model.threshold, strict=True)]
    else:
        f = [a.relu() * keep for a, keep in zip(p, scores >= least, strict=True)]
    y_hat = [b.expand(len(x), -1) for b in model.b_dec]
    for i, span in enumerate(model.spans):
        for m in span:
            y_hat[m] = y_hat[m] + f[i] @ model.W_dec[i][:, m - i]
    for i, W in enumerate(model.W_skip):
        y_hat[i] = y_hat[i] + x[:, i] @ W.T
    r = torch.stack(y_hat, 1) - y
    loss = r.pow(2).sum((1, 2)).mean()
    for i, span in enumerate(model.spans):
        at = dead[i].nonzero()[:, 0]
        if made.architecture == "jumprelu":
            loss = loss + made.l0_coefficient * torch.tanh(4 * norms[i] * f[i]).sum(1).mean()
            below = (model.threshold[i] - p[i]).relu()[:, at] * norms[i][at]
            loss = loss + made.pre_act_coefficient * below.sum(1).mean()
            continue
        e = r[:, list(span)].flatten(1).detach() + p[i][:, at] @ model.W_dec[i][at].flatten(1)
        share = min(1.0, len(at) / (D // 2))
        loss = loss + made.aux_loss_coefficient * share * e.pow(2).sum(1).mean()
    return loss


@pytest.mark.parametrize("layers", ["each", "cross"])
@pytest.mark.parametrize("architecture", SPARSITY)
def test_loss_and_gradients_are_those_of_a_dense_reference(architecture, layers):
    model, both = stirred(spec(architecture, layers, skip=layers == "each")), rows()
    dead = torch.zeros(L, 24, dtype=torch.bool)
    dead[0, :3] = dead[2, 5] = True
    loss = plainly(model, both, dead)
    loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out = layered_steps.step(model, both, dead=dead.flatten())
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(out.errors.sum(), out.mse)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", SPARSITY)
def test_a_cross_layer_transcoder_of_one_layer_is_a_transcoder(architecture):
    """SAELens's own loss and gradients; JumpReLU in its mode tanh."""
    model, both = stirred(spec(architecture), 1), rows(40, 1)
    if architecture == "jumprelu":
        from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

        about = {n: getattr(model.spec, n) for n in ("jumprelu_bandwidth", "jumprelu_ste_to_input",
                                                     "l0_coefficient")}  # fmt: skip
        sae = transcoder.training_class(JumpReLUTrainingSAE, D)(
            JumpReLUTrainingSAEConfig(
                d_in=D, d_sae=24, apply_b_dec_to_input=False, jumprelu_sparsity_loss_mode="tanh",
                pre_act_loss_coefficient=model.spec.pre_act_coefficient, **about,
            )
        )  # fmt: skip
        sae.threshold.data.copy_(model.threshold[0])
    elif architecture == "batchtopk":
        options = SPARSITY[architecture] | {"d_sae": 24, "output_hook": "blocks.0.hook_mlp_out"}
        sae = build(SaeSpec(architecture=architecture, **options), D, d_out=D)
    else:
        pytest.skip("SAELens has no TopK transcoder")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        own = getattr(model, name)[0].detach()
        own = own.T if name == "W_enc" else own
        getattr(sae, name).data.copy_(own.flatten(1) if name == "W_dec" else own)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[4:9] = True
    made = {"l0": 0.4} if architecture == "jumprelu" else {}
    want = steps.reference(sae, both, dead=dead, coefficients=made, step=0)
    out = layered_steps.step(model, both, dead=dead)
    torch.testing.assert_close(out.loss, want.loss.to(out.loss))
    torch.testing.assert_close(out.l0, want.l0)
    torch.testing.assert_close(model.W_enc[0].grad.T, sae.W_enc.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.W_dec[0].grad.flatten(1), sae.W_dec.grad, rtol=1e-4, atol=1e-6)
    if architecture == "batchtopk":
        torch.testing.assert_close(model.topk_threshold[0], sae.topk_threshold)


@pytest.mark.parametrize("architecture", SPARSITY)
def test_layers_divided_among_devices_train_as_on_one(architecture):
    """Two devices that are both the CPU, told apart by their index: two sums, then one."""
    models = [stirred(spec(architecture), L, where) for where in (["cpu"], ["cpu", "cpu:0"])]
    assert len(set(models[1].homes)) == 2
    outs = [layered_steps.step(model, rows()) for model in models]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6)


def test_layers_are_divided_by_their_decoders():
    where = [torch.device("cuda", n) for n in range(2)]
    homes = divided([range(n, 12) for n in range(12)], where)
    load = [sum(13 - n for n, home in enumerate(homes) if home == d) for d in where]
    assert load == [45, 45]


def test_a_job_takes_as_many_gpus_as_hold_its_weights(monkeypatch):
    made = {"cross": spec("topk", d_sae=10), "frozen": spec("topk", d_sae=10, frozen_decoder=True)}
    pairs = [(f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out") for n in range(2)]
    job = transcoders.TranscodersJob(pairs=pairs, training={}, dictionaries=made)
    # of each set two encoders and three decoders of 10 x 4; Adam has two states of what is trained
    assert transcoders.n_bytes(job, 4) == 4 * (3 * 200 + 3 * 80 + 120 + 200)
    gpu = SimpleNamespace(total_memory=1000 / split.ROOM)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=n, **vars(gpu))
    )
    monkeypatch.setattr(split.gpus, "hold", lambda name, _: name != "1")  # another job has 1
    first = torch.device("cuda", 0)
    assert transcoders.devices(first, 900) == [first]
    assert transcoders.devices(first, 1900) == [first, torch.device("cuda", 2)]
    with pytest.raises(RetraceError, match="2 free GPUs"):
        transcoders.devices(first, 2100)


# --- training ------------------------------------------------------------------------------


def planted(n: int, d: int = 16, true: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of two layers, [n 2 d]: features of layer 0 that write to both layers, and
    of layer 1 that write there alone. Also the decoders of the first, [true 2 d]."""
    truth, rng = np.random.default_rng(7), np.random.default_rng(seed)
    reads = np.linalg.qr(truth.normal(size=(d, true)))[0].T
    writes = truth.normal(size=(2, true, 2, d))
    writes /= np.linalg.norm(writes, axis=(2, 3), keepdims=True)
    writes[1, :, 0] = 0
    codes = np.where(rng.random((2, n, true)) < 0.08, rng.uniform(0.5, 1.5, (2, n, true)), 0)
    x = np.einsum("lnf,fd->nld", codes, reads)
    y = np.einsum("lnf,lfmd->nmd", codes, writes)
    return np.concatenate([x, y], 1).astype(np.float32) * 4, writes[0]


class Batches:
    batch_size, target_scale = 256, 1.0

    def __init__(self, both: np.ndarray) -> None:
        self.both = torch.from_numpy(both).flatten(1)

    def batches(self, first: int, last: int):
        for step in range(first, last):
            rng = np.random.default_rng(step)
            yield self.both[rng.integers(0, len(self.both), self.batch_size)]


@pytest.mark.workflow
@pytest.mark.parametrize("architecture", SPARSITY)
def test_training_finds_the_features_that_write_to_two_layers(architecture, one_thread):  # noqa: F811
    both, writes = planted(6000)
    more = {
        "topk": {"k": 2}, "batchtopk": {"k": 1},
        "jumprelu": {"l0_coefficient": 3, "jumprelu_bandwidth": 0.3, "l0_warmup_share": 0.5,
                     "jumprelu_init_threshold": 0.1},
    }[architecture]  # fmt: skip
    more |= {} if architecture == "jumprelu" else {"aux_loss_coefficient": 1 / 32}
    training = SaeTraining(n_rows=256 * 300, batch_size=256, lr=1e-2, dead_rows=5000)
    model = Layered(spec(architecture, **more), 2, 16)
    dictionary = LayeredDictionary("d", model, training, 300, [1.0, 1.0])
    train([dictionary], Batches(both), 300)
    W = model.W_dec[0].detach().flatten(1).numpy()
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    best = (writes.reshape(len(writes), -1) @ W.T).max(1)
    assert (best > 0.95).sum() >= 10, np.sort(best)
    assert dictionary.history[-1][4] > 0.9


# --- files ---------------------------------------------------------------------------------


def weights_of(model: Layered, scales=(2.0, 0.5, 3.0), targets=(0.25, 4.0, 1.5)):
    hooks = [[f"blocks.{n}.{h}" for n in range(L)] for h in ("mlp.hook_in", "hook_mlp_out")]
    return layered_files.folded(model, *hooks, scales, targets)


@pytest.mark.parametrize("layers", ["each", "cross"])
@pytest.mark.parametrize("architecture", SPARSITY)
def test_what_is_written_reads_back_and_does_the_same_on_rows_as_they_are(
    architecture, layers, tmp_path
):
    model = stirred(spec(architecture, layers, skip=layers == "each"))
    model.topk_threshold.fill_(0.7)
    made = weights_of(model)
    about = [{"model_name": "m", "hook_name": h, "hook_name_out": o}
             for h, o in zip(made.hooks, made.output_hooks, strict=True)]  # fmt: skip
    layered_files.write(tmp_path, made, about, {"stage": "t"})
    read = read_layers(tmp_path)
    assert (read.hooks, read.activation, read.k) == (made.hooks, made.activation, made.k)
    scales, targets = torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0.25, 4.0, 1.5])
    x, _ = model.split(rows())
    y_hat = read.forward(x / scales[:, None]) * targets[:, None]
    if architecture == "topk":  # on scaled rows, by the training step: y_hat - y with y = 0
        both = torch.cat([x, torch.zeros_like(x)], 1).flatten(1)
        errors = layered_steps.step(model, both).errors
        torch.testing.assert_close(y_hat.pow(2).sum((0, 2)) / len(x), errors)
    torch.testing.assert_close(y_hat, made.forward(x / scales[:, None]) * targets[:, None])
    if layers == "cross":
        found = sorted(p.name for p in tmp_path.glob("*.safetensors"))
        assert found == sorted(f"W_{w}_{n}.safetensors" for w in ("enc", "dec") for n in range(L))
        assert read.W_dec[1].shape == (24, L - 1, D)
    elif architecture != "topk":
        from sae_lens import SAE

        for n in range(L):
            sae = SAE.load_from_disk(str(tmp_path / f"layer_{n}"))
            torch.testing.assert_close(sae(x[:, n]).detach(), read.forward(x)[:, n])


def test_a_published_cross_layer_transcoder_is_read_without_our_cfg(tmp_path):
    """circuit-tracer's own files: config.yaml, no threshold, so ReLU."""
    made = weights_of(stirred(spec("topk")))
    layered_files.write(tmp_path, made, [{"model_name": "m"}] * L, {"stage": "t"})
    (tmp_path / "cfg.json").unlink()
    text = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (tmp_path / "config.yaml").write_text(text)
    read = read_clt(tmp_path)
    assert read.hooks[2] == "blocks.2.hook_resid_mid" and read.activation == "relu"
    torch.testing.assert_close(read.W_dec[0], made.W_dec[0])


def test_what_cannot_be_read_is_told(tmp_path):
    made = weights_of(stirred(spec("batchtopk")))
    layered_files.write(tmp_path, made, [{"model_name": "m"}] * L, {"stage": "t"})
    (tmp_path / "W_dec_1.safetensors").rename(tmp_path / "away")
    with pytest.raises(RetraceError, match=r"W_dec_1\.safetensors: is missing"):
        read_layers(tmp_path)
    (tmp_path / "W_dec_2.safetensors").rename(tmp_path / "W_dec_1.safetensors")
    with pytest.raises(RetraceError, match=r"has W_dec of 2 of 3 layers|W_dec_2\.safetensors"):
        read_layers(tmp_path)
    (tmp_path / "away").rename(tmp_path / "W_dec_2.safetensors")
    with pytest.raises(RetraceError):
        read_layers(tmp_path)


# --- the stages ----------------------------------------------------------------------------


def stored(folder: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Activations of two layers; the manifest, and the hooks."""
    both, _ = planted(3000)
    pairs = [(f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out") for n in range(2)]
    hooks = [p[0] for p in pairs] + [p[1] for p in pairs]
    held = {h: (both[:2600, i] + 1, both[2600:, i] + 1) for i, h in enumerate(hooks)}
    return store(folder / "acts", held), pairs


def job(pairs, names=tuple(SPARSITY), **more) -> dict:
    training = {"n_rows": 12_800, "batch_size": 128, "lr": 3e-3, "dead_rows": 4000} | more
    kept = {"grid", "arms", "hook", "output_hook", "reads", "writes"}
    made = {n: spec(n, d_sae=32).model_dump(exclude=kept) for n in names}
    made["single"] = spec("topk", "each", d_sae=32, skip=True).model_dump(exclude=kept)
    return {"transcoders": {"pairs": pairs, "training": training, "dictionaries": made}}


def paths(out: Path, manifest: Path) -> dict:
    return {"activations": manifest, "out": out / "manifest.json", "saes": out / "saes",
            "history": out / "history.parquet", "device": "cpu"}  # fmt: skip


@pytest.mark.workflow
def test_a_job_trains_and_judges_all_sets_and_resumes_to_the_same_bytes(
    tmp_path,
    monkeypatch,
    one_thread,  # noqa: F811
):
    manifest, pairs = stored(tmp_path)
    call("transcoders", job(pairs), **paths(tmp_path / "one", manifest))
    table = tmp_path / "table.parquet"
    call(
        "transcoders_evaluation", {}, activations=manifest, device="cpu",
        saes=[tmp_path / "one/manifest.json"], out=table,
    )  # fmt: skip
    judged = tables.read_table(table)
    assert len(judged) == 4 * 3 and set(judged["layer"]) == {0, 1, -1}
    whole = judged[judged["layer"] == -1].set_index("sae")
    assert (whole["explained_variance"] > 0.2).all() and (whole["l0"] > 0).all()
    of_topk = judged[(judged["sae"] == "topk") & (judged["layer"] >= 0)]
    assert (of_topk["l0"] <= 3).all()

    class Killed(Exception):
        pass

    save = Checkpoints.save

    def once(self, step, things):
        save(self, step, things)
        raise Killed

    monkeypatch.setattr(Checkpoints, "save", once)
    cut = job(pairs, checkpoint_seconds=1e-9)
    with pytest.raises(BaseException):  # noqa: B017 - the stage turns it into an exit
        call("transcoders", cut, **paths(tmp_path / "two", manifest))
    assert list((tmp_path / "two").glob("saes.partial/step-*"))
    monkeypatch.undo()
    call("transcoders", job(pairs), **paths(tmp_path / "two", manifest))
    assert contents(tmp_path / "one/saes") == contents(tmp_path / "two/saes")


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"architecture": "standard", "l1_coefficient": 1}, "not trained over all layers"),
        ({"layers": "cross", "skip": True}, "skip: circuit-tracer"),
        ({"layers": "later"}, "each"),
        ({"hook": "blocks.0.hook_mlp_out"}, "write reads and writes in its place"),
        ({"resample_steps": [3]}, "resample_steps"),
    ],
)
def test_a_set_that_cannot_be_is_told(over, said):
    with pytest.raises(ValidationError, match=said):
        TranscodersSpec.model_validate({"layers": "each", "architecture": "topk", "d_sae": 8,
                                        "k": 2} | over)  # fmt: skip


def test_a_layer_that_is_not_stored_is_named():
    made = spec("topk")
    hooks = ["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", "blocks.2.mlp.hook_in"]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_in.*add it to activations\.hooks"):
        made.pairs(hooks)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.hook_in"):
        made.pairs(["blocks.0.hook_resid_post"])


def test_layers_of_different_widths_are_told(tmp_path, capsys):
    both, _ = planted(300)
    pairs = [(f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out") for n in range(2)]
    hooks = [p[0] for p in pairs] + [p[1] for p in pairs]
    held = {h: (both[:200, i], both[200:, i]) for i, h in enumerate(hooks)}
    held[hooks[3]] = tuple(a[:, :10] for a in held[hooks[3]])
    manifest = store(tmp_path / "acts", held)
    with pytest.raises(SystemExit):
        call("transcoders", job(pairs), **paths(tmp_path / "out", manifest))
    assert "need one width" in capsys.readouterr().err
