"""Copies one dictionary out of the store, in the formats that other tools read.

    snakemake results/<scale>/<paper>/exports/<arm>.<dictionary>/saelens
    snakemake results/<scale>/<paper>/exports/<arm>.<dictionary>/saebench_core.json
    snakemake results/<scale>/<paper>/exports/<arm>.<dictionary>/neuronpedia

* `saelens`: its folder, as `SAE.load_from_disk` reads it, and a card (export_card.py).
* `sparsify`, `dictionary_learning`, `circuit_tracer`: its weights as those libraries read them
  (export_layouts.py).
* `crosscoder`: the weights of a crosscoder, source by source (export_layouts.py).
* `saebench_core.json`: what stage evaluation measured, under SAEBench's names. `explained_variance`
  and `mse` are ours (metrics.py): SAEBench 0.6.0's own subtract the square of a mean square from
  the variance, and divide by the number of tokens twice. Its ablation is SAEBench's: zero at every
  position, those included that the reconstruction spares. Its time is the evaluation table's.
* `neuronpedia`: one JSON a latent of stage features.

All is checked against its format before it is written (export_formats.py).
"""

import importlib.metadata
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from pipeline.errors import RetraceError, nearest
from pipeline.job import cli
from pipeline.sharing.export_card import card
from pipeline.sharing.export_formats import CoreResult, FeatureDetails, SaeLensConfig, check_weights
from pipeline.sharing.export_layouts import LAYOUTS, crosscoder, transcoders
from pipeline.spec.base import Section, sentence
from pipeline.store import provenance, tables

PIECE = 2048  # latents whose cosines with all others are in memory at a time
BLOCKS_A_PASS = 8  # as in evaluation.py
ROUNDING = 1e-6  # nats a nat: what float32 losses differ by when the same tokens are summed anew


class Export(Section):
    """What --spec carries under `export`."""

    format: Literal[
        "saelens", "saebench", "neuronpedia", "sparsify", "dictionary_learning", "circuit_tracer",
        "crosscoder",
    ]  # fmt: skip
    arm: str
    sae: str
    paper: str


def validated(format: type[BaseModel], data: dict, where: str) -> BaseModel:
    """`data` as a model of its format; one sentence where it does not fit."""
    try:
        return format.model_validate(data)
    except ValidationError as e:
        raise RetraceError(f"{where}: not {format.__name__}: {sentence(e)}") from None


