"""A model on one GPU and with its layers on several: the same numbers, and how much memory.

    python tests/benchmarks/spread.py                     Gemma-2-9B's shape, on 1 and all GPUs
    python tests/benchmarks/spread.py --gpus 1 2 4        on these many
    python tests/benchmarks/spread.py --tiny              a small model on the CPU, for a look

memory   GiB at most allocated on all GPUs together, from before the weights are read until
         activations, splicing and attribution have run, and of each by itself; `floor` is the
         weights with what a bare forward pass of the same batch takes, beside attribution also a
         forward and backward pass through the same layers; the target is a share of 1 / 1.15 = 0.87
apart    the largest difference of what was computed from that on one GPU, over its largest value

The model is random, in bfloat16, written once to --work (18.5 GB) and read by our own loader, which
is told that a GPU has room for its share alone, so that several are needed. Every number of GPUs is
a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Row, arguments, environment, report

SHAPE = {  # of google/gemma-2-9b: its config.json
    "vocab_size": 256_000, "hidden_size": 3584, "intermediate_size": 14_336,
    "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 8192,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
}  # fmt: skip
GIB = 2**30


def write_model(folder: Path, tiny: bool) -> Path:
    """model.json of a random model; made where the devices are, then written."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config

    from pipeline.store import tables

    if not (folder / "model.json").exists():
        config = Gemma2Config(**(SHAPE | (TINY if tiny else {})))
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        hf.save_pretrained(folder / "checkpoint")
        info = {"processing": "raw", "bos_id": 2, "n_ctx": 8192, "dtype": "bfloat16"}
        tables.write_json(folder / "model.json", info, {"stage": "model"})
    return folder / "model.json"


def load(model_json: Path, n: int) -> tuple:
    """(model, bytes of its weights) on n devices, each with room for little more than its part."""
    import torch

    from pipeline.models import loader, modules

    size = sum(f.stat().st_size for f in (model_json.parent / "checkpoint").glob("*.safetensors"))
    if not torch.cuda.is_available():
        hf = loader.load(model_json).hf
        devices = [torch.device("cpu")] * len(modules.layers_of(hf))
        modules.spread(hf, devices[0], devices) if n > 1 else None
        return hf, loader.bytes_of(hf)
    loader.room_of = lambda _: 1.06 * size / n + (n > 1) * 0.05 * size
    hf = loader.load(model_json, torch.device("cuda", 0)).hf
    used = {p.device for p in hf.parameters()}
    assert len(used) == n, f"weights lie on {used}, not on {n} GPUs"
    return hf, loader.bytes_of(hf)


def hooks_of(hf) -> tuple[str, str]:
    """The block behind a quarter of the layers, and that behind three."""
    from pipeline.models import modules

    n = len(modules.layers_of(hf))
    return f"blocks.{n // 4}", f"blocks.{3 * n // 4}"


def activations(hf, tokens) -> dict:
    """name -> tensor on the CPU."""
    import torch

    from pipeline.models import hooks

    early, late = hooks_of(hf)
    wanted = [f"{early}.hook_resid_post", f"{late}.mlp.hook_post", f"{late}.attn.hook_z",
              f"{late}.hook_attn_out", f"{late}.ln2.hook_normalized"]  # fmt: skip
    with torch.no_grad():
        return {h: x.float().cpu() for h, x in hooks.run_to(hf, tokens, wanted).items()}


def splicing(hf, tokens) -> dict:
    """Losses of two blocks with the stream as it is, and without it."""
    import torch

    from pipeline.latents.splicer import Splicer

    with torch.no_grad():
        splicer = Splicer(hf, f"{hooks_of(hf)[1]}.hook_resid_pre", tokens[:2], 1)
        losses = splicer.measure([splicer.target, torch.zeros_like])
    return {"spliced losses": torch.tensor(losses)}


def attribution(hf, tokens) -> dict:
    """Of a block's last prediction to its stream."""
    import torch

    from pipeline.models import splice

    hook = f"{hooks_of(hf)[0]}.hook_resid_post"
    x = splice.stream(hf, hook, tokens[:1]).detach().requires_grad_(True)
    logits = splice.resume(hf, hook, tokens[:1], x, last=1)[0, -1]
    (gradient,) = torch.autograd.grad(logits[3] - logits[4], x)
    return {"attribution": (gradient * x.detach()).sum(-1).cpu()}


