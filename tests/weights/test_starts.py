"""Fine-tuning: from the weights of another run, all of them or by LoRA; on some documents alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from synthetic import call

from pipeline.errors import RetraceError
from pipeline.spec.training import TrainingSpec
from pipeline.store import tables
from pipeline.weights import batches, lora, trained
from pipeline.weights.batches import Batches
from pipeline.weights.initial import build
from pipeline.weights.members import Members

CPU = torch.device("cpu")
NATIVE = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32, "n_ctx": 6, "bias": "mlp"}
GPT2 = NATIVE | {"family": "gpt2", "bias": "none", "tied": True}


def spec(**more) -> TrainingSpec:
    base = {
        "architecture": NATIVE,
        "data": {"source": "own", "function": "copy_first"},
        "optimiser": {"lr": 0.01},
        "steps": 20,
        "batch_size": 8,
        "start": {"run": "base"},
    }
    return TrainingSpec.model_validate(base | more)


def copies(seed: int) -> Batches:
    """The target at every position is the first token."""

    def draw(step: int) -> tuple:
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        tokens = torch.randint(7, (8, 6), generator=generator)
        return tokens, tokens[:, :1].expand(-1, 6).contiguous()

    return Batches(7, draw, {"test": draw(10**6)})


def weights(architecture: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    """The weights that a run starts from."""
    made = build(spec(architecture=architecture).architecture, 7).float()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, p in made.named_parameters():
        bias = name.endswith("bias") and not (architecture["bias"] == "mlp" and ".mlp." in name)
        state[name] = 0.2 * torch.randn(p.shape, generator=generator) * (not bias)
    return state


def members_of(given: TrainingSpec, start: dict) -> Members:
    return Members(given, [copies(seed) for _, _, seed in given.members()], CPU, start)


def trained_for(given: TrainingSpec, start: dict, steps: int) -> Members:
    out = members_of(given, start)
    for step in range(steps):
        out.step(step)
    return out


LORA = {"rank": 3, "alpha": 6}
BOTH = pytest.mark.parametrize("architecture", [NATIVE, GPT2], ids=["native", "gpt2"])


@BOTH
@pytest.mark.parametrize("how", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_before_the_first_step_it_is_the_model_that_it_starts_from(architecture, how):
    start = weights(architecture)
    made = members_of(spec(architecture=architecture, seeds=[0, 1], **how), start)
    for name, p in made.state_dict().items():
        torch.testing.assert_close(p, start[name].expand_as(p), rtol=0, atol=0)


@BOTH
def test_full_fine_tuning_is_torchs_adamw_on_all_weights(architecture):
    start = weights(architecture)
    given = spec(architecture=architecture)
    ours = trained_for(given, start, 10).state_dict()
    model = build(given.architecture, 7).float()
    model.load_state_dict(start, strict=False)
    free = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] != "bias"
            or (architecture["bias"] == "mlp" and ".mlp." in n)}  # fmt: skip
    plain = torch.optim.AdamW(free.values(), lr=0.01, weight_decay=0.0)
    for step in range(10):
        tokens, targets = copies(0).batch(step)
        plain.zero_grad()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        plain.step()
    for name, p in free.items():
        torch.testing.assert_close(ours[name][0], p.detach(), rtol=1e-4, atol=1e-5)


@BOTH
def test_lora_is_torchs_adamw_on_two_factors_of_each_matrix(architecture):
    """A plain loop: W = W_0 + 2 B A is put into the model before every pass."""
    start = weights(architecture)
    given = spec(architecture=architecture, lora=LORA, optimiser={"lr": 0.03, "clip": 0.5})
    made = members_of(given, start)
    first = made.forward.layout
    pieces = first.drawn(3, 6, seed=0).split(first.sizes)
    drawn = {n: p.view(s) for n, p, s in zip(first.names, pieces, first.shapes, strict=True)}
    model = build(given.architecture, 7).float()
    model.load_state_dict(start, strict=False)
    names = [n for n in start if (".layers." in n or ".h." in n) and start[n].dim() == 2]
    A, B = ({n: drawn[f"{n}.{x}"].clone().requires_grad_() for n in names} for x in "AB")
    plain = torch.optim.AdamW([*A.values(), *B.values()], lr=0.03, weight_decay=0.0)

    def merged() -> dict[str, torch.Tensor]:
        delta = {n: 2 * B[n] @ A[n] for n in names}
        turned = architecture is GPT2
        return {n: start[n] + (d.T if turned else d) for n, d in delta.items()}

    for step in range(12):
        made.step(step)
        tokens, targets = copies(0).batch(step)
        plain.zero_grad()
        logits = torch.func.functional_call(model, merged(), (tokens,)).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_([*A.values(), *B.values()], 0.5)
        plain.step()
    ours = made.state_dict()
    for name, W in merged().items():
        torch.testing.assert_close(ours[name][0], W.detach(), rtol=1e-3, atol=1e-5)
        assert torch.linalg.matrix_rank(ours[name][0] - start[name], atol=1e-4) == 3
    rest = [n for n in start if n not in names and not n.startswith("lm_head")]
    assert rest and all(torch.equal(ours[n][0], start[n]) for n in rest)


def test_members_of_other_ranks_train_as_they_do_alone():
    start = weights(NATIVE)
    arms = {"r1": {"rank": 1, "alpha": 2}, "r3": {}, "slow": {"lr": 0.001, "alpha": 1}}
    how = {"weight_decay": 0.1, "decay": "matrices", "lr": 0.01}
    together = trained_for(spec(lora=LORA, arms=arms, optimiser=how), start, 8)
    ranks = {"r1": {"rank": 1, "alpha": 2}, "r3": LORA, "slow": LORA | {"alpha": 1}}
    for i, (arm, low) in enumerate(ranks.items()):
        lr = arms[arm].get("lr", 0.01)
        alone = members_of(spec(lora=low, optimiser=how | {"lr": lr}), start)
        a, b = together.forward.layout, alone.forward.layout
        drawn = dict(zip(a.names, a.drawn(*together.spec.low_rank(arm), 0).split(a.sizes),
                         strict=True))  # fmt: skip
        cut = []  # the room of a row is the largest rank's
        for name, shape in zip(b.names, b.shapes, strict=True):
            whole = drawn[name].view(a.shapes[a.names.index(name)])
            cut.append(whole[: shape[0]] if not name.endswith(".B") else whole[:, : shape[1]])
        with torch.no_grad():
            alone.flat.copy_(torch.cat([c.flatten() for c in cut])[None])
        for step in range(8):
            alone.step(step)
        for name, W in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name][i], W[0], rtol=1e-3, atol=1e-5)


def test_the_first_factor_is_spread_as_in_peft():
    layout = lora.LowRank.of(build(spec().architecture, 7), spec(lora={"rank": 64, "alpha": 1}))
    row = dict(zip(layout.names, layout.drawn(64, 1, 0).split(layout.sizes), strict=True))
    A = row["model.layers.0.mlp.fc_out.weight.A"]
    assert A.abs().max() <= 32**-0.5 and A.std() == pytest.approx((32 * 3) ** -0.5, rel=0.05)
    assert (row["model.layers.0.mlp.fc_out.weight.B"] == 0).all()
    assert sum(n.endswith(".A") for n in layout.names) == 2 * 6  # q, k, v, o, fc_in, fc_out


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"start": None, "lora": LORA}, "needs start"),
        ({"arms": {"a": {"rank": 2}}}, "arms.a: rank and alpha are of lora"),
        ({"lora": LORA, "optimiser": {"weight_decay": 0.1}}, "optimiser.decay: matrices"),
        ({"data": {"source": "own", "function": "f", "labels": ["x"]}}, "leave them out"),
    ],
)
def test_a_bad_section_is_told_in_one_sentence(more, sentence):
    with pytest.raises(ValidationError, match=sentence):
        spec(**more)


def test_weights_of_another_vocabulary_are_refused():
    start = weights(NATIVE)
    start["model.tok_embed.weight"] = torch.zeros(9, 16)
    with pytest.raises(RetraceError, match=r"run 'base' do not fit .*same architecture"):
        members_of(spec(), start)


# --- some documents alone ------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    """Blocks of documents 0 and 1 (prose) and 2 (verse), a BOS in front of each block."""
    owners = [[-1, 0, 0, 2], [-1, 2, 1, 1], [-1, 2, 2, 1]]
    tokens = [[99, 1, 2, 21], [99, 22, 11, 12], [99, 23, 24, 13]]
    rows = pd.DataFrame({"block": range(3), "split": ["train", "train", "eval"],
                         "tokens": tokens, "documents": owners})  # fmt: skip
    about = pd.DataFrame({"document": [0, 1, 2], "label": ["", "", "verse"]})
    tables.write_table(tmp_path / "tokens.parquet", rows, {})
    tables.write_table(tmp_path / "documents.parquet", about, {})
    return tmp_path / "tokens.parquet", tmp_path / "documents.parquet"


def test_documents_of_a_label_are_joined_and_the_others_held_out_beside_them(corpus):
    found = batches.read_labelled(*corpus, ["verse"])
    want = {"train": [21, 22], "eval": [23, 24], "other": [13]}
    assert {split: ids.tolist() for split, ids in found.items()} == want
    found = batches.read_labelled(*corpus, [""])
    assert found["train"].tolist() == [1, 2, 11, 12] and found["other"].tolist() == [23, 24]
    assert "other" not in batches.read_labelled(*corpus, ["", "verse"])


def test_a_label_that_no_document_has_is_told(corpus):
    with pytest.raises(RetraceError, match=r"the label 'vers' \(did you mean 'verse'\?\)"):
        batches.read_labelled(*corpus, ["vers"])


def test_the_stage_goes_on_from_another_run(tmp_path):
    """Two runs on two labels; the second starts where the first ended, and `other` is the first's
    text."""
    rng = np.random.default_rng(0)
    owners = np.repeat([0, 1], 300)
    ids = np.where(owners == 0, rng.integers(0, 3, 600), rng.integers(3, 6, 600))
    shape = (60, 10)
    rows = pd.DataFrame({
        "block": range(60), "split": ["train", "eval"] * 30,
        "tokens": list(ids.reshape(shape)), "documents": list(owners.reshape(shape)),
    })  # fmt: skip
    about = pd.DataFrame({"document": [0, 1], "label": ["low", "high"]})
    tables.write_table(tmp_path / "tokens.parquet", rows, {})
    tables.write_table(tmp_path / "documents.parquet", about, {})
    tables.write_json(tmp_path / "model.json", {"d_vocab": 6}, {})
    shared = {"steps": 30, "eval_every": 30, "batch_size": 4}

    def run(name: str, label: str, **more) -> trained.Run:
        given = spec(data={"source": "corpus", "labels": [label]}, **shared, **more)
        out = tmp_path / f"{name}-0"
        start = {} if given.start is None else {"start": tmp_path / "base-0/manifest.json"}
        call(
            "training", {"training": given.model_dump(mode="json")}, device="cpu",
            corpus=tmp_path / "tokens.parquet", documents=tmp_path / "documents.parquet",
            tokenizer=tmp_path / "model.json", out=out / "manifest.json",
            checkpoints=out / "checkpoints", history=out / "history.parquet", **start,
        )  # fmt: skip
        return trained.open_run(out / "manifest.json")

    base = run("base", "low", start=None)
    tuned = run("tuned", "high", lora=LORA, optimiser={"lr": 0.03})
    first, last = tuned.stacked(0), base.stacked(-1)
    assert all(torch.equal(first[name], last[name]) for name in last)
    ends = {r: t.history.set_index(["set", "step"])["loss"] for r, t in (("b", base), ("t", tuned))}
    assert ends["t"]["other", 0] == pytest.approx(ends["b"]["val", 30], rel=1e-6)
    assert ends["t"]["val", 30] < ends["t"]["val", 0]
    assert ends["t"]["other", 30] > ends["t"]["other", 0]
    logits = tuned.model("s0")(torch.tensor([[3, 4]])).logits
    assert logits.isfinite().all()
