"""The paper's two RASP programs, compiled by tracr into a transformer's weights.

tracr (Lindner et al. 2023, 2301.05062) needs jax, so what it makes is kept in models/, and stages
read that. With the extra `tracr` installed,

    python rules/papers/circuit_discovery/programs.py rules/papers/circuit_discovery/models

makes it anew; a test compares. The programs, vocabularies and lengths are those of
acdc/tracr_task/utils.py in the authors' repository.

1. A program is compiled; its parameters become those of `pipeline.models.native`, layer by layer.
2. The unembedding picks the residual dimensions that hold the output: the first n_outputs logits.
3. tracr.json keeps what no weight says: tokens, names of the residual dimensions, versions, digest.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import command
from pipeline.store import provenance

BOS, MAX_LENGTH = "BOS", 5
PACKAGES = "tracr-pypi jax dm-haiku numpy".split()


def programs() -> dict[str, tuple[Any, set]]:
    """Task -> (RASP program, vocabulary).

    reverse: the sequence from its end. xproportion: the share of x among the tokens so far.
    """
    from tracr.compiler.lib import make_frac_prevs, make_length
    from tracr.rasp import rasp

    opposite = make_length() - rasp.indices - 1
    flip = rasp.Select(rasp.indices, opposite, rasp.Comparison.EQ)
    return {
        "reverse": (rasp.Aggregate(flip, rasp.tokens).named("reverse"), {1, 2, 3}),
        "xproportion": (make_frac_prevs(rasp.tokens == "x"), {"w", "x", "y", "z"}),
    }


def outputs(model: Any, name: str) -> list[int]:
    """The residual dimensions that hold the output, in the order of its values."""
    labels = model.residual_labels
    return [i for i, label in enumerate(labels) if label == name or label.startswith(f"{name}:")]


def weights(model: Any, out: list[int]) -> dict[str, np.ndarray]:
    """The state dict of `pipeline.models.native` of a compiled model."""
    given = {k: {n: np.asarray(p, np.float32) for n, p in v.items()}
             for k, v in model.params.items()}  # fmt: skip
    embed = given["token_embed"]["embeddings"]
    head = np.zeros_like(embed)
    head[range(len(out)), out] = 1
    made = {"tok_embed.weight": embed, "pos.weight": given["pos_embed"]["embeddings"]}
    parts = {
        "attn/query": "attn.q", "attn/key": "attn.k", "attn/value": "attn.v",
        "attn/linear": "attn.o", "mlp/linear_1": "mlp.fc_in", "mlp/linear_2": "mlp.fc_out",
    }  # fmt: skip
    for i in range(model.model_config.num_layers):
        for theirs, ours in parts.items():
            p = given[f"transformer/layer_{i}/{theirs}"]
            made |= {f"layers.{i}.{ours}.weight": p["w"].T, f"layers.{i}.{ours}.bias": p["b"]}
    made["head.weight"] = head
    return {f"model.{k}": np.ascontiguousarray(v) for k, v in made.items()}


def config(model: Any) -> dict[str, Any]:
    """The config of `pipeline.models.native` of a compiled model."""
    from pipeline.models.native import MODEL_TYPE
    from pipeline.spec.training import Architecture

    cfg, params = model.model_config, model.params
    d_vocab, d_model = params["token_embed"]["embeddings"].shape
    shape = Architecture(
        n_layers=cfg.num_layers, d_model=d_model, n_heads=cfg.num_heads, d_head=cfg.key_size,
        d_mlp=cfg.mlp_hidden_size, act_fn="relu", normalization="none",
        n_ctx=len(params["pos_embed"]["embeddings"]),
    )  # fmt: skip
    own = {"d_vocab": d_vocab, "model_type": MODEL_TYPE, "bidirectional": not cfg.causal}
    return shape.model_dump() | own


def write(task: str, program: Any, vocabulary: set, folder: Path) -> None:
    """Compile a program into folder/<task>/."""
    from safetensors.numpy import save_file
    from tracr.compiler import compiling

    model = compiling.compile_rasp_to_model(program, vocabulary, MAX_LENGTH, compiler_bos=BOS)
    out = outputs(model, program.label)
    folder = folder / task
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(model, out), folder / "model.safetensors")
    shape = json.dumps(config(model), indent=1) + "\n"
    (folder / "config.json").write_text(shape, encoding="utf-8")
    tokens = sorted(model.input_encoder.encoding_map.items(), key=lambda item: item[1])
    about = {
        "task": task,
        "tokens": [str(token) for token, _ in tokens],
        "n_outputs": len(out),
        "residual": model.residual_labels,
        "made_with": {p: version(p) for p in PACKAGES},
        "sha256": provenance.sha256_file(folder / "model.safetensors"),
    }
    (folder / "tracr.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the tasks with tracr.")
    parser.add_argument("folder", type=Path, help="where the models are written")
    folder = parser.parse_args().folder
    with command("programs"):
        for task, (program, vocabulary) in programs().items():
            write(task, program, vocabulary, folder)


if __name__ == "__main__":
    main()
