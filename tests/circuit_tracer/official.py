"""Our attribution graph beside that of circuit-tracer's own code, on the same transcoders.

    tests/circuit_tracer/official.sh

A random model of Llama's type and random ReLU transcoders, plain and with skip connections, are
given to both: to circuit-tracer as a HookedTransformer with the same weights. Compared are the
active features, the tokens that are explained, every direct effect, a graph of the most influential
features alone, and what pruning keeps. Runs in the environment that official.sh makes.
"""

import sys
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import constants
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# A constant that circuit-tracer imports for downloads, and that huggingface_hub 1 has no more.
constants.HF_HUB_ENABLE_HF_TRANSFER = getattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", False)

import random_case  # noqa: E402
from circuit_tracer.attribution import attribute  # noqa: E402
from circuit_tracer.graph import prune_graph  # noqa: E402
from circuit_tracer.replacement_model import ReplacementModel  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder  # noqa: E402

from pipeline.tracing.dictionaries import Dictionaries  # noqa: E402
from pipeline.tracing.graph import Graph, top_logits, trace  # noqa: E402
from pipeline.tracing.influence import prune  # noqa: E402
from pipeline.tracing.replacement import Replacement  # noqa: E402

CLOSE = 1e-4  # relative to the largest effect into a node: both sum in float32, in other orders


class Tokenizer:
    """What circuit-tracer asks of a tokenizer: no special tokens."""

    special_tokens_map: ClassVar[dict] = {}
    padding_side = "right"

    def convert_tokens_to_ids(self, tokens: list) -> list:
        return []

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def transcoders(
    n_layers: int, d_model: int, d_sae: int, skip: bool, bias: float, device: str = "cpu",
    spread: float = 0.1,
) -> list[SingleLayerTranscoder]:  # fmt: skip
    """Random transcoders (random_case.py) as circuit-tracer's."""
    out = []
    found = random_case.weights(n_layers, d_model, d_sae, skip, bias, device, spread)
    for layer, state in enumerate(found):
        one = SingleLayerTranscoder(d_model, d_sae, torch.nn.functional.relu, layer, skip)
        one.load_state_dict(state)
        out.append(one.requires_grad_(False).to(device))
    return out


def theirs(hf: LlamaForCausalLM, sets: list[SingleLayerTranscoder]) -> ReplacementModel:
    """circuit-tracer's replacement model with the weights of `hf`."""
    c = hf.config
    rotary = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings,
        d_head=c.hidden_size // c.num_attention_heads, n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size, d_vocab=c.vocab_size, eps=c.rms_norm_eps, act_fn="silu",
        n_key_value_heads=c.num_key_value_heads, normalization_type="RMS", gated_mlp=True,
        positional_embedding_type="rotary", rotary_base=int(rotary), rotary_adjacent_pairs=False,
        rotary_dim=c.hidden_size // c.num_attention_heads, final_rms=True,
        original_architecture="LlamaForCausalLM", device=str(hf.device), init_weights=False,
    )  # fmt: skip
    model = ReplacementModel.from_config(
        cfg, dict(enumerate(sets)), feature_input_hook="mlp.hook_in",
        feature_output_hook="mlp.hook_out",
    )  # fmt: skip
    state = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): w
        for name, w in convert_llama_weights(hf, cfg).items()
    }
    missing = model.load_state_dict(state, strict=False).missing_keys
    left = [k for k in missing if "transcoders" not in k and not k.endswith(("mask", "IGNORE"))]
    left = [k for k in left if "rotary" not in k and not k.endswith((".b_U", ".b_in", ".b_gate"))]
    if left:
        raise SystemExit(f"weights that were not handed over: {left}")
    model.to(hf.device)
    model.tokenizer = Tokenizer()
    return model


def ours(sets: list[SingleLayerTranscoder]) -> Dictionaries:
    """The same transcoders for us."""

    def encoder(one: SingleLayerTranscoder):
        return lambda x: one.encode(x)

    return Dictionaries(
        hooks=[f"blocks.{i}.mlp.hook_in" for i in range(len(sets))],
        output_hooks=[f"blocks.{i}.hook_mlp_out" for i in range(len(sets))],
        W_enc=[one.W_enc.T for one in sets],
        b_enc=[one.b_enc for one in sets],
        W_dec=[one.W_dec[:, None] for one in sets],
        b_dec=torch.stack([one.b_dec.data for one in sets]),
        encoders=[encoder(one) for one in sets],
        W_skip=None if sets[0].W_skip is None else [one.W_skip.data for one in sets],
    )


def whole(graph: Graph) -> torch.Tensor:
    """Our edges as circuit-tracer's square matrix."""
    n, n_logits = graph.n_chosen, len(graph.logits.tokens)
    columns = graph.edges.shape[1]
    out = torch.zeros(columns + n_logits, columns + n_logits)
    out[:n, :columns] = graph.edges[:n].cpu()
    out[columns:, :columns] = graph.edges[n:].cpu()
    return out


def compare(skip: bool, max_features: int | None) -> None:
    """Both graphs of one prompt; stops at the first difference."""
    hf = random_case.llama(3, 64, 8, 4, 96, 50, size=0.3)
    sets = transcoders(3, 64, 96, skip, bias=-1.0)
    tokens = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(2))
    their = attribute(tokens, theirs(hf, sets), batch_size=16, max_feature_nodes=max_features)
    model = Replacement.of(hf, tokens, ours(sets))
    graph = trace(
        model, top_logits(model, 0.0, 10, 0.95), max_features=max_features or 0, batch_size=16
    )
    active = torch.stack(graph.features[:3], 1)
    assert torch.equal(active, their.active_features), "other features are active"
    assert torch.equal(graph.logits.tokens, their.logit_tokens), "other tokens are explained"
    assert torch.equal(graph.chosen, their.selected_features), "other features were chosen"
    A, B = whole(graph), their.adjacency_matrix
    size = B.abs().amax(1, keepdim=True).clamp(min=1e-6)
    worst = float(((A - B).abs() / size).max())
    assert worst < CLOSE, f"an effect differs by {worst:.1e} of the largest into its node"
    mine = prune(graph.edges, graph.levels, graph.logits.probabilities, graph.n_pos)
    kept = prune_graph(their)
    masks = whole(_with(graph, mine.edges.float())) > 0
    nodes = int((mine.nodes != kept.node_mask).sum())
    edges = int((masks != kept.edge_mask).sum())
    # At a threshold two nodes may change places by rounding.
    assert nodes <= 1 and edges <= 0.01 * int(kept.edge_mask.sum()), (nodes, edges)
    print(
        f"skip {skip}, {graph.n_chosen} of {len(graph.features)} features, {A.numel()} effects: "
        f"largest difference {worst:.1e}; {int(kept.node_mask.sum())} nodes and "
        f"{int(kept.edge_mask.sum())} edges kept, {nodes} and {edges} differ"
    )


def _with(graph: Graph, edges: torch.Tensor) -> Graph:
    return Graph(**{**graph.__dict__, "edges": edges})


if __name__ == "__main__":
    for skip in (False, True):
        for max_features in (None, 40):
            compare(skip, max_features)
