"""A dictionary whose latents are divided among devices, in Triton's interpreter, against one that
is not: FusedStep, and gradients and Adam of PyTorch."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from test_sae_steps import BATCH, dictionary_at

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline.errors import RetraceError
from pipeline.kernels import choice, gradients
from pipeline.sae import fused, split
from pipeline.sae import sae as stage
from pipeline.sae.optimiser import Optimiser, learning_rate
from pipeline.sae.sparse import Scratch
from pipeline.sae.stream import Stream
from pipeline.sae.train import FAST, Dictionary, summary
from pipeline.spec.sae import SaeSpec, SaeTraining

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, D_IN, D_SAE, STEPS = 18, 12, 30, 3
TRAINING = SaeTraining(
    n_rows=ROWS * 100, batch_size=ROWS, lr=1e-2, warmup_steps=0, precision="bfloat16"
)
N_STEPS = 100


def dictionary(**options):
    sae = dictionary_at("topk", D_IN, D_SAE, "float32", 0.0, **BATCH | NO_AUXK | options)
    sae.b_enc.data[[7, 29]] = 9.0  # active on every row: their gradients are made in pieces
    return sae


NO_AUXK = {"aux_loss_coefficient": 0.0}


def devices_of(n: int) -> list[torch.device]:
    """As many different GPUs as there are."""
    there = torch.cuda.device_count()
    return [torch.device(DEVICE, i % there) if there else torch.device("cpu") for i in range(n)]


def divided(n: int, **options) -> split.SplitDictionary:
    return split.SplitDictionary("d", dictionary(**options), TRAINING, N_STEPS, devices_of(n))


def batches(n: int = STEPS, size: float = 1.0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [(size * torch.randn(ROWS, D_IN, generator=random)).to(DEVICE) for _ in range(n)]


def plain(kind: str, **options):
    """The step of PyTorch or of FusedStep, with its parameters and optimiser."""
    sae = dictionary(**options).to(DEVICE)
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    optimiser = Optimiser(sae, TRAINING)
    if kind == "fused":
        step = fused.FusedStep(sae, optimiser, TRAINING)
        optimiser.adam.param_groups[0]["lr"] = torch.tensor(0.0, device=DEVICE)

        def train(x, i):
            optimiser.set_learning_rate(learning_rate(i, N_STEPS, TRAINING))
            return step(x, dead=None, scratch=Scratch())
    else:

        def train(x, i):
            optimiser.set_learning_rate(learning_rate(i, N_STEPS, TRAINING))
            how = {"dead": None, "coefficients": {}, "step": i, "scratch": Scratch()}
            outcome = FAST["topk"](sae, x, **how)
            optimiser.step()
            return outcome

    return sae, optimiser, train


@pytest.mark.parametrize(
    "n, kind, options, size",
    [
        (1, "torch", {}, 1.0),
        (2, "torch", {}, 1.0),
        (3, "torch", {}, 1.0),
        (2, "fused", {}, 1.0),
        (3, "fused", {"rescale_acts_by_decoder_norm": False}, 1.0),
        (3, "torch", {"k": 9}, 1.0),  # of 10 latents a shard
        (2, "torch", {}, 1e-2),
    ],
)
def test_a_divided_dictionary_is_trained_as_one(n, kind, options, size, monkeypatch):
    monkeypatch.setattr(gradients, "LONG", 8)
    monkeypatch.setattr(choice, "WIDTH", 2)
    sae, optimiser, train = plain(kind, **options)
    ours, scratch = divided(n, **options), Scratch()
    silent = torch.zeros(D_SAE, dtype=torch.int64)
    for i, x in enumerate(batches(size=size)):
        want, got = train(x, i), ours.step(x, i, scratch)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.mse, want.mse)
        assert got.l0.item() == pytest.approx(want.l0.item())
        assert torch.equal(got.fired, want.fired)
        silent = (silent + ROWS).masked_fill(want.fired.cpu(), 0)
        assert torch.equal(ours.dead.rows_since_fired.cpu(), silent)
    found = ours.tensors()
    for name, value in optimiser.tensors().items():
        if name.endswith("step"):
            assert found[name] == value == STEPS
        else:
            torch.testing.assert_close(found[name], value.cpu(), rtol=1e-4, atol=1e-9, msg=name)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(found[f"sae.{name}"], value.cpu(), rtol=0, atol=2e-6, msg=name)
        torch.testing.assert_close(ours.sae.state_dict()[name], found[f"sae.{name}"])
    assert len(ours.shards) == n and sum(shard.n for shard in ours.shards) == D_SAE


@pytest.mark.parametrize("first, second", [(2, 3), (3, 1)])
def test_a_checkpoint_goes_over_to_another_number_of_devices(first, second):
    xs, scratch = batches(4), Scratch()
    undisturbed, before, after = divided(first), divided(first), divided(second)
    for i, x in enumerate(xs):
        outcome = undisturbed.step(x, i, scratch)
        undisturbed.record(outcome, x, i, 2.0)
    for i in (0, 1):
        before.record(before.step(xs[i], i, scratch), xs[i], i, 2.0)
    after.step(xs[3], 0, scratch)  # is forgotten
    after.restore(before.tensors())
    for i in (2, 3):
        after.record(after.step(xs[i], i, scratch), xs[i], i, 2.0)
    same_tensors(after.tensors(), undisturbed.tensors())
    undisturbed.check()


def test_a_checkpoint_is_that_of_an_undivided_dictionary():
    """Either takes up the other's."""
    xs, scratch = batches(4), Scratch()
    one = Dictionary("d", dictionary().to(DEVICE), TRAINING, N_STEPS)
    ours = divided(2)
    for trained in (one, ours):
        for i in (0, 1):
            trained.record(trained.step(xs[i], i, scratch), xs[i], i, 2.0)
    of_one, of_ours = one.tensors(), ours.tensors()
    same_tensors(of_ours, of_one)
    one = Dictionary("d", dictionary().to(DEVICE), TRAINING, N_STEPS)
    ours = divided(3)
    one.restore(of_ours)
    ours.restore(of_one)
    for trained in (one, ours):
        for i in (2, 3):
            trained.record(trained.step(xs[i], i, scratch), xs[i], i, 2.0)
    same_tensors(ours.tensors(), one.tensors())


