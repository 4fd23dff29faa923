"""Activations stage against a bare Hugging Face forward pass, and against TransformerBridge.

    python tests/benchmarks/activations.py                 SmolLM2-135M, layer 8, on the CPU
    python tests/benchmarks/activations.py --memory        its peak memory, too (minutes)
    python tests/benchmarks/activations.py --random --device cuda --model-dtype bfloat16 \
        --dtype bfloat16 --layer 7 --batch-size 32 --n-ctx 512 --tokens 2097152 \
        --shard-rows 130816 --repeats 3                   GPT-2's shape, no download
    python tests/benchmarks/activations.py --family gemma2 --layer 5    a random model of any type

ours     pipeline.activations: forward, statistics, rounding, Parquet, fsync; with a GPU once
         more with the shards in memory, where no disk is waited for
peer     the same model cut behind the same layer, same dtype and batch, tokens on the device,
         results thrown away; SAELens's CacheActivationsRunner on the same checkpoint, by the
         Hugging Face model that it can wrap, stopped behind the layer, its bytes left to the page
         cache; TransformerBridge.run_with_cache, stopped there, that hook alone
floor    the products of the layers at the measured rate of a product, or the disk's at that of a
         file, whichever is less

Loading the model is not timed. A random model's tokens are random. Model and text are made by our
own stages in --work, once.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from harness import (
    ROOT,
    Row,
    arguments,
    disk_rate,
    interleaved,
    matmul_rate,
    median,
    rates,
    report,
    waits,
)

MEMORY = Path("/dev/shm")
SIZES = {  # of a random model: size -> what configs call it
    512: "hidden_size n_embd d_model word_embed_proj_dim",
    2048: "intermediate_size n_inner ffn_dim",
    8: "num_hidden_layers n_layer n_layers num_attention_heads n_head n_heads num_key_value_heads "
    "num_kv_heads",
    64: "head_dim query_pre_attn_scalar",
    32: "rotary_dim",
    50_000: "vocab_size",
    1024: "max_position_embeddings n_positions max_seq_len",
}
HOOK = "blocks.{}.hook_resid_post"


def stage(name: str, spec: dict, **paths) -> str:
    """Run a stage; its log."""
    command = [sys.executable, "-m", "pipeline", name, "--spec", json.dumps(spec)]
    command += [x for option, path in paths.items() for x in (f"--{option}", str(path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


def prepare(work: Path, n_ctx: int, n_tokens: int) -> tuple[Path, Path]:
    """model.json and tokens.parquet of the default model and text."""
    model_json, corpus = work / "model" / "model.json", work / f"corpus_{n_ctx}_{n_tokens}"
    if not model_json.exists():
        stage("model", {"model": {}}, out=model_json, checkpoint=model_json.parent / "checkpoint")
    if not (corpus / "tokens.parquet").exists():
        spec = {"corpus": {"n_ctx": n_ctx, "n_tokens": n_tokens, "n_eval_tokens": 0}}
        stage("corpus", spec, tokenizer=model_json, out=corpus / "tokens.parquet",
              documents=corpus / "documents.parquet")  # fmt: skip
    return model_json, corpus / "tokens.parquet"


def model_of(family: str):
    """A random model of a type: 8 layers of width 512, where its config has these names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.families.tiny_models import tiny_config

    sizes = {name: size for size, names in SIZES.items() for name in names.split()}
    known = AutoConfig.for_model(family).to_dict()
    config = tiny_config(family, **{k: v for k, v in sizes.items() if k in known})
    return AutoModelForCausalLM.from_config(config)


def random_work(work: Path, n_ctx: int, n_tokens: int, family: str = "") -> tuple[Path, Path]:
    """model.json of a random GPT-2 small or model of a type, and a file of random tokens."""
    import numpy as np
    import pyarrow as pa
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from pipeline.store import tables

    torch.manual_seed(0)
    hf = model_of(family) if family else GPT2LMHeadModel(GPT2Config())
    hf.save_pretrained(work / "random" / "checkpoint")
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(work / "random" / "checkpoint")
    info = {"processing": "raw", "bos_id": 0, "n_ctx": 1024}
    (work / "random" / "model.json").write_text(json.dumps(info))
    n = n_tokens // n_ctx
    tokens = np.random.default_rng(0).integers(1, 50_000, (n, n_ctx), np.int32)
    lists = pa.FixedSizeListArray.from_arrays(tokens.ravel(), n_ctx).cast(pa.list_(pa.int32()))
    columns = {"split": ["train"] * n, "tokens": lists, "documents": lists}
    made = {"n_ctx": n_ctx, "bos_id": 0, "prepend_bos": True}
    tables.write_table(work / "random.parquet", pa.table(columns), made, row_group_size=1024)
    return work / "random" / "model.json", work / "random.parquet"


