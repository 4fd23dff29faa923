"""What Retrace has by itself: kinds of figures, methods, metrics, hooks, types of models.

`python -m pipeline list` prints it, and the catalogue beside an index shows it. What papers add
comes from their folders. Nothing is imported that needs torch.
"""

import fnmatch
import inspect
import re
import typing

from pipeline.claims import scalars
from pipeline.figures.kinds import KINDS
from pipeline.spec import families
from pipeline.spec.measured import Method

METHODS = {  # what is scored, and the source
    "direct_logit": "what heads and MLPs write to the logits (Elhage et al. 2021)",
    "activation_patching": "exact effect of replacing a head, MLP or stream (Meng et al. 2022)",
    "attribution_patching": "its first-order estimate, two forward and one backward pass (Nanda)",
    "path_patching": "exact effect of a head along paths to the logits (Wang et al. 2022)",
    "eap": "first-order estimate for every edge (Syed et al. 2023)",
    "eap_ig": "the same with the gradient averaged along a path (Hanna et al. 2024)",
    "atp_star": "attribution patching with QK fix and GradDrop (Kramar et al. 2024)",
    "acdc": "edges that are cut one by one (Conmy et al. 2023)",
    "latent_attribution": "first-order estimate for dictionary latents (Marks et al. 2024)",
    "latent_ig": "the same with the gradient averaged along a path (Marks et al. 2024)",
}
NORM = {  # of every norm
    "hook_scale": "what {norm} divides by: the root mean square, of a LayerNorm the standard "
    "deviation [1]",
    "hook_normalized": "what {norm} gives before its gain and bias [d_model]",
}
NORMS = {
    "ln1": "the norm before attention",
    "ln1_post": "the norm behind attention (Gemma 2 and 3, OLMo 2)",
    "ln2": "the norm before the MLP",
    "ln2_post": "the norm behind the MLP",
    "ln_final": "the norm before the unembedding",
}
HOOKS = {  # what is read at each, and the shape of a row
    "hook_embed": "the embedding of each token, without positions [d_model]",
    "hook_resid_pre": "the residual stream before block N [d_model]",
    "attn.hook_q": "queries of all heads, before rotary positions [n_heads*d_head]",
    "attn.hook_k": "keys of all key heads, before rotary positions [n_key_heads*d_head]",
    "attn.hook_v": "values of all key heads [n_key_heads*d_head]",
    "attn.hook_z": "values mixed by attention, before the output projection [n_heads*d_head]",
    "hook_attn_out": "what attention adds to the stream [d_model]",
    "hook_resid_mid": "the residual stream between attention and MLP [d_model]",
    "mlp.hook_in": "what the MLP reads, behind its norm [d_model]",
    "mlp.hook_expert_weights": "of a mixture of experts: the router's probabilities [n_experts]",
    "mlp.hook_experts_out": "of a mixture of experts: the sum of what its experts write, without a "
    "shared expert [d_model]",
    "mlp.hook_pre": "the MLP's neurons before the activation function; of a gated MLP the gate "
    "[d_mlp]",
    "mlp.hook_pre_linear": "of a gated MLP: what the activated gate is multiplied by [d_mlp]",
    "mlp.hook_post": "the MLP's neurons, as its last matrix reads them [d_mlp]",
    "hook_mlp_out": "what the MLP adds to the stream [d_model]",
    "hook_resid_post": "the residual stream after block N [d_model]",
    "attn.hook_attn_scores": "scores of each query for each key before the softmax; eager "
    "attention while they are read [n_heads*n_keys]",
    "attn.hook_pattern": "attention itself, the softmax of the scores; eager attention while it is "
    "read [n_heads*n_keys]",
    "attn.hook_result": "what each head writes to the stream [n_heads*d_model]",
}
METRICS = {  # beginning of a metric's name -> its last part: what it is
    "<arm>.<dictionary>": scalars.SAE,
    "<arm>.<crosscoder>.<source>": scalars.CROSSCODERS,
    "<arm>.<set of transcoders>": scalars.TRANSCODERS,
    "attribution.<prompt>": scalars.ATTRIBUTION,
    "circuits.<arm>.<method>": scalars.CIRCUITS,
    "graphs.<arm>.<dictionaries>": scalars.GRAPHS | scalars.REPLACED,
    "<arm>.probes.<label>.<method>.<hook>": scalars.PROBES,
    "<arm>.steering.<direction>": scalars.STEERING,
    "training.<run>": scalars.TRAINING,
}


def kinds() -> dict[str, str]:
    """Kind of figure -> what it draws."""
    return {name: inspect.getdoc(function) or "" for name, function in KINDS.items()}


def methods() -> dict[str, str]:
    """Method of the section circuits -> what it scores."""
    return {name: METHODS[name] for name in typing.get_args(Method)}


def metrics() -> dict[str, str]:
    """Pattern of a core metric -> its definition."""
    groups = METRICS.items()
    return {f"{start}.{name}": text for start, found in groups for name, text in found.items()}


def hooks() -> dict[str, str]:
    """Name of a hook, TransformerLens's, in the order of computation -> what it reads."""
    names = ["hook_embed", *(f"blocks.N.{h}" for h in families.LAYER_HOOKS + families.ON_REQUEST)]
    names += [f"ln_final.{h}" for h in families.NORM_HOOKS]
    return {name: _meaning(name.removeprefix("blocks.N.")) for name in names}


def _meaning(hook: str) -> str:
    norm, _, last = hook.partition(".")
    return NORM[last].format(norm=NORMS[norm]) if norm in NORMS else HOOKS[hook]


def models() -> dict[str, str]:
    """Model type of a config.json whose hooks are known -> the layout of its modules."""
    found = families.table()["types"]
    out = {
        kind: ", ".join(v.get("layout", "none for some settings") for v in found[kind])
        for kind in sorted(found)
    }
    return out | {
        kind: f"of its language model, such as {text}" for kind, text in families.WITH_TOWER.items()
    }


def fits(name: str, pattern: str) -> bool:
    """Whether a metric of a report, 'trained.topk.l0', is one that a pattern defines."""
    pattern = re.sub(r"<[^>]+>", "*", pattern)
    return name == pattern or ("*" in pattern and fnmatch.fnmatchcase(name, pattern))