def same_tensors(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        tight = {"rtol": 1e-4, "atol": 1e-8} if name.startswith("adam") else {}
        tight = {"rtol": 1e-5, "atol": 1e-6} if name == "history" else tight  # of float32
        tight = {"rtol": 0, "atol": 4e-6} if name.startswith("sae") else tight
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, msg=name, **tight)


def test_shards_are_of_nearly_equal_widths():
    assert split.bounds_of(262_144, 2) == [0, 131_072, 262_144]
    assert split.bounds_of(30, 3) == [0, 10, 20, 30]
    for n in range(1, 9):
        bounds = torch.tensor(split.bounds_of(24_576, n))
        widths = bounds.diff()
        assert len(widths) == n and widths.sum() == 24_576 and (widths % 64 == 0).all()
        assert widths.max() <= 1.05 * widths.min()


@pytest.mark.parametrize(
    "architecture, options, training, remedy",
    [
        ("batchtopk", {}, {}, "architecture: topk"),
        ("topk", BATCH, {}, "aux_loss_coefficient: 0"),
        ("topk", BATCH | NO_AUXK, {"precision": "float32"}, "precision: bfloat16"),
    ],
)
def test_what_is_not_divided_says_what_to_change(architecture, options, training, remedy):
    sae = dictionary_at(architecture, D_IN, D_SAE, "float32", 0.0, **options)
    given = TRAINING.model_copy(update=training)
    with pytest.raises(
        RetraceError, match=rf"sae\.d: 30 latents .* set .*{remedy}, or lower d_sae"
    ):
        split.SplitDictionary("d", sae, given, N_STEPS, devices_of(2))


