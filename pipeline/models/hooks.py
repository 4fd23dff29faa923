"""TransformerLens's hook names on the modules of a Hugging Face model. [torch]

The forward pass runs on the plain Hugging Face model with PyTorch's own forward hooks: on
2 cores that is about ten times as fast as the bridge's `run_with_cache` (design, decision 6).
A test holds every hook of every family equal to TransformerBridge's.

    x ──┬─ ln ─ attn ─(+)─┬─ ln ─ mlp ─(+)── out
    resid_pre   attn_out  resid_mid  mlp_out  resid_post

`capture` reads the stream, `stop_after` ends the forward pass behind the last hook that is
needed, `edited` replaces the stream. Everything here keeps gradients where the caller has them.
modules.py finds modules, places.py reads and replaces what they take and return, and inner.py what
none does: attention scores, patterns, heads' results, routers' probabilities.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import RetraceError, nearest
from pipeline.models import modules, places
from pipeline.models.inner import InnerPlace
from pipeline.models.places import Place
from pipeline.spec import families
from pipeline.spec.families import Layout


def hook_names(hf: nn.Module) -> list[str]:
    """Every hook of this model, in the order of computation; but for families.ON_REQUEST."""
    names, refused = modules.family(hf), _refused(hf)
    out = ["hook_embed"]
    for i, layer in enumerate(modules.layers_of(hf)):
        out += [f"blocks.{i}.{h}" for h in families.LAYER_HOOKS if _in_layer(names, layer, h)]
    out += [f"ln_final.{h}" for h in families.NORM_HOOKS if _find(hf, f"ln_final.{h}")]
    return [h for h in out if h not in refused]


def _in_layer(names: Layout, layer: nn.Module, hook: str) -> tuple[str, str] | None:
    """(path, what) of a hook, where the layer has its module: layers of a model may differ."""
    place = names.place(hook)
    return place if place and modules.reached(layer, place[0]) is not None else None


def _refused(hf: nn.Module) -> dict[str, str]:
    """Hooks that the model's own proof refused when it was loaded: hook -> why (proof.py)."""
    return getattr(hf, "retrace_refused", {})


def require(hf: nn.Module, what: str) -> None:
    """RetraceError where the model failed a part of its proof: resume, unembed, heads, behind."""
    if why := getattr(hf, "retrace_fails", {}).get(what):
        can = "" if why.endswith("can be stored") else "; activations of its hooks can be stored"
        raise RetraceError(f"{why}{can}")


def check(hf: nn.Module, hook: str) -> None:
    """RetraceError where the model has no such hook, naming the nearest that it has."""
    if _find(hf, hook) is None:
        _refuse(hf, hook)


def _refuse(hf: nn.Module, hook: str) -> None:
    """The sentence of a hook that the model has not."""
    if hook in _refused(hf):
        raise RetraceError(f"hook '{hook}': {_refused(hf)[hook]}")
    known, n_layers = hook_names(hf), len(modules.layers_of(hf))
    layer = re.match(r"blocks\.(\d+)\.", hook)
    if layer and int(layer[1]) >= n_layers:
        raise RetraceError(
            f"hook '{hook}': the model has {n_layers} layers; use blocks.0 to blocks.{n_layers - 1}"
        )
    if hook.endswith(("mlp.hook_pre", "mlp.hook_post")) and modules.family(hf).experts:
        raise RetraceError(
            f"hook '{hook}': the MLP of this layer is a mixture of experts, which has no neurons "
            f"that every token passes; use mlp.hook_in, mlp.hook_expert_weights, "
            f"mlp.hook_experts_out or hook_mlp_out"
        )
    here = [k for k in known if layer and k.startswith(layer[0])] or known
    raise RetraceError(
        f"hook '{hook}': the model has not{nearest(hook, here)}; a layer has "
        f"{', '.join(dict.fromkeys(k.split('.', 2)[2] for k in known if k.startswith('blocks.')))}"
    )


def _find(hf: nn.Module, hook: str) -> tuple[nn.Module, nn.Module, str] | None:
    """(layer or model, module, what) of a hook; None where the model has it not, or it failed."""
    names = modules.family(hf)
    if hook in _refused(hf):
        return None
    if hook == "hook_embed":
        return hf, modules.submodule(hf, names.embed), "out"
    part, _, kind = hook.partition(".")
    if part == "ln_final" and kind in families.NORM_HOOKS and names.final_norm:
        norm = None if names.norm_again else modules.reached(hf, names.final_norm)
        return None if norm is None else (hf, norm, kind.removeprefix("hook_"))
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    layers = modules.layers_of(hf)
    if not found or int(found[1]) >= len(layers):
        return None
    layer = layers[int(found[1])]
    place = _in_layer(names, layer, found[2])
    return (layer, modules.reached(layer, place[0]), place[1]) if place else None


