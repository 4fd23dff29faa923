"""The effect of each latent on a logit difference, and how far the estimates are right.

Let x = b_dec + sum_i f_i d_i + error at the hook, at every token that the dictionary was trained on
(`splice.known`; the others keep x throughout):

1. gradient x activation of latent i at position p: f_i(p) d_i . dm/dx(p), and of the error term
   error(p) . dm/dx(p), with m = logit(answer) - logit(foil) at the last position (Marks et al.
   2024, Sec. 3; Syed et al. 2023);
2. integrated gradients: dm/dx averaged over `ig_steps` midpoints of the line from b_dec to x
   (Sundararajan et al. 2017; Marks et al. 2024, Eq. 4);
3. completeness: all latents and the error sum to m(x) - m(b_dec) if the estimate is right; the gap
   is reported;
4. exact effects: the `n_ablate` nodes with the largest attribution are set to zero, one at a time,
   and the correlation of estimate and exact effect is reported.

For a transcoder, f comes from the rows that it reads and x above is what it reconstructs, so that
the effects are those through its output hook.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.latents.agreement import agreement
from pipeline.latents.stored import load_saes
from pipeline.models import loader, splice
from pipeline.spec.paper import AttributionSpec, Prompt
from pipeline.store import tables
from pipeline.text import tokens

ABLATIONS_PER_PASS = 32


@dataclass
class EncodedPrompt:
    """A prompt as tokens, and the two tokens whose logits are compared."""

    tokens: Int64[Tensor, "1 pos"]
    answer: int
    foil: int

    def metric(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """logit(answer) - logit(foil) at the last position."""
        return logits[:, -1, self.answer] - logits[:, -1, self.foil]


def encoded(prompt: Prompt, loaded: Any, device: torch.device | str) -> EncodedPrompt:
    """Tokenise a prompt, with BOS in front if the model has one.

    Args:
        loaded: a model with its tokenizer.

    Raises:
        RetraceError: the answer or the foil is not a single token.
    """
    ids = tokens.encode(loaded.tokenizer, prompt.prompt)
    answer, foil = (
        _single(loaded.tokenizer, prompt.prompt, t) for t in (prompt.answer, prompt.foil)
    )
    front = [] if loaded.bos_id is None else [loaded.bos_id]
    return EncodedPrompt(torch.tensor([[*front, *ids]], device=device), answer, foil)


def _single(tokenizer: Any, prompt: str, word: str) -> int:
    """The token that `word` becomes after a prompt."""
    ids = tokens.following(tokenizer, prompt, word)
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise RetraceError(
            f"attribution.prompts: '{word}' melts into the last token of '{prompt}'; let the "
            f"prompt end without a space and the word begin with one"
        )
    texts = " + ".join(repr(t) for t in tokens.Texts(tokenizer).context(ids))
    raise RetraceError(
        f"attribution.prompts: '{word}' is {len(ids)} tokens of this model behind '{prompt}', "
        f"{texts}, not one; choose a shorter word, with its leading space where it begins a word"
    )


@dataclass
class Site:
    """The stream of a model at the hook of a dictionary.

    Attributes:
        hook: the hook whose rows are reconstructed.
        skip_first, max_norm: tokens that the dictionary was not trained on, see `splice.known`.
        reads: for a transcoder, the hook whose rows are encoded; empty: the same as `hook`.
    """

    hf: torch.nn.Module
    hook: str
    skip_first: int
    max_norm: float = 0
    reads: str = ""

    def stream(self, tokens: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """x at the hook."""
        with torch.no_grad():
            return splice.stream(self.hf, self.hook, tokens)

    def encoded_rows(
        self, tokens: Int64[Tensor, "batch pos"], whole: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_in"]:
        """The rows that a dictionary encodes; `whole` is the stream at the hook."""
        with torch.no_grad():
            return splice.stream(self.hf, self.reads, tokens) if self.reads else whole

    def metric(
        self,
        prompt: EncodedPrompt,
        x: Float[Tensor, "batch rest d_model"],
        whole: Float[Tensor, "1 pos d_model"],
    ) -> Float[Tensor, " batch"]:
        """m with the positions from skip_first on set to x; `whole` gives those before."""
        head = whole[:, : self.skip_first].expand(len(x), -1, -1)
        tokens = prompt.tokens.expand(len(x), -1)
        return prompt.metric(
            splice.resume(self.hf, self.hook, tokens, torch.cat([head, x], 1), last=1)
        )


def mean_gradient(
    site: Any,
    prompt: EncodedPrompt,
    whole: Float[Tensor, "1 pos d_model"],
    base: Float[Tensor, "1 rest d_model"],
    alphas: list[float],
) -> Float[Tensor, "rest d_model"]:
    """dm/dx averaged over the points base + alpha (x - base).

    All points are one batch: m of one point does not depend on the others.

    Args:
        site: a Site.
        base: from position skip_first on.
    """
    x = whole[:, site.skip_first :]
    along = torch.tensor(alphas, device=x.device)[:, None, None]
    points = (base + along * (x - base)).requires_grad_(True)
    return torch.autograd.grad(site.metric(prompt, points, whole).sum(), points)[0].mean(0)


def exact_effects(
    site: Any,
    prompt: EncodedPrompt,
    whole: Float[Tensor, "1 pos d_model"],
    directions: Float[Tensor, "nodes d_model"],
    positions: Int64[Tensor, " nodes"],
) -> Float[Tensor, " nodes"]:
    """m(x) - m(x without a node), one node at a time.

    Args:
        site: a Site.
        directions: the contribution f_i(p) d_i of each node.
        positions: p of each node, counted from skip_first.
    """
    x = whole[:, site.skip_first :]
    out = []
    with torch.no_grad():
        before = site.metric(prompt, x, whole)
        for some, at in zip(
            directions.split(ABLATIONS_PER_PASS), positions.split(ABLATIONS_PER_PASS), strict=True
        ):
            ablated = x.repeat(len(some), 1, 1)
            ablated[torch.arange(len(some)), at] -= some
            out.append(before - site.metric(prompt, ablated, whole))
    return torch.cat(out)


def attribute(
    site: Any, prompt: EncodedPrompt, sae: Any, n_ablate: int, ig_steps: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Attributions of all active latents of one prompt.

    Args:
        site: a Site.
        sae: a SAELens SAE.
        n_ablate: number of nodes with exact effects.
        ig_steps: number of points of integrated gradients.

    Returns:
        A row of metrics; and the columns latent, position (in the prompt, BOS is 0), activation,
        attribution, attribution_ig, exact (NaN if not ablated), largest attribution first.
    """
    whole = site.stream(prompt.tokens)
    x = whole[:, site.skip_first :]
    read = site.encoded_rows(prompt.tokens, whole)
    known = splice.known(read, site.skip_first, site.max_norm)[0, site.skip_first :, None]
    with torch.no_grad():
        acts = sae.encode(read[:, site.skip_first :])[0] * known  # [pos-skip d_sae]
        error = (x - sae.decode(acts[None]))[0] * known
        base = torch.where(known, sae.b_dec, x)
        logit_diff = float(site.metric(prompt, x, whole))
        baseline = float(site.metric(prompt, base.clone(), whole))
    midpoints = [(j + 0.5) / ig_steps for j in range(ig_steps)]
    grads = {
        "attribution": mean_gradient(site, prompt, whole, base, [1.0]),
        "attribution_ig": mean_gradient(site, prompt, whole, base, midpoints),
    }
    position, latent = acts.nonzero(as_tuple=True)
    active = acts[position, latent]
    directions = active[:, None] * sae.W_dec[latent]  # [nodes d_model]
    nodes = {k: (directions * g[position]).sum(-1) for k, g in grads.items()}
    errors = {k: float((error * g).sum()) for k, g in grads.items()}
    order = nodes["attribution"].abs().argsort(descending=True, stable=True)
    top = order[:n_ablate]
    exact = torch.full_like(active, torch.nan)
    exact[top] = exact_effects(site, prompt, whole, directions[top], position[top])
    columns = {"latent": latent, "position": position + site.skip_first, "activation": active}
    columns |= nodes | {"exact": exact}
    frame = {k: v[order].cpu().numpy() for k, v in columns.items()}
    row = {"logit_diff": logit_diff, "baseline_logit_diff": baseline}
    return row | _quality(row, frame, nodes, errors), frame