def floor(args, hf, n_layers: int) -> tuple[float, str]:
    """Tokens a second that the products of the layers would allow, and what binds."""
    weights = sum(p.numel() for p in layers_of(hf)[:n_layers].parameters() if p.ndim > 1)
    d = hf.config.hidden_size
    attention = 2 * d * args.n_ctx * n_layers  # q k' and pattern v, causal: half of 4 d n_ctx
    rate = matmul_rate(args.device, args.model_dtype)
    return rate / (2 * weights + attention), f"products at {rate / 1e12:.3g} TFLOP/s"


def layers_of(hf):
    """The model's list of layers."""
    from pipeline.models import modules

    return hf.get_submodule(modules.family(hf).layers)


def cut_behind(hf, layer: int):
    """The model without the layers behind one."""
    from pipeline.models import modules

    parent, name = modules.family(hf).layers.rsplit(".", 1)
    setattr(hf.get_submodule(parent), name, layers_of(hf)[: layer + 1])
    return hf


def saelens_runner(args, model_json: Path, tokens, folder: Path):
    """CacheActivationsRunner on the same checkpoint, by the Hugging Face model that it can wrap."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from sae_lens.cache_activations_runner import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig

    from pipeline.models import loader, modules
    from pipeline.text.tokens import checkpoint_of

    disable_progress_bars()
    checkpoint, hf = checkpoint_of(model_json), loader.load(model_json).hf
    cfg = CacheActivationsRunnerConfig(
        dataset_path="given", model_name=str(checkpoint), model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": getattr(torch, args.model_dtype)},
        hook_name=f"{modules.family(hf).layers}.{args.layer}", d_in=hf.config.hidden_size,
        training_tokens=tokens.numel(), context_size=tokens.shape[1], device=args.device,
        model_batch_size=args.batch_size,
        dtype="float32" if args.dtype == "float32" else "float16", shuffle=False,
        new_cached_activations_path=str(folder),
    )  # fmt: skip
    cfg.buffer_size_gb = tokens.numel() * cfg.bytes_per_token / 1e9 * 1.0001
    runner = CacheActivationsRunner(cfg, Dataset.from_dict({"tokens": tokens.tolist()}))

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        assert len(runner.run()) == len(tokens)

    return run


def speed(args, model_json: Path, corpus: Path) -> list[Row]:
    """tokens/s of ours, the bare forward, the bridge and SAELens's runner, in turn."""
    import numpy as np
    import torch

    from pipeline.activations import activations, forward
    from pipeline.activations.plan import plan as plan_of
    from pipeline.activations.plan import row_bytes
    from pipeline.models import loader
    from pipeline.spec.paper import ActivationsSpec
    from pipeline.store.shards import Blocks

    torch.set_num_threads(args.threads)
    hook, device = HOOK.format(args.layer), torch.device(args.device)
    kind, wait = getattr(torch, args.model_dtype), waits(args.device)
    spec = ActivationsSpec(
        hooks=[hook], dtype=args.dtype, model_dtype=args.model_dtype, batch_size=args.batch_size,
        shard_rows=args.shard_rows,
    )  # fmt: skip
    loaded = loader.load(model_json, device, kind)
    cut = cut_behind(loader.load(model_json, device, kind).hf, args.layer)
    bound = floor(args, loaded.hf, args.layer + 1)
    peers = not args.family  # a random type is compared with its own bare forward alone
    bridge = (
        loader.bridge(model_json, device, kind) if peers and find_spec("transformer_lens") else None
    )
    blocks = Blocks(corpus)
    with torch.inference_mode():
        plan = plan_of(spec, blocks, forward.widths(loaded.hf, [hook], blocks.n_ctx))
    tokens = torch.from_numpy(blocks.read(0, len(blocks))[0].astype(np.int64))
    there = tokens.to(device)

    def ours(base: Path) -> None:
        with tempfile.TemporaryDirectory(dir=base) as folder:
            activations.run(loaded.hf, plan, blocks, Path(folder), {}, {})

    @torch.inference_mode()
    def bare() -> None:
        for batch in there.split(args.batch_size):
            cut.base_model(input_ids=batch, use_cache=False)
        wait()

    @torch.inference_mode()
    def cached() -> None:
        bridge.run_with_cache(
            there[: args.batch_size], names_filter=[hook], stop_at_layer=args.layer + 1
        )
        wait()

    few = tokens[: args.peer_batches * args.batch_size]
    amounts = {"ours": tokens.numel(), "bare": tokens.numel()}
    work = {"ours": lambda: ours(args.work), "bare": bare}
    size = tokens.numel() * row_bytes(spec, plan.widths)
    if args.device == "cuda" and shutil.disk_usage(MEMORY).free > 2 * size:
        work["in memory"], amounts["in memory"] = lambda: ours(MEMORY), tokens.numel()
    if bridge:
        work["bridge"], amounts["bridge"] = cached, there[: args.batch_size].numel()
    if peers and find_spec("sae_lens"):
        work["saelens"] = saelens_runner(args, model_json, few, args.work / "saelens")
        amounts["saelens"] = few.numel()
    seconds = interleaved(work, args.repeats)
    runs = {k: rates({k: s}, amounts[k])[k] for k, s in seconds.items()}
    return told(args, runs, bound, plan)


