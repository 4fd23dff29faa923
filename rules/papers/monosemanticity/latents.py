"""Latents beside neurons, beside another model's latents, and beside those of wider dictionaries.

1. Over stored rows: how often every latent of every width fires, on which tokens, and what
   follows; the same for the neurons, for random directions, and for all of the untrained model
   (tally.py).
2. Over held-out rows: the best match of each latent, and of each neuron, in the model of another
   seed (matching.py).
3. Between widths: which latents of the wide dictionaries lie near one of the narrowest
   (splitting.py). [torch]
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.activations.rows import to_tensor
from pipeline.errors import RetraceError, need_among
from pipeline.job import cli, own
from pipeline.latents.stored import load_saes
from pipeline.models import loader, splice
from pipeline.spec.base import Name
from pipeline.store import shards, tables
from pipeline.text.tokens import Texts, load_tokenizer

from . import matching, splitting, tally

TABLES = ("units", "matches", "splitting", "tree")
BATCH = 4096  # rows


class Options(own.Options):
    """Section own.latents of paper.yaml."""

    arms: list[Name] = Field(
        min_length=2,
        description="models of several seeds, whose dictionaries are looked at; each is compared "
        "with the next, the last with the first",
    )
    untrained: Name | None = Field(default=None, description="a model before training")
    dictionary: str = Field(description="the paper's A/1: trained on all of them")
    widths: list[str] = Field(min_length=3, description="dictionaries of `arms`, narrow first")
    n_rows: int = Field(default=1_000_000, ge=1, description="rows scanned, at most")
    n_top: int = Field(default=20, ge=2, description="largest activations whose tokens count")
    n_fired: int = Field(default=10, ge=1, description="rows a matched unit must fire on")
    n_random: int = Field(default=256, ge=1, description="random directions")
    n_tree: int = Field(default=8, ge=1, description="latents a width in the example")
    seed: int = Field(default=0, ge=0, description="of random directions and permutations")


class Arm:
    """The stored rows and the dictionaries of one arm."""

    def __init__(self, activations: str, saes: str, names: list[str], device: Any) -> None:
        self.activations, self.device = activations, device
        self.hook = tables.read_json(saes)["hook"]
        trained = tables.read_json(saes)["saes"]
        need_among(names, trained, f"own.latents: {saes} has no dictionary", "it has")
        self.saes = load_saes(saes, device, names)

    def rows(self, splits: tuple[str, ...], n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The first n rows of splits, in batches: x [rows d_in] float32, tokens, following [rows].

        following is the next token, -1 where it is not of this batch or block.
        """
        for split in splits:
            stored = shards.Rows(self.activations, self.hook, split)
            for raw, columns in stored.iterate(BATCH):
                raw, n = raw[:n], n - len(raw[:n])
                if len(raw) == 0:
                    return
                x = to_tensor(raw, stored.dtype, self.device).float()
                columns = {k: torch.from_numpy(c[: len(raw)]).long() for k, c in columns.items()}
                yield x, columns["token"].to(self.device), next_token(columns).to(self.device)


def next_token(columns: dict[str, Tensor]) -> Tensor:
    """The token behind each row, [rows]; -1 where the next row is of another place. columns are
    token, block and position, [rows] each."""
    token, at = columns["token"], columns["position"]
    follows = (columns["block"][1:] == columns["block"][:-1]) & (at[1:] == at[:-1] + 1)
    last = token.new_full((min(len(token), 1),), -1)
    return torch.cat([torch.where(follows, token[1:], -1), last])


def directions(d_in: int, n: int, seed: int) -> Tensor:
    """Random directions, unit columns [d_in n]."""
    drawn = torch.randn(d_in, n, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=0)


@torch.no_grad()
def tallies(arm: Arm, options: Options, d_vocab: int) -> dict[str, Any]:
    """Name -> Tally of each dictionary of an arm, of its neurons and of random directions, under
    the names 'neurons' and 'random'."""
    made: dict[str, Any] = {}
    random = None
    for x, tokens, following in arm.rows(("train", "eval"), options.n_rows):
        acts = {name: sae.encode(x) for name, sae in arm.saes.items()}
        if random is None:
            random = directions(x.shape[1], options.n_random, options.seed).to(x.device)
        acts |= {"neurons": x, "random": x @ random}
        for name, values in acts.items():
            if name not in made:
                n_units = values.shape[1]
                made[name] = tally.Tally(n_units, d_vocab, options.n_top, x.device)
            made[name].add(values, tokens, following)
    return made


