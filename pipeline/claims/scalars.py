"""Tables -> named scalars. Every metric has one written definition, stored beside its number.

Names are dotted: `<arm>.<sae>.<metric>` for a dictionary, `attribution.<prompt>.<metric>` for a
prompt. A paper adds its own in `metrics.py` beside paper.yaml: a literal `METRICS` (name or
pattern -> definition) and a function `metrics(tables) -> {name: value or one value a seed}`.
"""

import fnmatch
import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.job.source import import_file, literal

# What evaluation.py measures of a dictionary on held-out rows.
SAE = {
    "explained_variance": "1 - sum |x - x_hat|^2 / sum |x - mean|^2, both sums over all held-out "
    "rows, float64",
    "explained_variance_no_outliers": "the same over all dimensions but the four of largest "
    "variance",
    "l0": "mean number of non-zero latents a held-out row",
    "mse": "mean over held-out rows of |x - x_hat|^2, summed over dimensions, unscaled activations",
    "relative_bias": "sum |x_hat|^2 / sum x_hat . x over held-out rows: the factor by which x_hat "
    "is too long, below 1 for shrinkage (relative reconstruction bias, Rajamanoharan et al. 2024, "
    "2404.16014; SAELens averages this ratio over batches)",
    "cosine_similarity": "mean over held-out rows of cos(x, x_hat)",
    "norm_in": "mean over held-out rows of |x|",
    "norm_out": "mean over held-out rows of |x_hat|",
    "norm_ratio": "mean over held-out rows of |x_hat| / |x|: shrinkage, errors included",
    "l1": "mean over held-out rows of the sum of |activations|",
    "explained_variance_legacy": "mean over held-out rows of 1 - |x - x_hat|^2 / |x - mean|^2, the "
    "mean that of 4096 rows: SAELens's before 6.45.1, which many published numbers are; a row near "
    "the mean may weigh without bound",
    "freq_over_1_percent": "share of latents that more than 1 % of held-out rows make non-zero",
    "freq_over_10_percent": "the same for 10 %",
    "normalized_freq_over_1_percent": "share of all activations, counted, that these latents have",
    "normalized_freq_over_10_percent": "the same for 10 %",
    "dead_share": "share of latents that no row of the last sae.training.dead_rows training rows "
    "made non-zero, when training ended",
    "silent_share": "share of latents that no held-out row makes non-zero",
    "kl_spliced": "mean over positions of KL(model || spliced) of the next-token distributions, "
    "nats, held-out blocks",
    "kl_zero": "the same with x replaced by zero at the hook",
    "kl_zero_all": "the same with x replaced by zero at every position, the first of a block too",
    "loss_model": "mean next-token cross-entropy of the model, nats, held-out blocks",
    "loss_spliced": "the same with x replaced by x_hat at the hook",
    "loss_zero": "the same with x replaced by zero at the hook, on the tokens that dictionaries "
    "are trained on",
    "loss_zero_all": "the same at every position, the first of a block too: SAELens's and "
    "SAEBench's ablation",
    "loss_mean": "the same with x replaced by the held-out mean at the hook",
    "delta_loss": "loss_spliced - loss_model, nats",
    "loss_recovered_zero": "(loss_zero - loss_spliced) / (loss_zero - loss_model); undefined where "
    "the ablation does not raise the loss, so that there is nothing to recover",
    "loss_recovered_mean": "(loss_mean - loss_spliced) / (loss_mean - loss_model); undefined as "
    "loss_recovered_zero",
    "splice_check": "|loss with x replaced by x_hat + (x - x_hat) - loss_model|, nats; near zero "
    "if the splice is right",
}
SPLICED = {  # of SAE, what needs the model; a crosscoder is not spliced
    *(name for name in SAE if name.startswith(("loss_", "kl_"))), "delta_loss", "splice_check",
}  # fmt: skip
ATTRIBUTION = {
    "logit_diff": "logit of the answer minus logit of the foil at the last position",
    "baseline_logit_diff": "the same with every latent and the error set to zero at the hook",
    "completeness_gap": "gradient x activation: (sum over latents and error - (logit_diff - "
    "baseline_logit_diff)) / |logit_diff - baseline_logit_diff|",
    "completeness_gap_ig": "the same for integrated gradients",
    "ablation_correlation": "Pearson correlation of gradient x activation and exact ablation over "
    "the ablated latents, those of largest attribution",
    "ablation_correlation_ig": "the same for integrated gradients",
    "ablation_spearman": "the same as ablation_correlation, of ranks",
    "ablation_spearman_ig": "the same for integrated gradients",
    "ablation_correlation_without_largest": "the same as ablation_correlation, without the one "
    "latent whose leaving out changes it the most",
    "ablation_correlation_without_largest_ig": "the same for integrated gradients",
    "sign_agreement": "share of the ablated latents whose gradient x activation has the sign of "
    "the exact effect",
    "sign_agreement_ig": "the same for integrated gradients",
}
SPARSE_PROBES = {  # of a dictionary, for each k of section benchmarks; {k} stands for it
    "probe_k{k}": "mean over labels of the held-out accuracy of a logistic probe on the {k} "
    "latents whose mean differs most between texts of the label and as many others (SAEBench "
    "0.6.0, sparse probing); chance is 0.5; one value a seed of the draw",
    "probe_k{k}_stream": "the same with {k} dimensions of the stream that the dictionary reads",
    "probe_all_stream": "the same with the whole stream",
}
PERTURBATION = {  # of a dictionary, for each n of benchmarks.tpp; {n} stands for it
    "tpp_n{n}": "mean over labels of the accuracy that a label's probe loses when the {n} latents "
    "of largest effect on it are ablated, less the mean of what the other labels' probes lose "
    "(targeted probe perturbation, SAEBench 0.6.0); one value a seed of the draws",
    "tpp_n{n}_intended": "the first part alone: what a label's own probe loses",
    "tpp_n{n}_unintended": "the second part alone: what the other labels' probes lose",
}
CROSSCODERS = {  # of a source of a crosscoder, <arm>.<crosscoder>.<source>.*, beside those of SAE
    "living": "latents that held-out rows make non-zero",
    "shared": "of these, latents whose decoder norms, on scaled rows, are within a factor of 0.8 "
    "of the largest source's in every source (0.4 <= delta <= 0.6 of two, Minder et al. 2025)",
    "exclusive": "of these, latents of this source whose norm in every other is below 0.2 of it "
    "(delta < 0.1 or > 0.9 of two, Lindsey et al. 2024)",
    "confirmed": "of the exclusive ones, those that latent scaling calls exclusive, too: nu_r < "
    "0.5 and nu_e < 0.2 in every other source (Minder et al. 2025)",
}
TRANSCODERS = {  # of a set of all layers, <arm>.<set>.*, and of each layer, <arm>.<set>.l<n>.*
    "explained_variance": "1 - sum of squared errors / sum of squared deviations of what a layer's "
    "MLP writes on held-out tokens, from its true input; of a set the mean over layers",
    "l0": "mean number of active features per token that read the layer; of a set the sum over "
    "layers",
    "mse": "mean squared error per token of what the layer's MLP writes; of a set the sum",
    "silent_share": "share of features that no held-out token makes fire; of a set the mean",
    "dead_share": "share of features that had been silent for dead_rows rows when training ended",
}
ABSORPTION = {  # of a dictionary, one value a seed; SAEBench 0.6.0, Chanin et al. 2024
    "absorption_fraction": "mean over letters of the mean over held-out words, whose first letter "
    "a linear probe sees, of the share that other latents than the letter's carry; of letters "
    "whose probe has an F1 above absorption.min_f1, undefined with fewer than "
    "absorption.min_letters",
    "full_absorption": "the same of the share of words on which the letter's latents are silent "
    "and one other carries most",
    "letter_latents": "mean number of latents that stand for one of these letters",
}
CIRCUITS = {  # of a method of the section circuits
    "total": "mean over prompts of m(source) - m(base), m the logit of the answer minus that of "
    "the other name; for direct_logit m of the clean prompt; for latents the exact effect of "
    "patching a whole site, summed over sites; for acdc the loss of the circuit that is left",
    "completeness_gap": "(sum over a cut of the graph - total) / |total|; the cut is the embedding "
    "of each differing token for patching, all latents and error terms of every site for latent "
    "methods, the edges that acdc cut, all that is written to the logits for the others",
    "correlation": "Pearson correlation of the score with exact patching: of all heads and MLPs, "
    "for eap of the edges of largest score, for latents of those of largest score by any method; "
    "acdc: of all edges when they had their turn, with each edge cut alone; "
    "path_patching, itself exact: with the whole head's; atp_star, which has no sign and no sum: "
    "with the size of the exact effect",
    "spearman": "the same of ranks",
    "correlation_without_largest": "Pearson's without the one part whose leaving out changes it "
    "the most; the column largest of the table methods names it",
    "sign_agreement": "share of those whose score has the sign of the exact effect",
}
GRAPHS = {  # of dictionaries of the section graphs: means over prompts; circuit-tracer's scores
    "replacement_score": "share of the influence on the logits that starts in embeddings, not in "
    "errors, in the graph before pruning; influence is the sum of the powers of the graph's edges, "
    "those into a node as shares (circuit-tracer, compute_graph_scores)",
    "completeness_score": "share of what nodes read that does not come from errors, nodes weighted "
    "by their influence (circuit-tracer, compute_graph_scores)",
    "n_active": "features active on a prompt, over all layers and positions",
    "n_features": "of these, nodes of the graph before pruning",
    "n_kept": "of these, nodes that pruning keeps",
    "l0": "active features per token, over all layers",
    "pruned_l0": "features that pruning keeps per token",
    "kl_frozen": "KL divergence of next tokens from the model's, nats, mean over positions of a "
    "prompt, of the replacement model with its patterns and norms' scales, without errors",
    "agreement_frozen": "share of these positions where both find the same token most probable",
    "balance_error": "largest difference between a node's value and the sum of edges and bias into "
    "it, as a share of their sizes; 0 but for rounding",
    "faithfulness": "rank correlation between what a graph says of a feature's activation when "
    "another is taken out, and what the true model does, over features of largest influence and "
    "all kept features behind them",
    "faithfulness_null": "the same with what the model does when another feature's decoder row is "
    "taken out in its place, with the same activation and length",
    "faithfulness_logits": "as faithfulness, of the logits that the graph explains",
    "faithfulness_logits_null": "its null",
}
REPLACED = {  # of the same, on held-out text
    "kl": "KL divergence of next tokens from the model's, nats, mean over held-out tokens, with "
    "the dictionaries in the place of all MLPs at once, attention and norms computed anew",
    "agreement": "share of these tokens where both find the same next token most probable",
}
PROBES = {  # of a label and a method at a hook of the section probes, one value a seed
    "accuracy": "share of held-out rows whose class the probe names; the rows are of documents "
    "that it did not learn from",
    "balanced_accuracy": "mean over classes of that share",
    "loss": "mean cross-entropy of held-out rows, nats; of methods whose softmax is a probability",
    "control_accuracy": "accuracy on the control task: a class drawn for each token id from the "
    "real classes' distribution, the same in training and test (Hewitt & Liang 2019)",
    "selectivity": "accuracy - control_accuracy; of numbers the same of R^2",
    "codelength": "online code of the training labels, kbit (Voita & Titov 2020); logistic only",
    "control_codelength": "the same of the control task",
    "compression": "uniform code / online code",
    "control_compression": "the same of the control task",
    "r2": "1 - squared error / squared error of the training mean, held-out rows; of numbers",
    "leak": "accuracy with rows held out one by one - accuracy with documents held out",
}
STEERING = {  # of a direction, mean over classes, hooks and blocks, one value a seed
    "own_gain": "largest fall, over coefficients above 0, of the loss on held-out text of the "
    "class, nats a token",
    "net_gain": "largest difference, over coefficients above 0, of the fall of the loss on text of "
    "the class and that on other text, nats a token",
    "words": "largest rise, over coefficients above 0, of the mean log-probability of the tokens "
    "that are typical of the class, on other text, nats",
    "words_free": "the same over coefficients that raise the loss on other text by at most 0.1 "
    "nats a token; 0 where none does",
    "harm": "rise of the loss on other text at the largest coefficient, nats a token",
    "opposite": "rise of the log-probability of the typical tokens at the lowest coefficient",
    "ablated": "the same where the direction is taken out of the stream",
    "reading": "largest rise, over coefficients above 0, of the class's logit against the others' "
    "mean in the logistic probe at steering.reading",
}
TRAINING = {  # of a training run; training.<run>.<arm>.* where it has arms
    "steps": "updates when training ended, one value a seed",
    "tokens": "training tokens that were shown until then, repeats counted, one value a seed",
    "val_last": "loss of the evaluation set val when training ended, nats, one value a seed",
    "val_best": "the smallest such loss at any evaluation",
    "past_minimum": "val_last / val_best - 1: how far training ran past the best held-out loss",
}


