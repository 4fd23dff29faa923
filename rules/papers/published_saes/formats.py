"""One dictionary in the format of each publisher, read again: are its numbers the same? [torch]

1. Four dictionaries that are trained here (TopK, BatchTopK saved as JumpReLU, L1, and a transcoder)
   are written in each format that can say what they are (written.py), nothing but files.
2. The reader that imports published dictionaries reads them (pipeline/imports).
3. Both pass the held-out rows. L0 and explained variance stand side by side, and the largest
   difference of a reconstruction over the largest entry of it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from pipeline.activations.rows import to_tensor
from pipeline.errors import RetraceError, nearest
from pipeline.imports import dictionary_learning, formats, gemma_scope, saelens
from pipeline.imports.original import Files
from pipeline.job import cli, own
from pipeline.job.source import import_file
from pipeline.latents.reconstruction import reconstruction
from pipeline.latents.stored import load_saes
from pipeline.spec.base import Section
from pipeline.spec.imports import listing
from pipeline.store import shards, tables

written = import_file(Path(__file__).parent / "written.py")
TABLES = ("formats",)
READ = {"saelens": saelens.saelens, "dictionary_learning": dictionary_learning.dictionary_learning}
READ |= {n: getattr(gemma_scope, n) for n in ("gemma_scope", "gemma_scope_2")}
READ |= {n: getattr(formats, n) for n in ("llama_scope", "sparsify", "openai", "circuit_tracer")}


class Options(Section):
    """Section own.formats of paper.yaml."""

    tables: list[str]
    arm: str
    dictionaries: dict[str, list[str]] = Field(description="dictionary -> formats")
    n_rows: int = Field(default=4096, ge=2, description="held-out rows")


def read(format: str, path: Path, transcoder: bool) -> Any:
    """What pipeline/imports reads of files at a path, as `reconstruction` takes a dictionary."""
    weights, beside, optional = listing(format, str(path))
    there = {Path(n).name: Path(n) for n in (*beside, *optional) if Path(n).is_file()}
    original = READ[format](Files(Path(weights), there, transcoder=transcoder))
    cfg = SimpleNamespace(d_sae=original.shape[1])
    return SimpleNamespace(encode=original.encode, decode=original.decode, cfg=cfg)


def compared(sae: Any, other: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """L0 and explained variance of both on rows x that reconstruct y, and how they differ."""
    both, d = {"ours": sae, "theirs": other}, (x.shape[1], y.shape[1])
    fit, _ = reconstruction(both, [torch.cat([x, y], 1)], *d)
    with torch.no_grad():
        a, b = (s.decode(s.encode(x)) for s in both.values())
    out = {"differs_by": float((a - b).abs().max() / a.abs().max())}
    for metric in ("l0", "explained_variance"):
        out |= {metric: fit["theirs"][metric], f"{metric}_trained": fit["ours"][metric]}
    return out


def work(job: cli.Job, options: Options) -> own.Tables:
    """A row for each format of each dictionary."""
    out, args = own.Tables(TABLES), job.args
    torch.set_num_threads(args.threads)
    manifests = {f: tables.read_json(f) for f in args.saes}
    activations = own.by_arm(job, args.activations)[options.arm]
    known = [name for m in manifests.values() for name in m["saes"]]
    for name, wanted in options.dictionaries.items():
        if name not in known:
            raise RetraceError(f"own.formats: no dictionary '{name}'{nearest(name, known)}")
        file = next(f for f, m in manifests.items() if name in m["saes"])
        manifest, sae = manifests[file], load_saes(file, "cpu", [name])[name]
        sides = [manifest["hook"], manifest.get("output_hook") or manifest["hook"]]
        x, y = (_rows(activations, hook, options.n_rows) for hook in sides)
        folder = Path(file).parent / manifest["saes"][name]["folder"]
        for format in wanted:
            with TemporaryDirectory() as temporary:
                path = written.WRITERS[format](Path(temporary), folder)
                other = read(format, path, sides[0] != sides[1])
                row = compared(sae, other, x, y)
            out.add({"formats": [{"format": format, "sae": name} | row]})
    return out


def _rows(manifest: str, hook: str, n: int) -> torch.Tensor:
    """The first n held-out rows of a hook, float32."""
    rows = shards.Rows(manifest, hook, "eval")
    raw = np.concatenate([raw for raw, _ in rows.iterate(4096)])[:n]
    return to_tensor(raw, rows.dtype, torch.device("cpu")).float()


def main() -> None:
    own.main("formats", __doc__, Options, TABLES, work, activations="manifest.json of each arm*",
             saes="manifest.json of every arm's dictionaries*")  # fmt: skip


if __name__ == "__main__":
    main()
