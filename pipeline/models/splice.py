"""Run a model's upper part with its stream at one hook replaced.

`stream` runs the lower part once and returns x; `resume` runs the upper part on any x, without the
layers below the hook, which would only compute what is thrown away. Gradients flow through
`resume` to x. Positions, masks and rotary angles are the model's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, native

PROBE = 1e3  # size of the coordinates that a norm is measured with; its epsilon vanishes beside it


def stream(hf: nn.Module, hook: str, tokens: Tensor) -> Tensor:
    """x at `hook`, [batch pos d], of tokens [batch pos]; layers above the hook do not run."""
    return hooks.run_to(hf, tokens, [hook])[hook]


def known(x: Tensor, skip_first: int, max_norm: float) -> Tensor:
    """Which tokens a dictionary was trained on, bool [batch pos]; see ActivationsSpec.

    Args:
        x: the stream, [batch pos d].
        skip_first, max_norm: as in the activations' manifest (max_norm a hook); 0 is no bound.
    """
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[:, :skip_first] = False
    return mask & (x.norm(dim=-1) <= max_norm) if max_norm else mask


def resume(hf: nn.Module, hook: str, tokens: Tensor, x: Tensor, last: int = 0) -> Tensor:
    """Logits [batch pos d_vocab] with the stream at `hook` set to x [batch pos d].

    Args:
        last: only the logits of this many last positions; 0 for all. With a vocabulary of 49,152
            the unembedding is a fifth of the work.
    """
    with hooks.edited(hf, hook, lambda _: x), _skipped_below(hf, hook):
        return hf(input_ids=tokens, use_cache=False, logits_to_keep=last).logits


def resume_stream(hf: nn.Module, hook: str, x: Tensor, **given: Any) -> Tensor:
    """The stream that the final norm reads, [batch pos d], with the stream at `hook` set to x.

    Args:
        hook: resid_pre, resid_mid or resid_post of a layer. From resid_mid the attention of the
            layer does not run either: x enters before it, and it writes nothing.
        given: what else the model takes, such as the keys and values of earlier positions.
    """
    silent = None
    if hook.endswith("hook_resid_mid"):
        layer = hf.get_submodule(hooks.family(hf).layers)[int(hook.split(".")[1])]
        silent = getattr(layer, hooks.family(hf).attn)
        nothing = torch.zeros((), device=x.device)
        out = nothing if hf.config.model_type == native.MODEL_TYPE else (nothing, None)
        hook = hook.replace("resid_mid", "resid_pre")
    end = final_norm(hf)
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise hooks.Stopped

    tokens = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    handle = end.register_forward_pre_hook(stop)
    try:
        if silent is not None:
            silent.forward = lambda *_, **__: out
        with hooks.edited(hf, hook, lambda _: x), _skipped_below(hf, hook):
            hf.base_model(input_ids=tokens, **{"use_cache": False, **given})
    except hooks.Stopped:
        pass
    finally:
        handle.remove()
        if silent is not None:
            silent.__dict__.pop("forward", None)
    return seen[0]


@contextmanager
def _skipped_below(hf: nn.Module, hook: str) -> Iterator[None]:
    """Inside: the layers whose output `resume` overwrites pass their input on.

    Only where the hook is the residual stream itself; elsewhere the stream beside it is needed.
    """
    layers = hf.get_submodule(hooks.family(hf).layers)
    skipped: list[nn.Module] = []
    if hook.endswith(("hook_resid_pre", "hook_resid_post")):
        number = int(hook.split(".")[1])
        skipped = list(layers)[: number + hook.endswith("hook_resid_post")]
    try:
        for layer in skipped:
            layer.forward = lambda hidden_states, *_, **__: hidden_states
        yield
    finally:
        for layer in skipped:
            layer.__dict__.pop("forward", None)


def written(hf: nn.Module, hook: str, directions: Tensor) -> Tensor:
    """What directions [n d] at a hook write into the residual stream, [n d_model].

    Behind an MLP's nonlinearity that is the MLP's last matrix times them, before the output
    projection of attention that projection; elsewhere they lie in the stream.
    """
    if not hook.endswith(("mlp.hook_post", "attn.hook_z")):
        return directions
    last, _ = hooks.site(hf, hook)
    return last(directions) - last(torch.zeros_like(directions[:1]))


def normed(hf: nn.Module, rows: Tensor) -> Tensor:
    """Directions [n d_model] of the stream as the unembedding reads them, but for the norm's scale.

    Behind the final norm x is g * c(x) / s(x) + b: c takes the mean of the coordinates away in a
    layer norm and nothing in an RMS norm, s(x) is one number a token. This gives g * c(row).
    g and c are measured, since models write the gain in several ways (Gemma's is 1 + its weight).
    """
    norm, d = final_norm(hf), rows.shape[-1]
    if isinstance(norm, nn.Identity):
        return rows
    n = (d + 1) // 2
    probe = torch.full((1, d), PROBE, dtype=rows.dtype, device=rows.device)
    probe[:, n:] *= -n / max(d - n, 1)  # mean 0, and no coordinate is
    scale = probe.square().mean().sqrt()
    gain = (norm(probe) - norm(-probe)) / 2 * scale / probe
    centres = torch.allclose(norm(probe), norm(probe + PROBE), rtol=1e-3)
    return gain * (rows - rows.mean(-1, keepdim=True) if centres else rows)


def final_norm(hf: nn.Module) -> nn.Module:
    """The norm before the unembedding; its weight, if it has one, is a gain [d_model]."""
    for name in ("norm", "ln_f", "final_layer_norm", "ln_out"):
        if hasattr(hf.base_model, name):
            return getattr(hf.base_model, name)
    raise RetraceError(
        f"model type '{hf.config.model_type}': no final norm is known; add its name to "
        f"final_norm in pipeline/models/splice.py"
    )
