"""Training: AdamW as torch has it, members that do not see each other, resumed runs, faults."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import warm
from conftest import ROOT, environment, stage
from pydantic import ValidationError

from pipeline.errors import RetraceError
from pipeline.models import native
from pipeline.spec.training import Architecture, Optimiser, TrainingSpec
from pipeline.store import provenance
from pipeline.weights import batches, initial, trained, training
from pipeline.weights.members import Members

CPU = torch.device("cpu")
SMALL = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_mlp": 32, "act_fn": "relu", "n_ctx": 6}
# Softmax does not see a bias of the keys: its gradient is rounding, which Adam makes steps of. So
# weights are compared where attention has no biases.
NO_KEY_BIAS = SMALL | {"bias": "mlp"}
DATA = '''
import torch
from pipeline.weights.batches import Batches

def copy_first(options, seed, batch_size, n_ctx, device):
    """The target at every position is the first token."""
    def draw(step):
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        tokens = torch.randint(options["d"], (batch_size, n_ctx), generator=generator).to(device)
        return tokens, tokens[:, :1].expand(-1, n_ctx).contiguous()
    return Batches(options["d"], draw, {"test": draw(10**6)})

def wrong_tokens(options, seed, batch_size, n_ctx, device):
    tokens = torch.full((batch_size, n_ctx), 9)
    return Batches(5, lambda step: (tokens, tokens))

def wrong_shapes(options, seed, batch_size, n_ctx, device):
    tokens = torch.zeros(batch_size, n_ctx, dtype=torch.long)
    return Batches(5, lambda step: (tokens, tokens[:, 0]))

def nothing(options, seed, batch_size, n_ctx, device):
    pass
'''


def spec(**more) -> TrainingSpec:
    base = {
        "architecture": SMALL,
        "data": {"source": "own", "function": "copy_first", "options": {"d": 7}},
        "optimiser": {"lr": 0.01},
        "steps": 40,
        "batch_size": 8,
        "eval_every": 10,
    }
    return TrainingSpec.model_validate(base | more)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("paper") / "data.py"
    file.write_text(DATA)
    return file


def members_of(given: TrainingSpec, data: Path) -> Members:
    seeds = [seed for _, _, seed in given.members()]
    return Members(given, [batches.own(data, given, s, CPU) for s in seeds], CPU)


def trained_for(given: TrainingSpec, data: Path, steps: int) -> Members:
    out = members_of(given, data)
    for step in range(steps):
        out.step(step)
    return out


# --- the model -----------------------------------------------------------------------------


def drawn(seed: int = 0, d_vocab: int = 11, **more) -> native.NativeForCausalLM:
    architecture = Architecture.model_validate(SMALL | more)
    out = initial.build(architecture, d_vocab)
    initial.initial(out, architecture, seed)
    for p in out.parameters():  # biases, too, so that none can be forgotten
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return out.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n_layers": 2, "d_mlp": 0},
        {"normalization": "none", "d_head": 4},
        {"positional": "rotary", "act_fn": "gelu_new"},
    ],
    ids=["plain", "attention only", "no norm", "rotary"],
)
def test_logits_equal_transformer_lens(more):
    model = drawn(**more)
    tokens = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(native.to_bridge(model)(tokens), model(tokens).logits)


@pytest.mark.parametrize("more", [{}, {"positional": "rotary"}, {"smeared_keys": True}])
def test_fused_attention_is_the_pattern_times_v(more):
    """What training on a GPU runs in place of the scores, with the same gradients."""
    attention = drawn(**more).model.layers[0].attn.requires_grad_()
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    want = attention.pattern(x) @ attention.heads(attention.v(x))
    got = attention.fused(x)
    weights = [x, *(p for n, p in attention.named_parameters() if n[0] != "o")]
    torch.testing.assert_close(got, want)
    pull = torch.randn(want.shape, generator=torch.Generator().manual_seed(4))
    for a, b in zip(*(torch.autograd.grad(z, weights, pull) for z in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_smeared_keys_mix_with_those_before():
    """a = ln 3 gives s = 3/4: k_1 is three quarters itself and a quarter k_0; k_0 stays."""
    keys = native.SmearedKeys(4, 2, 2)
    x = torch.randn(1, 3, 4)
    torch.nn.init.constant_(keys.smear, math.log(3))
    plain = F.linear(x, keys.weight, keys.bias)
    want = torch.cat([plain[:, :1], 0.75 * plain[:, 1:] + 0.25 * plain[:, :-1]], 1)
    torch.testing.assert_close(keys(x), want)


def test_a_bridge_of_smeared_keys_is_refused():
    with pytest.raises(RetraceError, match="smeared_keys"):
        native.to_bridge(drawn(smeared_keys=True))


@pytest.mark.parametrize("init, sd", [("gpt2", 0.02), ("inverse_sqrt", 1 / 8)])
def test_first_weights_have_the_papers_spread(init, sd):
    wide = SMALL | {"d_model": 64, "d_mlp": 256, "init": init, "n_layers": 2}
    architecture = Architecture.model_validate(wide)
    model = initial.build(architecture, 100)
    initial.initial(model, architecture, 0)
    named = {n: p.detach() for n, p in model.named_parameters()}
    layer = "model.layers.1."
    assert named[layer + "mlp.fc_in.weight"].std() == pytest.approx(sd, rel=0.05)
    into_stream = sd / 2 if init == "gpt2" else sd  # sqrt(2 · 2 layers)
    assert named[layer + "mlp.fc_out.weight"].std() == pytest.approx(into_stream, rel=0.05)
    head = sd if init == "gpt2" else 1 / 10
    assert named["model.head.weight"].std() == pytest.approx(head, rel=0.05)
    assert all((p == 0).all() for n, p in named.items() if n.endswith("bias"))


GPT2 = {"family": "gpt2", "bias": "none", "tied": True, "d_mlp": 64}


def test_biases_that_are_not_trained_stay_zero(data):
    made = trained_for(spec(architecture=SMALL | GPT2), data, 5)
    state = made.state_dict()
    biases = [p for n, p in state.items() if n.endswith("bias")]
    assert biases and all((p == 0).all() for p in biases)
    assert not any(n.startswith("lm_head") for n in state)  # tied: one tensor


# --- the optimiser -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"lr": 0.01, "weight_decay": 0.5},
        {"lr": 0.01, "weight_decay": 0.5, "decay": "matrices", "clip": 0.05},
        {"lr": 0.01, "betas": [0.8, 0.95], "warmup_steps": 4, "schedule": "cosine", "min_lr": 1e-3},
    ],
    ids=["decay", "matrices and clipping", "warm-up and cosine"],
)
@pytest.mark.parametrize("family", ["native", "gpt2"])
def test_a_step_is_that_of_torchs_adamw(data, how, family):
    """A plain loop over the same batches: torch.optim.AdamW, its clipping, a scheduler by hand."""
    given = spec(architecture=SMALL | GPT2 if family == "gpt2" else NO_KEY_BIAS, optimiser=how)
    ours = trained_for(given, data, 12)
    start = members_of(given, data)
    model = start.forward.model
    model.load_state_dict({n: p[0] for n, p in start.state_dict().items()}, strict=False)
    named = {n: p for n, p in model.named_parameters() if n in start.forward.layout.names}
    rest = [p for n, p in model.named_parameters() if n not in named]
    decays = [p for p in named.values() if given.optimiser.decay == "all" or p.dim() > 1]
    others = [p for p in named.values() if not any(p is d for d in decays)]
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    o = given.optimiser
    plain = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    for step in range(12):
        for group in plain.param_groups:
            group["lr"] = initial.learning_rate(o, o.lr, step + 1, given.steps)
        tokens, targets = start.data[0].batch(step)
        plain.zero_grad()
        logits = model(tokens).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        if o.clip:
            torch.nn.utils.clip_grad_norm_(named.values(), o.clip)
        for p in rest:
            p.grad = None
        plain.step()
    want = torch.cat([named[n].detach().flatten() for n in ours.forward.layout.names])
    torch.testing.assert_close(ours.flat.detach()[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "step, want", [(1, 0.1), (5, 0.5), (10, 1.0), (15, 0.55), (20, 0.1), (30, 0.1)]
)
def test_warm_up_and_cosine(step, want):
    """From 0.1 to 1 over ten steps, then half a cosine to 0.1 at step 20."""
    how = Optimiser(lr=1, warmup_steps=10, schedule="cosine", min_lr=0.1, decay_steps=20)
    assert initial.learning_rate(how, 1.0, step, 50) == pytest.approx(want)


# --- members -------------------------------------------------------------------------------


def test_members_are_those_that_train_alone(data):
    both = {"architecture": NO_KEY_BIAS, "seeds": [3, 4]}
    both |= {"arms": {"decay": {"weight_decay": 0.3}, "slow": {"lr": 0.001}}}
    together = trained_for(spec(**both), data, 10)
    names = [name for name, _, _ in together.spec.members()]
    assert names == ["decay_s3", "decay_s4", "slow_s3", "slow_s4"]
    for i, how in enumerate([{"weight_decay": 0.3}] * 2 + [{"lr": 0.001}] * 2):
        one = {"seeds": [3 + i % 2], "optimiser": {"lr": 0.01} | how}
        alone = trained_for(spec(architecture=NO_KEY_BIAS, **one), data, 10)
        torch.testing.assert_close(together.flat[i], alone.flat[0], rtol=1e-4, atol=1e-5)
    assert (together.flat[0] - together.flat[1]).abs().max() > 0.01


def test_evaluation_counts_only_what_has_a_target(data):
    made = members_of(spec(), data)
    tokens, targets = made.data[0].evaluation["test"]
    targets[:, 1:] = batches.IGNORED
    logits = made.forward.each(made.forward.logits, made.flat, tokens[None])[0, :, 0].double()
    made.evaluate(0)
    want = F.cross_entropy(logits, targets[:, 0]).item()
    assert made.curves.rows[0][3] == pytest.approx(want, rel=1e-6)
    assert made.curves.rows[0][4] == (logits.argmax(-1) == targets[:, 0]).double().mean().item()


def test_a_compiled_model_with_another_gradient_is_not_trained(data, caplog):
    """Equal losses are not enough: here one weight matrix has the gradient of its negative."""
    made = members_of(spec(seeds=[0, 1]), data)
    forward, layout = made.forward, made.forward.layout
    at = layout.names.index("model.layers.0.attn.q.weight")
    cut = (sum(layout.sizes[:at]), sum(layout.sizes[: at + 1]))

    def same(flat, *batch):
        return forward.total_loss(flat, *batch)

    def other(flat, *batch):
        q = flat[:, slice(*cut)]
        negated = 2 * q.detach() - q  # has the same value
        flat = torch.cat([flat[:, : cut[0]], negated, flat[:, cut[1] :]], 1)
        return forward.total_loss(flat, *batch)

    assert forward.checked(same, made.flat, *made.batch(0)) is same
    assert forward.checked(other, made.flat, *made.batch(0)) == forward.total_loss
    assert "gradient of model.layers.0.attn.q.weight wrong by 2 of its size" in caplog.text


# --- data ----------------------------------------------------------------------------------


def test_windows_of_a_corpus_are_pieces_of_its_text():
    tokens = {"train": np.arange(1000, dtype=np.int32), "eval": np.arange(50, dtype=np.int32)}
    given = spec(data={"source": "corpus"}, batch_size=4)
    made = batches.of_corpus(tokens, 1000, given, 0, CPU)
    x, y = made.batch(700)
    assert (x[:, 1:] == x[:, :-1] + 1).all() and (y == x + 1).all()
    again, _ = batches.of_corpus(tokens, 1000, given, 0, CPU).batch(700)
    other, _ = batches.of_corpus(tokens, 1000, given, 1, CPU).batch(700)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert not torch.equal(x, made.batch(701)[0])
    held_out = made.evaluation["val"][0]
    assert held_out.flatten().tolist() == list(range(48))


def test_a_text_shorter_than_a_window_is_refused():
    tokens = {"train": np.arange(1000, dtype=np.int32), "eval": np.arange(6, dtype=np.int32)}
    with pytest.raises(RetraceError, match="6 eval tokens are not even one window of n_ctx 6"):
        batches.of_corpus(tokens, 1000, spec(), 0, CPU)


@pytest.mark.parametrize(
    "function, sentence",
    [
        ("copy_frist", r"no function 'copy_frist' \(did you mean 'copy_first'\?\)"),
        ("wrong_tokens", "batch holds token 9, d_vocab is 5"),
        ("wrong_shapes", r"tokens \[8, 6\] and targets \[8\]"),
        ("nothing", "returned NoneType; return Batches of pipeline.weights.batches"),
    ],
)
def test_wrong_data_is_told_in_one_sentence(data, function, sentence):
    given = spec(data={"source": "own", "function": function})
    with pytest.raises(RetraceError, match=sentence):
        batches.own(data, given, 0, CPU)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"architecture": SMALL | {"n_heads": 3}}, "no multiple of n_heads 3"),
        ({"architecture": SMALL | {"tied": True}}, "family native has no tied: True; use gpt2"),
        ({"architecture": SMALL | {"family": "gpt2", "d_mlp": 0}}, "family gpt2 has no d_mlp: 0"),
        ({"data": {"source": "own"}}, "needs function"),
        ({"data": {"source": "corpus"}, "batch_size": 0}, "needs batch_size"),
        ({"seeds": [1, 1]}, "name one twice"),
        ({"checkpoints": {"at": [41]}}, "41 is not among the 40 steps"),
        ({"stepps": 3}, "unknown key 'stepps' (did you mean 'steps'?)"),
    ],
)
def test_a_bad_section_is_told_in_one_sentence(more, sentence):
    with pytest.raises(ValidationError) as e:
        spec(**more)
    assert sentence in str(e.value)


# --- the stage -----------------------------------------------------------------------------

LONG = {
    **spec().model_dump(mode="json"),
    "steps": 120,
    "seeds": [0, 1],
    "checkpoints": {"every": 40},
    "resume_seconds": 0.01,
}


def arguments(out: Path, data: Path) -> dict[str, str]:
    return {
        "data": str(data), "out": str(out / "manifest.json"), "device": "cpu", "threads": "1",
        "checkpoints": str(out / "checkpoints"), "history": str(out / "history.parquet"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    stage("training", {"training": LONG}, **arguments(out, data))
    return out


def contents(folder: Path) -> dict[str, str]:
    files = [*sorted((folder / "checkpoints").iterdir()), folder / "history.parquet"]
    return {f.name: provenance.content_digest(f) for f in files}


@pytest.mark.workflow
def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_another(made, data, tmp_path):
    command = [
        warm.python(),
        "-m",
        "pipeline",
        "training",
        "--spec",
        json.dumps({"training": LONG}),
    ]
    for option, value in arguments(tmp_path, data).items():
        command += [f"--{option}", value]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints.partial/step-*")) and time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "checkpoints").exists()
    told = stage("training", {"training": LONG}, **arguments(tmp_path, data)).stderr
    assert "resumed at step" in told
    assert contents(tmp_path) == contents(made)


@pytest.mark.workflow
def test_a_run_killed_while_it_moves_its_weights_starts_anew(made, data, tmp_path, monkeypatch):
    """The state is left, the weights are not: what goes on from it would lack its first ones."""
    argv = ["training", "--spec", json.dumps({"training": LONG})]
    for option, value in arguments(tmp_path, data).items():
        argv += [f"--{option}", value]
    monkeypatch.setattr(sys, "argv", argv)

    def killed(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            training.main()
    assert list(tmp_path.glob("checkpoints.partial/step-*"))
    shutil.rmtree(tmp_path / "checkpoints.partial/weights")
    training.main()
    assert contents(tmp_path) == contents(made)


def test_a_run_is_read_back(made, data):
    run = trained.open_run(made / "manifest.json")
    assert run.members == ["s0", "s1"] and run.steps == [0, 40, 80, 120]
    tokens, targets = run.batches("s1", data).evaluation["test"]
    loss = F.cross_entropy(run.model("s1")(tokens).logits.flatten(0, 1), targets.flatten())
    last = run.history.query("member == 's1' and step == 120")
    assert last["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    curve = run.history.query("member == 's1'")
    assert curve["loss"].iloc[-1] < 0.5 * curve["loss"].iloc[0]  # it learns
    best = F.cross_entropy(run.model("s1", trained.BEST)(tokens).logits.mT, targets)
    assert best.item() == pytest.approx(curve["loss"].min(), rel=1e-5)
    with pytest.raises(RetraceError, match="keeps no checkpoint of step 41"):
        run.stacked(41)
    with pytest.raises(RetraceError, match=r"no member 's11' \(did you mean 's1'\?\)"):
        run.model("s11")


def test_history_has_a_row_a_member_step_and_set(made):
    frame = pd.read_parquet(made / "history.parquet")
    assert len(frame) == 2 * 13
    assert frame["tokens"].max() == 120 * 8 * 6
    assert frame.query("step > 0")["lr"].unique() == pytest.approx([0.01])


@pytest.mark.workflow
def test_a_loss_that_is_not_finite_is_told(data, tmp_path):
    wild = {**LONG, "optimiser": {"lr": 1e12}, "resume_seconds": 60}
    done = stage("training", {"training": wild}, check=False, **arguments(tmp_path, data))
    assert done.returncode == 1 and not (tmp_path / "manifest.json").exists()
    assert "has a loss that is not finite at step" in done.stderr and "lower" in done.stderr


@pytest.mark.workflow
@pytest.mark.parametrize("more", [{}, GPT2], ids=["native", "gpt2"])
def test_a_trained_model_is_a_model_like_any_other(data, tmp_path, more):
    """The stage `model` takes it out of the run, and the stages' loader gives the same logits."""
    from pipeline.models import hooks, loader

    short = {**LONG, "steps": 20, "checkpoints": {}, "architecture": SMALL | more}
    stage("training", {"training": short}, **arguments(tmp_path, data))
    section = {"source": "training", "run": "main", "member": "s1"}
    stage("model", {"model": section}, training=tmp_path / "manifest.json",
          out=tmp_path / "m/model.json", checkpoint=tmp_path / "m/checkpoint")  # fmt: skip
    loaded = loader.load(tmp_path / "m/model.json")
    tokens = torch.randint(0, 7, (2, 6))
    want = trained.open_run(tmp_path / "manifest.json").model("s1")(tokens).logits
    torch.testing.assert_close(loaded.hf(tokens).logits, want)
    stream = hooks.run_to(loaded.hf, tokens, ["blocks.0.hook_resid_post"])
    assert stream["blocks.0.hook_resid_post"].shape == (2, 6, 16)
    assert loaded.tokenizer is None and loaded.bos_id is None


def test_logits_of_the_last_position_alone_are_those_of_all():
    model = drawn(n_layers=2, positional="rotary")
    tokens = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(2))
    whole = model(tokens).logits[:, -2:]
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole)
    torch.testing.assert_close(model(tokens, logits_to_keep=2, trim=True).logits, whole)


@pytest.mark.parametrize("d_vocab", [11, native.SMALL_VOCABULARY + 1])
def test_embedding_in_training_is_the_lookup(d_vocab):
    made = native.Embedding(d_vocab, 5)
    tokens = torch.randint(0, d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.train()(tokens), made.eval()(tokens))