def bare(hf, tokens) -> None:
    """The forward passes that activations and splicing cannot do without."""
    import torch

    with torch.no_grad():
        hf.base_model(input_ids=tokens, use_cache=False)
        hf(input_ids=tokens[:2], use_cache=False)


def bare_backward(hf, tokens) -> None:
    """A forward and backward pass through the layers that attribution goes through."""
    from pipeline.models import modules

    layers = modules.layers_of(hf)
    above = layers[len(layers) // 4 + 1]
    handle = above.register_forward_pre_hook(
        lambda _, args, given: ((args[0].detach().requires_grad_(True), *args[1:]), given),
        with_kwargs=True,
    )
    try:
        logits = hf(input_ids=tokens[:1], use_cache=False, logits_to_keep=1).logits[0, -1]
        (logits[3] - logits[4]).backward()
    finally:
        handle.remove()


def one(args) -> None:
    """A process: load on args.one devices, compute, write what was found."""
    sys.path.insert(0, str(ROOT))
    import torch

    model_json, n = Path(args.work) / "model.json", args.one
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()

    def peak() -> float:
        return float(sum(torch.cuda.max_memory_allocated(i) for i in gpus))

    def peak_of(work) -> tuple[float, dict | None]:
        for i in gpus:
            torch.cuda.reset_peak_memory_stats(i)
        made = work(hf, tokens)
        return peak(), made

    hf, weights = load(model_json, n)
    about = {"weights": weights, "loaded": peak()}
    generator = torch.Generator().manual_seed(0)
    home = next(hf.parameters()).device
    size = (args.batch_size, args.n_ctx)
    tokens = torch.randint(5, hf.config.vocab_size, size, generator=generator).to(home)
    found: dict = {}
    for work in (bare, activations, splicing, bare_backward, attribution):
        about[work.__name__], made = peak_of(work)
        found |= made or {}
    torch.save(found, f"{args.work}/{n}.pt")
    (Path(args.work) / f"{n}.json").write_text(json.dumps(about))


def apart(work: Path, n: int) -> float:
    """The largest difference between n devices and one, over the largest value, of all results."""
    import torch

    a, b = (torch.load(work / f"{k}.pt", weights_only=True) for k in (1, n))
    gaps = {k: float((a[k] - b[k]).abs().max() / a[k].abs().max()) for k in a}
    print(n, {k: f"{gap:.1e}" for k, gap in gaps.items()})
    return max(gaps.values())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "spread")
    parser.add_argument("--gpus", type=int, nargs="*", help="default: 1, and all that there are")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--one", type=int, default=0, help="(of a process of this script)")
    args = parser.parse_args()
    if args.one:
        return one(args)
    sys.path.insert(0, str(ROOT))
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    write_model(args.work, args.tiny)
    if device == "cuda":
        torch.cuda.empty_cache()
    counts = args.gpus or sorted({1, max(1, torch.cuda.device_count()) if device == "cuda" else 2})
    rows = []
    for n in counts:
        command = [sys.executable, __file__, "--one", str(n), "--work", str(args.work)]
        command += ["--batch-size", str(args.batch_size), "--n-ctx", str(args.n_ctx)]
        subprocess.run(command, check=True, env=environment())
        about = json.loads((args.work / f"{n}.json").read_text())
        print(f"{n}: { ({k: round(v / GIB, 3) for k, v in about.items()}) } GiB")
        if device == "cuda":
            parts = [about[w.__name__] for w in (activations, splicing, attribution)]
            every = [("all of it", max(about["loaded"], *parts), "bare", "weights, a bare pass")]
            every += [
                (w.__name__, about[w.__name__], "bare", "the same") for w in (activations, splicing)
            ]
            back = "weights, a pass and its backward"
            every += [("attribution", about["attribution"], "bare_backward", back)]
            rows += [
                Row(f"memory on {n} GPUs, {what}", most / GIB, "GiB", floor=about[floor] / GIB,
                    floor_name=name, higher_is_better=False, target="share_of_floor >= 0.8696")
                for what, most, floor, name in every
            ]  # fmt: skip
        if n > 1:
            rows.append(Row(f"apart, {n} and 1", apart(args.work, n), "", higher_is_better=False,
                            target="ours <= 0.02"))  # fmt: skip
    report("spread", rows, args.out, device)


if __name__ == "__main__":
    main()