def is_by_key(hook: str) -> bool:
    """Whether a row at a hook has a number for each key, so that its length is the context's."""
    return hook.endswith(("attn.hook_attn_scores", "attn.hook_pattern"))


def site(hf: nn.Module, hook: str) -> Place | InnerPlace:
    """Where the stream at a hook is read.

    Args:
        hf: a Hugging Face model.
        hook: TransformerLens's name, such as blocks.8.hook_resid_post.

    Raises:
        RetraceError: the model has no such hook, or refuses it.
    """
    found, home = _site(hf, hook), modules.home(hf)
    return found if home is None else replace(found, home=home)


def _site(hf: nn.Module, hook: str) -> Place | InnerPlace:
    found = _find(hf, hook)
    if found is None:
        _refuse(hf, hook)
    layer, module, what = found
    inside = _in_bridge(layer, hook)
    rows = modules.rows_of(layer) if modules.family(hf).flat and layer is not hf else []
    if what in ("attn_scores", "pattern", "result", "probabilities"):
        n_heads = modules.n_heads_of(hf, int(hook.split(".")[1]))
        if inside is not None and what == "result":
            raise RetraceError(
                f"hook '{hook}': in a model with processing: compatibility weights are folded, and "
                f"what a head writes is not formed; write processing: raw, or take attn.hook_z"
            )
        if what == "probabilities":
            block = modules.family(hf).place(hook.split(".", 2)[-1])[0].rpartition(".")[0]
            return InnerPlace(hf, modules.submodule(layer, block), what, 0, rows, router=module)
        return InnerPlace(hf, module if inside is None else inside, what, n_heads, rows)
    if inside is not None:
        return Place(inside, "output")
    if what in ("normalized", "scale"):
        return Place(module, "norm", what=what, rows=rows)
    if what.startswith("out times "):
        return Place(module, "output", scale=float(getattr(hf.config, what.split()[-1])), rows=rows)
    changed = {*modules.family(hf).overwritten, *getattr(hf, "retrace_overwritten", ())}
    kept = hook.split(".", 2)[-1] not in changed
    if what in ("in", "out"):
        return Place(module, "input" if what == "in" else "output", rows=rows, kept=kept)
    end = modules.reached(layer, (modules.family(hf).place("attn.hook_z") or ("", ""))[0])
    columns = places.columns_of(module, what, end, modules.n_heads_of(hf, int(hook.split(".")[1])))
    return Place(module, "output", columns=columns, rows=rows, kept=kept)


def width(hf: nn.Module, hook: str) -> int:
    """Length of a row at a hook, read off the weights without a forward pass.

    Behind an MLP's nonlinearity and before the output projection of attention it is what the next
    linear map reads; elsewhere in the stream it is d_model.

    Raises:
        RetraceError: a hook whose width is not read off one map, such as a query.
    """
    place, at = site(hf, hook), hook.split(".", 2)[-1]
    if at in ("mlp.hook_post", "attn.hook_z"):
        return places.weight_of(place.module).shape[1]
    if at.startswith("hook_") or at == "mlp.hook_in" or at.endswith("hook_normalized"):
        return hf.config.hidden_size
    raise RetraceError(f"hook '{hook}': a dictionary that was trained there cannot be brought in")


def _in_bridge(layer: nn.Module, hook: str) -> nn.Module | None:
    """The hook point of a TransformerBridge around this layer, for hooks within a part of it.

    Folded weights bypass some modules there; the bridge's own hook points see them all.
    """
    at = hook.split(".", 2)[-1]
    path = families.BRIDGE_NAMES.get(at, at) if at.startswith(("attn.", "mlp.")) else at
    if not type(layer).__module__.startswith("transformer_lens") or "." not in path:
        return None
    return modules.reached(layer, path)


def _on(hf: nn.Module, hook: str, see: Callable[[Tensor], Tensor | None]) -> Any:
    """Call `see` on the stream at a hook; what it returns, if anything, takes its place."""
    return site(hf, hook).register(see)