def whole(found: Any, file: Any) -> dict[str, dict[str, Any]]:
    """The metrics of a metrics.json of another's making, as `summary` writes them.

    Earlier releases wrote NaN, in place of null, for the sd of a metric that has none.

    Raises:
        RetraceError: names the first that is not.
    """
    if not isinstance(found, dict):
        raise RetraceError(f"{file}: holds no metrics; run snakemake again")
    for name, metric in found.items():
        if not _is_summary(metric):
            raise RetraceError(
                f"{file}: metric '{name}' has not values, mean, sd, n and definition as stage "
                f"metrics writes them; make it again"
            )
    return {name: {**metric, "sd": _spread(metric)} for name, metric in found.items()}


def _spread(metric: dict[str, Any]) -> float | None:
    sd = metric["sd"]
    return None if sd is None or math.isnan(sd) else sd


def _is_summary(metric: Any) -> bool:
    if not isinstance(metric, dict) or not isinstance(metric.get("values"), list):
        return False
    values, sd = metric["values"], metric.get("sd")
    numbers = [*values, metric.get("mean"), metric.get("n"), *([] if sd is None else [sd])]
    plain = all(type(v) is float or (type(v) is int and abs(v) < 2**63) for v in numbers)
    spread = sd is None or (plain and (math.isnan(sd) or any(map(math.isfinite, values))))
    return plain and spread and "sd" in metric and isinstance(metric.get("definition"), str)


