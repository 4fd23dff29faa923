"""Run a model's upper part with its stream at one hook replaced. [torch]

`stream` runs the lower part once and returns x; `resume` runs the upper part on any x, without the
layers below the hook, which would only compute what is thrown away. Gradients flow through
`resume` to x. Positions, masks and rotary angles are the model's own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, modules, places


def stream(
    hf: nn.Module, hook: str, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d"]:
    """x at `hook`, of tokens, float32 at least; layers above the hook do not run."""
    return places.full(hooks.run_to(hf, tokens, [hook])[hook])


def known(
    x: Float[Tensor, "batch pos d"], skip_first: int, max_norm: float
) -> Bool[Tensor, "batch pos"]:
    """Which tokens a dictionary was trained on; see ActivationsSpec.

    Args:
        x: the stream.
        skip_first, max_norm: as in the activations' manifest; a max_norm of 0 is no bound.
    """
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[:, :skip_first] = False
    return mask & (x.norm(dim=-1) <= max_norm) if max_norm else mask


def resume(
    hf: nn.Module,
    hook: str,
    tokens: Int[Tensor, "batch pos"],
    x: Float[Tensor, "batch pos d"],
    last: int = 0,
) -> Float[Tensor, "batch last d_vocab"]:
    """Logits, float32 at least, with the stream at `hook` set to x.

    Args:
        last: only the logits of this many last positions; 0 for all. With a vocabulary of 49,152
            the unembedding is a fifth of the work.
    """
    hooks.require(hf, "resume")
    with skipped_below(hf, hook), hooks.edited(hf, hook, lambda _: x):
        # of shared keys and values, Gemma 4 would give the upper layers these positions alone
        few = {"logits_to_keep": last} if last and not _reads_below(hf) else {}
        logits = hf(input_ids=tokens, use_cache=False, **few).logits
    return places.full(logits[:, -last:])  # some models give all of them whatever is asked


def _reads_below(hf: nn.Module) -> bool:
    """Whether upper layers read keys and values of lower ones, as the model's proof found."""
    return getattr(hf, "retrace_reads_below", False)


def resume_stream(
    hf: nn.Module, hook: str, x: Float[Tensor, "batch pos d"], *, to: str = "", **given: Any
) -> Float[Tensor, "batch pos d"]:
    """The stream that the final norm reads, with the stream at `hook` set to x.

    Args:
        hook: resid_pre, resid_mid or resid_post of a layer. From resid_mid the attention of the
            layer does not run either: x enters before it, and it writes nothing.
        to: a hook above, at which to stop and whose stream to give in place of the last.
        given: what else the model takes, such as the keys and values of earlier positions.
    """
    hooks.require(hf, "resume")
    if _reads_below(hf):
        raise RetraceError(
            f"model type '{hf.config.model_type}': upper layers read keys and values of lower "
            f"ones, so that the upper part alone has no stream"
        )
    with ExitStack() as stack:
        if hook.endswith("hook_resid_mid"):
            stack.enter_context(_without_attention(hf, int(hook.split(".")[1]), x))
            hook = hook.replace("resid_mid", "resid_pre")
        stack.enter_context(skipped_below(hf, hook))
        stack.enter_context(hooks.edited(hf, hook, lambda _: x))
        last = to or f"blocks.{len(modules.layers_of(hf)) - 1}.hook_resid_post"
        end = stack.enter_context(hooks.capture(hf, [last]))
        stack.enter_context(hooks.stop_after(hf, [last]))
        tokens = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        hf.base_model(input_ids=tokens, **{"use_cache": False, **given})
    return end[last]


@contextmanager
def _without_attention(hf: nn.Module, number: int, x: Tensor) -> Iterator[None]:
    """Inside: the attention of a layer writes nothing, and where it can be, is not run."""
    names, layer = modules.family(hf), modules.layers_of(hf)[number]
    attention = modules.reached(layer, names.attn)
    if names.place("hook_attn_out") != (names.attn, "out"):
        with hooks.edited(hf, f"blocks.{number}.hook_attn_out", torch.zeros_like):
            yield
        return
    answer, device = modules.answer_of(hf, attention), next(attention.parameters()).device

    def nothing(*_: Any, **__: Any) -> Any:
        return answer(torch.zeros((), dtype=x.dtype, device=device))

    with modules.instead([(attention, nothing)]):
        yield


