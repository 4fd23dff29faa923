"""What lenses see in the models: layer by layer, from layer to layer, and along texts. [torch]

Each seed has its own translators, and its own share of the held-out blocks.

1. layers        logit and tuned lens against the prediction, over held-out text (models/lens.py)
2. transfer      each translator on the stream of each layer (Belrose et al. 2023, Section 3)
3. trajectories  the likeliest tokens at every layer and position of example texts
4. attribution   what each attention and MLP adds to the logit of the likeliest token of the texts
5. basis         causal bases of the lenses, and what they do to the model (basis.py)
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import RetraceError, need_among
from pipeline.job import cli, own
from pipeline.latents.stored import blocks as blocks_of
from pipeline.models import lens, loader
from pipeline.spec.base import Name
from pipeline.text.tokens import Texts
from pipeline.tuning import tuned_lens

from . import basis, tuning

PLAIN = "logit"  # the lens without a translator
NUMBERS = ["loss", "kl", "bias"]  # of a lens on a stream, nats
TABLES = ("layers", "transfer", "trajectories", "attribution", "basis")
READS = {"translators": "what stage tuning wrote"}


class Options(own.Options):
    """Section own.lenses of paper.yaml."""

    n_tokens: dict[Name, int] = Field(
        default={}, description="model -> held-out tokens measured, at most; default 20,000"
    )
    n_transfer_tokens: dict[Name, int] = Field(
        default={}, description="model -> tokens of the transfer matrix; default as many"
    )
    texts: dict[Name, list[str]] = Field(
        default={}, description="model -> example texts; default the first held-out blocks"
    )
    n_texts: int = Field(default=2, ge=1, description="held-out blocks, where there are no texts")
    n_shown: int = Field(default=16, ge=2, description="positions of an example, at most")
    basis: basis.Options

    def check(self, models: Iterable[str]) -> None:
        """RetraceError where an option names a model that has no lens."""
        named = {"n_tokens": self.n_tokens, "n_transfer_tokens": self.n_transfer_tokens,
                 "texts": self.texts, "basis.models": self.basis.models}  # fmt: skip
        for key, names in named.items():
            need_among(names, models, f"own.lenses.{key}: no model", "own.tuning.models has")


@torch.no_grad()
def transfer(
    hf: nn.Module, translators: lens.Translators, tokens: Tensor, targets: Tensor, first: int
) -> pd.DataFrame:
    """One row per translator and layer read: loss, kl and bias in nats, penalty, similarity.

    penalty: the loss of translator l on the stream of layer l' less that of l' on its own.
    loss_logit, kl_logit, bias_logit: of the logit lens on that stream, without a translator.
    similarity: the Frobenius cosine of the two streams' covariances.

    Args:
        tokens, targets: [windows pos]; positions below `first` do not count.
    """
    read, layers = lens.tuned_lens(hf, translators), translators.layers
    readers = {str(a): lambda _, x, a=a: read(a, x) for a in layers}
    found = lens.measure(hf, tokens, targets, readers | {PLAIN: lens.logit_lens(hf)}, layers, first)
    found = found[found["layer"].isin(layers)].set_index("layer")
    plain = found.loc[found["lens"] == PLAIN, NUMBERS].add_suffix("_logit")
    found = found.loc[found["lens"] != PLAIN, ["lens", *NUMBERS, "n_tokens"]].join(plain)
    frame = found.reset_index().rename(columns={"lens": "translator"}).astype({"translator": int})
    passes = [lens.streams(hf, windows)[0] for (windows,) in lens.passes(hf, tokens)]
    streams = {a: torch.cat([x[a][:, first:].flatten(0, 1) for x in passes]) for a in layers}
    cov = {layer: torch.cov(x.double().T, correction=0) for layer, x in streams.items()}
    cov = {layer: c / c.norm() for layer, c in cov.items()}
    pairs = zip(frame["translator"], frame["layer"], strict=True)
    own_loss = frame[frame["translator"] == frame["layer"]].set_index("layer")["loss"]
    penalty = frame["loss"] - frame["layer"].map(own_loss)
    similarity = [float((cov[a] * cov[b]).sum()) for a, b in pairs]
    return frame.assign(similarity=similarity, penalty=penalty)


def examples(loaded: Any, texts: list[str], blocks: Tensor, n: int, shown: int) -> list[Tensor]:
    """Token ids [pos] of each example text, BOS before it where the model has one.

    Args:
        texts: none for the beginnings of the first n held-out blocks [blocks pos].
        shown: tokens of a text, at most, BOS not counted.
    """
    if not texts:
        return list(blocks[:n, : shown + int(loaded.bos_id is not None)])
    front = [] if loaded.bos_id is None else [loaded.bos_id]
    encode = lambda t: loaded.tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [torch.tensor([*front, *encode(t)[:shown]], device=blocks.device) for t in texts]


def along(
    loaded: Any, ids: list[Tensor], lenses: dict[str, lens.Lens], layers: list[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trajectories and attribution of the example texts; BOS is read and not shown."""
    decode, first = Texts(loaded.tokenizer).alone, int(loaded.bos_id is not None)
    shown, added = [], []
    for number, tokens in enumerate(ids):
        found = lens.trajectory(loaded.hf, tokens, lenses, decode, layers, first)
        whole = "".join(found[found["layer"] == layers[0]].drop_duplicates("position")["token"])
        shown.append(found.assign(text=number, words=whole))
        found = lens.parts(loaded.hf, tokens, first)
        read = [decode(i) for i in tokens.tolist()]
        words = ["".join(read[first : at + 1]) for at in found["position"]]
        top = found.pop("id").map(decode)
        added.append(found.assign(text=number, words=words, top=top))
    return tuple(pd.concat(frames, ignore_index=True) for frames in (shown, added))


