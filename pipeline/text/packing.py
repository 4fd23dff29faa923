"""Token ids of documents -> the streams of train and eval, and the blocks that they are cut into.

corpus.py says how a section chooses; here the choice is made. Documents are read in any order and
tokens are appended to files, so memory holds a batch of documents and what is said of each in
numbers.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.sources import CorpusSpec
from pipeline.text import spool

BATCH = 512  # documents tokenised at a time, at most
BATCH_SIZE = 1 << 20  # characters of them, or token ids; one document may have more
Encode = Callable[[list[Any]], list[np.ndarray]]


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, which lie on disk or in memory: slice, then np.asarray.

    tokens, document: int32 [n]; used: int32 [documents, 2], each document and how many of its
    tokens stand in the stream, in stream order.
    """

    tokens: spool.Ids | np.ndarray
    document: spool.Ids | np.ndarray
    used: np.ndarray


def batches(texts: Sequence[Any], order: Iterable[int]) -> Iterator[tuple[list[int], list[Any]]]:
    """Documents and their texts in the given order, in batches that fit into memory."""
    chosen, found, size = [], [], 0
    for i in order:
        chosen.append(int(i))
        found.append(texts[int(i)])
        size += len(found[-1])
        if len(chosen) == BATCH or size >= BATCH_SIZE:
            yield chosen, found
            chosen, found, size = [], [], 0
    if chosen:
        yield chosen, found


def take(
    texts: Sequence[Any],
    order: Sequence[int] | np.ndarray,
    n: int,
    encode: Encode,
    eos_id: int | None,
    scratch: Path | None = None,
) -> TokenStream:
    """The first n tokens of documents in the given order, each closed by EOS.

    Args:
        texts: all documents.
        order: indices into texts, tokenised until n tokens are there.
        encode: texts -> int32 token ids of each.
        eos_id: None leaves documents unclosed.
        scratch: folder of the files that the tokens lie in; default: of temporary files.
    """
    end = np.array([] if eos_id is None else [eos_id], np.int32)
    tokens, owners, used = (spool.Ids(scratch) for _ in range(3))
    found = done = 0
    every = n == sys.maxsize
    goal = (len(order), "documents") if every else (n, "tokens")
    progress = cli.Progress("corpus", *goal)
    for chosen, some in batches(texts, order if n else []):
        for i, ids in zip(chosen, encode(some), strict=True):
            kept = np.concatenate([ids, end])[: max(n - found, 0)]
            found += len(ids) + len(end)
            if len(kept):
                tokens.append(kept)
                owners.append(np.full(len(kept), i, np.int32))
                used.append(np.array([i, len(kept)], np.int32))
        done += len(chosen)
        progress.at(done if every else min(found, n))
        if found >= n:
            break
    return TokenStream(tokens, owners, np.asarray(used).reshape(-1, 2))


def cut(stream: TokenStream, n_ctx: int, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a stream.

    Returns:
        tokens and document, int32 [blocks, n_ctx]; the document of a BOS is -1.
    """
    body = n_ctx - (bos_id is not None)
    columns = (stream.tokens, stream.document)
    tokens, owners = (np.asarray(column).reshape(-1, body) for column in columns)
    if bos_id is None:
        return tokens, owners
    front = np.full((len(tokens), 1), bos_id, np.int32)
    return np.hstack([front, tokens]), np.hstack([np.full_like(front, -1), owners])


def split(
    texts: Sequence[Any],
    spec: CorpusSpec,
    encode: Encode,
    eos_id: int | None,
    source: str,
    scratch: Path | None = None,
) -> dict[str, TokenStream]:
    """The streams of train and eval, cut to whole blocks.

    Args:
        eos_id: closes every document; None: nothing does.
        scratch: see `take`.

    Raises:
        RetraceError: the corpus is too short; it says how many tokens there are.
    """
    return (_split_tail if spec.split == "tail" else _split_documents)(
        texts, spec, encode, eos_id, source, scratch
    )


def _split_documents(
    texts: Sequence[Any], spec: CorpusSpec, encode: Encode, eos_id: int | None, source: str,
    scratch: Path | None,
) -> dict[str, TokenStream]:  # fmt: skip
    """Train and eval from different documents, in a random order."""
    if 0 < spec.n_eval_tokens < spec.n_ctx:
        raise RetraceError(
            f"corpus.n_eval_tokens: {spec.n_eval_tokens} is less than one block of {spec.n_ctx}; "
            f"raise it, or set 0 for no held-out blocks"
        )
    body = spec.n_ctx - spec.prepend_bos
    need = {s: n // spec.n_ctx * body for s, n in
            (("train", spec.n_tokens), ("eval", spec.n_eval_tokens))}  # fmt: skip
    order = np.random.default_rng(spec.seed).permutation(len(texts))
    held_out = take(texts, order[::-1], need["eval"], encode, eos_id, scratch)
    rest = order[: len(order) - len(held_out.used)]
    if spec.n_tokens:
        train = take(texts, rest, need["train"], encode, eos_id, scratch)
    else:
        train = _whole_blocks(take(texts, rest, sys.maxsize, encode, eos_id, scratch), body)
        need["train"] = body  # one block, at least
    if len(train.tokens) < need["train"] or len(held_out.tokens) < need["eval"]:
        every = (ids for _, some in batches(texts, range(len(texts))) for ids in encode(some))
        there = sum(len(ids) + (eos_id is not None) for ids in every)
        raise RetraceError(
            f"{source}: too short, {len(texts)} documents with {there} tokens; n_tokens "
            f"{spec.n_tokens} and n_eval_tokens {spec.n_eval_tokens} need {sum(need.values())} "
            f"from different documents; lower them or give more text"
        )
    return {"train": train, "eval": held_out}


def _split_tail(
    texts: Sequence[Any], spec: CorpusSpec, encode: Encode, eos_id: int | None, source: str,
    scratch: Path | None,
) -> dict[str, TokenStream]:  # fmt: skip
    """The last eval_share of all tokens is eval, what stands before it train; in text order.

    n_tokens keeps the end of train, n_eval_tokens the start of eval, so that they stay neighbours.
    """
    whole = take(texts, range(len(texts)), sys.maxsize, encode, eos_id, scratch)
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


def _whole_blocks(stream: TokenStream, body: int) -> TokenStream:
    return _part(stream, 0, len(stream.tokens) // body * body)


def _part(stream: TokenStream, start: int, end: int) -> TokenStream:
    """A piece of a stream."""
    ends = np.cumsum(stream.used[:, 1], dtype=np.int64)
    begins = ends - stream.used[:, 1]
    n = np.minimum(ends, end) - np.maximum(begins, start)
    used = np.column_stack([stream.used[:, 0], n.clip(0)]).astype(np.int32)[n > 0]
    return TokenStream(stream.tokens[start:end], stream.document[start:end], used)


def shuffled(streams: dict[str, TokenStream], seed: int) -> dict[str, TokenStream]:
    """The tokens of each split in a random order, each still with its document.

    They are all held in memory, 16 bytes each.
    """
    out = {}
    for i, (name, stream) in enumerate(streams.items()):
        order = np.random.default_rng([seed, i]).permutation(len(stream.tokens))
        columns = (np.asarray(column)[order] for column in (stream.tokens, stream.document))
        out[name] = TokenStream(*columns, stream.used)
    return out
