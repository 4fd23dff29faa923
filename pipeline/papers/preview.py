r"""What a paper's labels say, before any model runs: examples, balance, and what the id gives away.

    python -m pipeline preview labels my_paper
    python -m pipeline preview labels my_paper --scale smoke --label in_quotes --examples 6
    python -m pipeline preview labels my_paper --pattern '(?P<name>Mr\. \w+)|(?P<year>1\d{3})'

Reads the corpus that the paper's run made, or says how to make it. For each label of the section
probes it prints how many tokens, documents and token ids each class has, the accuracy of the most
frequent class and of the token id alone on held-out documents (R^2 for numbers), the tokens that
give most away, and some tokens in their context. A label that the id alone gives away says little
about what the model computed. `--pattern` and `--function` try a label that paper.yaml does not
have yet. No torch is needed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError, command, nearest
from pipeline.papers.folders import Paper
from pipeline.papers.papers import Run
from pipeline.papers.paths import resolve
from pipeline.spec.base import SCALES
from pipeline.spec.measured import LabelSpec
from pipeline.spec.paper import parse
from pipeline.spec.yaml_files import load_yaml

ROOT = Path(__file__).parents[2]
WHAT = ("labels",)
AROUND = 8  # tokens before and after an example
TELLING = 5  # tokens that are named
GIVEN_AWAY = 0.98  # share of the way from the most frequent class to all right


def corpus_of(run: Run, paper: Paper) -> tuple[Path, Path]:
    """(tokens.parquet, model.json) of the paper's first arm.

    Raises:
        RetraceError: it was not made yet.
    """
    store = run.store(paper.name, paper.scale, paper.spec.arm_names()[0])
    if "corpus" not in store:
        raise RetraceError(f"{paper.folder / 'paper.yaml'}: no section corpus, so no labels")
    tokens = Path(f"results/store/corpus/{store['corpus'].id}/tokens.parquet")
    if not tokens.is_file():
        config = f"papers=[{paper.name}] scale={paper.scale}"
        raise RetraceError(
            f"{tokens}: not made yet; make it by `snakemake -c2 {tokens} --config {config}`"
        )
    return tokens, Path(f"results/store/{store['corpus'].folders()['tokenizer']}/model.json")


def wanted(paper: Paper, args: argparse.Namespace) -> dict[str, LabelSpec]:
    """Name -> the label's section: those of paper.yaml, or one that is tried.

    Raises:
        RetraceError: there is none, or none of that name.
    """
    for key in ("pattern", "function"):
        if given := getattr(args, key, ""):
            return {"tried": parse(LabelSpec, {key: given}, f"--{key}")}
    probes = paper.spec.probes
    if probes is None:
        raise RetraceError(
            f"{paper.folder / 'paper.yaml'}: no section probes, so no labels; write it or try "
            f"--pattern"
        )
    if args.label and args.label not in probes.labels:
        raise RetraceError(f"no label '{args.label}'{nearest(args.label, probes.labels)}")
    return {k: v for k, v in probes.labels.items() if args.label in ("", k)}


def made(run: Run, paper: Paper, specs: dict[str, LabelSpec]) -> tuple[Any, Any, dict[str, Any]]:
    """(corpus, texts, name -> labels or the sentence of what is wrong with them)."""
    from pipeline.text import labels
    from pipeline.text.tokens import Texts, load_tokenizer

    tokens, model = corpus_of(run, paper)
    corpus = labels.Corpus.read(tokens, tokens.with_name("documents.parquet"))
    texts, own = Texts(load_tokenizer(model)), paper.code_files("labels.py")
    out: dict[str, Any] = {}
    for name, spec in specs.items():
        file = str(resolve(spec.file, paper.folder, run.roots)) if spec.file else None
        try:
            out[name] = labels.make(name, spec, corpus, texts, own[0] if own else None, file)
        except RetraceError as e:
            out[name] = str(e)
    return corpus, texts, out


def shown(found: Any, spec: LabelSpec, corpus: Any, texts: Any, n: int, seed: int) -> list[str]:
    """The lines of one label."""
    rng = np.random.default_rng(seed)
    known = found.known & (corpus.document >= 0)
    owner, ids = corpus.document[known], corpus.tokens[known]
    source = spec.column or spec.pattern or spec.function or spec.file
    lines = [f"{found.name}: {source}, per {spec.per}; {known.sum():,} tokens in "
             f"{len(np.unique(owner)):,} documents"]  # fmt: skip
    if not found.classes:
        values = found.values[known]
        parts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        lines += ["  numbers: least, quartiles, largest " + ", ".join(f"{v:g}" for v in parts)]
        lines += told(found, corpus, texts, rng)
        return lines + examples(
            known, corpus, texts, lambda b, p: f"{found.values[b, p]:g}", n, rng
        )
    codes = found.values[known]
    for code, name in enumerate(found.classes):
        mine = codes == code
        lines.append(
            f"  {name:20} {mine.sum():>9,} tokens {mine.mean():>7.1%}  "
            f"{len(np.unique(owner[mine])):>7,} documents {len(np.unique(ids[mine])):>7,} ids"
        )
    lines += told(found, corpus, texts, rng)
    for code, name in enumerate(found.classes):
        mine = known & (found.values == code)
        lines += examples(mine, corpus, texts, lambda *_, name=name: name, n, rng)
    return lines


def told(found: Any, corpus: Any, texts: Any, rng: np.random.Generator) -> list[str]:
    """What the token id alone gives away, and which tokens do."""
    from pipeline.text.labels import leakage, telling

    common, by_id = leakage(found, corpus, rng)
    if found.classes:
        line = f"  most frequent class {common:.1%}, token id alone {by_id:.1%} of held-out tokens"
    else:
        line = f"  R^2 of the token id alone {by_id:.3f} on held-out tokens"
    if by_id >= common + GIVEN_AWAY * (1 - common):
        line += ": the id alone gives this label away, so a probe of it reads tokens, not context"
    if not found.classes:
        return [line]
    tokens = [
        f"{''.join(texts.context([i]))!r} {found.classes[code]} ({share:.0%} of {n:,})"
        for i, code, share, n in telling(found, corpus, TELLING)
    ]
    return [line, f"  tokens that give most away: {', '.join(tokens)}"] if tokens else [line]


def examples(
    where: np.ndarray, corpus: Any, texts: Any, name: Any, n: int, rng: np.random.Generator
) -> list[str]:
    """Some labelled tokens, each in [[ ]] in its context."""
    places = np.argwhere(where)
    out = []
    for block, position in places[np.sort(rng.permutation(len(places))[:n])]:
        start = max(0, position - AROUND)
        words = texts.context(corpus.tokens[block, start : position + AROUND + 1].tolist())
        at = position - start
        before, after = "".join(words[:at]), "".join(words[at + 1 :])
        line = f"{before}[[{words[at]}]]{after}".replace("\n", "⏎")
        out.append(f"    {name(block, position)}: {line}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", help=f"one of {', '.join(WHAT)}")
    parser.add_argument("paper", help="name of a paper")
    parser.add_argument("--scale", default="laptop", choices=SCALES)
    parser.add_argument("--label", default="", help="one label; default: all")
    parser.add_argument("--pattern", default="", help="try a regular expression as a label")
    parser.add_argument("--function", default="", help="try a function of the paper's labels.py")
    parser.add_argument("--examples", type=int, default=3, help="of each class")
    parser.add_argument("--dir", action="append", default=[], help="folder of papers, if another")
    parser.add_argument("--seed", type=int, default=0, help="of the examples")
    args = parser.parse_args()
    with command("preview"):
        print("\n".join(lines(args)))


def lines(args: argparse.Namespace) -> list[str]:
    """What the command prints.

    Raises:
        RetraceError: no such paper or label, or no corpus yet.
    """
    if args.what not in WHAT:
        raise RetraceError(f"no preview of '{args.what}'; there is {', '.join(WHAT)}")
    config = load_yaml(ROOT / "config.yaml") | {"papers": [args.paper], "scale": args.scale}
    if args.dir:
        config["papers_dirs"] = args.dir
    run = Run.load(config, [Path.cwd(), ROOT])
    paper = run.paper(args.paper, args.scale)
    specs = wanted(paper, args)
    corpus, texts, found = made(run, paper, specs)
    out: list[str] = []
    for name, one in found.items():
        spec = specs[name]
        if isinstance(one, str):
            out += [f"{name}: {one}", ""]
        else:
            out += [*shown(one, spec, corpus, texts, args.examples, args.seed), ""]
    return out[:-1]