def told(args, runs: dict[str, list[float]], bound: tuple[float, str], plan) -> list[Row]:
    """The rows of what was measured."""
    from pipeline.activations.plan import row_bytes

    about = f"layer {args.layer}, {args.model_dtype}, batch {args.batch_size} x {args.n_ctx}"
    about = f"{args.family}, {about}" if args.family else about
    mid = {k: median(v) for k, v in runs.items()}
    bare, ours = "bare Hugging Face forward", mid["ours"]
    disk = disk_rate(args.work) / row_bytes(plan.spec, plan.widths)
    print(f"the disk alone takes {disk:,.0f} tokens/s; the products alone {bound[0]:,.0f}")
    least = min(bound, (disk, "the disk"))
    target = "ratio >= 0.95" if args.family else "ratio >= 0.9"
    rows = [Row(about, ours, "tokens/s", mid["bare"], bare, *least, target, runs=runs)]
    if "in memory" in mid:
        rows.append(
            Row(f"{about}, shards in {MEMORY}", mid["in memory"], "tokens/s", mid["bare"], bare,
                *bound, "ratio >= 0.9")
        )  # fmt: skip
    if "saelens" in mid:
        rows.append(
            Row(about, ours, "tokens/s", mid["saelens"], "CacheActivationsRunner",
                target="ratio >= 3" if args.device == "cuda" else "")
        )  # fmt: skip
    if "bridge" in mid:
        rows.append(Row(about, ours, "tokens/s", mid["bridge"], "run_with_cache"))
    return rows


def memory(args, model_json: Path, small: Path) -> Row:
    """Peak resident memory of the stage on a corpus and on one four times as long."""
    n = args.tokens
    _, large = prepare(args.work, args.n_ctx, 4 * n)
    peaks = []
    for corpus in (small, large):
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            spec = {"activations": {"hooks": [HOOK.format(0)], "shard_rows": 8192}}
            said = stage("activations", spec, model=model_json, corpus=corpus, device=args.device,
                         out=f"{folder}/manifest.json", shards=f"{folder}/shards")  # fmt: skip
        peaks.append(float(re.search(r"peak ([\d.]+) GiB", said)[1]))
    return Row(
        f"peak memory, {4 * n:,} tokens (peer: {n:,})", peaks[1], "GiB", peaks[0],
        "a quarter of the tokens", target="ratio >= 0.95", higher_is_better=False,
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "retrace_bench")
    parser.add_argument("--random", action="store_true", help="a random GPT-2 small, no download")
    parser.add_argument("--family", default="", help="a random model of this type, no download")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192, help="a run")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-rows", type=int, default=16_384)
    parser.add_argument("--peer-batches", type=int, default=4, help="of a run of SAELens's")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--model-dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    made = (args.work, args.n_ctx, args.tokens)
    random = args.random or args.family
    model_json, corpus = random_work(*made, args.family) if random else prepare(*made)
    rows = speed(args, model_json, corpus)
    if args.memory:
        rows.append(memory(args, model_json, corpus))
    report("activations", rows, args.out, args.device)


if __name__ == "__main__":
    main()