def parts(paper: Any) -> dict[str, Any]:
    """What the names of a paper's metrics are made of, small enough for a command's argument.

    own: METRICS of its metrics.py, in pairs, for the JSON of a job sorts the keys of a mapping and
    the first pattern that fits counts; saes: arm -> names; prompts: of attribution; circuits: arms
    and methods; ks and absorption: of benchmarks and absorption, where there are these
    sections; training: names of runs.
    """
    spec = paper.spec
    own = dict(literal(paper.folder / "metrics.py", "METRICS"))
    out: dict[str, Any] = {"own": [[name, text] for name, text in own.items()]}
    out["saes"] = {a: list(spec.saes_of(a)) for a in spec.arm_names()} if spec.sae else {}
    crossed = {a: found for a in spec.arm_names() if (found := spec.crosscoders_of(a))}
    if crossed:  # absent elsewhere, as those below
        out["crosscoders"] = {arm: list(found) for arm, found in crossed.items()}
    layered = {a: found for a in spec.arm_names() if (found := spec.transcoders_of(a))}
    if layered:
        out["transcoders"] = {arm: list(found) for arm, found in layered.items()}
    if spec.benchmarks:
        out["ks"] = list(spec.benchmarks.ks)
        out |= {"tpp": list(spec.benchmarks.tpp)} if spec.benchmarks.tpp else {}
    if spec.absorption:
        out["absorption"] = True
    out["prompts"] = list(spec.attribution.prompts) if spec.attribution else []
    arms = spec.circuit_arms() if spec.circuits else []
    out["circuits"] = {arm: list(spec.circuits.methods) for arm in arms}
    if spec.graphs:
        out["graphs"] = {arm: spec.graph_dictionaries(arm) for arm in spec.graph_arms()}
    if spec.probes:  # absent elsewhere, so that no other paper's job changes
        hooks = spec.probes.hooks or spec.activations.hooks
        sites = list(dict.fromkeys(["text", "mean", *map(site, hooks)]))
        out["probes"] = {arm: [list(spec.probes.labels), sites] for arm in spec.probe_arms()}
    if spec.steering:
        out["steering"] = {spec.steering.arm: list(spec.steering.directions)}
    return out | {"training": list(spec.training)}


