"""Describe each latent of a dictionary: density, histogram, top contexts, logits.

1. Every stored row is encoded once; the non-zero activations are kept as a sparse matrix
   [rows d_sae].
2. A latent's top contexts are its largest activations, at most one per document, with the tokens
   around them and the latent's activation on each (Bricken et al. 2023, "feature dashboard").
3. The logits that it raises and lowers are those of the direct path, which leaves out the layers in
   between (Elhage et al. 2021): what its decoder row writes into the residual stream, centred if
   the final norm is a layer norm, times the norm's gain, times the unembedding. An encoder without
   a decoder writes nothing, and has none.
4. How topical it is: the document label whose share of the latent's activation exceeds its base
   rate most. How token-bound it is: the entropy of the tokens on which it fires (Heap et al. 2025).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy import sparse
from torch import Tensor

from pipeline.activations.rows import to_tensor
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.latents.stored import decodes, load_saes
from pipeline.models import loader, places, splice
from pipeline.spec.paper import FeaturesSpec
from pipeline.store import shards, tables
from pipeline.text import tokens

N_BINS = 30
COLUMNS = "block position token document".split()


@dataclass
class Scan:
    """Activations of a dictionary on stored rows, in the order of the store.

    Attributes:
        acts: [rows d_sae].
        at: block, position, token and document of every row, int32 [rows] each.
    """

    acts: sparse.csc_matrix
    at: dict[str, np.ndarray]

    @cached_property
    def row_at(self) -> np.ndarray:
        """Index of the row of (block, position), -1 if it is not stored; int64 [blocks n_ctx]."""
        shape = (self.at["block"].max() + 1, self.at["position"].max() + 1)
        out = np.full(shape, -1, np.int64)
        out[self.at["block"], self.at["position"]] = np.arange(len(self.at["block"]))
        return out

    @cached_property
    def apart(self) -> np.ndarray:
        """In what the examples of a latent must differ, [rows]: documents, or blocks if there is
        only one document."""
        found = self.at["document"][self.at["document"] >= 0]  # BOS has none
        single = len(found) == 0 or found.min() == found.max()
        return self.at["block" if single else "document"]

    def column(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows on which a latent is active, ascending, and its activations on them."""
        start, stop = self.acts.indptr[latent : latent + 2]
        return self.acts.indices[start:stop], self.acts.data[start:stop]


def scan(
    sae: Any, manifest: str | Path, hook: str, n_rows: int, device: torch.device,
    splits: tuple[str, ...] = ("train", "eval"),
) -> Scan:  # fmt: skip
    """Encode the first `n_rows` stored rows of `splits`, one behind the other."""
    parts, at = [], {c: [] for c in COLUMNS}
    left = n_rows
    with torch.no_grad():
        for split in splits:
            rows = shards.Rows(manifest, hook, split)
            progress = cli.Progress(f"features, {split} rows", min(rows.n_rows, left), "rows")
            for raw, columns in rows.iterate(4096):
                raw = raw[:left]
                if len(raw) == 0:
                    break
                acts = sae.encode(to_tensor(raw, rows.dtype, device))
                parts.append(sparse_rows(acts))
                for c in COLUMNS:
                    at[c].append(columns[c][: len(raw)])
                left -= len(raw)
                progress.at(progress.total - left)
    matrix = sparse.vstack(parts).tocsc()
    matrix.sort_indices()
    return Scan(matrix, {c: np.concatenate(v) for c, v in at.items()})


def sparse_rows(acts: Float[Tensor, "rows d_sae"]) -> sparse.csr_matrix:
    """Activations as a sparse matrix; only non-zero values leave the device."""
    row, latent = acts.nonzero(as_tuple=True)
    entries = (t.cpu().numpy() for t in (acts[row, latent].float(), row, latent))
    value, row, latent = entries
    return sparse.csr_matrix((value, (row, latent)), shape=tuple(acts.shape))


def top_rows(rows: np.ndarray, values: np.ndarray, documents: np.ndarray, n: int) -> np.ndarray:
    """The rows of the n largest values, at most one per document; of equal values the first row.

    Args:
        rows, values: on which rows a latent fires and how strongly, [active] each.
        documents: the document of every stored row, [rows].
    """
    order = rows[np.lexsort((rows, -values))]
    _, first = np.unique(documents[order], return_index=True)
    return order[np.sort(first)][:n]


