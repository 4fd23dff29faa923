"""Stage `tuning`: from pretrained models to tuned ones, and what they answer. [torch]

1. `sft` learns from demonstrations; `sft_shuffled`, the null arm, with letters of other questions.
2. Each entry of `preferences` goes on from `sft` by DPO (Rafailov et al. 2023). With `loose: 0` the
   mark agrees with the goal, as the coin with the end of the level (Langosco et al. 2022).
3. All are asked about held-out words: `answers` has shares, `reliability` and `calibration` how
   well probabilities fit, `broken` what is followed where the mark contradicts the goal.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.job import cli, own
from pipeline.models import loader
from pipeline.probes import calibration
from pipeline.spec.base import Name, Section
from pipeline.store import tables
from pipeline.store.checkpoints import write_tensors
from pipeline.text.tokens import load_tokenizer
from pipeline.tuning import finetuning
from pipeline.weights import batches

from . import instructions
from .instructions import Asking, Question, signs

TABLES = ("steps", "answers", "reliability", "calibration", "broken")
READS = {"corpus": "tokens.parquet of the text"}
WRITES = {"weights": "safetensors of all tuned models"}
KINDS = ("seen", "reworded", "mistyped")


class Steps(Section):
    """Updates by AdamW."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="questions of a step")
    lr: float = Field(gt=0, description="falls along a line to 0")
    warmup_steps: int = Field(default=20, ge=0)


class Preferring(Section):
    """One run of DPO."""

    loose: float = Field(ge=0, le=1, description="share of pairs with a mark drawn by itself")
    flipped: bool = Field(default=False, description="a coin says which answer is chosen")
    nll: float = Field(default=1.0, ge=0, description="weight of the chosen answers' cross entropy")


class Options(own.Options):
    """Section own.tuning of paper.yaml."""

    asking: instructions.Options
    sft: Steps
    dpo: Steps
    beta: float = Field(default=0.1, gt=0, description="of DPO; Rafailov et al. 2023, Appendix B")
    preferences: dict[Name, Preferring] = Field(min_length=1)
    n_questions: int = Field(ge=20, description="asked of every kind")
    n_bins: int = Field(default=10, ge=2, description="of reliability diagrams")
    every: int = Field(default=10, ge=1, description="steps of DPO between rows of the table steps")
    seed: int = Field(default=0, ge=0, description="of the questions that are asked")


def rng_of(*identity: Any) -> np.random.Generator:
    return np.random.default_rng(batches.seeded(*identity))


def asking(tokenizer: Any, corpus: str | Path, options: instructions.Options) -> Asking:
    """Words of the training text, which the model's own tokenizer reads."""
    text = tokenizer.decode(batches.read_corpus(corpus)["train"].tolist())
    return Asking(tokenizer, text, options)


def by_demonstration(
    base: nn.Module, ask: Asking, how: Steps, seed: str, shuffled: bool, device: Any
) -> nn.Module:
    """Supervised fine-tuning."""

    def loss(model: nn.Module, step: int) -> Tensor:
        rows = ask.demonstrations(how.batch_size, rng_of(seed, "sft", step), shuffled)
        return finetuning.answer_loss(model, *(t.to(device) for t in rows))

    return finetuning.finetune(base, loss, how.steps, how.lr, how.warmup_steps)