def site(hook: str) -> str:
    """A hook in the name of a metric: l8 for blocks.8.hook_resid_post, l8_mlp_out, embed."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if not found:
        return hook.replace("hook_", "").replace(".", "_")
    at = found[2].replace("hook_", "").replace(".", "_")
    return f"l{found[1]}" + ("" if at == "resid_post" else f"_{at}")


def known(parts: dict[str, Any]) -> dict[str, str]:
    """Name or pattern -> definition of every metric that a paper of these `parts` can yield."""
    out = dict(parts["own"])
    for arm, saes in parts["saes"].items():
        for sae in saes:
            out |= {f"{arm}.{sae}.{m}": text for m, text in SAE.items()}
            if parts.get("absorption"):
                out |= {f"{arm}.{sae}.{m}": text for m, text in ABSORPTION.items()}
            for k in parts.get("ks", []):
                named = {m.format(k=k): text.format(k=k) for m, text in SPARSE_PROBES.items()}
                out |= {f"{arm}.{sae}.{m}": text for m, text in named.items()}
            for n in parts.get("tpp", []):
                named = {m.format(n=n): text.format(n=n) for m, text in PERTURBATION.items()}
                out |= {f"{arm}.{sae}.{m}": text for m, text in named.items()}
    for arm, names in parts.get("crosscoders", {}).items():
        measured = {m: t for m, t in SAE.items() if m not in SPLICED} | CROSSCODERS
        for sae in names:
            out |= {f"{arm}.{sae}.*.{m}": text for m, text in measured.items()}
    for arm, names in parts.get("transcoders", {}).items():
        for name, at in product(names, ("", "l*.")):
            out |= {f"{arm}.{name}.{at}{m}": text for m, text in TRANSCODERS.items()}
    for prompt in parts["prompts"]:
        out |= {f"attribution.{prompt}.{m}": text for m, text in ATTRIBUTION.items()}
    if parts["prompts"]:
        out |= {f"attribution.mean.{m}": f"mean over prompts: {t}" for m, t in ATTRIBUTION.items()}
    for arm, methods in parts["circuits"].items():
        for method in methods:
            out |= {f"circuits.{arm}.{method}.{m}": t for m, t in CIRCUITS.items()}
    for arm, names in parts.get("graphs", {}).items():
        for name in names:
            out |= {f"graphs.{arm}.{name}.{m}": t for m, t in (GRAPHS | REPLACED).items()}
    for arm, (labels, sites) in parts.get("probes", {}).items():
        for name, at in product(labels, sites):
            out |= {f"{arm}.probes.{name}.*.{at}.{m}": text for m, text in PROBES.items()}
    for arm, directions in parts.get("steering", {}).items():
        for name in directions:
            out |= {f"{arm}.steering.{name}.{m}": text for m, text in STEERING.items()}
    for run in parts["training"]:
        out |= {f"training.{run}.{m}": text for m, text in TRAINING.items()}
        out |= {f"training.{run}.*.{m}": text for m, text in TRAINING.items()}
    return out


def definition(name: str, definitions: dict[str, str]) -> str | None:
    """The definition of a metric: by its name, else by the first pattern that fits it."""
    if name in definitions:
        return definitions[name]
    return next((t for p, t in definitions.items() if fnmatch.fnmatchcase(name, p)), None)


def summary(value: Any) -> dict[str, Any]:
    """values, mean, sd (ddof 1; null for one value) and n of one metric over its seeds.

    A seed in which the metric is undefined (NaN) keeps its place among the values and is left out
    of mean and sd.
    """
    values = [float(v) for v in np.atleast_1d(np.asarray(value, dtype=float))]
    defined = [v for v in values if not math.isnan(v)]
    mean = float(np.mean(defined)) if defined else math.nan
    sd = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return {"values": values, "mean": mean, "sd": sd, "n": len(values)}


def training(run: str, table: Any) -> dict[str, list[float]]:
    """The metrics of a training run, see TRAINING; those of val where it has such a set."""
    out: dict[str, list[float]] = {}
    for arm, rows in table.groupby("arm"):
        name = f"training.{run}.{arm}" if arm else f"training.{run}"
        for _, seed in rows.sort_values(["seed", "step"]).groupby("seed"):
            found = {m: seed[c].max() for m, c in (("steps", "step"), ("tokens", "tokens"))}
            val = seed.loc[seed["set"] == "val", "loss"]
            if len(val):
                last, best = val.iloc[-1], val.min()
                found |= {"val_last": last, "val_best": best, "past_minimum": last / best - 1}
            for metric, value in found.items():
                out.setdefault(f"{name}.{metric}", []).append(float(value))
    return out


def crosscoders(arm: str, table: Any) -> dict[str, float]:
    """SAE, as far as it is measured, and CROSSCODERS of every source of an arm's crosscoders."""
    out = {}
    for row in table.to_dict("records"):
        source = "_".join(map(site, row["source"].split()))
        found = {m: row[m] for m in (*SAE, *CROSSCODERS) if m in row}
        out |= {f"{arm}.{row['sae']}.{source}.{m}": float(v) for m, v in found.items()}
    return out


