"""Text -> blocks of tokens, and the documents that they came from.

1. text.py gives the documents of the section.
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
"""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.paper import CorpusSpec
from pipeline.store import tables
from pipeline.text import sources
from pipeline.text.documents import Document
from pipeline.text.tokens import load_tokenizer

BATCH = 512  # documents tokenised at a time
ROW_GROUP = 1024  # blocks that a reader must take at a time
Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Stream:
    """The tokens of one split.

    tokens, document: int32 [n]; used: document -> tokens of it in the stream, in stream order.
    """

    tokens: np.ndarray
    document: np.ndarray
    used: dict[int, int]


def take(
    texts: list[str], order: Iterable[int], n: int, encode: Encode, eos_id: int | None
) -> Stream:
    """The first n tokens of documents in the given order, each closed by EOS.

    Args:
        texts: all documents.
        order: indices into texts, tokenised until n tokens are there.
        encode: texts -> int32 token ids of each.
        eos_id: None leaves documents unclosed.
    """
    end = np.array([] if eos_id is None else [eos_id], np.int32)
    order, parts, owners = list(order), [], []
    used: dict[int, int] = {}
    found = 0
    for start in range(0, len(order), BATCH):
        if found >= n:
            break
        chunk = order[start : start + BATCH]
        for i, ids in zip(chunk, encode([texts[i] for i in chunk]), strict=True):
            kept = np.concatenate([ids, end])[: max(n - found, 0)]
            found += len(ids) + len(end)
            if len(kept):
                parts.append(kept)
                owners.append(np.full(len(kept), i, np.int32))
                used[i] = len(kept)
    empty = [np.empty(0, np.int32)]
    return Stream(np.concatenate(parts or empty), np.concatenate(owners or empty), used)