def of_model(
    name: str, loaded: Any, translators: lens.Translators, blocks: Tensor, skip: int, how: Options,
    seed: int, texts: bool,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """The tables of one model and seed.

    Args:
        blocks: held-out tokens, [blocks pos].
        skip: positions of a block that do not count.
        seed: of the translators; random directions follow it.
        texts: whether the tables along example texts are wanted.
    """
    hf, layers = loaded.hf, translators.layers
    lenses = {"logit": lens.logit_lens(hf), "tuned": lens.tuned_lens(hf, translators)}
    tokens, targets = blocks[:, :-1], blocks[:, 1:]
    n, few = (max(1, of.get(name, 20_000) // tokens.shape[1])
              for of in (how.n_tokens, how.n_transfer_tokens))  # fmt: skip
    out = {
        "layers": lens.measure(hf, tokens[:n], targets[:n], lenses, layers, skip),
        "transfer": transfer(hf, translators, tokens[:few], targets[:few], skip),
    }
    if texts:
        ids = examples(loaded, how.texts.get(name, []), blocks, how.n_texts, how.n_shown)
        out["trajectories"], out["attribution"] = along(loaded, ids, lenses, layers)
    if every := how.basis.models.get(name):
        few = blocks[: how.basis.n_blocks]
        out["basis"] = basis.of_model(hf, lenses, layers[::every], few, skip, how.basis, seed)
    return out


def work(job: cli.Job, how: Options) -> own.Tables:
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    tuned = job.section("own.tuning", tuning.Options)
    how.check(tuned.models)
    for name, file, corpus in zip(sorted(tuned.models), args.models, args.corpora, strict=True):
        loaded, blocks = loader.load(file, device), blocks_of(corpus, "eval").to(device)
        skip = tuned.models[name].skip_first
        for number, seed in enumerate(tuned.seeds):
            translators = tuned_lens.read(args.translators, f"{name}.{seed}", device)
            some = blocks[number :: len(tuned.seeds)]
            if not len(some):
                raise RetraceError(
                    f"{corpus}: {len(blocks)} held-out blocks for {len(tuned.seeds)} seeds "
                    f"(own.tuning.seeds); raise corpus.n_eval_tokens"
                )
            made = of_model(name, loaded, translators, some, skip, how, seed, number == 0)
            out.add(made, model=name, seed=seed)
            cli.log.info("%s, seed %d: read", name, seed)
    return out