def transcoders(arm: str, table: Any) -> dict[str, float]:
    """TRANSCODERS of every set of an arm and of each of its layers."""
    out = {}
    for row in table.to_dict("records"):
        at = "" if row["layer"] < 0 else f"l{row['layer']}."
        out |= {f"{arm}.{row['sae']}.{at}{m}": float(row[m]) for m in TRANSCODERS}
    return out


def sparse_probes(table: Any) -> dict[str, list[float]]:
    """SPARSE_PROBES and PERTURBATION of every dictionary of a table, one value per seed."""
    out: dict[str, list[float]] = {}
    for (sae, of, k), rows in table.groupby(["sae", "of", "k"]):
        if of == "tpp":
            by_seed = rows.groupby("seed")[["tpp", "intended", "unintended"]].mean().sort_index()
            for column, values in by_seed.items():
                named = f"tpp_n{k}" + f"_{column}" * (column != "tpp")
                out[f"{sae}.{named}"] = values.tolist()
            continue
        named = f"probe_k{k}" if k else "probe_all"
        named += "_stream" * (of == "stream")
        by_seed = rows.groupby("seed")["accuracy"].mean().sort_index()
        out[f"{sae}.{named}"] = by_seed.tolist()
    return out


def probes(arm: str, table: Any) -> dict[str, np.ndarray]:
    """The metrics of an arm's probes, see PROBES: at each hook, and the mean over hooks."""
    keys, out = ["label", "probe"], {}
    table = table.assign(site=[site(h) if h else "text" for h in table["hook"]])
    columns = [m for m in PROBES if m in table.columns]
    leaky = table[table["split"] == "token"].set_index([*keys, "site", "seed"])["accuracy"]
    table = table[table["split"] == "document"].set_index([*keys, "site", "seed"])
    table = table[columns].assign(leak=leaky - table["accuracy"])
    for (label, probe, at), rows in table.groupby(level=[*keys, "site"], sort=False):
        rows = rows.droplevel([*keys, "site"]).sort_index()
        found = {m: rows[m].to_numpy(float) for m in PROBES if rows[m].notna().any()}
        out |= {f"{arm}.probes.{label}.{probe}.{at}.{m}": v for m, v in found.items()}
    for (label, probe), rows in table.drop("text", level="site").groupby(level=keys, sort=False):
        mean = rows.groupby(level="seed").mean().sort_index()
        found = {m: mean[m].to_numpy(float) for m in PROBES if mean[m].notna().any()}
        out |= {f"{arm}.probes.{label}.{probe}.mean.{m}": v for m, v in found.items()}
    return out


