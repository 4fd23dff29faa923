"""Feature absorption of first letters, of every autoencoder of an arm. [torch]

Chanin et al. 2024 (2409.14507) as in SAEBench 0.6.0; spelling.py makes the prompts and absorbed.py
has the measure. All of it, words, examples and probes, is drawn anew for each seed, so that the
spread beside a number is that of the whole procedure. A transcoder and an encoder without a decoder
have no directions in the stream that they read, and are left out.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.job import cli
from pipeline.latents.stored import decodes, load_saes
from pipeline.models import loader
from pipeline.saebench import absorbed, probes, spelling
from pipeline.spec.paper import AbsorptionSpec
from pipeline.store import tables

TRAINED = 0.8  # share of the words that probes learn from, SAEBench's
FEW = 5  # words of a letter, in either part
COLUMNS = ("sae seed letter f1_probe f1_latents n_latents n_words absorption_fraction "
           "full_absorption").split()  # fmt: skip


def of_words(
    saes: dict[str, Any], words: list[spelling.Word], x: Tensor, section: AbsorptionSpec, seed: int
) -> list[dict[str, Any]]:
    """A row for each dictionary and letter.

    Args:
        words, x: words in random order, and the stream on each [words d_in].
    """
    cut = int(len(words) * TRAINED)
    letter = np.array([word.letter for word in words])
    letters = [a for a in spelling.LETTERS
               if min((letter[:cut] == a).sum(), (letter[cut:] == a).sum()) >= FEW]  # fmt: skip
    if not letters:
        cli.log.warning("no letter has %d words in both parts: raise absorption.n_words", FEW)
        return []
    scale = x[:cut].norm(dim=1).mean() / x.shape[1] ** 0.5
    rows, found = (x / scale).cpu().numpy(), {}
    for a in letters:
        weights = probes.fitted(rows[:cut], (letter[:cut] == a).astype(int), balanced=True)
        found[a] = weights, absorbed.scored(rows[cut:], weights) > 0
    one_hot = torch.tensor(np.stack([letter == a for a in letters], 1))
    out = []
    for name, sae in saes.items():
        f = torch.cat([sae.encode(part) for part in x.split(512)])
        ranked = absorbed.l1_weights(f[:cut], one_hot[:cut].to(f), seed)
        for a, at in zip(letters, ranked, strict=True):
            y = (letter == a).astype(int)
            latents, score = absorbed.split(
                (f[:cut], y[:cut]), (f[cut:], y[cut:]), at, section.max_k, section.f1_jump
            )
            weights, said = found[a]
            seen = torch.from_numpy(np.flatnonzero(said & (y[cut:] == 1)) + cut).to(x.device)
            direction = torch.from_numpy(weights[:-1]).to(x)
            share = absorbed.absorption(x[seen], f[seen], sae.W_dec, direction, latents)
            values = (name, seed, a, absorbed.f1(y[cut:], said), score, len(latents), len(seen))
            means = [float(part.mean()) if len(part) else np.nan for part in share]
            out.append(dict(zip(COLUMNS, (*values, *means), strict=True)))
    return out


def counted(table: Any, section: AbsorptionSpec) -> Any:
    """The table with a column `counts`: whether a letter's row is part of the means.

    The probe has to see the letter, and the model enough letters; otherwise there is no mean.
    """
    seen = (table["f1_probe"] > section.min_f1) & (table["n_words"] > 0)
    letters = seen.groupby([table["sae"], table["seed"]]).transform("sum")
    table = table.assign(counts=seen & (letters >= section.min_letters))
    for (sae, seed), rows in table.groupby(["sae", "seed"]):
        if not rows["counts"].any():
            cli.log.warning(
                "%s, seed %s: the probe sees %d of %d letters, fewer than absorption.min_letters",
                sae, seed, seen[rows.index].sum(), len(rows),
            )  # fmt: skip
    return table


def work(job: cli.Job) -> None:
    import pandas as pd

    args, device = job.args, job.device()
    torch.set_num_threads(args.threads)
    section = job.section("absorption", AbsorptionSpec)
    loaded, out = loader.load(args.model, device), []
    bos = [] if loaded.bos_id is None else [loaded.bos_id]
    for seed in section.seeds:
        drawn = (section.template, section.n_words, section.n_examples, seed)
        words = spelling.words(loaded.tokenizer, bos, *drawn)
        cli.log.info("seed %d: %d words", seed, len(words))
        for manifest in args.saes:
            about = tables.read_json(manifest)
            names = [n for n, entry in about["saes"].items() if decodes(entry)]
            if about.get("output_hook") or not names:
                cli.log.info("%s: has no directions in the stream that it reads", manifest)
                continue
            x = spelling.states(loaded.hf, about["hook"], words, section.batch_size, device)
            with torch.no_grad():
                out += of_words(load_saes(manifest, device, names), words, x, section, seed)
    made = job.certificate([args.model, *args.saes])
    table = counted(pd.DataFrame(out, columns=COLUMNS), section)
    tables.write_table(args.out, table, made)


def main() -> None:
    parser = cli.parser(
        "absorption",
        __doc__,
        model="model.json",
        saes="manifests of the SAE jobs*",
        out="one row per dictionary, seed and letter",
    )
    cli.run("absorption", parser.parse_args(), work)
