"""Evaluating a published dictionary, beside SAELens's `run_evals`, at equal numbers.

    python tests/benchmarks/evaluation.py           8 layers of 384, 6,144 latents, 64 blocks of 128
    python tests/benchmarks/evaluation.py --tiny    the same in seconds, for a look

A random Llama with a vocabulary of --d-vocab tokens, and a random JumpReLU dictionary in Gemma
Scope's layout, whose thresholds let about one latent in a hundred fire, at the middle layer. Both
programs get the held-out blocks of one text, BOS spared, and take them in batches of 8.

ours     tokens/s of stages activations and evaluation, one after the other, files, checks and
         certificates with them. The model is loaded before, as it is for SAELens; with it, and
         with the store's proof of it, beside that
theirs   tokens/s of run_evals of sae-lens: CE, KL, norms, sparsity, variance and densities. The
         cosines between all latents, which stage evaluation does not have, are left out

floor    tokens/s of the passes that no program can leave out: the model once, the dictionary once
         on its stream, and the layers above with what it gives; no loss, no check, no file

processor  the same by the processor's seconds, which other processes change less

The benchmark stops where their numbers differ by more than SAME.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import ROOT, Row, arguments, interleaved, median, rates, report

sys.path.insert(0, str(ROOT / "tests"))

SAME = 2e-3  # of a number's size: attention adds in another order, which turns a latent or two
COMPARED = {
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "mse": ("reconstruction_quality", "mse"),
    "cosine_similarity": ("reconstruction_quality", "cossim"),
    "norm_ratio": ("shrinkage", "l2_ratio"),
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "loss_model": ("model_performance_preservation", "ce_loss_without_sae"),
    "loss_spliced": ("model_performance_preservation", "ce_loss_with_sae"),
    "kl_spliced": ("model_behavior_preservation", "kl_div_with_sae"),
}
BATCH, BOS = 8, 0


def tokenizer() -> Any:
    """Bytes, at ids from 4 on; id 0 begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|a|>", "<|b|>", "<|c|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    named = {"bos_token": special[BOS], "eos_token": special[BOS]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def store(folder: Path, args: Any) -> dict[str, Any]:
    """Model, text and dictionary as a paper's jobs have them, and their hook."""
    import numpy as np
    import torch
    from synthetic import call
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.d_vocab, hidden_size=args.d_model, intermediate_size=4 * args.d_model,
        num_hidden_layers=args.n_layers, num_attention_heads=args.d_model // 32,
        max_position_embeddings=256, initializer_range=0.08, bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    tokenizer().save_pretrained(folder / "hf")
    at = {"model": folder / "model.json", "corpus": folder / "tokens.parquet"}
    section = {"name": "random", "source": "folder", "path": str(folder / "hf")}
    call("model", {"model": section}, out=at["model"], checkpoint=folder / "checkpoint")
    rng, n_tokens = np.random.default_rng(0), args.n_ctx * args.n_blocks
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    texts = ["".join(rng.choice(letters, 2000)) for _ in range(2 + 2 * n_tokens // 2000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    section = {"source": "local", "path": str(folder / "text.jsonl"), "n_ctx": args.n_ctx,
               "n_tokens": args.n_ctx, "n_eval_tokens": n_tokens,
               "close_documents": False}  # fmt: skip
    call("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
         documents=folder / "documents.parquet")  # fmt: skip
    return at | {"hook": f"blocks.{args.n_layers // 2}.hook_resid_post"}


def dictionary(folder: Path, at: dict[str, Any], d_sae: int) -> Path:
    """The manifest of a random dictionary in Gemma Scope's layout, brought in."""
    import numpy as np
    import torch
    from synthetic import call

    from pipeline.latents.stored import eval_tokens
    from pipeline.models import hooks, loader

    hf, tokens = loader.load(at["model"]).hf, eval_tokens(at["corpus"], 4)
    with torch.no_grad(), hooks.capture(hf, [at["hook"]]) as seen:
        hf(tokens)
    x = seen[at["hook"]][:, 1:].flatten(0, 1)
    W = torch.randn(x.shape[1], d_sae, generator=torch.Generator().manual_seed(0))
    W /= W.norm(dim=0)
    weights = {
        "W_enc": W, "W_dec": 0.2 * W.T.contiguous(), "b_enc": torch.zeros(d_sae),
        "b_dec": x.mean(0), "threshold": (x @ W).quantile(0.99, 0).clamp_min(1e-3),
    }  # fmt: skip
    folder.mkdir()
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in weights.items()})
    job = {"name": "x", "source": "folder", "format": "gemma_scope", "path": str(folder)}
    call("sae_import", {"import": job | {"hook": at["hook"]}}, model=at["model"],
         out=folder / "manifest.json", saes=folder / "saes")  # fmt: skip
    return folder / "manifest.json"


def ours(folder: Path, at: dict[str, Any], manifest: Path, args: Any) -> dict[str, float]:
    """The row of the evaluation table, out of held-out text."""
    from synthetic import call

    from pipeline.store import tables

    same = {"device": "cpu", "threads": args.threads, "model": at["model"], "corpus": at["corpus"]}
    section = {"hooks": [at["hook"]], "dtype": "float32", "batch_size": BATCH}
    call("activations", {"activations": section}, **same, out=folder / "activations.json",
         shards=folder / "shards")  # fmt: skip
    call("evaluation", {"evaluation": {"n_splice_blocks": args.n_blocks}}, **same, saes=[manifest],
         activations=folder / "activations.json", out=folder / "table.parquet",
         history=folder / "history.parquet")  # fmt: skip
    return tables.read_table(folder / "table.parquet").iloc[0].to_dict()


