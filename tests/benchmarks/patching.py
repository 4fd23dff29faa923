"""Exact patching against TransformerLens's loop, and attribution patching in forward passes.

    python tests/benchmarks/patching.py                  SmolLM2-135M on the CPU
    python tests/benchmarks/patching.py --random --device cuda      GPT-2's shape, no download

ours     pipeline.circuits.patching.activation_patching: heads of some layers, all positions
peer     transformer_lens.patching on a TransformerBridge, the same interventions on the same tokens
equal    the largest difference of an effect between the two, logits
floor    the products that exact effects of these heads cannot do without (`needed`), made as square
         matrices of 1024: the ratio can become the peer's time over this and no more

The second row is circuits.eap.attribution_patching of every head, MLP and stream at every position
(both runs, one backward pass) over one bare forward pass of the same batch. Loading is not timed.
With --processor there are these two rows alone, their times those of one thread on the processor,
which others at work hardly change.

Edge attribution and exact patching of edges follow; with `--peer-python` beside EAP-IG's own code
(edges.py, which says how to install it).
"""

import json
import tempfile
import time
from pathlib import Path

import edges
from activations import stage
from harness import ROOT, Row, arguments, interleaved, median, report


def tokens_of(hf, tokenizer, n: int, device):
    """n pairs of prompts of the paper ioi; for a random model pairs of random tokens."""
    import torch

    from pipeline.models.pairs import Pairs
    from pipeline.text import prompts_ioi

    if tokenizer is not None:
        return Pairs.of(prompts_ioi.draw(tokenizer, n, 0).data(), 0, device)
    ids = torch.randint(5, 50_000, (2, n, 16), generator=torch.Generator().manual_seed(0)).tolist()
    made = {"clean": ids[0], "corrupt": ids[1], "answer": [1] * n, "foil": [2] * n}
    return Pairs.of({**made, "positions": {}}, 0, device)


def random_gpt2(folder: Path) -> Path:
    """A random GPT-2 small in the store's layout."""
    import sys

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import byte_tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    (folder / "model.json").write_text(json.dumps({"processing": "raw", "bos_id": 0}))
    return folder / "model.json"


def smollm2(folder: Path) -> Path:
    """model.json of the default model, made by our own stage, once."""
    if not (folder / "model.json").exists():
        stage("model", {"model": {}}, out=folder / "model.json", checkpoint=folder / "checkpoint")
    return folder / "model.json"


def needed(task, layers: list[int]) -> float:
    """Operations of both runs and of every head's patch in some layers; attention's not counted.

    A patch of a head at all positions changes the stream from the first token that differs to the
    last position, from its own layer's MLP on. Of the last layer only the last position counts, but
    for the keys and values that it reads. Two operations a weight and token.
    """
    from pipeline.models.heads import SLOTS

    heads, pairs = task.heads, task.pairs
    size = lambda module: sum(p.numel() for p in module.parameters() if p.dim() == 2)  # noqa: E731
    last = heads.n_layers - 1
    whole = [size(layer) for layer in heads.layers]
    attention = [size(heads.attn(i)) for i in range(heads.n_layers)]
    read = sum(heads.count(s) for s in SLOTS[1:]) * heads.d_head * heads.d_model  # keys and values
    ends = len(pairs.end)
    suffix = int((pairs.end - pairs.first_change("") + 1).sum())
    weights = 0  # times tokens
    for layer in layers:
        mlp = whole[layer] - attention[layer]
        if layer == last:
            weights += mlp * ends
            continue
        above = mlp + sum(whole[layer + 1 : last])
        weights += above * suffix + read * suffix + (whole[last] - read) * ends
    runs = sum(whole) * (int((pairs.end + 1).sum()) + suffix)
    return 2.0 * (weights * heads.n_heads + runs)


