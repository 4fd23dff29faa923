"""Greater-than by latents of a transcoder, and by neurons of the MLP that it replaces. [torch]

After Dunefsky et al. 2024 (2406.11944), "greater-than" in GPT-2, on the prompts of Hanna et al.
2023 (2305.00586): "The war lasted from the year 1742 to the year 17". Where a tokenizer splits
digits the next token is the tens digit, and

    difference = p(digits above the first year's) - p(digits below it)

1. `effects` sets the MLP of one layer, at the last position, to its mean over prompts; the layer of
   `from_layer` or above whose mean costs most is taken apart (theirs is MLP 10 of 12; the first
   layers' MLPs tell which token stands there, and without that nothing is left).
2. Units, latents or neurons, are ranked by |gradient x (activation - mean)|, mean over the first
   half of the prompts.
3. `kept` leaves the first n units as they are on the other half, all others at their means. What a
   transcoder does not reconstruct stays at its mean, too.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from pipeline.crosscoders.layered_files import LayerWeights
from pipeline.errors import RetraceError
from pipeline.job import cli, own
from pipeline.models import hooks, loader, splice
from pipeline.spec.base import Name
from pipeline.text import tokens as text

from .finetuning import found_in

TABLES = ("effects", "kept")
NOUNS = "war siege strike reign trial study voyage drought plague dispute campaign marriage".split()
Edit = Callable[[Tensor], Tensor]


class Options(own.Options):
    """Section own.greater of paper.yaml."""

    arm: Name = Field(default="trained", description="whose model and dictionaries are compared")
    dictionaries: list[Name] = Field(min_length=1, description="transcoders of each layer")
    from_layer: int = Field(default=0, ge=0, description="the lowest, or the last, to take apart")
    n_prompts: int = Field(default=100, ge=4)
    n_units: list[int] = Field(default=[0, 1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512])
    seed: int = Field(default=0, description="of the prompts")


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length, and the tens digit of each first year."""

    tokens: Int64[Tensor, "prompts pos"]
    tens: Int64[Tensor, " prompts"]
    digits: Int64[Tensor, " 10"]

    @property
    def half(self) -> int:
        return len(self.tens) // 2

    def difference(self, logits: Float[Tensor, "prompts d_vocab"]) -> Float[Tensor, " prompts"]:
        """p(greater) - p(less)."""
        p = logits.float().softmax(-1)[:, self.digits]
        beyond = torch.arange(10, device=p.device) - self.tens[:, None]
        return (p * beyond.sign()).sum(-1)

    def part(self, first: bool) -> "Prompts":
        some = slice(0, self.half) if first else slice(self.half, None)
        return Prompts(self.tokens[some], self.tens[some], self.digits)


def prompts_of(loaded: loader.Loaded, n: int, seed: int, device: Any) -> Prompts:
    """Prompts drawn at random, all as long as most of them are.

    Raises:
        RetraceError: the tokenizer does not split years into digits.
    """
    draw = torch.Generator().manual_seed(seed)
    front = [] if loaded.bos_id is None else [loaded.bos_id]
    rows, tens = [], []
    for _ in range(n):
        noun, century, ten, unit = (
            int(torch.randint(low, high, (), generator=draw))
            for low, high in ((0, len(NOUNS)), (11, 18), (1, 9), (0, 10))
        )
        said = f"The {NOUNS[noun]} lasted from the year {century}{ten}{unit} to the year {century}"
        rows.append([*front, *text.encode(loaded.tokenizer, said)])
        tens.append(ten)
    digits = [text.following(loaded.tokenizer, said, str(d)) for d in range(10)]
    if any(len(ids) != 1 for ids in digits):
        raise RetraceError(
            f"own.greater: the tokenizer does not write the digits behind '{said}' one by one; "
            f"choose a model whose tokenizer splits numbers into digits"
        )
    lengths = [len(row) for row in rows]
    usual = max(set(lengths), key=lengths.count)
    kept = [i for i, length in enumerate(lengths) if length == usual]
    return Prompts(
        torch.tensor([rows[i] for i in kept], device=device),
        torch.tensor([tens[i] for i in kept], device=device),
        torch.tensor([ids[0] for ids in digits], device=device),
    )


def logits_of(
    hf: nn.Module, tokens: Int64[Tensor, "prompts pos"], hook: str = "", edit: Edit | None = None
) -> Float[Tensor, "prompts d_vocab"]:
    """Logits behind the last token, what `hook` shows there being edited.

    Args:
        edit: [prompts d] -> [prompts d].
    """

    def whole(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], edit(x[:, -1]).to(x.dtype)[:, None]], 1)

    last = f"blocks.{hf.config.num_hidden_layers - 1}.hook_resid_post"
    with hooks.edited(hf, hook, whole) if edit else nullcontext():
        stream = hooks.run_to(hf, tokens, [last])[last]
    return splice.unembed(hf, stream[:, -1])


