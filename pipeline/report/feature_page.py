"""The features table -> one offline page: search, sort, and every latent's contexts and logits.

Where paper.yaml says `features.beside: random.topk`, each latent stands beside one of that null
arm's dictionary: the k-th of one beside the k-th of the other, in the order that a reader chooses.

1. Pack the table into typed arrays: tokens as indices into one vocabulary, activations as 255ths
   of the latent's largest, histograms as heights. 5,000 latents with 8 contexts of 23 tokens make
   a page of about 2 MB.
2. gzip, base64, into the page. features.js unpacks it with the browser's DecompressionStream and
   draws only the latents that are scrolled to.
"""

import base64
import gzip
import json
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.report import pages
from pipeline.report.pages import licences
from pipeline.store import provenance, tables

LEVELS = 255  # of an activation's colour
# column -> what the reader sorts by, and what it means; a table may lack some
SORTS = {
    "label_share": ("topic", "share of its activation on documents of its topic"),
    "token_share": ("one token", "share of its firings on its most frequent token"),
    "token_entropy": ("variety of tokens", "entropy of the tokens it fires on, bits"),
    "max_act": ("largest activation", "largest activation"),
    "mean_act": ("mean activation", "mean activation where it fires"),
    "density": ("density", "share of tokens on which it fires"),
    "latent": ("number", "number of the latent"),
}
NEEDED = "latent density max_act mean_act histogram top_logits bottom_logits examples dead".split()


class Vocabulary:
    """Strings, each once, in the order of their first appearance."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def ids(self, strings: Any) -> np.ndarray:
        """Indices of an Arrow array of strings, uint32."""
        import pyarrow.compute as pc

        encoded = pc.fill_null(strings.cast("string"), "").dictionary_encode()
        mine = [self.index.setdefault(s, len(self.index)) for s in encoded.dictionary.to_pylist()]
        return np.array(mine, np.uint32)[encoded.indices.to_numpy(zero_copy_only=False)]


def whole(column: Any) -> Any:
    """A chunked column as one array."""
    import pyarrow as pa

    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def ends(lists: Any) -> np.ndarray:
    """Where each list of a list array ends in its flattened values, uint32 [rows]."""
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.cumsum(lengths).astype(np.uint32)


def field(structs: Any, name: str) -> Any:
    """A field of an Arrow array of structs; an array without type, of empty lists, has none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(structs.type):
        return structs
    return pc.struct_field(structs, name)


def floats(column: Any) -> np.ndarray:
    return np.nan_to_num(column.cast("float32").to_numpy(zero_copy_only=False)).astype(np.float32)