def dictionary(manifest: str | Path, name: str) -> tuple[Path, SaeLensConfig, dict]:
    """Folder, configuration and tensors of one dictionary of an SAE job, checked."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    listed = tables.read_json(manifest).get("saes")
    if not isinstance(listed, dict) or name not in listed:
        known = listed if isinstance(listed, dict) else []
        raise RetraceError(f"{manifest}: holds no dictionary '{name}'{nearest(name, known)}")
    inside = listed[name].get("folder") if isinstance(listed[name], dict) else None
    if not isinstance(inside, str) or Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise RetraceError(f"{manifest}: saes.{name}.folder is {inside!r}, no folder beside it")
    folder = Path(manifest).parent / inside
    if listed[name].get("decoder") is False:
        raise RetraceError(
            f"{folder}: '{name}' is an encoder without a decoder, and every format of exports has "
            f"one; export another dictionary"
        )
    config = validated(SaeLensConfig, tables.read_json(folder / "cfg.json"), f"{folder}/cfg.json")
    try:
        weights = load_file(folder / "sae_weights.safetensors")
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise RetraceError(
            f"{folder}/sae_weights.safetensors: cannot be read ({e}); delete the folder, then run "
            f"snakemake again"
        ) from e
    check_weights(config, weights, f"{folder}/sae_weights.safetensors")
    return folder, config, weights


def mean_max_cosine(directions: np.ndarray) -> float:
    """Mean over rows [n d] of the largest cosine with another row; a row of zeros has none."""
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = directions / np.maximum(norms, np.finfo(np.float32).tiny)
    largest = []
    for at in range(0, len(unit), PIECE):
        cosines = unit[at : at + PIECE] @ unit.T
        cosines[np.arange(len(cosines)), at + np.arange(len(cosines))] = -1
        largest.append(cosines.max(1))
    return float(np.clip(np.concatenate(largest).mean(), -1, 1))


def plain_ratio(part: float, whole: float, *, loss: float, name: str) -> float:
    """part / whole, SAEBench's score, where the ablation moves the model at all.

    The ratio is also given where ablation lowers the loss, where metrics.loss_recovered is not.

    Args:
        loss: of the model, nats; a `whole` within ROUNDING of it is noise, and so is the ratio.
        name: of the score.

    Raises:
        RetraceError: `whole` is zero or noise, so the score has no value.
    """
    if abs(whole) <= ROUNDING * max(loss, 1.0):
        raise RetraceError(
            f"{name} has no value: with the hook set to zero the model differs from itself by "
            f"{whole:.3g} nats, which is rounding, and the score divides by that; export a "
            f"dictionary of a hook that the output depends on"
        )
    return part / whole


def core_metrics(row: dict[str, Any], n_ctx: int, weights: dict) -> dict[str, dict]:
    """SAEBench's categories out of a row of the evaluation table and a dictionary's weights.

    Raises:
        RetraceError: a score has no value, since the ablation changes nothing.
    """
    loss, kl_zero, loss_zero = row["loss_model"], row["kl_zero_all"], row["loss_zero_all"]
    encoder = weights["W_enc"].T if "W_enc" in weights else weights["W_dec"]
    often = [f"{n}freq_over_{p}_percent" for n in ("", "normalized_") for p in (1, 10)]
    return {
        "model_behavior_preservation": {
            "kl_div_score": plain_ratio(
                kl_zero - row["kl_spliced"], kl_zero, loss=loss, name="kl_div_score"
            ),
            "kl_div_with_ablation": kl_zero,
            "kl_div_with_sae": row["kl_spliced"],
        },
        "model_performance_preservation": {
            "ce_loss_score": plain_ratio(
                loss_zero - row["loss_spliced"], loss_zero - loss, loss=loss, name="ce_loss_score"
            ),
            "ce_loss_with_ablation": loss_zero,
            "ce_loss_with_sae": row["loss_spliced"],
            "ce_loss_without_sae": loss,
        },
        "reconstruction_quality": {
            "explained_variance": row["explained_variance"],
            "explained_variance_legacy": row["explained_variance_legacy"],
            "mse": row["mse"],
            "cossim": row["cosine_similarity"],
        },
        "shrinkage": {
            "l2_norm_in": row["norm_in"],
            "l2_norm_out": row["norm_out"],
            "l2_ratio": row["norm_ratio"],
            "relative_reconstruction_bias": row["relative_bias"],
        },
        "sparsity": {"l0": row["l0"], "l1": row["l1"]},
        "token_stats": {
            "total_tokens_eval_reconstruction": row["splice_blocks"] * n_ctx,
            "total_tokens_eval_sparsity_variance": row["eval_rows"],
        },
        "misc_metrics": {
            **{name: row[name] for name in often},
            "average_max_encoder_cosine_sim": mean_max_cosine(encoder),
            "average_max_decoder_cosine_sim": mean_max_cosine(weights["W_dec"]),
            "frac_alive": 1 - row["silent_share"],
        },
    }


def quantile_values(histogram: np.ndarray, largest: float) -> list[float]:
    """The 1st to 100th percentile of a latent's non-zero activations; none of a silent latent.

    Args:
        histogram: counts in bins of equal width from 0 to `largest`; inside a bin the activations
            count as evenly spread, so a percentile is right to within a bin.
    """
    counts = np.concatenate([[0], np.cumsum(histogram)])
    if not counts[-1]:
        return []
    edges = np.linspace(0, largest, len(counts))
    return np.interp(np.arange(1, 101) / 100 * counts[-1], counts, edges).tolist()


def feature_details(row: dict[str, Any], sae: str) -> dict[str, Any]:
    """Neuronpedia's details of a latent, out of a row of the features table."""
    return {
        "transcoder_id": sae,
        "index": row["latent"],
        "examples_quantiles": [
            {
                "quantile_name": "Top activations",
                "examples": [
                    {
                        "tokens": list(e["tokens"]),
                        "tokens_acts_list": [float(a) for a in e["acts"]],
                        "train_token_ind": int(e["peak"]),
                        "is_repeated_datapoint": False,
                    }
                    for e in row["examples"]
                ],
            }
        ],
        "top_logits": [pair["token"] for pair in row["top_logits"]],
        "bottom_logits": [pair["token"] for pair in row["bottom_logits"]],
        "act_min": 0.0,
        "act_max": row["max_act"],
        "quantile_values": quantile_values(row["histogram"], row["max_act"]),
        "histogram": [float(n) for n in row["histogram"]],
        "activation_frequency": row["density"],
    }


