"""Which module of a Hugging Face model holds which of TransformerLens's hooks.

`families.json` has one layout per model type. `python -m pipeline adapters` writes it from
TransformerLens's own adapters, once a release; nothing here imports TransformerLens. A type that
the table lacks is brought by a file of its own, which `model.family` in paper.yaml names.

A place is a module's path and what to take of it:

    self_attn.o_proj in                     the module's input
    mlp out                                 its output; the first, where that is a tuple
    self_attn out times residual_multiplier the output times a number of the model's config
    attn.c_attn k of qkv                    the keys among the columns of a joint projection
    mlp.gate_up_proj first half             half of the columns of its output
    mlp.gate probabilities                  those of a router, over all experts

The columns of a joint projection lie as `qkv` (all queries, all keys, all values), `group` (for
each key head its queries, its key and its value; of GPT-NeoX one query) or `codegen` (in four
parts, each with its queries, values and keys).
"""

import functools
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipeline.errors import RetraceError, nearest
from pipeline.spec.base import Section, sentence

TABLE = Path(__file__).parent / "families.json"
NATIVE_TYPE = "retrace_native"
PLACE = re.compile(
    r"([A-Za-z_][\w.]*)? ?(in|out(?: times \w+)?|[qkv] of (?:qkv|group|codegen)|"
    r"(?:first|second) half|probabilities)"
)
ModulePath = Annotated[str, Field(pattern=r"^([A-Za-z_]\w*(\.\w+)*)?$")]
# Within a layer, in the order in which a layer with norms before attention and MLP computes them.
LAYER_HOOKS = (
    "hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k",
    "attn.hook_v", "attn.hook_z", "ln1_post.hook_scale", "ln1_post.hook_normalized",
    "hook_attn_out", "hook_resid_mid", "ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_in",
    "mlp.hook_expert_weights", "mlp.hook_experts_out", "mlp.hook_pre", "mlp.hook_pre_linear",
    "mlp.hook_post", "ln2_post.hook_scale", "ln2_post.hook_normalized", "hook_mlp_out",
    "hook_resid_post",
)  # fmt: skip
NORM_HOOKS = ("hook_scale", "hook_normalized")
# Read where they are asked for by name only: the first two need eager attention, and all are wide.
ON_REQUEST = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result")
# What TransformerBridge calls a hook itself in families without norms behind attention and MLP;
# the names on the left are its aliases.
BRIDGE_NAMES = {
    "hook_embed": "embed.hook_out",
    "hook_resid_pre": "hook_in",
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "hook_attn_out": "attn.hook_out",
    "hook_resid_mid": "ln2.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
    "hook_mlp_out": "mlp.hook_out",
    "hook_resid_post": "hook_out",
}
# Models with an image tower, and the type of their language model where a config names none. It is
# read alone: of text it computes the same logits, bit for bit (tests/weights/test_towers.py).
WITH_TOWER = {
    "deepseek_vl": "llama", "exaone4_5": "exaone4", "gemma3": "gemma3_text",
    "gemma4": "gemma4_text", "idefics3": "llama", "internvl": "qwen2", "lfm2_vl": "lfm2",
    "llama4": "llama4_text", "llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2",
    "mistral3": "mistral", "ovis2": "qwen2", "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text", "smolvlm": "llama",
}  # fmt: skip
PARTS = ("ln1", "ln1_post", "attn", "ln2", "ln2_post", "mlp")


class Layout(Section):
    """Where the modules of an architecture lie. Paths within a layer start at the layer."""

    embed: ModulePath = Field(description="the embedding of tokens; its output is hook_embed")
    layers: ModulePath = Field(min_length=1, description="the list of layers")
    final_norm: ModulePath = Field(
        default="", description="the norm before the unembedding, if any"
    )
    norm_again: bool = Field(
        default=False,
        description="the final norm runs elsewhere, too (nanochat), so that ln_final has no hooks",
    )
    parts: dict[str, ModulePath] = Field(
        default={}, description=f"modules of a layer by name: {', '.join(PARTS)}"
    )
    hooks: dict[str, str] = Field(description="hook within a layer: its place")
    experts: bool = Field(default=False, description="the MLP is a mixture of experts")
    flat: bool = Field(
        default=False, description="some modules of a layer see sequences run together, [rows d]"
    )

    bridge: dict[str, str] = Field(
        default={},
        description="hook: what a TransformerBridge calls it itself, where that is not "
        "what it calls it in most families",
    )
    overwritten: list[str] = Field(
        default=[], description="hooks whose tensor the layer changes in place later on"
    )

    @model_validator(mode="after")
    def _known(self) -> "Layout":
        for name in self.parts:
            if name not in PARTS:
                raise ValueError(f"parts: '{name}'{nearest(name, PARTS)} is none of {PARTS}")
        for hook, place in self.hooks.items():
            if hook not in LAYER_HOOKS or hook.endswith(NORM_HOOKS):
                raise ValueError(
                    f"hooks: '{hook}'{nearest(hook, LAYER_HOOKS)} is no hook with a place; those "
                    f"of norms follow from parts, the others are "
                    f"{', '.join(h for h in LAYER_HOOKS if not h.endswith(NORM_HOOKS))}"
                )
            if not PLACE.fullmatch(place):
                raise ValueError(
                    f"hooks: {hook}: '{place}' is no place; write a module's path and in, out, "
                    f"'out times' a number of the config, 'q of qkv', 'first half', or "
                    f"'probabilities'"
                )
        return self

    @property
    def attn(self) -> str:
        """The path of the attention; '' where the layer has none."""
        return self.parts.get("attn", "")

    @property
    def ln1(self) -> str:
        """The path of the norm that the adapter calls ln1; '' where the layer has none."""
        return self.parts.get("ln1", "")

    @property
    def ln2(self) -> str:
        """The path of the norm that the adapter calls ln2; '' where the layer has none."""
        return self.parts.get("ln2", "")

    @property
    def mlp(self) -> str:
        """The path of the MLP; '' where the layer has none, or its maps stand in the layer."""
        return self.parts.get("mlp", "")

    def place(self, hook: str) -> tuple[str, str] | None:
        """(path, what) of a hook within a layer, such as ('mlp', 'out'); None: it has none."""
        part, _, kind = hook.partition(".")
        if kind in NORM_HOOKS and part.startswith("ln") and self.parts.get(part):
            return self.parts[part], kind.removeprefix("hook_")
        if hook in ON_REQUEST:
            return self._inner(hook)
        if hook not in self.hooks:
            return None
        path, what = PLACE.fullmatch(self.hooks[hook]).groups()
        return path or "", what

    def _inner(self, hook: str) -> tuple[str, str] | None:
        """The place of a hook of ON_REQUEST: in attention, or behind its heads."""
        z = self.place("attn.hook_z")
        if hook == "attn.hook_result":
            return (z[0], "result") if z and z[1] == "in" else None
        return (self.attn, hook.removeprefix("attn.hook_")) if self.attn and z else None