def example(
    scanned: Scan,
    latent: int,
    row: int,
    corpus: np.ndarray,
    context: tuple[int, int],
    lead: int = tokens.CUT,
) -> dict[str, Any]:
    """The tokens around a row and the latent's activation on each.

    Args:
        corpus: token ids, [blocks n_ctx].
        context: number of tokens before and after.
        lead: number of tokens before those, which may hold the first bytes of a character.

    Returns:
        tokens: ids; before: ids of the tokens before them, see `tokens.Texts`; acts; peak: index
        of the row's token; document.
    """
    block, position = int(scanned.at["block"][row]), int(scanned.at["position"][row])
    there = scanned.row_at[block]
    start = max(position - context[0], int(np.argmax(there >= 0)))  # BOS was never encoded
    stop = min(position + context[1] + 1, len(there))
    rows, values = scanned.column(latent)
    window = there[start:stop]
    found = np.minimum(np.searchsorted(rows, window), len(rows) - 1)
    acts = np.where(rows[found] == window, values[found], 0).astype(np.float32)
    return {
        "tokens": corpus[block, start:stop],
        "before": corpus[block, max(start - lead, 0) : start],
        "acts": acts,
        "peak": position - start,
        "document": int(scanned.at["document"][row]),
    }


def entropy_bits(weights: np.ndarray) -> float:
    """Shannon entropy in bits of the distribution proportional to `weights` [n]."""
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log2(p)).sum())


def label_excess(labels: np.ndarray, values: np.ndarray, base: np.ndarray) -> tuple[int, float]:
    """The label whose share of a latent's activation exceeds its base rate most, and that share.

    Args:
        labels: label index of each active row, [active].
        values: activations, [active].
        base: each label's share of all rows, [n_labels].

    Returns:
        The label's index and the share; (0, 0.0) if nothing is active.
    """
    if len(values) == 0:
        return 0, 0.0
    share = np.bincount(labels, values, len(base)) / values.sum()
    best = int(np.argmax(share - base))
    return best, float(share[best])


def logit_weights(
    hf: torch.nn.Module, W_dec: Float[Tensor, "d_sae d_model"], n: int, ids: list[int] | None = None
) -> tuple[Float[Tensor, "d_sae twice_n"], Int64[Tensor, "d_sae twice_n"]]:
    """Logits that each latent raises and lowers by the direct path.

    Args:
        W_dec: what each latent writes into the residual stream.
        n: how many of each kind, at most as many as there are tokens.
        ids: ids that are tokens, ascending; default: all. Ids that only pad the vocabulary to a
            round size (Pythia, Qwen) are no tokens and are left out.

    Returns:
        Values (largest first, then smallest first) and token ids, [d_sae 2n] each. Each latent's
        mean logit is subtracted, since softmax ignores it.
    """
    W_U = places.full(hf.get_output_embeddings().weight)  # [d_vocab d_model]
    known = torch.arange(len(W_U), device=W_U.device)
    if ids is not None:
        known = known[[i for i in ids if i < len(W_U)]]
        W_U = W_U[known]
    n = min(n, len(known))
    values, found = [], []
    for rows in W_dec.split(256):
        logits = splice.normed(hf, rows) @ W_U.T
        logits -= logits.mean(-1, keepdim=True)
        high, low = logits.topk(n), (-logits).topk(n)
        values.append(torch.cat([high.values, -low.values], -1))
        found.append(known[torch.cat([high.indices, low.indices], -1)])
    return torch.cat(values), torch.cat(found)


