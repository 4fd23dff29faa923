"""Every model type of the table of families against TransformerLens's bridge, in numbers.

    PYTHONPATH=. python tests/families_check.py          writes results/reference/families.csv

A tiny random model is made of each type and each setting of it that has a layout of its own. Of
every hook that the bridge has, too, our value is held equal to that in the bridge's own cache.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.families import tiny_models
from pipeline.models import hooks, proof
from pipeline.spec import families
from pipeline.store import provenance, tables

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results/reference/families.csv"

TOKENS = torch.tensor([[1, 3, 4, 15, 9, 26, 5, 35], [1, 8, 9, 7, 9, 3, 23, 8]])
# Ours and the bridge's attention add float32 numbers in another order: a few ulps, which two
# layers of weights of size 0.3 amplify.
CLOSE = 1e-4


# Circuits of these are held exact against plain hooked passes (test_patching.py and
# test_circuits_families.py); of the others that prove themselves, the parts that they are made of.
CIRCUITS = [("gpt_neox", 0), ("gpt_neox", 1), ("gemma", 0), ("gemma2", 0), ("gptj", 0), ("opt", 0),
            ("phi", 0), ("olmo", 0), ("olmo2", 0), ("granite", 0), ("phi3", 0), ("gpt_neo", 0),
            ("stablelm", 1), ("gemma3_text", 0), ("qwen3", 0), ("bloom", 0)]  # fmt: skip
# Held exact by test_any_family.py, most of them among the slow tests.
ALSO = ("nemotron mpt mixtral olmoe gpt_oss qwen2 qwen3_moe cohere cohere2 starcoder2 exaone4 xglm "
        "arcee smollm3 seed_oss glm glm4 glm4_moe codegen qwen2_moe ernie4_5_moe granitemoe "
        "flex_olmo minimax_m2 apertus hunyuan_v1_dense olmo3 ministral3 vaultgemma internlm3 "
        "bitnet llama4_text").split()  # fmt: skip
TESTED = [*CIRCUITS, ("llama", 0), ("gpt2", 0), ("mistral", 0), *((kind, 0) for kind in ALSO)]
# By test_settings.py and test_any_family.py.
TESTED += [*(("falcon", i) for i in (0, 1, 2, 4, 5, 6)), ("nanochat", 0)]
# Bridges of TransformerLens 3.9 whose own logits are not those of the Hugging Face model: what
# they read before attention mixes positions, in the first layer, is still compared.
FIRST = ("hook_embed", *(f"blocks.0.{h}" for h in ("hook_resid_pre", "ln1.hook_scale",
         "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v")))  # fmt: skip
ANOTHER_MODEL = {
    ("cohere", 0): FIRST, ("cohere2", 0): FIRST, ("hunyuan_v1_dense", 0): FIRST,
}  # fmt: skip
# Those that it cannot build, or run, around a model of the type.
NO_BRIDGE = {
    ("falcon", 4): "RuntimeError: split_with_sizes",
    ("falcon", 5): "AttributeError: no attribute 'ln_attn'",
    ("falcon", 6): "RuntimeError: split_with_sizes",
    ("granitemoehybrid", 0): "RuntimeError: Original component not set",
    ("granitemoehybrid", 1): "RuntimeError: Original component not set",
    ("recurrent_gemma", 0): "ValueError: `get_seq_length`",
}


def cases() -> list[tuple[str, int]]:
    """(type, number of its variant) of all layouts of the table."""
    found = families.table()["types"].items()
    return [(k, i) for k, each in found for i, v in enumerate(each) if "layout" in v]


def model_of(kind: str, variant: int, **also: Any) -> nn.Module:
    """A tiny random model of a type, with the settings of one of its variants."""
    when = families.table()["types"][kind][variant].get("when", {})
    config = tiny_models.with_architecture(tiny_models.tiny_config(kind, **{**when, **also}))
    return tiny_models.tiny_model(config)


def bridge_of(hf: nn.Module) -> Any:
    """TransformerLens's bridge around a copy of the model."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    inside = copy.deepcopy(hf)
    config = tiny_models.with_architecture(inside.config)
    return build_bridge_from_module(inside, type(hf).__name__, hf_config=config).eval()


@torch.no_grad()
def compared(hf: nn.Module) -> tuple[dict[str, float], float]:
    """(hook -> `distance` to the bridge's value, of hooks that it has; that of the logits)."""
    names, bridge = hooks.hook_names(hf), bridge_of(hf)
    acts = hooks.run_to(hf, TOKENS, names)
    logits, cache = bridge.run_with_cache(TOKENS)
    found = {n: distance(acts[n], cache[n]) for n in names if n in cache}
    return found, distance(hf(input_ids=TOKENS, use_cache=False).logits, logits)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value; of q, k, v and z with heads run together."""
    theirs = theirs.reshape(ours.shape) if theirs.numel() == ours.numel() else theirs
    if theirs.shape != ours.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


def row(kind: str, variant: int) -> dict[str, Any]:
    """One row of families.csv; AssertionError where a hook is not the bridge's."""
    hf = model_of(kind, variant)
    when = families.table()["types"][kind][variant].get("when", {})
    about = {"type": kind, "settings": " ".join(f"{k}={v}" for k, v in when.items())}
    checked: list[str] = []
    if (kind, variant) not in NO_BRIDGE:
        found, whole = compared(hf)
        same = (kind, variant) not in ANOTHER_MODEL
        checked = list(found) if same else [h for h in ANOTHER_MODEL[kind, variant] if h in found]
        wrong = {h: found[h] for h in checked if not found[h] <= CLOSE}
        assert not wrong, f"{kind} {variant}: {wrong}"
        assert same == (whole <= CLOSE), f"{kind} {variant}: logits are {whole:.1e} apart"
    refused = proof.prove(hf)
    short = lambda names: sorted({n.split(".", 2)[-1] if n[0] == "b" else n for n in names})  # noqa: E731
    fails = hf.retrace_fails
    return about | {
        "hooks": " ".join(h for h in families.LAYER_HOOKS if h in short(hooks.hook_names(hf))),
        "refused": " ".join(short(refused)),
        "splicing": "no" if "resume" in fails else "yes",
        "logits": "no" if "unembed" in fails else "yes",
        "circuits": "no"
        if fails.keys() - {"edges"}
        else "nodes"
        if fails
        else "tested"
        if (kind, variant) in TESTED
        else "parts sum",
        "checked_against_bridge": len(checked),
        "bridge": NO_BRIDGE.get((kind, variant), "").split(":")[0]
        or ("another model" if (kind, variant) in ANOTHER_MODEL else "the same logits"),
    }


def main() -> None:
    import pandas as pd

    rows = [row(*case) for case in cases()]
    about = {"command": "python tests/families_check.py"}
    about["families"] = provenance.sha256_file(families.TABLE)
    made = provenance.certificate("benchmark", about, "", [], "cpu")
    tables.write_csv(OUT, pd.DataFrame(rows), made)
    print(f"{len(rows)} rows in {OUT}")


if __name__ == "__main__":
    main()
