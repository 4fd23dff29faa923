"""Edge attribution and exact patching of edges against EAP-IG's own code. Rows of patching.py.

    python tests/benchmarks/patching.py --peer-python peer/bin/python

EAP-IG (Hanna et al. 2024, 2403.17806; github.com/hannamw/EAP-IG) is on no package index. Its
venv, at the commit that these rows were written against:

    git clone https://github.com/hannamw/EAP-IG && git -C EAP-IG checkout 795f560
    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0 transformer-lens==3.9.0 transformers==5.23.0 ./EAP-IG

TransformerLens 4 has no HookedTransformer any more, which EAP-IG needs.

ours     edges of pipeline.circuits.eap and many_edges of head_inputs on the Hugging Face model
peer     eap.attribute.attribute on a HookedTransformer, in a process of its own (peer_edges.py)
equal    edge for edge, see TOLERANCE; or there are no rows

Both get the same weights, token ids, metric (logit difference) and threads, and make all their own
runs on the prompts. The model is random, with a third of its products in the unembedding, as in
GPT-2 small. EAP-IG takes the right ends of its steps here, as the peer does.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from harness import Row, interleaved, median

SHAPE = {"n_layer": 6, "n_head": 8, "n_embd": 512, "vocab_size": 16_384}
STEPS = 5  # as in the peer's notebooks
N_EXACT = 12  # edges, of which the peer takes seconds each
# The largest difference, over the largest score of edges into the same kind of input (q, k, v, mlp,
# logits); of exact effects, over the largest of all, as m itself is rounded. Rounding in float32
# leaves about 1e-5; midpoints of the steps instead of right ends would make 0.2.
TOLERANCE = 1e-4


class Peer:
    """peer_edges.py in another Python, asked line by line."""

    def __init__(self, python: str, folder: Path, device: str, threads: int) -> None:
        script = str(Path(__file__).with_name("peer_edges.py"))
        options = ["--device", device, "--threads", str(threads)]
        self.process = subprocess.Popen(
            [python, script, str(folder), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def ask(self, what: str) -> Any:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} stopped: see above, and its venv in edges.py")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def name_of(edge) -> str:
    """The peer's name of an edge, such as a0.h1->a2.h3<q>."""

    def part(node) -> str:
        names = {"resid": "input", "head": f"a{node.layer}.h{node.head}", "mlp": f"m{node.layer}"}
        return names.get(node.kind, node.kind)

    slot = f"<{edge.slot}>" if edge.slot else ""
    return f"{part(edge.source)}->{part(edge.target)}{slot}"


def gap(method: str, ours: dict[Any, float], peer: dict[str, float]) -> float:
    """The largest relative difference of a score, see TOLERANCE; printed with the correlation.

    Args:
        ours: of each Edge.
    """
    import pandas as pd

    table = pd.DataFrame(
        [(name_of(e), e.slot or e.target.kind, score) for e, score in ours.items()],
        columns=["edge", "kind", "ours"],
    ).set_index("edge")
    if set(table.index) != set(peer):
        odd = sorted(set(table.index) ^ set(peer))
        raise SystemExit(f"{method}: {len(odd)} edges are of one side only, such as {odd[0]}")
    table["peer"] = pd.Series(peer)
    apart, size = (table.ours - table.peer).abs(), table.peer.abs()
    largest = size.max() if method == "exact" else size.groupby(table.kind).transform("max")
    relative = float((apart / largest).max())
    print(
        f"{method}: {len(table)} edges, correlation {table.ours.corr(table.peer):.9f}, largest "
        f"difference {apart.max():.2g} logits, {relative:.2g} of the largest score"
    )
    if not relative <= TOLERANCE:
        raise SystemExit(f"{method}: ours and EAP-IG's code differ by {relative:.2g}")
    return relative


def rows(args: argparse.Namespace, folder: Path) -> list[Row]:
    """EAP, EAP-IG and exact patching; without --peer-python of ours alone.

    Args:
        folder: where model and prompts are kept for both.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipeline.circuits import eap
    from pipeline.circuits.head_inputs import many_edges
    from pipeline.models.pairs import Pairs, Task

    torch.manual_seed(0)
    device, n = torch.device(args.device), args.prompts
    hf = (
        GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=None, eos_token_id=None))
        .eval()
        .requires_grad_(False)
    )
    hf.save_pretrained(folder / "checkpoint")
    hf.to(device)
    ids = torch.randint(5, SHAPE["vocab_size"], (2, n, 16)).tolist()
    prompts = {"clean": ids[0], "corrupt": ids[1], "answer": [1] * n, "foil": [2] * n}
    pairs = Pairs.of({**prompts, "positions": {}}, None, device)
    every = eap.edges(Task.of(hf, pairs), [0.0])[0]
    some = [every[i] for i in sorted(torch.randperm(len(every))[:N_EXACT].tolist())]
    told = {**prompts, "ig_steps": STEPS, "edges": [name_of(e) for e in some]}
    (folder / "task.json").write_text(json.dumps(told))
    found = {}

    def attribution(method: str, alphas: list[float]) -> None:
        edges, scores = eap.edges(Task.of(hf, pairs), alphas)
        found[method] = dict(zip(edges, scores.tolist(), strict=True))

    def exact() -> None:
        effects = many_edges(Task.of(hf, pairs), some).mean(-1)
        found["exact"] = dict(zip(some, effects.tolist(), strict=True))

    ours = {
        "eap": lambda: attribution("eap", [0.0]),
        "eap_ig": lambda: attribution("eap_ig", [(j + 1) / STEPS for j in range(STEPS)]),
        "exact": exact,
    }
    about = {
        "eap": f"EAP of {len(every):,} edges",
        "eap_ig": f"EAP-IG of {len(every):,} edges, {STEPS} steps",
        "exact": f"exact patching of {len(some)} edges",
    }
    # .tolist() waits for the device on our side, and the peer's process on its own
    peer = Peer(args.peer_python, folder, args.device, args.threads) if args.peer_python else None
    out = []
    for method, function in ours.items():
        work = {"ours": function}
        if peer:
            work["peer"] = lambda method=method: peer.ask(method)
        seconds = interleaved(work, args.repeats)
        row = Row(about[method], median(seconds["ours"]), "s", higher_is_better=False, runs=seconds)
        row.peer_name = "EAP-IG's code: no --peer-python"
        if peer:
            equal = gap(method, found[method], peer.ask("scores"))
            row.case += f", equal to {equal:.1g}"
            row.peer, row.peer_name = median(seconds["peer"]), "EAP-IG's code"
        out.append(row)
    if peer:
        peer.close()
    return out