NATIVE = Layout(
    embed="model.tok_embed", layers="model.layers", final_norm="model.ln_out",
    parts={"ln1": "ln1", "attn": "attn", "ln2": "ln2", "mlp": "mlp"},
    hooks={
        "hook_resid_pre": "in", "attn.hook_q": "attn.q out", "attn.hook_k": "attn.k out",
        "attn.hook_v": "attn.v out", "attn.hook_z": "attn.o in", "hook_attn_out": "attn out",
        "hook_resid_mid": "ln2 in", "mlp.hook_in": "mlp in", "mlp.hook_pre": "mlp.fc_in out",
        "mlp.hook_post": "mlp.fc_out in", "hook_mlp_out": "mlp out", "hook_resid_post": "out",
    },
    bridge={"mlp.hook_pre": "mlp.in.hook_out"},
)  # fmt: skip


@functools.cache
def table() -> dict[str, Any]:
    """families.json: layouts by name, and per type the layouts that its configs may have."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def types() -> list[str]:
    """Every model type that has a layout here."""
    return [*table()["types"], NATIVE_TYPE]


@functools.cache
def layout_named(name: str) -> Layout:
    """A layout of the table."""
    return Layout(**table()["layouts"][name])


def layout(config: Any, kind: str = "") -> Layout:
    """The layout of a model with this config.

    Args:
        kind: the type whose layout it has; default: its own.

    Raises:
        RetraceError: a type that the table lacks, or a setting of it without a layout.
    """
    kind = kind or config.model_type
    check_type(kind)
    if kind == NATIVE_TYPE:
        return NATIVE
    for variant in table()["types"][kind]:
        if all(getattr(config, k, None) == v for k, v in variant.get("when", {}).items()):
            if "layout" in variant:
                return layout_named(variant["layout"])
            break
    flags = sorted({k for v in table()["types"][kind] for k in v.get("when", {})})
    set_to = ", ".join(f"{k}: {getattr(config, k, None)}" for k in flags)
    raise RetraceError(
        f"model type '{kind}' with {set_to} in its config has no hooks here; name a file with its "
        f"layout as model.family in paper.yaml (README, 'Models')"
    )


def check_type(kind: str, where: str = "", like: str = "") -> None:
    """RetraceError for a model type that the table lacks.

    Args:
        where: the file that names it, if one does.
        like: a type of the table whose modules have the names of its own.
    """
    if kind not in types():
        other = f"its modules have the names of {like}'s, so write model.family: {like}, and each "
        other += "hook is proved when it is loaded; or"
        raise RetraceError(
            f"{where and where + ': '}model type '{kind}'{nearest(kind, types())} has no hooks "
            f"here; README lists the {len(types())} types that have; "
            f"{other if like else 'for another,'} name a file with its layout as model.family in "
            f"paper.yaml"
        )


def text_type(config: dict[str, Any]) -> str:
    """The model type of a config.json; of a model with an image tower, of its language model."""
    kind = str(config.get("model_type", ""))
    if kind not in WITH_TOWER:
        return kind
    text = config.get("text_config")
    named = text.get("model_type") if isinstance(text, dict) else None
    return str(named or WITH_TOWER[kind])


def given(family: str, config: Any) -> Layout:
    """The layout that `model.family` names: a file, or a type of the table with the same modules.

    Raises:
        RetraceError: as of `of_file` and `layout`.
    """
    return layout(config, family) if family in types() else of_file(Path(family))


def of_file(file: Path) -> Layout:
    """The layout that a group's own JSON file holds.

    Raises:
        RetraceError: the file cannot be read, or is no layout; the sentence says where.
    """
    try:
        return Layout(**json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as e:
        raise RetraceError(f"{file}: {sentence(e)}") from e
    except (OSError, ValueError, TypeError) as e:
        raise RetraceError(f"{file}: no JSON object with a layout ({e}); see README") from e


def bridge_name(hook: str, names: Layout | None = None) -> str:
    """TransformerBridge's own name of a hook: blocks.8.hook_out for blocks.8.hook_resid_post.

    SAELens's SAETransformerBridge (6.54) ignores aliases in run_with_hooks and run_with_cache.

    Args:
        names: the model's layout; families with norms behind attention and MLP have other names.
    """
    layer, at = re.fullmatch(r"(blocks\.\d+\.|)(.+)", hook).groups()
    own = names.bridge if names else {}
    return layer + own.get(at, BRIDGE_NAMES.get(at, at))
