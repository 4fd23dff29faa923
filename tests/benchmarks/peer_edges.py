"""EAP-IG's own code (Hanna et al. 2024, 2403.17806) on a model and prompts that are handed over.

`patching.py --peer-python <python of a venv with the package eap>` starts this, and talks with it
by lines:

    stdin    eap | eap_ig | exact      run it, and say so when done; or
             scores                    of the last run
    stdout   null when ready or done, or scores: {"input->a0.h0<q>": m(edge cut) - m, ...}

Model and prompts are read from the folder: checkpoint/ is a Hugging Face GPT-2, given to the
HookedTransformer by TransformerLens's own conversion, unfolded; task.json has clean, corrupt
(lists of token ids of one length), answer, foil, ig_steps, and the edges that `exact` patches.

Two things of eap 2.0.0 are replaced, neither to its disadvantage: its tokenizer, since both sides
get token ids, and the device 'cuda' that its code names where it makes the table of scores. Else it
runs as in its notebooks, whose parameters take gradients. Making its graph of edges is not timed.
"""

import argparse
import json
import sys
from pathlib import Path

import eap.attribute
import eap.evaluate
import torch
from eap.graph import Graph
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel


def hooked(folder: Path, device: str) -> HookedTransformer:
    """The checkpoint as a HookedTransformer with the hooks that EAP-IG asks for."""
    hf = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    config = HookedTransformerConfig(
        n_layers=hf.config.n_layer, d_model=hf.config.n_embd, n_ctx=hf.config.n_positions,
        n_heads=hf.config.n_head, d_head=hf.config.n_embd // hf.config.n_head,
        d_mlp=4 * hf.config.n_embd, d_vocab=hf.config.vocab_size, act_fn="gelu_new",
        eps=hf.config.layer_norm_epsilon, normalization_type="LN", device=device,
    )  # fmt: skip
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf, config), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return model


class Peer:
    """EAP-IG on one batch of prompts."""

    def __init__(self, folder: Path, device: str) -> None:
        self.task = json.loads((folder / "task.json").read_text())
        self.model = hooked(folder / "checkpoint", device)
        self.graph = Graph.from_model(self.model)
        labels = torch.tensor([self.task["answer"], self.task["foil"]], device=device).T
        self.batches = [(self.task["clean"], self.task["corrupt"], labels)]
        every = self.graph.edges
        self.edges = {
            "eap": every, "eap_ig": every, "exact": {k: every[k] for k in self.task["edges"]}
        }  # fmt: skip
        self.last = "eap"

        def given(model, ids: list[list[int]], max_length: int | None = None):
            tokens = torch.tensor(ids, device=device)
            mask = torch.ones_like(tokens)
            return tokens, mask, mask.sum(1), tokens.shape[1]

        eap.attribute.tokenize_plus = eap.evaluate.tokenize_plus = given

    def run(self, method: str) -> None:
        self.last, self.graph.edges = method, self.edges[method]
        name = {"eap": "EAP", "eap_ig": "EAP-IG-inputs", "exact": "exact"}[method]

        def metric(logits, _, lengths, labels):
            end = logits[torch.arange(len(logits)), lengths - 1]
            good, bad = end.gather(-1, labels).T
            return good - bad if method == "exact" else (good - bad).sum()

        eap.attribute.attribute(
            self.model, self.graph, self.batches, metric, name, ig_steps=self.task["ig_steps"],
            quiet=True,
        )  # fmt: skip

    def scores(self) -> dict[str, float]:
        return {name: float(edge.score) for name, edge in self.edges[self.last].items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    said, sys.stdout = sys.stdout, sys.stderr  # libraries print
    torch.set_num_threads(args.threads)
    zeros = torch.zeros
    torch.zeros = lambda *shape, **more: zeros(
        *shape, **more | ({"device": args.device} if more.get("device") == "cuda" else {})
    )
    peer = Peer(args.folder, args.device)
    print("null", file=said, flush=True)
    for line in sys.stdin:
        answer = peer.scores() if line.strip() == "scores" else peer.run(line.strip())
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps(answer), file=said, flush=True)


if __name__ == "__main__":
    main()