@torch.no_grad()
def effects(hf: nn.Module, prompts: Prompts) -> list[dict[str, float]]:
    """The difference, mean over prompts, as it is (layer -1) and with each MLP at its mean."""

    def row(layer: int, hook: str = "", edit: Edit | None = None) -> dict[str, float]:
        found = prompts.difference(logits_of(hf, prompts.tokens, hook, edit))
        right = (found > 0).double().mean()
        return {"layer": layer, "difference": float(found.mean()), "right": float(right)}

    at = [f"blocks.{i}.hook_mlp_out" for i in range(hf.config.num_hidden_layers)]
    mean = [row(i, hook, lambda y: y.mean(0).expand_as(y)) for i, hook in enumerate(at)]
    return [row(-1), *mean]


@dataclass(frozen=True)
class Units:
    """What is left as it is, or set to its mean.

    Attributes:
        hook: where they are edited.
        activations: tokens -> [prompts units], behind the last token.
        rows: what each writes at the hook; None: they are what stands there.
    """

    kind: str
    hook: str
    activations: Callable[[Tensor], Float[Tensor, "prompts units"]]
    rows: Float[Tensor, "units d"] | None = None

    def changed(
        self, x: Float[Tensor, "prompts d"], change: Float[Tensor, "prompts units"]
    ) -> Float[Tensor, "prompts d"]:
        """What the hook shows where the units' activations change."""
        return x + (change if self.rows is None else change @ self.rows)


def neurons(hf: nn.Module, layer: int) -> Units:
    """Those of a layer's MLP."""
    hook = f"blocks.{layer}.mlp.hook_post"
    return Units("neurons", hook, lambda t: hooks.run_to(hf, t, [hook])[hook][:, -1].float())


def latents(hf: nn.Module, weights: LayerWeights, layer: int) -> Units:
    """Those of the transcoder of the layer."""
    if weights.layers != "each":
        raise RetraceError(
            "own.greater.dictionaries: a cross-layer transcoder writes later layers, too; name "
            "sets with `layers: each`"
        )
    read = weights.hooks[layer]

    def activations(tokens: Tensor) -> Tensor:
        return weights.encode(layer, hooks.run_to(hf, tokens, [read])[read][:, -1].float())

    return Units("latents", weights.output_hooks[layer], activations, weights.W_dec[layer][:, 0])


def ranked(hf: nn.Module, units: Units, prompts: Prompts) -> Int64[Tensor, " units"]:
    """Units in the order of what they do for the difference, the strongest first."""
    with torch.no_grad():
        a = units.activations(prompts.tokens)
    change = torch.zeros_like(a, requires_grad=True)
    logits = logits_of(hf, prompts.tokens, units.hook, lambda x: units.changed(x, change))
    (gradient,) = torch.autograd.grad(prompts.difference(logits).sum(), change)
    return (gradient * (a - a.mean(0))).abs().mean(0).argsort(descending=True)


@torch.no_grad()
def kept(
    hf: nn.Module, units: Units, order: Int64[Tensor, " units"], prompts: Prompts,
    numbers: list[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the difference with the first n units as they are; 0 is the first of `numbers`."""
    a = units.activations(prompts.tokens)
    whole = float(prompts.difference(logits_of(hf, prompts.tokens)).mean())
    rows = []
    for n in [n for n in numbers if n <= len(order)]:
        keep = torch.zeros_like(a[0])
        keep[order[:n]] = 1
        change = (a - a.mean(0)) * keep
        logits = logits_of(
            hf, prompts.tokens, units.hook,
            lambda x, change=change: units.changed(x.float().mean(0).expand_as(x), change),
        )  # fmt: skip
        found = float(prompts.difference(logits).mean())
        rows.append({"units": units.kind, "n": n, "difference": found})
    none = rows[0]["difference"]
    return [r | {"recovered": (r["difference"] - none) / (whole - none)} for r in rows]


def work(job: cli.Job, options: Options) -> own.Tables:
    device, out = job.device(), own.Tables(TABLES)
    loaded = loader.load(own.by_arm(job, job.args.models)[options.arm], device)
    hf, prompts = loaded.hf, prompts_of(loaded, options.n_prompts, options.seed, device)
    first, second = prompts.part(True), prompts.part(False)
    rows = effects(hf, first)
    out.add({"effects": rows})
    late = rows[1 + min(options.from_layer, len(rows) - 2) :]
    layer = int(min(late, key=lambda row: row["difference"])["layer"])
    cli.log.info("difference %.3f; layer %d matters most", rows[0]["difference"], layer)
    numbers = sorted({0, *options.n_units})
    units = neurons(hf, layer)
    of_neurons = kept(hf, units, ranked(hf, units, first), second, numbers)
    for name in options.dictionaries:
        units = latents(hf, found_in(job.args.transcoders, name, device), layer)
        found = kept(hf, units, ranked(hf, units, first), second, numbers)
        out.add({"kept": [*of_neurons, *found]}, first={"dictionary": name, "layer": layer})
    return out
