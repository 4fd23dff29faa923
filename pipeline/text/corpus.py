"""Text -> blocks of tokens, and the documents that they came from.

1. text.py gives the documents of the section: text, token ids, or chats, which a template of the
   model's tokenizer makes text (chat.py).
2. `split: documents`: they are put in a random order, seeded. Held-out blocks take documents from
   the end of that order and training blocks from its start, so that no document is in both, and
   another number of training tokens leaves the held-out blocks as they are.
   `split: tail`: all tokens, in the order of the text; the last share of them is held out, as in
   nanoGPT (90/10).
3. `shuffle: tokens`: the tokens of each split change places at random. What is left of the language
   is how often each token occurs.
4. The token ids of a split, each document closed by EOS, form one stream. It is cut into pieces
   of n_ctx - 1, each after a BOS: blocks without padding, as in GPT-2's training. Without BOS and
   EOS the blocks of a split, one after another, are the text itself.

Text and tokens lie on disk while this happens (spool.py). What stays in memory is meant to be 24
bytes a document, for its place, its turn and how much of it was used; measured are about 1.3 kB a
document over 384,149 of them (tests/benchmarks/corpus_stream.py), 0.68 GiB for 1 GB of text.
Documents are tokenised on all threads; how many there are changes no byte.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.sources import CorpusSpec
from pipeline.store import tables
from pipeline.text import chat, sources
from pipeline.text.packing import Encode, TokenStream, cut, shuffled, split
from pipeline.text.tokens import load_tokenizer

ROW_GROUP = 1024  # blocks that a reader must take at a time
DOCUMENTS = 1 << 16  # rows of documents.parquet that are written at a time


def block_schema() -> Any:
    """The schema of tokens.parquet."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    names = {"block": pa.int32(), "split": pa.string(), "tokens": ids, "documents": ids}
    return pa.schema(names)


def block_tables(streams: dict[str, TokenStream], n_ctx: int, bos_id: int | None) -> Iterator[Any]:
    """The row groups of tokens.parquet: block, split, tokens, documents; eval comes last."""
    import pyarrow as pa

    body = n_ctx - (bos_id is not None)
    blocks = [(name, i) for name in streams for i in [len(streams[name].tokens) // body]]
    spans, start = [], 0  # (split, first block, last + 1) of each, over all blocks
    for name, n in blocks:
        spans.append((name, start, start + n))
        start += n
    for first in range(0, start, ROW_GROUP):
        last = min(first + ROW_GROUP, start)
        parts, splits = [], []
        for name, begin, end in spans:
            a, b = max(first, begin) - begin, min(last, end) - begin
            if a < b:
                parts.append(cut(_slice(streams[name], a * body, b * body), n_ctx, bos_id))
                splits += [name] * (b - a)
        offsets = pa.array(np.arange(last - first + 1, dtype=np.int32) * n_ctx)
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([x.ravel() for x in column])))
            for column in zip(*parts, strict=True)
        ]
        ids = pa.array(range(first, last), pa.int32())
        yield pa.Table.from_arrays([ids, pa.array(splits), *lists], schema=block_schema())


def _slice(stream: TokenStream, start: int, end: int) -> TokenStream:
    """Tokens of a stream, with no word on documents."""
    return TokenStream(stream.tokens[start:end], stream.document[start:end], stream.used[:0])


def document_schema() -> Any:
    """The schema of documents.parquet."""
    import pyarrow as pa

    texts = {name: pa.string() for name in ("title", "label")}
    return pa.schema(
        {"document": pa.int32(), **texts, "n_tokens": pa.int32(), "split": pa.string()}
    )


def document_tables(
    about: Sequence[tuple[str, str]], streams: dict[str, TokenStream]
) -> Iterator[Any]:
    """Parts of documents.parquet: the documents whose tokens stand in blocks, in order of use.

    Args:
        about: document -> (title, label).
    """
    import pyarrow as pa

    rows = ((name, i, n) for name, s in streams.items() for i, n in map(np.ndarray.tolist, s.used))
    while part := list(islice(rows, DOCUMENTS)):
        splits, ids, counts = zip(*part, strict=True)
        titles, labels = zip(*(about[i] for i in ids), strict=True)
        columns = (ids, titles, labels, counts, splits)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, document_schema(), strict=True)]
        yield pa.Table.from_arrays(arrays, schema=document_schema())


def encoder(tokenizer: Any) -> Encode:
    """Bulk tokenisation on all threads; the text of a special token is text, not that token."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True

    def encode(texts: list[str]) -> list[np.ndarray]:
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in found]

    return encode


def special_ids(spec: CorpusSpec, bos_id: int | None, eos_id: int | None) -> list[int | None]:
    """BOS of every block and EOS of every document, None where the spec wants none.

    Raises:
        RetraceError: the spec wants one that the tokenizer does not have.
    """
    out = []
    for key, token, name in (("prepend_bos", bos_id, "BOS"), ("close_documents", eos_id, "EOS")):
        if getattr(spec, key) and token is None:
            raise RetraceError(
                f"corpus.{key}: true, but the tokenizer has no {name}; set it to false"
            )
        out.append(token if getattr(spec, key) else None)
    return out


def _same_text(tokenizer: dict, found: sources.Text, file: str) -> None:
    """A tokenizer made from a corpus's text was made from the text that this job read."""
    made_from = tokenizer.get("text_sha256", found.sha256)
    if made_from != found.sha256:
        raise RetraceError(
            f"{file}: made from a text of sha256 {made_from[:12]}, but this job read "
            f"{found.sha256[:12]} ({found.used}); delete {Path(file).parent}, then run again"
        )


