"""Training rows made a window ahead: the disk they take, the speed, and what is explained.

    python tests/benchmarks/window.py                      a tiny GPT-2 on the CPU, minutes
    python tests/benchmarks/window.py --device cuda --half --width 768 --layers 12 --layer 7 \
        --n-ctx 512 --batch-size 32 --shard-rows 32704 --tokens 100000000 --window 2GB \
        --d-sae 24576 --train-batch 4096 --seeds 3 --compare-tokens 8000000 --compare-window 400MB

The model is random, and so are its tokens.

ours     the whole number of --tokens through --window: tokens a second of stage sae, the making of
         its rows included; the most bytes that training rows took on the disk, looked at 20 times
         a second
peer     stages activations and sae with a whole store, on --compare-tokens of the same text
floor    the window's own size

The explained variance of held-out rows is compared on --compare-tokens, over --seeds, with that of
the whole store: the means may differ by no more than the larger spread of the two (max - min).
"""

import argparse
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from activations import HOOK, stage
from harness import Row, arguments, median, report
from text_to_dictionary import BOS, explained, random_corpus


def model(args) -> Path:
    """model.json of a random GPT-2 of a width and depth."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    made = args.work / "model" / "model.json"
    torch.manual_seed(0)
    shape = GPT2Config(n_embd=args.width, n_layer=args.layers, n_head=max(1, args.width // 64))
    GPT2LMHeadModel(shape).save_pretrained(args.work / "hf")
    words = Tokenizer(models.WordLevel({"<|endoftext|>": BOS}, unk_token="<|endoftext|>"))
    bos = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **bos).save_pretrained(args.work / "hf")
    spec = {"model": {"name": "random", "source": "folder", "path": str(args.work / "hf")}}
    stage("model", spec, out=made, checkpoint=made.parent / "checkpoint", device="cpu")
    return made


class Disk:
    """The most bytes of training rows in a folder, while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.done = folder, 0, threading.Event()

    def __enter__(self) -> "Disk":
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(0.05):
            total = 0
            for file in self.folder.glob("saes.partial/window/shards/*/*part-*"):
                try:
                    total += file.stat().st_size
                except OSError:
                    continue
            self.most = max(self.most, total)


def run(args, model_json: Path, corpus: Path, tokens: int, window: str, seed: int) -> dict:
    """A dictionary's training, whole or windowed: seconds, most bytes, explained variance."""
    folder = args.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    hook, kind = HOOK.format(args.layer), "bfloat16" if args.half else "float32"
    stored = {"hooks": [hook], "dtype": kind, "model_dtype": kind, "batch_size": args.batch_size,
              "shard_rows": args.shard_rows} | ({"window": window} if window else {})  # fmt: skip
    n_rows = tokens // args.n_ctx * (args.n_ctx - 1)
    training = {"n_rows": n_rows, "batch_size": args.train_batch, "lr": args.lr, "seed": seed,
                "precision": kind}  # fmt: skip
    one = {"architecture": "topk", "d_sae": args.d_sae, "k": args.k, "seed": seed}
    sae = {"hook": hook, "training": training, "dictionaries": {"topk": one}}
    how = {"device": args.device, "threads": args.threads}
    began = time.perf_counter()
    stage("activations", {"activations": stored}, model=model_json, corpus=corpus,
          out=folder / "manifest.json", shards=folder / "shards", **how)  # fmt: skip
    held = time.perf_counter() - began
    more = {"model": model_json, "corpus": corpus, "gpus": args.gpus} if window else {}
    with Disk(folder) as disk:
        stage("sae", {"sae": sae} | ({"activations": stored} if window else {}),
              activations=folder / "manifest.json", out=folder / "sae.json",
              saes=folder / "saes", history=folder / "history.parquet", **more, **how)  # fmt: skip
    whole = sum(f.stat().st_size for f in (folder / "shards").rglob("*.parquet"))
    ev = explained(folder / "saes" / "topk", folder / "manifest.json", hook)
    out = {"seconds": time.perf_counter() - began - (held if window else 0), "ev": ev}
    out |= {"bytes": disk.most if window else whole}
    print(f"{tokens:,} tokens, window {window or 'none'}, seed {seed}: {out}", flush=True)
    return out


def compared(args, model_json: Path) -> list[Row]:
    """Explained variance with a window and with the whole store, over seeds."""
    n = args.compare_tokens
    corpus = random_corpus(args.work / "few.parquet", args.n_ctx, n, args.eval_tokens)
    windows = {"ours": args.compare_window, "peer": ""}
    found = {k: [run(args, model_json, corpus, n, w, seed) for seed in range(args.seeds)]
             for k, w in windows.items()}  # fmt: skip
    ev = {kind: [one["ev"] for one in runs] for kind, runs in found.items()}
    mean = {kind: sum(values) / len(values) for kind, values in ev.items()}
    spread = max(max(values) - min(values) for values in ev.values())
    apart = abs(mean["peer"] - mean["ours"])
    speed = {kind: [n / one["seconds"] for one in runs] for kind, runs in found.items()}
    size = max(one["bytes"] for one in found["peer"])
    return [
        Row(
            f"means {mean['ours']:.5f} in {args.compare_window}, {mean['peer']:.5f} in a store of "
            f"{size / 1e9:.2f} GB: how far apart, as a share of the spread over {args.seeds} seeds",
            apart / spread if spread else float(apart > 0), "of the spread", higher_is_better=False,
            target="ours <= 1", runs=ev,
        ),
        Row(
            f"{n:,} tokens, {args.compare_window}", median(speed["ours"]), "tokens/s",
            median(speed["peer"]), "the whole store", runs=speed,
        ),
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=None, help="default: a temporary folder")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--half", action="store_true", help="bfloat16, as GPUs are used")
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--window", default="8MB")
    parser.add_argument("--compare-tokens", type=int, default=100_000, help="0: not compared")
    parser.add_argument("--compare-window", default="4MB")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-rows", type=int, default=2_048)
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--train-batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="2: rows are made on another one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        args.work = Path(work)
        report("window", rows_of(args), args.out, args.device)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """What is measured, the speed last."""
    from pipeline.spec.base import in_bytes

    model_json, rows = model(args), []
    if args.compare_tokens:
        rows += compared(args, model_json)
    corpus = random_corpus(args.work / "all.parquet", args.n_ctx, args.tokens, args.eval_tokens)
    one = run(args, model_json, corpus, args.tokens, args.window, 0)
    size = in_bytes(args.window)
    about = f"{args.tokens:,} tokens through {args.window}"
    most = Row(f"{about}: most on the disk", one["bytes"] / 1e9, "GB", floor=size / 1e9,
               floor_name="the window", target=f"ours <= {size / 1e9}",
               higher_is_better=False)  # fmt: skip
    speed = Row(f"{about}, explained variance {one['ev']:.5f}", args.tokens / one["seconds"],
                "tokens/s", rows[-1].peer if rows else None, "the whole store",
                target="ratio >= 1" if rows else "")  # fmt: skip
    return [most, *rows, speed]


if __name__ == "__main__":
    sys.exit(main())