@contextmanager
def capture(hf: nn.Module, hooks: list[str]) -> Iterator[dict[str, Float[Tensor, "batch pos _"]]]:
    """Inside: every forward pass fills the dictionary, hook -> [batch pos d].

    Tensors keep their graph; detach them where it is not wanted. Inside `edited` of the same
    hook, entered first, the edited stream is seen.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(_on(hf, hook, functools.partial(_keep, seen, hook)).remove)
        yield seen


def _keep(seen: dict[str, Tensor], hook: str, x: Tensor) -> None:
    seen[hook] = x


class Stopped(Exception):
    """Ends a forward pass from inside a hook."""


@contextmanager
def stop_after(hf: nn.Module, hooks: list[str]) -> Iterator[None]:
    """Inside: one forward pass, which ends behind the last of `hooks`; the block ends there, too.

    with capture(hf, hooks) as acts, stop_after(hf, hooks):
        hf(tokens)                                            # what stands behind this never runs
    """
    left = set(hooks)
    for hook in hooks:
        check(hf, hook)

    def seen(hook: str) -> Callable[[Tensor], None]:
        def see(_: Tensor) -> None:
            left.discard(hook)
            if not left:
                raise Stopped

        return see

    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(_on(hf, hook, seen(hook)).remove)
        with suppress(Stopped):
            yield


def run_to(
    hf: nn.Module, tokens: Int[Tensor, "batch pos"], hooks: list[str], **given: Any
) -> dict[str, Float[Tensor, "batch pos _"]]:
    """The stream at `hooks`, from a forward pass that stops behind the last of them.

    Args:
        tokens: on the model's device.
        given: more arguments of the model's forward pass, such as past_key_values.

    Returns:
        hook -> the stream there.
    """
    with capture(hf, hooks) as acts, stop_after(hf, hooks):
        hf.base_model(input_ids=tokens, **{"use_cache": False} | given)
    for hook in hooks:
        if hook not in acts:
            raise RetraceError(f"hook '{hook}': never runs in a forward pass of this model")
    return acts


@contextmanager
def edited(hf: nn.Module, hook: str, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside: the stream x at `hook` is replaced by fn(x) in every forward pass.

    resid_mid is read by ln2 and by the skip connection, so it is edited where both begin:
    attn_out becomes fn(resid_pre + attn_out) - resid_pre.

    Args:
        fn: [batch pos d] -> [batch pos d]; gradients flow through it.
    """
    if not hook.endswith("hook_resid_mid"):
        handle = _on(hf, hook, fn)
        try:
            yield
        finally:
            handle.remove()
        return
    check(hf, hook)
    attn_out = hook.replace("resid_mid", "attn_out")
    if _find(hf, attn_out) is None:
        with _edited_behind(hf, hook, fn):
            yield
        return
    names, layer = modules.family(hf), modules.layers_of(hf)[int(hook.split(".")[1])]
    seen: dict[str, Tensor] = {}

    def before_attention(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["resid_pre"] = places.moved(places.stream_of(args, kwargs), modules.home(hf))

    handle = modules.first_reader(names, layer).register_forward_pre_hook(
        before_attention, with_kwargs=True
    )
    try:
        with edited(hf, attn_out, lambda a: fn(seen["resid_pre"] + a) - seen["resid_pre"]):
            yield
    finally:
        handle.remove()


@contextmanager
def _edited_behind(hf: nn.Module, mid: str, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`edited` of a resid_mid whose layer has no attention (Bamba): what ln2 reads and the skip.

    The layer adds resid_mid to what its MLP writes, so resid_post changes by as much as resid_mid.
    The proof of the model holds that sum, where the layer has hook_mlp_out.
    """
    if _find(hf, mid.replace("resid_mid", "mlp_out")) is None:
        raise RetraceError(
            f"hook '{mid}': can be read and not replaced, since its layer has neither "
            f"hook_attn_out nor hook_mlp_out; take hook_resid_pre or hook_resid_post"
        )
    change: list[Tensor] = []

    def at_mid(x: Tensor) -> Tensor:
        new = fn(x)
        change[:] = [new - x]
        return new

    with ExitStack() as stack:
        stack.callback(_on(hf, mid, at_mid).remove)
        post = mid.replace("resid_mid", "resid_post")
        stack.callback(_on(hf, post, lambda x: x + change[0]).remove)
        yield


def written_by(hf: nn.Module, layer: nn.Module, part: str) -> tuple[Place, nn.Module | None]:
    """(the place of hook_attn_out or hook_mlp_out, the norm behind that part or None).

    Args:
        part: attn or mlp.
    """
    number = next(i for i, other in enumerate(modules.layers_of(hf)) if other is layer)
    out = site(hf, f"blocks.{number}.hook_{part}_out")
    path = modules.family(hf).place(f"hook_{part}_out")[0]
    return out, (out.module if path in modules.norm_paths(modules.family(hf)) else None)