class Tokens:
    """What run_evals asks of an ActivationsStore: the held-out blocks, in order."""

    def __init__(self, tokens: Any) -> None:
        self.batches, self.context_size = tokens.split(BATCH), tokens.shape[1]
        self.store_batch_size_prompts = BATCH
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self.left = list(self.batches)

    def get_batch_tokens(self, n: int) -> Any:
        return self.left.pop(0)


def theirs(bridge: Any, sae: Any, tokens: Any) -> dict[str, dict]:
    """SAELens's metrics by section."""
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    n = -(-len(tokens) // BATCH)
    config = EvalConfig(
        n_eval_reconstruction_batches=n, n_eval_sparsity_variance_batches=n, compute_kl=True,
        compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
    )  # fmt: skip
    found, _ = run_evals(sae, Tokens(tokens), bridge, ActivationScaler(), config,
                         exclude_special_tokens=[BOS])  # fmt: skip
    return found


def least(hf: Any, sae: Any, hook: str, tokens: Any) -> None:
    """Clean and spliced logits of every block, and nothing else."""
    import torch

    from pipeline.models import hooks, splice

    with torch.no_grad():
        for batch in tokens.split(BATCH):
            with hooks.capture(hf, [hook]) as seen:
                hf(batch, use_cache=False)
            x_hat = sae.decode(sae.encode(seen[hook].flatten(0, 1))).view_as(seen[hook])
            splice.resume(hf, hook, batch, x_hat)


def check_equal(mine: dict[str, float], other: dict[str, dict]) -> float:
    """The largest difference, relative; ends the benchmark where it is above SAME."""
    worst = 0.0
    for name, (section, key) in COMPARED.items():
        a, b = mine[name], float(other[section][key])
        off = abs(a - b) / max(abs(b), 1e-9)
        worst = max(worst, off)
        if not off <= SAME:
            sys.exit(f"{name}: {a:.6g}, and SAELens's is {b:.6g}")
    return worst


def timed(function: Callable[[], None], into: list[float]) -> Callable[[], None]:
    """The function, whose seconds of the processor are kept."""

    def run() -> None:
        before = time.process_time()
        function()
        into.append(time.process_time() - before)

    return run


def main() -> None:
    parser = arguments(__doc__)
    for name, size in {"n-layers": 8, "d-model": 384, "d-vocab": 8192, "d-sae": 6144, "n-ctx": 128,
                       "n-blocks": 64}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 64, 512 latents, 8 blocks")
    args = parser.parse_args()
    if args.tiny:
        tiny = {"n_layers": 2, "d_model": 64, "d_vocab": 512, "d_sae": 512, "n_blocks": 8}
        args = SimpleNamespace(**vars(args) | tiny)
    import torch

    from pipeline.latents.stored import eval_tokens, load_saes
    from pipeline.models import loader

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        at = store(folder, args)
        manifest = dictionary(folder / "dictionary", at, args.d_sae)
        tokens = eval_tokens(at["corpus"], args.n_blocks)
        bridge, sae = loader.bridge(at["model"]), load_saes(manifest, torch.device("cpu"))["x"]
        found: dict[str, Any] = {}

        def mine() -> None:
            found["ours"] = ours(folder, at, manifest, args)

        plain, loaded = loader.load, cache(loader.load)

        def with_model_at_hand() -> None:
            loader.load = loaded
            try:
                mine()
            finally:
                loader.load = plain

        def other() -> None:
            found["theirs"] = theirs(bridge, sae, tokens)

        hf = plain(at["model"]).hf
        work = {
            "ours": with_model_at_hand, "theirs": other, "ours, loading": mine,
            "floor": lambda: least(hf, sae, at["hook"], tokens),
        }  # fmt: skip
        processor: dict[str, list[float]] = {name: [] for name in work}
        seconds = interleaved({n: timed(f, processor[n]) for n, f in work.items()}, args.repeats)
        off = check_equal(found["ours"], found["theirs"])
    runs = rates(seconds, tokens.numel())
    of_processor = rates({n: s[1:] for n, s in processor.items()}, tokens.numel())
    case = f"{args.n_layers} layers of {args.d_model}, {args.d_sae:,} latents, {tokens.numel():,} "
    peer = {"peer": median(runs["theirs"]), "peer_name": "SAELens's run_evals"}
    floor = {"floor": median(runs["floor"]), "floor_name": "one pass and a half alone"}
    print(f"numbers differ by {off:.1g} of their size at most")
    report(
        "evaluation",
        [
            Row(case + "tokens", median(runs["ours"]), "tokens/s", **peer, **floor,
                target="ratio >= 3", runs={n: runs[n] for n in ("ours", "theirs", "floor")}),
            Row("with the model's loading", median(runs["ours, loading"]), "tokens/s", **peer,
                runs={"ours": runs["ours, loading"]}),
            Row("processor", median(of_processor["ours"]), "tokens/s",
                peer=median(of_processor["theirs"]), peer_name="SAELens's run_evals",
                floor=median(of_processor["floor"]), floor_name="one pass and a half alone",
                runs={n: of_processor[n] for n in ("ours", "theirs", "floor")}),
        ],
        args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