def cut(stream: Stream, n_ctx: int, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a stream.

    Returns:
        tokens and document, int32 [blocks, n_ctx]; the document of a BOS is -1.
    """
    body = n_ctx - (bos_id is not None)
    tokens, owners = stream.tokens.reshape(-1, body), stream.document.reshape(-1, body)
    if bos_id is None:
        return tokens, owners
    front = np.full((len(tokens), 1), bos_id, np.int32)
    return np.hstack([front, tokens]), np.hstack([np.full_like(front, -1), owners])


def split(
    texts: list[str], spec: CorpusSpec, encode: Encode, eos_id: int | None, source: str
) -> dict[str, Stream]:
    """The streams of train and eval, cut to whole blocks.

    Args:
        eos_id: closes every document; None: nothing does.

    Raises:
        RetraceError: the corpus is too short; it says how many tokens there are.
    """
    return (_split_tail if spec.split == "tail" else _split_documents)(
        texts, spec, encode, eos_id, source
    )


def _split_documents(
    texts: list[str], spec: CorpusSpec, encode: Encode, eos_id: int | None, source: str
) -> dict[str, Stream]:
    """Train and eval from different documents, in a random order."""
    if 0 < spec.n_eval_tokens < spec.n_ctx:
        raise RetraceError(
            f"corpus.n_eval_tokens: {spec.n_eval_tokens} is less than one block of {spec.n_ctx}; "
            f"raise it, or set 0 for no held-out blocks"
        )
    body = spec.n_ctx - spec.prepend_bos
    need = {s: n // spec.n_ctx * body for s, n in
            (("train", spec.n_tokens), ("eval", spec.n_eval_tokens))}  # fmt: skip
    order = np.random.default_rng(spec.seed).permutation(len(texts)).tolist()
    held_out = take(texts, reversed(order), need["eval"], encode, eos_id)
    rest = order[: len(order) - len(held_out.used)]
    if spec.n_tokens:
        train = take(texts, rest, need["train"], encode, eos_id)
    else:
        train = _whole_blocks(take(texts, rest, sys.maxsize, encode, eos_id), body)
        need["train"] = body  # one block, at least
    if len(train.tokens) < need["train"] or len(held_out.tokens) < need["eval"]:
        there = sum(len(ids) + (eos_id is not None) for ids in encode(texts))
        raise RetraceError(
            f"{source}: too short, {len(texts)} documents with {there} tokens; n_tokens "
            f"{spec.n_tokens} and n_eval_tokens {spec.n_eval_tokens} need {sum(need.values())} "
            f"from different documents; lower them or give more text"
        )
    return {"train": train, "eval": held_out}


def _split_tail(
    texts: list[str], spec: CorpusSpec, encode: Encode, eos_id: int | None, source: str
) -> dict[str, Stream]:
    """The last eval_share of all tokens is eval, what stands before it train; in text order.

    n_tokens keeps the end of train, n_eval_tokens the start of eval, so that they stay neighbours.
    """
    whole = take(texts, range(len(texts)), sys.maxsize, encode, eos_id)
    n, body = len(whole.tokens), spec.n_ctx - spec.prepend_bos
    border = int(n * (1 - spec.eval_share))
    caps = [(k // spec.n_ctx or sys.maxsize) * body for k in (spec.n_tokens, spec.n_eval_tokens)]
    sizes = [k // body * body for k in (min(border, caps[0]), min(n - border, caps[1]))]
    if not all(sizes) or spec.n_tokens > border:
        raise RetraceError(
            f"{source}: too short, {n} tokens, of which eval_share {spec.eval_share:g} holds out "
            f"{n - border}; n_tokens {spec.n_tokens} and one block of {spec.n_ctx} in either part "
            f"do not fit; lower n_tokens or n_ctx, or give more text"
        )
    return {
        "train": _part(whole, border - sizes[0], border),
        "eval": _part(whole, border, border + sizes[1]),
    }


def _whole_blocks(stream: Stream, body: int) -> Stream:
    return _part(stream, 0, len(stream.tokens) // body * body)


def _part(stream: Stream, start: int, end: int) -> Stream:
    """A piece of a stream."""
    document = stream.document[start:end]
    ids, counts = np.unique(document, return_counts=True)
    size = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    used = {i: size[i] for i in stream.used if i in size}
    return Stream(stream.tokens[start:end], document, used)


def shuffled(streams: dict[str, Stream], seed: int) -> dict[str, Stream]:
    """The tokens of each split in a random order, each still with its document."""
    out = {}
    for i, (name, stream) in enumerate(streams.items()):
        order = np.random.default_rng([seed, i]).permutation(len(stream.tokens))
        out[name] = Stream(stream.tokens[order], stream.document[order], stream.used)
    return out


def block_table(streams: dict[str, Stream], n_ctx: int, bos_id: int | None) -> Any:
    """tokens.parquet as an Arrow table: block, split, tokens, documents; eval comes last."""
    import pyarrow as pa

    pairs = {name: cut(stream, n_ctx, bos_id) for name, stream in streams.items()}
    rows = {name: len(tokens) for name, (tokens, _) in pairs.items()}
    n = sum(rows.values())

    def lists(which: int) -> Any:
        values = np.concatenate([pair[which].ravel() for pair in pairs.values()])
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * n_ctx)
        return pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32()))

    return pa.table(
        {
            "block": pa.array(range(n), pa.int32()),
            "split": [name for name, count in rows.items() for _ in range(count)],
            "tokens": lists(0),
            "documents": lists(1),
        }
    )


def document_table(found: list[Document], streams: dict[str, Stream]) -> Any:
    """documents.parquet: the documents whose tokens stand in blocks, in order of use."""
    import pyarrow as pa

    rows = [(i, n, name) for name, stream in streams.items() for i, n in stream.used.items()]
    return pa.table(
        {
            "document": pa.array([i for i, _, _ in rows], pa.int32()),
            "title": [found[i].title for i, _, _ in rows],
            "label": [found[i].label for i, _, _ in rows],
            "n_tokens": pa.array([n for _, n, _ in rows], pa.int32()),
            "split": [name for _, _, name in rows],
        }
    )


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


def check_fits(streams: dict[str, Stream], info: dict, file: str) -> None:
    """RetraceError where a token has no row in the embedding of the model that is to read it."""
    largest = max((int(s.tokens.max()) for s in streams.values() if len(s.tokens)), default=0)
    if largest >= info.get("d_vocab", largest + 1):
        raise RetraceError(
            f"{file}: its tokenizer gives token {largest}, but the model's vocabulary ends at "
            f"{info['d_vocab'] - 1}; give the tokenizer that the model was trained with"
        )


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
        found = sources.read(spec, Path(f"{args.out}.partial"))
        _same_text(info, found, args.tokenizer)
        streams = split(found.texts, spec, encoder(tokenizer), eos_id, found.name)
        check_fits(streams, info, args.tokenizer)
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
        blocks = block_table(streams, spec.n_ctx, bos_id)
        tables.write_table(args.documents, document_table(found.documents, streams), made)
        tables.write_table(args.out, blocks, made, row_group_size=ROW_GROUP)
        cli.log.info("%d blocks of %d tokens from %s", len(blocks), spec.n_ctx, found.name)

    cli.run("corpus", parser.parse_args(), work)