def steering(table: Any) -> dict[str, np.ndarray]:
    """The metrics of steered directions, see STEERING."""
    out: dict[str, list[float]] = {}
    for (arm, name), rows in table.groupby(["arm", "direction"], sort=False):
        for _, seed in rows.groupby("seed"):
            each = [_steered(own) for _, own in seed.groupby(["class", "hook"])]
            for metric in STEERING:
                values = [one[metric] for one in each if metric in one]
                if values:
                    out.setdefault(f"{arm}.steering.{name}.{metric}", []).append(np.mean(values))
    return {name: np.array(values) for name, values in out.items()}


def _steered(rows: Any) -> dict[str, float]:
    """What one direction at one hook does for one class, over its coefficients."""
    added = rows[rows["mode"] == "add"].sort_values("coefficient")
    up, down = added[added["coefficient"] > 0], added[added["coefficient"] < 0]
    out: dict[str, float] = {}
    if len(up):
        free = up.loc[up["other_loss"] <= 0.1, "words"]
        out = {
            "own_gain": -up["own_loss"].min(),
            "net_gain": (up["other_loss"] - up["own_loss"]).max(),
            "words": up["words"].max(),
            "words_free": max(free.max(), 0.0) if len(free) else 0.0,
            "harm": up["other_loss"].iloc[-1],
            "reading": up["reading"].max(),
        }
    if len(down):
        out["opposite"] = down["words"].iloc[0]
    gone = rows[rows["mode"] == "ablate"]
    if len(gone):
        out["ablated"] = gone["words"].iloc[0]
    return {k: float(v) for k, v in out.items() if np.isfinite(v)}