def vocabulary(tokenizer: Any, info: dict) -> int:
    """Token ids that text may hold lie below this: the tokenizer's, and the model's embeddings."""
    known = max(tokenizer.get_vocab().values()) + 1
    return min(known, info.get("d_vocab", known))


def pretokenised(
    found: sources.Alike, spec: CorpusSpec, bos_id: int | None, eos_id: int | None, name: str
) -> Encode:
    """Token ids of rows as they are, without the BOS and EOS that blocks and documents get here.

    Raises:
        RetraceError: the rows follow another convention than the section.
    """
    column = f"{name}: column '{spec.tokens_column}'"
    leads, ends = found.first == bos_id is not None, found.last == eos_id is not None
    if leads and not spec.prepend_bos:
        raise RetraceError(
            f"{column}: every row begins with BOS ({bos_id}), which would stand inside of blocks; "
            f"set corpus.prepend_bos: true, and it stands once, at the front of each"
        )
    if found.rows > 1 and found.length and spec.close_documents and not ends:
        raise RetraceError(
            f"{column}: every row has {found.length} tokens, so rows are windows of a text and no "
            f"documents, and EOS would stand where none ends; set corpus.close_documents: false"
        )
    front, back = int(leads), int(ends and spec.close_documents)

    def encode(rows: list[np.ndarray]) -> list[np.ndarray]:
        return [ids[front : len(ids) - back] for ids in rows]

    return encode


def encoding(found: sources.Text, spec: CorpusSpec, tokenizer: Any, info: dict) -> Encode:
    """How the documents of a text become token ids, tokens that the model lacks refused."""
    eos_id = tokenizer.eos_token_id
    if spec.tokens_column:
        return pretokenised(found.alike, spec, info["bos_id"], eos_id, found.name)
    if spec.chat:
        return chat.encoder(tokenizer, info["bos_id"] if spec.prepend_bos else None, found.name)
    return encoder(tokenizer)


def checked(encode: Encode, info: dict, file: str) -> Encode:
    """`encode`; RetraceError where a token has no row in the embedding of the model that reads it.

    Args:
        info: model.json, of which d_vocab is the number of those rows.
    """

    def encode_checked(texts: list[Any]) -> list[np.ndarray]:
        found = encode(texts)
        largest = max((int(ids.max()) for ids in found if len(ids)), default=0)
        if largest >= info.get("d_vocab", largest + 1):
            raise RetraceError(
                f"{file}: its tokenizer gives token {largest}, but the model's vocabulary ends at "
                f"{info['d_vocab'] - 1}; give the tokenizer that the model was trained with"
            )
        return found

    return encode_checked


def main() -> None:
    parser = cli.parser(
        "corpus", __doc__, tokenizer="model.json of the model or tokenizer that is used",
        out="tokens.parquet", documents="documents.parquet",
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, spec = job.args, job.section("corpus", CorpusSpec)
        os.environ |= {"RAYON_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "true"}
        tokenizer, info = load_tokenizer(args.tokenizer), tables.read_json(args.tokenizer)
        bos_id, eos_id = special_ids(spec, info["bos_id"], tokenizer.eos_token_id)
        scratch = Path(args.out).parent
        found = sources.read(spec, Path(f"{args.out}.partial"), vocabulary(tokenizer, info))
        _same_text(info, found, args.tokenizer)
        encode = checked(encoding(found, spec, tokenizer, info), info, args.tokenizer)
        streams = split(found.texts, spec, encode, eos_id, found.name, scratch)
        if spec.shuffle:
            streams = shuffled(streams, spec.seed)
        made = job.certificate(
            [args.tokenizer],
            n_ctx=spec.n_ctx,
            prepend_bos=spec.prepend_bos,
            bos_id=info["bos_id"],
            seed=spec.seed,
            **found.certificate(),
        )
        parts = (lambda: document_tables(found.about, streams)), document_schema()
        tables.write_tables(args.documents, *parts, made)
        blocks = (lambda: block_tables(streams, spec.n_ctx, bos_id)), block_schema()
        tables.write_tables(args.out, *blocks, made, ROW_GROUP)
        n = sum(len(s.tokens) for s in streams.values()) // (spec.n_ctx - (bos_id is not None))
        cli.log.info("%d blocks of %d tokens from %s", n, spec.n_ctx, found.name)

    cli.run("corpus", parser.parse_args(), work)
