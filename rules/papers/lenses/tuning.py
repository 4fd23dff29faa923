"""Train a tuned lens for every model that own.tuning.models names (translators.py). [torch]"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.models import lens, loader
from pipeline.spec.base import Name, Section
from pipeline.store import provenance, tables
from pipeline.store.checkpoints import Checkpoints, write_tensors

translators = import_file(Path(__file__).with_name("translators.py"))


class Options(Section):
    """Section own.tuning of paper.yaml."""

    tables: list[str]
    models: dict[Name, translators.Tuning] = Field(min_length=1)
    seeds: list[int] = Field(
        default=[0],
        min_length=1,
        description="a lens each, of other batches and judged on other text",
    )

    def of(self, name: str, seed: int) -> translators.Tuning:
        """How the lens of one model and seed is trained."""
        how = self.models[name]
        return how.model_copy(update={"seed": how.seed + seed})


def read_blocks(corpus: str | Path, split: str, n: int = 0) -> Tensor:
    """Blocks of a corpus, int64 [blocks pos]: the first n of a split, or all.

    Raises:
        RetraceError: it has none.
    """
    frame = tables.read_table(corpus, ["split", "tokens"])
    found = frame.loc[frame["split"] == split, "tokens"].tolist()
    if not found:
        raise RetraceError(f"{corpus}: holds no block of split {split}; raise the corpus's tokens")
    return torch.from_numpy(np.stack(found[: n or None]).astype(np.int64))


def read_translators(
    file: str | Path, name: str, seed: int, device: torch.device
) -> lens.Translators:
    """The translators of one model and seed, out of the file that this stage writes."""
    from safetensors.torch import load_file

    found: dict[str, dict[int, Tensor]] = {"A": {}, "b": {}}
    for key, t in load_file(file).items():
        of, of_seed, kind, layer = key.split(".")
        if (of, of_seed) == (name, str(seed)):
            found[kind][int(layer)] = t.to(device)
    return lens.Translators(**{k: dict(sorted(v.items())) for k, v in found.items()})


def main() -> None:
    parser = cli.parser(
        "tuning", __doc__, models="model.json of every model, sorted by name*",
        corpora="tokens.parquet of every model*", out="translators, safetensors",
        history="history.parquet",
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, options = job.args, job.section("own.tuning", Options)
        device = job.device()
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU; the package takes bfloat16
        made_by = [job.code, job.hardware, provenance.versions()]
        kept, frames, inputs = {}, [], [*args.models, *args.corpora]
        partial = Path(f"{args.out}.partial")
        for name, file, corpus in zip(
            sorted(options.models), args.models, args.corpora, strict=True
        ):
            hf = loader.load(file, device).hf
            blocks = read_blocks(corpus, "train").to(device)
            given = [provenance.sha256_file(p) for p in (file, corpus)]
            for seed in options.seeds:
                how = options.of(name, seed)
                tuned = translators.Lens(name, hf, blocks, how)
                key = provenance.digest([how.model_dump(mode="json"), given, made_by])
                translators.train(tuned, Checkpoints(partial / f"{name}-{seed}", key))
                for kind, maps in (("A", tuned.translators.A), ("b", tuned.translators.b)):
                    kept |= {f"{name}.{seed}.{kind}.{i}": t.cpu() for i, t in maps.items()}
                told = {"model": name, "seed": seed, **translators.history(tuned)}
                frames.append(pd.DataFrame(told))
                cli.log.info("%s, seed %d: %d translators", name, seed, len(tuned.layers))
        made = job.certificate(inputs, seed=options.seeds)
        write_tensors(Path(args.out), kept)
        tables.stamp_safetensors(args.out, made)
        tables.write_table(args.history, pd.concat(frames, ignore_index=True), made)
        shutil.rmtree(partial)

    cli.run("tuning", parser.parse_args(), work)


if __name__ == "__main__":
    main()
