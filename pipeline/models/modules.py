"""The modules of a Hugging Face model, found by the layout of its family. [torch]

    family        the layout: which paths hold the layers, the norms, attention and the MLP
    layers_of     the layers in order
    submodule     the module at a path
    first_reader  what reads the stream before a layer
    answer_of     what a layer returns, a tensor or a tuple
    rows_of       (batch, pos) of a pass, where modules see sequences run together
    spread        a model whose layers lie on several devices

Nothing here knows a hook; hooks.py has those.
"""

import functools
import re
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import places
from pipeline.spec import families
from pipeline.spec.families import Layout


def family(hf: nn.Module) -> Layout:
    """The layout of a model: the one that came with it, or that of its type.

    A model without a head (an encoder such as MiniLM) is the inner module of the one that the
    layout is for, so that its paths begin behind that module's name.

    Raises:
        RetraceError: a type without one.
    """
    return _inside(hf, getattr(hf, "retrace_layout", None) or families.layout(hf.config))


def _inside(hf: nn.Module, names: Layout) -> Layout:
    """The layout, whose paths begin behind the name of the inner module where that is the model.

    RoBERTa's inner module has another name than BERT's, and the same modules in it.
    """
    prefix, _, _ = names.layers.partition(".")
    base = getattr(hf, "base_model", None)
    if base is None or hasattr(hf, prefix):
        return names
    own = "" if base is hf else f"{hf.base_model_prefix}."
    paths = {k: re.sub(rf"^{prefix}\.", own, getattr(names, k))
             for k in ("embed", "layers", "final_norm")}  # fmt: skip
    return names.model_copy(update=paths)


def check_layout(hf: nn.Module) -> None:
    """RetraceError where a model has not the modules around its layers that its layout names."""
    names = family(hf)
    for key in ("embed", "layers"):
        if reached(hf, path := getattr(names, key)) is None:
            raise RetraceError(
                f"model type '{hf.config.model_type}': has no '{path}', which its layout names as "
                f"{key}; correct model.family in paper.yaml"
            )


def layers_of(hf: nn.Module) -> nn.ModuleList:
    """The layers of a model, in order."""
    return submodule(hf, family(hf).layers)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The module at a path; '' is the module itself."""
    for part in path.split(".") if path else ():  # not get_submodule: a bridge's wrappers delegate
        module = getattr(module, part)
    return module


def reached(module: nn.Module, path: str) -> nn.Module | None:
    """`submodule`, or None where a part of the path is missing or None."""
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


def n_heads_of(hf: nn.Module, number: int) -> int:
    """The query heads of a layer; Laguna's layers may have more or fewer of them."""
    config = hf.config
    each = getattr(config, "num_attention_heads_per_layer", None)
    return each[number] if each else getattr(config, "num_attention_heads", None) or config.n_heads


def alike(hf: nn.Module) -> str:
    """The type of the table whose layout names most of a model's modules; '' where none fits.

    That modules have the names of another type's says nothing of how they are used; the proof
    does (proof.py).

    Args:
        hf: of any type; it may have no weights.
    """
    found = []
    for kind, variants in families.table()["types"].items():
        for variant in variants:
            if "layout" in variant and (fit := _fit(hf, families.layout_named(variant["layout"]))):
                found.append((fit, kind))
    best = [kind for fit, kind in found if fit == max(found)[0]]
    return "llama" if "llama" in best else "".join(best[:1])


def _fit(hf: nn.Module, names: Layout) -> tuple[int, int, bool] | None:
    """(hooks and parts, multipliers, whether the inner module has the name that it has there).

    None where the model lacks what the layout names.
    """
    given, names = names, _inside(hf, names)
    layers = reached(hf, names.layers)
    ends = [reached(hf, path) for path in (names.embed, names.final_norm)]
    if not isinstance(layers, nn.ModuleList) or None in ends:
        return None
    found = [families.PLACE.fullmatch(place).groups() for place in names.hooks.values()]
    paths = {path or "" for path, _ in found} | set(names.parts.values())
    times = [what.split()[-1] for _, what in found if what.startswith("out times")]
    if not all(any(reached(layer, p) is not None for layer in layers) for p in paths):
        return None
    if not all(hasattr(hf.config, name) for name in times):
        return None
    return len(names.hooks) + len(names.parts), len(times), names is given