def _without_certificate(path: Path) -> dict[str, Any]:
    return {k: v for k, v in tables.read_json(path).items() if k != "provenance"}


@contextmanager
def _whole(folder: str | Path) -> Iterator[Path]:
    """Inside: an empty folder beside `folder`, which takes its name at the end, whole."""
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# --- the formats ---------------------------------------------------------------------------


def saelens(job: cli.Job, export: Export) -> None:
    """Copy the folder, byte for byte, and add a card; provenance.json names what it is made of."""
    args = job.args
    folder, config, _ = dictionary(args.sae, export.sae)
    made = job.certificate([args.sae, args.model, *sorted(folder.iterdir())])
    named = {"paper": export.paper, "arm": export.arm, "sae": export.sae}
    text = card(config, tables.read_json(args.model), folder=args.out, named=named)
    with _whole(args.out) as out:
        copies = [Path(shutil.copy2(file, out)) for file in sorted(folder.iterdir())]
        copies.append(out / "README.md")
        copies[-1].write_text(text, encoding="utf-8")
        files = {copy.name: provenance.sha256_file(copy) for copy in copies}
        tables.write_json(out / "provenance.json", {"files": files}, made)


def layout(job: cli.Job, export: Export) -> None:
    """The folder of another library; provenance.json names what it is made of."""
    entry = tables.read_json(job.args.sae)["saes"].get(export.sae, {})
    if "layers" in entry:
        folder = Path(job.args.sae).parent / entry["folder"]
        made = job.certificate([job.args.sae])
        with _whole(job.args.out) as out:
            transcoders(out, folder)
            files = {file.name: provenance.sha256_file(file) for file in sorted(out.iterdir())}
            tables.write_json(out / "provenance.json", {"files": files}, made)
        return
    folder, config, weights = dictionary(job.args.sae, export.sae)
    made = job.certificate([job.args.sae, *sorted(folder.iterdir())])
    with _whole(job.args.out) as out:
        if sources := tables.read_json(job.args.sae).get("sources"):
            crosscoder(out, config, weights, sources, entry["spec"])
        else:
            LAYOUTS[export.format](out, config, weights)
        files = {file.name: provenance.sha256_file(file) for file in sorted(out.iterdir())}
        tables.write_json(out / "provenance.json", {"files": files}, made)


