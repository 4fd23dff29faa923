"""Stage `steering`: directions written into the stream, and what becomes of the text. [torch]

A probe finds a direction along which a class can be read. Whether the model reads it there, too,
is another question (Marks & Tegmark 2024; Wu et al. 2025, AxBench). For each class and hook:

1. directions  of length 1: a linear probe's, a difference of means, a row of a dictionary,
               the difference of two prompts' last positions (Turner et al. 2023), or random.
2. effects     of adding it, at coefficients in units of the stream's mean norm, and of taking it
               out: on the loss of the class's text and of other text, on the class's typical
               tokens, on a later probe, on the prompts of `contrasts`          (steered.py).
3. samples     the likeliest continuation of some prompts, with and without.

A seed draws the held-out blocks and the random directions.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.latents.stored import load_saes
from pipeline.models import hooks, loader, places
from pipeline.probes import steered
from pipeline.probes.directions import Directions
from pipeline.probes.steered import Edit
from pipeline.spec.measured import DirectionSpec, LabelSpec, SteeringSpec
from pipeline.store import tables
from pipeline.store.shards import Blocks
from pipeline.text.labels import Corpus
from pipeline.text.tokens import Texts, encode, following

EFFECTS = (
    "arm direction class hook seed mode coefficient own_loss other_loss words reading cosine"
).split()


class Steering:
    """A model with what steers it.

    Args:
        about: the activations' manifest.
        saes: name of a dictionary -> its decoder [d_sae d].
    """

    def __init__(
        self, spec: SteeringSpec, loaded: loader.Loaded, about: dict, probes: Directions,
        saes: dict[str, Tensor], device: torch.device,
    ) -> None:  # fmt: skip
        self.spec, self.loaded, self.hf, self.device = spec, loaded, loaded.hf, device
        self.probes, self.saes, self.skip = probes, saes, about["skip_first"]
        self.norms = {hook: about["hooks"][hook]["mean_norm"] for hook in spec.hooks}

    def ids(self, text: str) -> list[int]:
        """Ids of a text behind BOS, where the model has one."""
        bos = [] if self.loaded.bos_id is None else [self.loaded.bos_id]
        found = [*bos, *encode(self.loaded.tokenizer, text)]
        if len(found) <= self.skip:
            raise RetraceError(
                f"steering: the text '{text}' is {len(found)} tokens long, and the first "
                f"{self.skip} positions stay as they are; take a longer one"
            )
        return found

    def direction(self, name: str, hook: str, target: str, seed: int) -> Tensor:
        """A direction of length 1, [d]."""
        spec = self.spec.directions[name]
        found = self._direction(spec, hook, target, seed)
        length = found.norm()
        if not bool(length > 0) or not bool(length.isfinite()):
            raise RetraceError(
                f"steering.directions.{name}: has no length at {hook} for class '{target}'; "
                f"correct it"
            )
        return found / length

    def _direction(self, spec: DirectionSpec, hook: str, target: str, seed: int) -> Tensor:
        label = self.spec.label
        if spec.source == "random":
            draw = torch.Generator().manual_seed(1000 * seed + self.spec.classes.index(target))
            d = self.probes.of(label, next(self._methods()), hook).shape[1] - 1
            return torch.randn(d, generator=draw).to(self.device)
        if spec.source == "prompts":
            ends = []
            for text in (spec.plus, spec.minus):
                tokens = torch.tensor([self.ids(text.replace("{class}", target))])
                at = hooks.run_to(self.hf, tokens.to(self.device), [hook])[hook]
                ends.append(places.full(at[0, -1]))
            return ends[0] - ends[1]
        method = spec.method or "mean_difference"
        if spec.source == "dictionary" and spec.latent >= 0:
            return self._row(spec, spec.latent)
        found = torch.from_numpy(self.probes.towards(label, method, hook, target)).to(self.device)
        if spec.source == "probe":
            return found
        rows = self.saes[spec.sae]
        cosines = rows @ found / rows.norm(dim=1).clamp(min=1e-12)
        return self._row(spec, int(cosines.argmax()))

    def _methods(self) -> Any:
        """Methods of which the label has probes."""
        return (name.split("/")[1] for name in self.probes.weights
                if name.startswith(f"{self.spec.label}/"))  # fmt: skip

    def _row(self, spec: DirectionSpec, latent: int) -> Tensor:
        rows = self.saes[spec.sae]
        if latent >= len(rows):
            raise RetraceError(
                f"steering.directions: '{spec.sae}' has latents 0 to {len(rows) - 1}, not {latent}"
            )
        return rows[latent]

    # --- effects ---------------------------------------------------------------------------

    def effects(self, corpus: Corpus, split: np.ndarray, label: LabelSpec) -> pd.DataFrame:
        """A row for each class, hook, seed, direction and edit."""
        out, spec = [], self.spec
        total = len(spec.classes) * len(spec.hooks) * len(spec.seeds)
        progress = cli.Progress("steering", total, "texts")
        for target in spec.classes:
            words = steered.typical(corpus, split, target, label.column, spec.n_words)
            for seed in spec.seeds:
                text = steered.texts(
                    corpus, split, target, label.column, spec.n_blocks, seed, self.device
                )
                for hook in spec.hooks:
                    out += self._of_hook(target, seed, hook, text, words)
                    progress.at(len({(r["class"], r["seed"], r["hook"]) for r in out}))
        frame = pd.DataFrame(out)
        return frame[[*EFFECTS, *(c for c in frame if c not in EFFECTS)]]

    def _of_hook(
        self, target: str, seed: int, hook: str, text: steered.Text, words: np.ndarray
    ) -> list[dict[str, Any]]:
        spec, norm = self.spec, self.norms[hook]
        run = steered.Steered(self.hf, hook, text, words, norm, self.skip, self._reading(target))
        contrasts = self._contrasts(hook) if seed == spec.seeds[0] else {}
        plain = {name: of(None) for name, of in contrasts.items()}
        mean = None
        if any(name.split("/")[1] == "mean_difference" for name in self.probes.weights):
            mean = self.probes.towards(spec.label, "mean_difference", hook, target)
            mean = torch.from_numpy(mean / np.linalg.norm(mean)).to(self.device)
        rows = []
        for name in spec.directions:
            v = self.direction(name, hook, target, seed)
            card = {"arm": spec.arm, "direction": name, "class": target, "hook": hook}
            card |= {"seed": seed, "cosine": float(v @ mean) if mean is not None else np.nan}
            for edit in steered.edits(hook, v, spec.coefficients, spec.ablate):
                row = card | {"mode": edit.mode, "coefficient": edit.coefficient}
                row |= run.effect(edit)
                row |= {f"contrast_{k}": of(edit) - plain[k] for k, of in contrasts.items()}
                rows.append(row)
        return rows

    def _reading(self, target: str) -> tuple[str, Tensor] | None:
        hook = self.spec.reading
        if not hook:
            return None
        v = self.probes.towards(self.spec.label, "logistic", hook, target)
        return hook, torch.from_numpy(v).to(self.device)

    def _contrasts(self, hook: str) -> dict[str, Any]:
        """Name -> a function from an edit to the logit difference of that prompt."""
        out = {}
        for name, spec in self.spec.contrasts.items():
            tokens = torch.tensor([self.ids(spec.prompt)], device=self.device)
            ends = []
            for word in (spec.answer, spec.foil):
                found = following(self.loaded.tokenizer, spec.prompt, word)
                if not found:
                    raise RetraceError(
                        f"steering.contrasts.{name}: '{word}' melts with the end of its prompt; "
                        f"begin it with a space"
                    )
                ends.append(found[0])
            out[name] = steered.contrast(self.hf, hook, tokens, *ends, self.norms[hook], self.skip)
        return out

    # --- samples and files -----------------------------------------------------------------

    def samples(self) -> pd.DataFrame:
        """A row for each prompt, class, direction and coefficient, at the first hook."""
        spec, hook, rows = self.spec, self.spec.hooks[0], []
        texts = Texts(self.loaded.tokenizer)
        for target in spec.classes:
            steer, cards = [], []
            for name in spec.directions:
                v = self.direction(name, hook, target, spec.seeds[0])
                for edit in steered.edits(hook, v, spec.coefficients, spec.ablate):
                    steer.append(edit)
                    cards.append({"direction": name, "mode": edit.mode,
                                  "coefficient": edit.coefficient})  # fmt: skip
            steer = [Edit(hook, "none", v), *steer]
            cards = [{"direction": "", "mode": "none", "coefficient": 0.0}, *cards]
            for prompt in spec.prompts:
                ids = self.ids(prompt)
                found = steered.continued(
                    self.hf, ids, steer, self.norms[hook], self.skip, spec.n_new
                )
                for card, new in zip(cards, found, strict=True):
                    said = "".join(texts.context(new, ids))
                    rows.append({"prompt": prompt, "class": target, "hook": hook, **card}
                                | {"text": said})  # fmt: skip
        columns = "prompt class hook direction mode coefficient text".split()
        return pd.DataFrame(rows, columns=columns)

    def kept(self) -> dict[str, np.ndarray]:
        """direction/class/hook -> the direction of the first seed, [d], of length 1."""
        spec = self.spec
        return {
            f"{name}/{target}/{hook}": self.direction(name, hook, target, spec.seeds[0])
            .float()
            .cpu()
            .numpy()
            for name in spec.directions
            for target in spec.classes
            for hook in spec.hooks
        }


def work(job: cli.Job) -> None:
    from safetensors.numpy import save_file

    args, device = job.args, job.device()
    spec = job.section("steering", SteeringSpec)
    label = LabelSpec.model_validate(job.spec["probes"]["labels"][spec.label])
    corpus, split = Corpus.read(args.corpus, args.documents), Blocks(args.corpus).split
    about = tables.read_json(args.activations)
    saes: dict[str, Tensor] = {}
    wanted = {d.sae for d in spec.directions.values() if d.sae}
    for manifest in args.saes:
        there = [name for name in tables.read_json(manifest)["saes"] if name in wanted]
        saes |= {k: v.W_dec for k, v in load_saes(manifest, device, there).items()} if there else {}
    with torch.no_grad():
        loaded = loader.load(args.model, device)
        probes = Directions.read(args.probes)
        steering = Steering(spec, loaded, about, probes, saes, device)
        effects, samples = steering.effects(corpus, split, label), steering.samples()
        kept = steering.kept()
    inputs = [args.model, args.corpus, args.documents, args.activations, args.probes, *args.saes]
    made = job.certificate(inputs, seed=spec.seeds)
    tables.write_table(args.effects, effects, made)
    tables.write_table(args.samples, samples, made)
    norms = {hook: repr(float(norm)) for hook, norm in steering.norms.items()}
    tables.atomically(args.directions, lambda to: save_file(kept, to, metadata=norms))
    tables.stamp_safetensors(args.directions, made)


def main() -> None:
    parser = cli.parser(
        "steering",
        __doc__,
        model="model.json",
        corpus="tokens.parquet",
        documents="documents.parquet",
        activations="manifest.json of the activations",
        probes="directions of the stage probes, safetensors",
        saes="manifests of the SAE jobs, if any*",
        effects="one row for each class, hook, seed, direction and edit",
        samples="continuations, steered and not",
        directions="the directions of the first seed, safetensors",
    )
    cli.run("steering", parser.parse_args(), work)