def describe(
    scanned: Scan, latent: int, tokens: np.ndarray, labels: tuple, section: FeaturesSpec
) -> dict[str, Any]:
    """One latent's row of the table, with token ids that are not yet decoded.

    Args:
        labels: see `label_table`.
    """
    rows, values = scanned.column(latent)
    of_document, names, base = labels
    out = {
        "latent": latent,
        "density": len(rows) / len(scanned.at["block"]),
        "dead": len(rows) == 0,
    }
    if len(rows) == 0:
        return out | {
            "max_act": 0.0,
            "mean_act": 0.0,
            "histogram": [0] * N_BINS,
            "examples": [],
            "top_label": "",
            "label_share": 0.0,
            "token_entropy": 0.0,
            "token_share": 0.0,
        }
    document = scanned.at["document"][rows]
    there = document >= 0  # BOS has no document
    best, share = label_excess(of_document[document[there]], values[there], base)
    _, counts = np.unique(scanned.at["token"][rows], return_counts=True)
    top = top_rows(rows, values, scanned.apart, section.n_examples)
    return out | {
        "max_act": float(values.max()),
        "mean_act": float(values.mean()),
        "histogram": np.histogram(values, N_BINS, (0, float(values.max())))[0].tolist(),
        "examples": [example(scanned, latent, int(r), tokens, section.context) for r in top],
        "top_label": names[best] if there.any() else "",
        "label_share": share,
        "token_entropy": entropy_bits(counts),
        "token_share": float(counts.max() / counts.sum()),
    }


def label_table(documents: Any, at: dict[str, np.ndarray]) -> tuple:
    """Label index of each document number, label names, and each label's share of the rows.

    Rows of a BOS, which stands in front of a block and belongs to no document, are left out.

    Args:
        documents: documents.parquet as a DataFrame.
        at: see `Scan`.
    """
    names, index = np.unique(documents["label"].fillna("").astype(str), return_inverse=True)
    of_document = np.zeros(documents["document"].max() + 1, np.int64)
    of_document[documents["document"]] = index
    rows = at["document"][at["document"] >= 0]
    base = np.bincount(of_document[rows], minlength=len(names)) / max(len(rows), 1)
    return of_document, names.tolist(), base


def decoded(rows: list[dict], logits: tuple, documents: Any, texts: tokens.Texts) -> list[dict]:
    """Rows with strings in place of token ids, and with titles and logits.

    Args:
        logits: values and ids, [rows 2n] each, as `logit_weights` gives them.
    """
    once = documents.drop_duplicates("document")  # split: tail may cut one in two
    titles = once.set_index("document")["title"].fillna("").astype(str)
    values, ids = logits[0].tolist(), logits[1].tolist()
    for row, v, i in zip(rows, values, ids, strict=True):
        pairs = [{"token": texts.alone(t), "value": x} for t, x in zip(i, v, strict=True)]
        n = len(pairs) // 2
        row["top_logits"], row["bottom_logits"] = pairs[:n], pairs[n:]
        for e in row["examples"]:
            e["tokens"] = texts.context(e["tokens"], e.pop("before"))
            e["title"] = titles.get(e["document"], "")
    return rows


def work(job: cli.Job) -> None:
    import pandas as pd

    args, device = job.args, job.device()
    section, name = job.section("features", FeaturesSpec), job.spec["latents"]
    trained = tables.read_json(args.sae)
    hook = trained["hook"]
    sae = load_saes(args.sae, device, [name], alone=True)[name]
    loaded = loader.load(args.model, device)
    scanned = scan(sae, args.activations, hook, section.n_rows, device)
    if scanned.acts.nnz == 0:
        raise RetraceError(f"{args.sae}: no latent of '{name}' fires on any stored row; retrain it")
    documents = tables.read_table(args.documents)
    blocks = tables.read_table(args.corpus, ["tokens"])["tokens"]
    corpus, labels = np.stack(blocks.tolist()), label_table(documents, scanned.at)
    rows = [describe(scanned, i, corpus, labels, section) for i in range(sae.cfg.d_sae)]
    texts = tokens.Texts(loaded.tokenizer)
    if decodes(trained["saes"][name]):
        with torch.no_grad():
            written = splice.written(loaded.hf, trained.get("output_hook") or hook, sae.W_dec)
            logits = logit_weights(loaded.hf, written, section.n_logits, texts.ids)
    else:
        logits = (torch.zeros(len(rows), 0),) * 2
    rows = decoded(rows, logits, documents, texts)
    inputs = [args.model, args.corpus, args.documents, args.activations, args.sae]
    tables.write_table(args.out, pd.DataFrame(rows), job.certificate(inputs))


def main() -> None:
    parser = cli.parser(
        "features",
        __doc__,
        model="model.json",
        corpus="tokens.parquet",
        documents="documents.parquet",
        activations="manifest.json of the activations",
        sae="manifest.json of the SAE job",
        out="one row per latent",
    )
    cli.run("features", parser.parse_args(), work)