def saebench(job: cli.Job, export: Export) -> None:
    """Write a row of the evaluation table as SAEBench's core result."""
    args = job.args
    folder, config, weights = dictionary(args.sae, export.sae)
    row = tables.read_table(args.table).set_index("sae").loc[export.sae].to_dict()
    made, about = job.certificate([args.sae, args.table]), config.metadata
    where = f"{args.table}: {export.sae}"
    try:
        measured = core_metrics(row, about.context_size, weights)
    except RetraceError as e:
        raise RetraceError(f"{where}: {e}") from None
    first = about.seqpos_slice[0] or 0
    result = {
        "eval_config": {
            "model_name": about.model_name,
            "llm_dtype": "float32",
            "batch_size_prompts": BLOCKS_A_PASS,
            "n_eval_reconstruction_batches": -(-row["splice_blocks"] // BLOCKS_A_PASS),
            "n_eval_sparsity_variance_batches": 1,
            "dataset": about.dataset_path,
            "context_size": about.context_size,
            "exclude_special_tokens_from_reconstruction": about.prepend_bos and first > 0,
        },
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, provenance.digest(made["inputs"]))),
        "datetime_epoch_millis": int(Path(args.table).stat().st_mtime * 1000),
        "eval_result_metrics": measured,
        "sae_bench_commit_hash": f"none: measured by retrace {made['retrace']}",
        "sae_lens_id": f"{export.arm}.{export.sae}",
        "sae_lens_release_id": export.paper,
        "sae_lens_version": importlib.metadata.version("sae-lens"),
        "sae_cfg_dict": _without_certificate(folder / "cfg.json"),
        "eval_result_unstructured": {
            "tokens": f"Positions below {first} are neither reconstructed nor counted; every other "
            "position is, where SAEBench leaves out BOS, EOS and padding wherever they stand."
        },
    }
    checked = validated(CoreResult, result, where)
    tables.write_json(args.out, checked.model_dump(mode="json"), made)


def neuronpedia(job: cli.Job, export: Export) -> None:
    """Write `<latent>.json` for every latent, and provenance.json with their digests."""
    table, name = job.args.table, f"{export.paper}-{export.arm}-{export.sae}"
    made, files = job.certificate([table]), {}
    frame = tables.read_table(table)
    details = [
        validated(FeatureDetails, feature_details(row, name), f"{table}: latent {row['latent']}")
        for row in frame.to_dict("records")
    ]
    with _whole(job.args.out) as out:
        for one in details:
            file = out / f"{one.index}.json"
            file.write_text(one.model_dump_json(), encoding="utf-8")
            files[file.name] = provenance.sha256_file(file)
        tables.write_json(out / "provenance.json", {"files": files}, made)


def check_kind(manifest: str, export: Export) -> None:
    """Raise where a crosscoder is to leave in the format of one source, or the other way round."""
    stored = tables.read_json(manifest)
    sources, entry = stored.get("sources"), stored["saes"].get(export.sae, {})
    if "layers" in entry and export.format != "circuit_tracer":
        raise RetraceError(
            f"{manifest}: '{export.sae}' is a set of transcoders of all layers, which "
            f"{export.format} has no place for; export it as circuit_tracer"
        )
    if entry.get("layers") == "cross" and entry["spec"].get("skip"):
        raise RetraceError(
            f"{manifest}: '{export.sae}' is a cross-layer transcoder with a skip connection, and "
            f"circuit-tracer's files of one hold no W_skip; read the store's folder as it is"
        )
    if sources and export.format != "crosscoder":
        raise RetraceError(
            f"{manifest}: '{export.sae}' is a crosscoder of {len(sources)} sources, which "
            f"{export.format} has no place for; export it as crosscoder"
        )
    if not sources and export.format == "crosscoder":
        raise RetraceError(
            f"{manifest}: '{export.sae}' has one source and is no crosscoder; export it as "
            f"saelens, or as one of {', '.join(LAYOUTS)}"
        )


FORMATS: dict[str, Callable[[cli.Job, Export], None]] = {
    "saelens": saelens, "saebench": saebench, "neuronpedia": neuronpedia,
    **dict.fromkeys([*LAYOUTS, "crosscoder"], layout),
}  # fmt: skip


def main() -> None:
    parser = cli.parser(
        "exports",
        __doc__,
        sae="manifest.json of the SAE job",
        out="folder or file to write",
    )
    parser.add_argument("--table", help="of evaluation (saebench) or of features (neuronpedia)")
    parser.add_argument("--model", help="model.json (saelens)")

    def work(job: cli.Job) -> None:
        export = job.section("export", Export)
        check_kind(job.args.sae, export)
        FORMATS[export.format](job, export)
        cli.log.info("%s: written and checked", job.args.out)

    cli.run("exports", parser.parse_args(), work)