def _quality(row: dict, frame: dict, nodes: dict, errors: dict) -> dict[str, float]:
    """Completeness and agreement with exact ablation, for both estimates."""
    change = row["logit_diff"] - row["baseline_logit_diff"]
    done = np.isfinite(frame["exact"])
    out = {}
    for key, suffix in (("attribution", ""), ("attribution_ig", "_ig")):
        latents = float(nodes[key].sum())
        estimate, exact = frame[key][done], frame["exact"][done]
        found = agreement(estimate, exact)
        out |= {
            f"sum_latents{suffix}": latents,
            f"error_term{suffix}": errors[key],
            f"completeness_gap{suffix}": (latents + errors[key] - change) / abs(change),
            f"ablation_correlation{suffix}": found.pearson,
            f"ablation_spearman{suffix}": found.spearman,
            f"ablation_correlation_without_largest{suffix}": found.without_largest,
            f"sign_agreement{suffix}": float(np.mean(np.sign(estimate) == np.sign(exact))),
        }
    return out


def work(job: cli.Job) -> None:
    import pandas as pd

    args, device = job.args, job.device()
    section = job.section("attribution", AttributionSpec)
    manifest = tables.read_json(args.sae)
    sae = load_saes(args.sae, device, [section.sae])[section.sae]
    loaded = loader.load(args.model, device)
    stored = tables.read_json(args.activations)
    hook, output_hook = manifest["hook"], manifest.get("output_hook")
    max_norm = stored["hooks"][hook]["max_norm"]
    at = (output_hook, hook) if output_hook else (hook, "")
    site = Site(loaded.hf, at[0], stored["skip_first"], max_norm, at[1])
    rows, frames, texts = [], [], tokens.Texts(loaded.tokenizer)
    for name, prompt in section.prompts.items():
        tokenised = encoded(prompt, loaded, device)
        row, columns = attribute(site, tokenised, sae, section.n_ablate, section.ig_steps)
        card = {"prompt": name, "text": prompt.prompt, "answer": prompt.answer, "foil": prompt.foil}
        rows.append(card | row)
        text = texts.context(tokenised.tokens[0].tolist())
        frame = pd.DataFrame(columns).assign(token=lambda f, t=text: [t[p] for p in f["position"]])
        frame.insert(0, "prompt", name)
        frames.append(frame)
        cli.log.info(
            "%s: logit difference %.3f, gap %.2f, correlation with ablation %.2f",
            name,
            row["logit_diff"],
            row["completeness_gap"],
            row["ablation_correlation"],
        )
    made = job.certificate([args.model, args.sae])
    tables.write_table(args.latents, pd.concat(frames, ignore_index=True), made)
    tables.write_table(args.out, pd.DataFrame(rows), made)


def main() -> None:
    parser = cli.parser(
        "attribution",
        __doc__,
        model="model.json",
        activations="manifest.json of the activations",
        sae="manifest.json of the SAE job",
        out="one row per prompt",
        latents="one row per active latent and position",
    )
    cli.run("attribution", parser.parse_args(), work)