def absorption(table: Any) -> dict[str, list[float]]:
    """The metrics of ABSORPTION, of every dictionary of a table: one value a seed."""
    columns = {"letter_latents": "n_latents", "full_absorption": "full_absorption"}
    out: dict[str, list[float]] = {}
    for sae, rows in table.groupby("sae"):
        for metric in ABSORPTION:
            values = rows[columns.get(metric, metric)].where(rows["counts"])
            out[f"{sae}.{metric}"] = values.groupby(rows["seed"]).mean().sort_index().tolist()
    return out


def core(tables: dict[str, Any]) -> dict[str, Any]:
    """The metrics that every paper with training runs, SAEs, attribution or circuits has."""
    out: dict[str, Any] = {}
    for name, table in tables.items():
        stage, _, part = name.partition("/")
        if stage == "training":
            out |= training(part, table)
        if stage == "evaluation" and not part.endswith("_history"):
            for row in table.to_dict("records"):
                out |= {f"{part}.{row['sae']}.{m}": row[m] for m in SAE if m in row}
        if stage == "crosscoders" and not part.endswith("_latents"):
            out |= crosscoders(part, table)
        if stage == "transcoders":
            out |= transcoders(part, table)
        if stage == "benchmarks":
            out |= {f"{part}.{m}": v for m, v in sparse_probes(table).items()}
        if stage == "absorption":
            out |= {f"{part}.{m}": v for m, v in absorption(table).items()}
        if name == "attribution/prompts":
            for row in table.to_dict("records"):
                out |= {f"attribution.{row['prompt']}.{m}": row[m] for m in ATTRIBUTION}
            out |= {f"attribution.mean.{m}": table[m].mean() for m in ATTRIBUTION}
        if stage == "probes" and part.endswith("_scores"):
            out |= probes(part.removesuffix("_scores"), table)
        if name == "steering/effects":
            out |= steering(table)
        if stage == "graphs" and part.endswith(("_scores", "_replacement")):
            arm, of = part.rpartition("_")[0], GRAPHS if part.endswith("_scores") else REPLACED
            for dictionary, rows in table.groupby("dictionary", sort=False):
                means = rows[list(of)].mean()
                found = {m: v for m, v in means.items() if math.isfinite(v)}
                out |= {f"graphs.{arm}.{dictionary}.{m}": v for m, v in found.items()}
        if stage == "circuits" and part.endswith("_methods"):
            for method, rows in table.groupby("method", sort=False):
                named = f"circuits.{part.removesuffix('_methods')}.{method}"
                found = {m: rows[m].to_numpy(float) for m in CIRCUITS}  # one value for each seed
                out |= {f"{named}.{m}": v for m, v in found.items() if np.isfinite(v).any()}
    return out


def compute(tables: dict[str, Any], definitions: dict[str, str], own: Path | None) -> dict:
    """Every metric of a paper: name -> values, mean, sd, n, definition.

    Args:
        tables: name -> DataFrame, as `Paper.tables` names them.
        definitions: see `known`.
        own: the paper's metrics.py, if it has one.

    Raises:
        RetraceError: metrics.py yields a name without a definition.
    """
    values = core(tables)
    if own is not None:
        values |= import_file(own).metrics(tables)
    out = {}
    for name, value in values.items():
        text = definition(name, definitions)
        if text is None:
            raise RetraceError(
                f"{own}: metric '{name}' has no definition; add it to METRICS, with one sentence"
            )
        out[name] = {**summary(value), "definition": text}
    return out
