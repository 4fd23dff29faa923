"""Peak memory and rate of stage corpus on a text larger than the memory that it may use.

    python tests/benchmarks/corpus_stream.py                     1 GB in 8 shards, all tokenised
    python tests/benchmarks/corpus_stream.py --gb 0.1 --packed   .jsonl.zst in place of .parquet
    python tests/benchmarks/corpus_stream.py --gb 10 --n-tokens 20000000   a part used

memory   GiB at most resident, by the kernel's count, of the stage's process; `floor` is the same of
         a text a hundred times smaller: what the imports, the tokenizer and a batch take
rate     MB of text a second from shards to tokens.parquet; `floor` is the tokenizer alone, on texts
         that lie in memory, with as many threads

The arrays that grow with the text take 24 bytes a document (place, turn, use); the first
row gives the bytes a document that were measured, which are more.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import ROOT, Row, arguments, environment, report

WORDS, SENTENCES, MEAN = 20_000, 20_000, 2000  # kinds of each; characters of a document, about


def sentences(seed: int = 0) -> list[str]:
    """Sentences of words that occur as often as words do (Zipf)."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    share = 1 / np.arange(1, 27)
    lengths = rng.integers(2, 11, WORDS)
    words = ["".join(rng.choice(letters, n, p=share / share.sum())) for n in lengths]
    rank = 1 / np.arange(1, WORDS + 1)
    chosen = rng.choice(WORDS, (SENTENCES, 14), p=rank / rank.sum())
    return [" ".join(words[i] for i in row).capitalize() + "." for row in chosen]


def documents(pool: list[str], size: int, seed: int) -> list[str]:
    """Texts of about `size` characters together."""
    rng, out, made = np.random.default_rng(seed), [], 0
    while made < size:
        n = int(rng.exponential(MEAN / 80)) + 1
        out.append(" ".join(pool[i] for i in rng.integers(0, len(pool), n)))
        made += len(out[-1])
    return out


def write(folder: Path, gb: float, shards: int, packed: bool) -> tuple[int, int]:
    """Shards of a text; how many documents and bytes they hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    pool, n, size = sentences(), 0, 0
    for i in range(shards):
        texts = documents(pool, int(gb * 1e9 / shards), i)
        n, size = n + len(texts), size + sum(map(len, texts))
        name = folder / f"train-{i:05}-of-{shards:05}"
        if packed:
            with pa.CompressedOutputStream(f"{name}.jsonl.zst", "zstd") as out:
                for text in texts:
                    out.write(json.dumps({"text": text}).encode() + b"\n")
        else:
            pq.write_table(pa.table({"text": texts}), f"{name}.parquet", row_group_size=1000)
    return n, size


def tokenizer_at(folder: Path) -> Path:
    """model.json of a byte-level BPE with 8,192 tokens, made from sentences of the text."""
    sys.path.insert(0, str(ROOT))
    from pipeline.store import tables
    from pipeline.text import tokenizer

    made = tokenizer.bpe(sentences()[:5000], 8192)
    made.save_pretrained(folder / "checkpoint")
    about = {"bos_id": made.bos_token_id, "d_vocab": len(made)}
    tables.write_json(folder / "model.json", about, {"stage": "tokenizer"})
    return folder / "model.json"


def run(work: Path, text: Path, model: Path, args) -> tuple[float, float]:
    """(seconds, peak GiB) of the stage on all files of a folder."""
    corpus = {"source": "local", "path": f"{text}/train-*", "n_ctx": args.n_ctx}
    corpus |= {"n_tokens": args.n_tokens if text.name == "large" else 0}
    command = [sys.executable, "-m", "pipeline", "corpus", "--spec", json.dumps({"corpus": corpus})]
    command += ["--tokenizer", str(model), "--threads", str(args.threads)]
    command += ["--out", str(work / "tokens.parquet")]
    command += ["--documents", str(work / "documents.parquet")]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment())
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"stage corpus failed with {status}")
    return time.perf_counter() - started, used.ru_maxrss / 2**20


def tokenizer_rate(model: Path, threads: int) -> float:
    """MB of text a second of the tokenizer alone."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    from pipeline.text import tokens

    backend = tokens.load_tokenizer(model).backend_tokenizer
    texts = documents(sentences(), 20_000_000, 99)
    started = time.perf_counter()
    for i in range(0, len(texts), 512):
        backend.encode_batch_fast(texts[i : i + 512], add_special_tokens=False)
    return sum(map(len, texts)) / 1e6 / (time.perf_counter() - started)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--n-tokens", type=int, default=0, help="0: all")
    parser.add_argument("--packed", action="store_true", help=".jsonl.zst")
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        model = tokenizer_at(work / "tokenizer")
        sizes = {}
        for name, gb in (("small", args.gb / 100), ("large", args.gb)):
            n, size = write(work / name, gb, args.shards, args.packed)
            sizes[name] = (n, size, *run(work, work / name, model, args))
        (few, _, _, floor), (n, size, seconds, peak) = sizes["small"], sizes["large"]
        rate = tokenizer_rate(model, args.threads)
        kind = ".jsonl.zst" if args.packed else ".parquet"
        each = (peak - floor) * 2**30 / (n - few)
        used = f"{args.n_tokens:,}" if args.n_tokens else "all"
        case = f"{size / 1e9:.2f} GB of {kind}, {used} tokens, {n:,} documents of {each:.0f} bytes"
        rows = [
            Row(case, peak, "GiB", floor=floor, floor_name="a hundredth of the text",
                target="ours <= 2", higher_is_better=False),
            Row(f"{args.threads} threads", size / 1e6 / seconds, "MB/s", floor=rate,
                floor_name="tokenizer alone"),
        ]  # fmt: skip
    report("corpus_stream", rows, args.out)


if __name__ == "__main__":
    main()
