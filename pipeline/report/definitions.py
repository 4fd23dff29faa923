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
    return dict.fromkeys([*names, *(f"ln_final.{h}" for h in families.NORM_HOOKS)], "")


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
    pattern = re.sub(r"<\w+>", "*", pattern)
    return name == pattern or ("*" in pattern and fnmatch.fnmatchcase(name, pattern))