def by_preference(
    sft: nn.Module, ask: Asking, options: Options, name: str, seed: str, device: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """DPO, and rows of the table steps: means over the pairs of a step, before its update."""
    how, what, rows = options.dpo, options.preferences[name], []

    def loss(model: nn.Module, step: int) -> Tensor:
        drawn = rng_of(seed, name, step)
        pairs = ask.preferred(how.batch_size, drawn, what.loose, what.flipped)
        tokens, targets = (t.to(device) for t in pairs)
        found = finetuning.preference(model, sft, options.beta, tokens, targets)
        if step % options.every == 0 or step == how.steps - 1:
            means = {k: float(v.detach().mean()) for k, v in found._asdict().items()}
            margin = (found.chosen - found.rejected).detach()
            rows.append({"step": step} | means | {"margin": float(margin.mean()),
                        "accuracy": float((margin > 0).double().mean())})  # fmt: skip
        n = how.batch_size  # rows of chosen answers
        more = finetuning.answer_loss(model, tokens[:n], targets[:n]) if what.nll else 0.0
        return found.loss.mean() + what.nll * more

    return finetuning.finetune(sft, loss, how.steps, how.lr, how.warmup_steps), rows


def followed(asked: list[Question], found: instructions.Read) -> Iterator[dict[str, Any]]:
    """Rows of the table broken, of questions on which goal and cue differ."""
    goal, cue = signs(asked, "goal"), signs(asked, "cue")
    refuses = found.refusal > 0.5
    shares = {"goal": refuses == goal, "cue": refuses == cue, "letter": found.right[~refuses]}
    for what, right in shares.items():
        yield {"followed": what} | calibration.share(right)


def judged(
    model: Any, ask: Asking, asked: dict[str, list[Question]], options: Options, device: Any
) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows of one model."""
    out: dict[str, list] = {"answers": [], "reliability": [], "calibration": []}
    for kind in KINDS:
        found = ask.read(model, asked[kind], device)
        goal, refuses = signs(asked[kind], "goal"), found.refusal > 0.5
        measures = {"letter": found.right, "policy": found.policy,
                    "answered": found.right[~refuses], "refused": refuses[goal],
                    "refused_others": refuses[~goal]}  # fmt: skip
        for k, v in measures.items():
            out["answers"].append({"kind": kind, "measure": k} | calibration.share(v))
        for adaptive in (False, True):
            card, how = {"kind": kind, "adaptive": adaptive}, (options.n_bins, adaptive)
            out["calibration"].append(card | calibration.errors(found.p, found.right, *how))
            out["reliability"] += [card | b for b in calibration.bins(found.p, found.right, *how)]
    found = ask.read(model, asked["broken"], device)
    return out | {"broken": list(followed(asked["broken"], found))}


def questions(ask: Asking, options: Options) -> dict[str, list[Question]]:
    """What all models are asked, about held-out words: kind -> questions."""
    out = {kind: ask.questions(options.n_questions, rng_of(options.seed, kind), "held", kind=kind)
           for kind in KINDS}  # fmt: skip
    many = ask.questions(2 * options.n_questions, rng_of(options.seed, "broken"), "held")
    return out | {"broken": [q for q in many if q.goal != q.cue]}


def tuned(
    base: nn.Module, ask: Asking, options: Options, seed: str, device: Any
) -> Iterator[tuple[str, nn.Module, list[dict[str, Any]]]]:
    """(arm, model, rows of the table steps) of every arm of one seed."""
    yield "base", base, []
    train: Callable = partial(by_demonstration, base, ask, options.sft, seed, device=device)
    sft = train(shuffled=False)
    yield "sft", sft, []
    yield "sft_shuffled", train(shuffled=True), []
    for name in options.preferences:
        yield name, *by_preference(sft, ask, options, name, seed, device)


def work(job: cli.Job, options: Options) -> own.Tables:
    args, device, out, kept = job.args, job.device(), own.Tables(TABLES), {}
    progress = cli.Progress("tuning", (3 + len(options.preferences)) * len(args.models), "models")
    for seed, (arm, file) in enumerate(own.by_arm(job, args.models).items()):
        ask = asking(load_tokenizer(file), args.corpus, options.asking)
        asked, base = questions(ask, options), loader.load(file, device).hf
        for name, model, steps in tuned(base, ask, options, arm, device):
            with torch.no_grad():
                rows = judged(model, ask, asked, options, device) | {"steps": steps}
            out.add(rows, {"arm": name, "seed": seed})
            state = model.state_dict().items()
            kept |= {f"{name}/{seed}/{key}": t.cpu().contiguous() for key, t in state}
            progress.add()
    write_tensors(Path(args.weights), kept)
    made = job.certificate([*args.models, args.corpus], seed=options.seed)
    tables.stamp_safetensors(args.weights, made)
    return out