def packed(table: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The features table (Arrow) as a header and typed arrays, see features.js.

    Raises:
        RetraceError: a column is missing.
    """
    for name in NEEDED:
        if name not in table.column_names:
            raise RetraceError(f"features table: no column '{name}'; it has {table.column_names}")
    words, titles, labels = Vocabulary(), Vocabulary(), Vocabulary()
    arrays = {"dead": table["dead"].to_numpy().astype(np.uint8)}
    sorts = [k for k in SORTS if k in table.column_names]
    sorts = [k for k in sorts if k != "label_share" or labelled(table)]
    arrays |= {k: floats(whole(table[k])) for k in sorts if k != "latent"}
    arrays["latent"] = table["latent"].to_numpy().astype(np.uint32)
    if "side" in table.column_names:
        arrays["side"] = table["side"].to_numpy()
    if "top_label" in table.column_names:
        arrays["top_label"] = labels.ids(whole(table["top_label"]))
    arrays |= _histograms(whole(table["histogram"]), table.num_rows)
    for side in ("top", "bottom"):
        lists = whole(table[f"{side}_logits"])
        pairs = lists.flatten()
        arrays[f"{side}_end"] = ends(lists)
        arrays[f"{side}_token"] = words.ids(field(pairs, "token"))
        arrays[f"{side}_value"] = floats(field(pairs, "value"))
    arrays |= _examples(whole(table["examples"]), arrays["max_act"], words, titles)
    named = {"words": words, "titles": titles, "labels": labels}
    header = {k: list(v.index) for k, v in named.items()}
    header["sorts"] = [{"key": k, "label": SORTS[k][0], "help": SORTS[k][1]} for k in sorts]
    return header, arrays


def labelled(table: Any) -> bool:
    """Whether documents had labels; else no latent has a topic."""
    import pyarrow.compute as pc

    if "top_label" not in table.column_names:
        return False
    labels = pc.fill_null(table["top_label"].cast("string"), "")
    return bool(pc.any(pc.not_equal(labels, "")).as_py())


def joined(table: Any, beside: Any) -> Any:
    """Two tables as one, with the columns that both have, and `side`: 0, or 1 of beside."""
    import pyarrow as pa

    both = [c for c in table.column_names if c in beside.column_names]
    sides = [t.select(both).append_column("side", pa.array([i] * len(t), pa.uint8()))
             for i, t in enumerate((table, beside))]  # fmt: skip
    return pa.concat_tables(sides, promote_options="permissive").combine_chunks()


def _histograms(lists: Any, rows: int) -> dict[str, np.ndarray]:
    """Counts as heights, the fullest bin 255; a bin that is not empty is at least 1."""
    counts = lists.flatten().cast("float64").to_numpy(zero_copy_only=False).reshape(rows, -1)
    heights = np.ceil(LEVELS * counts / np.maximum(counts.max(1, keepdims=True), 1))
    return {"histogram": heights.astype(np.uint8).ravel()}


def _examples(lists: Any, largest: np.ndarray, words: Vocabulary, titles: Vocabulary) -> dict:
    """The contexts: where each latent's end, where each one's tokens end, tokens and levels."""
    contexts = lists.flatten()
    latent_end = ends(lists)
    tokens, acts = field(contexts, "tokens"), field(contexts, "acts")
    token_end = ends(tokens)
    latent = np.repeat(np.arange(len(latent_end)), np.diff(latent_end, prepend=np.uint32(0)))
    scale = np.maximum(largest[latent], np.finfo(np.float32).tiny)
    per_token = np.repeat(scale, np.diff(token_end, prepend=np.uint32(0)))
    levels = np.ceil(LEVELS * np.clip(floats(acts.flatten()) / per_token, 0, 1))
    names = {f.name for f in contexts.type}
    out = {
        "example_end": latent_end,
        "token_end": token_end,
        "token": words.ids(tokens.flatten()),
        "level": levels.astype(np.uint8),
        "peak": field(contexts, "peak").to_numpy(zero_copy_only=False).astype(np.uint16),
    }
    return out | ({"title": titles.ids(field(contexts, "title"))} if "title" in names else {})


def blob(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Header and arrays as one text: base64 of gzip of [length, JSON, arrays at 4-byte steps]."""
    places, at = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.name, at, len(array)]
        at += -(-array.nbytes // 4) * 4
    text = json.dumps({**header, "arrays": places}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 4)
    parts = [len(text).to_bytes(4, "little"), text]
    for array in arrays.values():
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        parts.append(raw + bytes(-len(raw) % 4))
    return base64.b64encode(gzip.compress(b"".join(parts), 6, mtime=0)).decode()


def main() -> None:
    from pathlib import Path

    from pipeline import __version__
    from pipeline.job import cli
    from pipeline.store import embed

    parser = cli.parser(
        "feature_page",
        __doc__,
        features="the features table",
        beside="that of a null arm*",
        out="the page, .html",
    )

    def work(job: cli.Job) -> None:
        args = job.args
        table = tables.read_arrow(args.features)
        n = len(table)
        for file in args.beside:
            table = joined(table, tables.read_arrow(file))
        header, arrays = packed(table)
        header["sides"] = job.spec.get("sides", [])
        files = [args.features, *args.beside]
        certificates = [c for file in files for _, _, c in provenance.chain(file) if c]
        page = pages.render(
            "features.html",
            title=f"Latents of {Path(args.features).stem}",
            name=Path(args.features).stem,
            paper=job.spec["title"],
            data=blob(header, arrays),
            n=n,
            beside=header["sides"][1] if header["sides"] else "",
            licences=licences(certificates),
            version=__version__,
        )
        embed.write_page(args.out, page, job.certificate(files))
        size = Path(args.out).stat().st_size / 2**20
        cli.log.info("%d latents, %.1f MiB", n, size)

    cli.run("feature_page", parser.parse_args(), work)