def compared(args, model_json: Path) -> list[Row]:
    """Both rows, and the largest difference of an effect."""
    import pandas as pd
    import torch
    from transformer_lens import patching as theirs

    from pipeline.circuits import eap
    from pipeline.circuits.patching import activation_patching
    from pipeline.models import loader
    from pipeline.models.pairs import Node, Task

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    loaded = loader.load(model_json, device)
    bridge = loader.bridge(model_json, device)
    pairs = tokens_of(loaded.hf, None if args.random else loaded.tokenizer, args.prompts, device)
    task = Task.of(loaded.hf, pairs)
    n_layers = task.heads.n_layers
    layers = sorted({round(i * (n_layers - 1) / (args.layers - 1)) for i in range(args.layers)})
    nodes = [Node("head", i, h) for i in layers for h in range(task.heads.n_heads)]
    index = pd.DataFrame([(n.layer, n.head) for n in nodes], columns=["layer", "head"])
    rows = torch.arange(len(pairs.end), device=device)
    found: dict[str, torch.Tensor] = {}

    def metric(logits):
        last = logits[rows, pairs.end]
        return (last[rows, pairs.answer] - last[rows, pairs.foil]).mean()

    def ours() -> None:
        again = Task.of(loaded.hf, pairs)  # both runs count, as the peer's do
        found["ours"] = (activation_patching(again, nodes) + again.before).mean(-1).cpu()

    def peer() -> None:
        _, cache = bridge.run_with_cache(pairs.source)
        found["peer"] = theirs.generic_activation_patch(
            bridge, pairs.base, cache, metric, theirs.layer_head_vector_patch_setter, "z",
            index_df=index,
        ).cpu()  # fmt: skip

    every = [
        Node("resid", i, -1, f"@{p}") for i in range(n_layers) for p in range(len(pairs.base[0]))
    ]
    every += [Node("mlp", n.layer, -1, n.position) for n in every]
    every += [
        Node("head", n.layer, h, n.position)
        for n in every[: len(every) // 2]
        for h in range(task.heads.n_heads)
    ]

    def gradient() -> None:
        eap.attribution_patching(Task.of(loaded.hf, pairs, eap.OF_NODES), every).cpu()

    def forward() -> None:
        loaded.hf(input_ids=pairs.base, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    n_products = round(needed(task, layers) / (2 * 1024**3))

    def floor() -> None:
        for _ in range(n_products):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    clock = {"clock": time.process_time} if args.processor else {}
    with torch.no_grad():
        exact = interleaved({"ours": ours, "peer": peer, "floor": floor}, args.repeats, **clock)
        cheap = {"gradient": gradient, "forward": forward}
        cheap = interleaved(cheap, max(5, args.repeats), **clock)
    gap = float((found["ours"] - found["peer"]).abs().max())
    print(f"largest difference of an effect: {gap:.2g} logits")
    if gap > 1e-4:
        raise SystemExit(f"ours and TransformerLens differ by {gap:.2g} logits")
    about = f"{len(nodes)} heads of {len(layers)} layers, {args.prompts} prompts of up to "
    about += f"{pairs.base.shape[1]} tokens, equal to {gap:.1g}"
    units = "s of a processor" if args.processor else "s"
    return [
        Row(about, median(exact["ours"]), units, median(exact["peer"]), "TransformerLens's loop",
            median(exact["floor"]), "products of what is new in each patched run",
            target="ratio >= 6", higher_is_better=False, runs=exact),
        Row(f"attribution patching of {len(every)} nodes over a forward pass",
            median(cheap["gradient"]) / median(cheap["forward"]), "forward passes",
            target="ours <= 3.2", higher_is_better=False, runs=cheap),
    ]  # fmt: skip


def main() -> None:
    import torch

    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "retrace_bench")
    parser.add_argument("--random", action="store_true", help="a random GPT-2 small, no download")
    parser.add_argument("--layers", type=int, default=10, help="layers whose heads are patched")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="processor time, one thread")
    parser.add_argument("--peer-python", help="python of a venv with EAP-IG's code, see edges.py")
    args = parser.parse_args()
    if args.peer_python and not Path(args.peer_python).exists():
        parser.error(f"--peer-python: no file '{args.peer_python}'; edges.py says how to make it")
    if args.processor:
        args.threads = 1  # a thread that waits for others counts, too
    args.work.mkdir(parents=True, exist_ok=True)
    made = random_gpt2(args.work / "gpt2") if args.random else smollm2(args.work / "model")
    if args.processor:
        report("patching_heads", compared(args, made), args.out, args.device)
        return
    with torch.no_grad():
        of_edges = edges.rows(args, args.work / "edges")
    report("patching", compared(args, made) + of_edges, args.out, args.device)


if __name__ == "__main__":
    main()