@contextmanager
def skipped_below(hf: nn.Module, hook: str) -> Iterator[None]:
    """Inside: the layers whose output `resume` overwrites pass their input on.

    Only where the hook is the residual stream itself; elsewhere the stream beside it is needed. Nor
    where upper layers read the keys and values of lower ones, as the model's proof found (Gemma 4).
    """
    skipped: list[nn.Module] = []
    if not _reads_below(hf) and hook.endswith(("hook_resid_pre", "hook_resid_post")):
        number = int(hook.split(".")[1])
        skipped = list(modules.layers_of(hf))[: number + hook.endswith("hook_resid_post")]
    answers = [modules.answer_of(hf, layer) for layer in skipped]

    def passing(answer: Callable[[Tensor], Any]) -> Callable:
        return lambda hidden_states, *_, **__: answer(hidden_states)

    with modules.instead([(m, passing(a)) for m, a in zip(skipped, answers, strict=True)]):
        yield


def written(
    hf: nn.Module, hook: str, directions: Float[Tensor, "*n d"]
) -> Float[Tensor, "*n d_model"]:
    """What directions at a hook write into the residual stream.

    Behind an MLP's nonlinearity, and at z, that is the last matrix of the MLP or of attention times
    them, and the gain of a norm behind it, whose scale depends on the token and is left out. What
    heads write (hook_result) is summed over heads.
    Elsewhere they lie in the stream.

    Raises:
        RetraceError: what follows the hook is not linear.
    """
    at = hook.split(".", 2)[-1]
    if not at.startswith(("attn.", "mlp.", "ln")):
        return directions
    if at not in ("attn.hook_z", "attn.hook_result", "mlp.hook_post"):
        raise RetraceError(
            f"hook '{hook}': what a direction there writes into the stream depends on the token; "
            f"take one of hook_resid_*, hook_attn_out, hook_mlp_out, attn.hook_z, mlp.hook_post"
        )
    hooks.check(hf, hook)
    names, layer = modules.family(hf), modules.layers_of(hf)[int(hook.split(".")[1])]
    if at == "attn.hook_result":
        rows = directions.unflatten(-1, (-1, hf.config.hidden_size)).sum(-2)
    else:
        last = modules.submodule(layer, names.place(at)[0])
        rows = directions.to(next(last.parameters()).dtype)
        rows = last(rows) - last(torch.zeros_like(rows[:1]))
        rows = places.full(places.moved(rows, modules.home(hf)))
    out, post = hooks.written_by(hf, layer, at.split(".")[0])
    return rows * out.scale if post is None else _gained(post, rows)


def normed(hf: nn.Module, rows: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """Directions of the stream as the unembedding reads them, but for the norm's scale.

    Behind the final norm x is g * c(x) / s(x) + b: c takes the mean of the coordinates away in a
    layer norm and nothing in an RMS norm, s(x) is one number per token. This gives g * c(row).
    g and c are measured, since models write the gain in several ways (Gemma's is 1 + its weight).
    """
    norm = final_norm(hf)
    return rows if isinstance(norm, nn.Identity) else _gained(norm, rows)


def _gained(norm: nn.Module, rows: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """g * c(row) of a norm g c(x) / s(x) + b."""
    run = places.as_function(norm)
    centred = places.centres(run, rows)
    return places.gain(run, rows) * (rows - rows.mean(-1, keepdim=True) if centred else rows)


def final_norm(hf: nn.Module) -> nn.Module:
    """The norm before the unembedding, as a module; Identity where a model has none."""
    path = modules.family(hf).final_norm
    return (modules.reached(hf, path) if path else None) or nn.Identity()


def tail(hf: nn.Module) -> tuple[float, float]:
    """(scale, cap) between unembedding and logits: cap * tanh(scale * x / cap); a cap of 0 is none.

    Cohere and Falcon-H1 multiply, Granite divides, Gemma 2 caps. The proof of a loaded model holds
    it to the model's own logits.
    """
    cfg = hf.config
    scale = getattr(cfg, "logit_scale", None) or getattr(cfg, "lm_head_multiplier", None) or 1.0
    scale = float(scale) / float(getattr(cfg, "logits_scaling", None) or 1.0)
    cap = getattr(cfg, "final_logit_softcapping", None) or getattr(cfg, "logits_soft_cap", None)
    return scale, float(cap or 0.0)


def capped(hf: nn.Module, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Logits of what the unembedding gives."""
    scale, cap = tail(hf)
    x = x if scale == 1.0 else x * scale
    return cap * torch.tanh(x / cap) if cap else x


def unembed(hf: nn.Module, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of the stream behind the last layer."""
    hooks.require(hf, "unembed")
    head = hf.get_output_embeddings()
    return capped(hf, places.full(head(final_norm(hf)(x.to(head.weight.dtype)))))