def norm_paths(names: Layout) -> list[str]:
    """Paths of the norms of a layer."""
    return [path for part, path in names.parts.items() if part.startswith("ln")]


def first_reader(names: Layout, layer: nn.Module) -> nn.Module:
    """What reads the stream before a layer: the norm before attention, or attention itself."""
    behind = (names.place("hook_attn_out") or ("", ""))[0] == names.parts.get("ln1")
    return submodule(layer, names.attn if behind else names.parts.get("ln1", names.attn))


def answer_of(hf: nn.Module, module: nn.Module) -> Callable[[Tensor], object]:
    """x -> what a layer or an attention would return with x in it: a tensor, a tuple or a list.

    Families differ, and so do releases of transformers, so that one token is run to see it.
    """
    if "_retrace_answer" not in module.__dict__:
        _see_answers(hf)
    kind, more = module.__dict__["_retrace_answer"]
    return lambda x: x if kind is None else kind([x, *[None] * more])


@torch.no_grad()
def _see_answers(hf: nn.Module) -> None:
    """Note at every layer and attention what it returns."""
    names = family(hf)

    def see(module: nn.Module, _: tuple, out: object) -> None:
        several = isinstance(out, tuple | list)
        module.__dict__["_retrace_answer"] = (type(out), len(out) - 1) if several else (None, 0)

    with ExitStack() as stack:
        for layer in layers_of(hf):
            for module in (layer, reached(layer, names.attn)):
                if module is not None:
                    stack.callback(module.register_forward_hook(see).remove)
        token = torch.zeros(1, 1, dtype=torch.long, device=next(hf.parameters()).device)
        hf.base_model(input_ids=token, use_cache=False)


def rows_of(layer: nn.Module) -> list[tuple[int, int]]:
    """(batch, pos) of the last input of a layer, in a list that each forward pass renews."""
    if "_retrace_rows" not in layer.__dict__:

        def before(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            # of a copied layer, too, whose hooks are those of the one that it was copied from
            layer.__dict__["_retrace_rows"][:] = [tuple(places.stream_of(args, kwargs).shape[:2])]

        layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        layer.__dict__["_retrace_rows"] = []
    return layer.__dict__["_retrace_rows"]


# --- several devices -----------------------------------------------------------------------


def home(hf: nn.Module) -> Any:
    """Where values at hooks are read, of a model that is spread over devices; else None."""
    return getattr(hf, "retrace_home", None)


def spread(hf: nn.Module, home: Any, devices: list[Any]) -> None:
    """Let the layers of a model lie on several devices, and all else on one.

    Every module of a layer takes what it is called with to its own device, as accelerate's
    dispatch does, and the last layer brings the stream home. Hooks show values at home, and take
    them from there, so that nobody else asks where a layer lies.

    Args:
        home: the device of the embedding, the final norm and the unembedding.
        devices: one per layer.
    """
    layers = layers_of(hf)
    for layer, device in zip(layers, devices, strict=True):
        layer.to(device)
        for module in layer.modules():
            _takes(module, device)
    _brings(layers[-1], home)
    hf.retrace_home = home


def _each(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same tuple, list, dictionary or tensor with a function of each tensor."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple | list):
        made = [_each(v, fn) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return {k: _each(v, fn) for k, v in value.items()} if type(value) is dict else value


def _takes(module: nn.Module, device: Any) -> None:
    """Let a module move its arguments to a device; behind its hooks, which may have moved them."""
    forward = module.forward

    def here(x: Tensor) -> Tensor:
        return places.moved(x, device)

    @functools.wraps(forward)
    def taking(*args: Any, **kwargs: Any) -> Any:
        return forward(*_each(args, here), **_each(kwargs, here))

    module.forward = taking


def _brings(layer: nn.Module, device: Any) -> None:
    forward = layer.forward

    @functools.wraps(forward)
    def bringing(*args: Any, **kwargs: Any) -> Any:
        return _each(forward(*args, **kwargs), lambda x: places.moved(x, device))

    layer.forward = bringing


@contextmanager
def instead(changes: list[tuple[nn.Module, Callable]]) -> Any:
    """Inside: other functions in the place of some modules' forward."""
    before = [module.__dict__.get("forward") for module, _ in changes]
    try:
        for module, forward in changes:
            module.forward = forward
        yield
    finally:
        for (module, _), old in zip(changes, before, strict=True):
            module.__dict__.pop("forward", None)
            if old is not None:
                module.forward = old