def test_a_frozen_decoder_and_shards_below_k_are_refused():
    sae = dictionary()
    sae.W_dec.requires_grad_(False)
    assert split.unfit(sae, TRAINING) == "frozen_decoder: false"
    with pytest.raises(RetraceError, match="8 shards of 30 latents have fewer than k = 4 each"):
        divided(8)


def test_bytes_of_a_dictionary():
    spec = SaeSpec(architecture="topk", d_sae=262_144, k=32)
    training = TRAINING.model_copy(update={"batch_size": 4096})
    assert split.n_bytes(spec, training, 768) == 26 * 2 * 262_144 * 768 + 2 * 4096 * 262_144


def test_a_dictionary_too_large_for_a_gpu_is_divided_among_as_many_as_hold_it(monkeypatch):
    small = SaeSpec(architecture="topk", d_sae=64, k=4, aux_loss_coefficient=0.0)
    specs = {"small": small, "large": small.model_copy(update={"d_sae": 1024})}
    need = {name: split.n_bytes(spec, TRAINING, D_IN) for name, spec in specs.items()}
    gpu = SimpleNamespace(total_memory=(need["large"] - 1) / split.ROOM)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=n, **vars(gpu))
    )
    held = []
    monkeypatch.setattr(split.gpus, "hold", lambda name, _: name != "1" and not held.append(name))
    first = torch.device("cuda", 0)
    found = split.shared(specs, TRAINING, D_IN, [first])
    assert found == {"large": [first, torch.device("cuda", 2)]} and held == ["2"]
    assert split.shared({"small": small}, TRAINING, D_IN, [first]) == {}
    assert split.shared(specs, TRAINING, D_IN, [torch.device("cpu")]) == {}
    both = [torch.device("cuda", 1), first]  # the job's, so that no other is taken
    assert split.shared(specs, TRAINING, D_IN, both) == {"large": both} and held == ["2"]
    many = {f"d{i}": specs["large"] for i in range(4)}
    said = "4 dictionaries take .* the 3 free GPUs .* or train fewer dictionaries in one paper"
    with pytest.raises(RetraceError, match=said):
        split.shared(many, TRAINING, D_IN, [first])


class Made(Stream):
    """What `prepare` asks of a stream."""

    def __init__(self) -> None:
        self.d_in = self.d_out = D_IN
        self.device = torch.device(DEVICE)

    def median(self, n_rows: int) -> torch.Tensor:
        return torch.cat(batches(2)).median(0).values


def test_a_job_divides_its_dictionaries():
    """As saved folders need it: b_dec begins at the median, and `sae` has all weights."""
    spec = SaeSpec(architecture="topk", d_sae=32, k=4, aux_loss_coefficient=0.0)
    hook = "blocks.0.hook_resid_post"
    job = stage.SaeJob(training=TRAINING, dictionaries={"one": spec}, hook=hook)
    stream = Made()
    about = {"model": "m/model.json", "corpus": "c/tokens.parquet", "n_ctx": 8, "skip_first": 1,
             "prepend_bos": True}  # fmt: skip
    given = devices_of(2)
    (one,) = stage.prepare(job, stream, about)
    (ours,) = stage.prepare(job, stream, about, divided=given)
    assert [shard.device for shard in ours.shards] == given and type(one) is Dictionary
    for i, x in enumerate(batches(2)):
        for trained in (one, ours):
            trained.step(x, i, Scratch())
    for name, value in one.sae.state_dict().items():
        same = {"rtol": 0, "atol": 4e-6, "msg": name}
        torch.testing.assert_close(ours.sae.state_dict()[name], value.cpu(), **same)
    assert summary(ours, spec) == summary(one, spec)