@torch.no_grad()
def matches(a: Arm, b: Arm, options: Options) -> pd.DataFrame:
    """Best matches over the held-out rows: kind, unit, match, correlation."""
    kinds = ("latents", "neurons", "null_latents", "null_neurons")
    found = {kind: matching.Correlation() for kind in kinds}
    pairs = zip(*(arm.rows(("eval",), options.n_rows) for arm in (a, b)), strict=True)
    for (x, tokens, _), (y, same, _) in pairs:
        if not torch.equal(tokens, same):
            raise RetraceError(
                f"{a.activations} and {b.activations} hold other tokens; set max_norm_ratio: 0"
            )
        name = options.dictionary
        acts, others = a.saes[name].encode(x), b.saes[name].encode(y)
        found["latents"].add(acts, others)
        found["neurons"].add(x, y)
        found["null_latents"].add(acts, tally.elsewhere(others))
        found["null_neurons"].add(x, tally.elsewhere(y))
    if not found["latents"].n_rows:
        raise RetraceError(f"{a.activations}: no held-out rows; raise corpus.n_eval_tokens")
    best = [c.best(options.n_fired).assign(kind=kind) for kind, c in found.items()]
    return pd.concat(best, ignore_index=True)


@torch.no_grad()
def says(hf: Any, arm: Arm, options: Options) -> dict[str, Tensor]:
    """Name -> what each unit of `tallies` adds to the logits, [units d_vocab].

    By the direct path: through the final norm's gain and the unembedding, its scale left out.
    """
    d_in = next(iter(arm.saes.values())).W_dec.shape[1]
    eye = torch.eye(d_in, device=arm.device)
    units = {name: sae.W_dec for name, sae in arm.saes.items()} | {"neurons": eye}
    units["random"] = directions(d_in, options.n_random, options.seed).T.to(arm.device)
    W_U = hf.get_output_embeddings().weight
    written = {name: splice.written(hf, arm.hook, W) for name, W in units.items()}
    return {name: splice.normed(hf, rows) @ W_U.T for name, rows in written.items()}


def units(
    made: dict[str, Any], arm: str, text: list[str], logits: dict[str, Tensor]
) -> pd.DataFrame:
    """One row a unit of each Tally (see there for the columns); logits are of `says`. A random
    direction has signed values: it neither fires nor has a share of them on a token."""
    frames = []
    for name, t in made.items():
        columns = {"arm": arm, "group": name, "unit": range(len(t.density))}
        columns |= {"density": t.density, "token_share": t.token_share}
        columns |= {"top_entropy": t.top_entropy(), "n_rows": t.n_rows}
        columns |= {"narrowing": t.narrowing(), "said": t.said(logits[name])}
        columns["tokens"] = [" · ".join(text[i] for i in row) for row in t.foremost(3)]
        frames.append(pd.DataFrame(columns))
        if name == "random":
            frames[-1][["density", "token_share"]] = float("nan")
    return pd.concat(frames, ignore_index=True)


def split(arm: Arm, made: dict[str, Any], options: Options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables `splitting` and `tree`; latents by their numbers in the dictionaries.

    The example is the latent of the narrowest dictionary with most latents near it in the widest.
    """
    ids = [(made[n].fired > 0).nonzero()[:, 0] for n in options.widths]
    rows = [arm.saes[n].W_dec[alive] for n, alive in zip(options.widths, ids, strict=True)]
    if not all(len(r) for r in rows):
        raise RetraceError("own.latents: a dictionary has no latent that fires; train it longer")
    frames = [splitting.near(rows[0], wide, options.seed) for wide in rows[1:]]
    root = int(frames[-1].sort_values(["n_near", "best"]).index[-1])
    example = splitting.tree(rows, root, options.n_tree)
    for frame, name in zip(frames, options.widths[1:], strict=True):
        frame["latent"] = ids[0].cpu().numpy()
        frame.insert(0, "wide", name)
    numbers = [i.tolist() for i in ids]
    for column, up in (("latent", 0), ("parent", 1)):
        example[column] = [
            numbers[level - up][i] if i >= 0 else -1
            for level, i in zip(example["level"], example[column], strict=True)
        ]
    example.insert(0, "dictionary", [options.widths[level] for level in example["level"]])
    return pd.concat(frames, ignore_index=True), example


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each arm in turn."""
    device, out = job.device(), own.Tables(TABLES)
    files = list(zip(job.args.activations, job.args.saes, job.args.models, strict=True))
    paths, main = own.by_arm(job, files), [options.dictionary]
    nulls = [options.untrained] if options.untrained else []
    wanted = {arm: list(dict.fromkeys([*options.widths, *main])) for arm in options.arms}
    wanted |= dict.fromkeys(nulls, main)
    need_among(wanted, paths, "own.latents: no arm", "paper.yaml has")
    arms = {arm: Arm(*paths[arm][:2], saes, device) for arm, saes in wanted.items()}
    tokenizer = load_tokenizer(job.args.models[0])
    alone = Texts(tokenizer).alone
    text = [alone(i) for i in range(len(tokenizer))]
    for number, (name, arm) in enumerate(arms.items()):
        made = tallies(arm, options, len(text))
        logits = says(loader.load(paths[name][2], device).hf, arm, options)
        out.add({"units": units(made, name, text, logits)})
        cli.log.info("%s: %d rows scanned", name, made["neurons"].n_rows)
        if name in options.arms:
            other = arms[options.arms[(number + 1) % len(options.arms)]]
            near, example = split(arm, made, options)
            found = {"matches": matches(arm, other, options), "splitting": near, "tree": example}
            out.add(found, arm=name)
    return out
