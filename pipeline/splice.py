"""Run a model's upper part with its stream at one hook replaced.

`stream` runs the lower part once and returns x; `resume` runs the upper part on any x, without the
layers below the hook, which would only compute what is thrown away. Gradients flow through
`resume` to x. Positions, masks and rotary angles are the model's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline import hooks
from pipeline.errors import RetraceError


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

    Behind an MLP's nonlinearity that is the MLP's last matrix times them; elsewhere they lie in
    the stream.
    """
    if not hook.endswith("mlp.hook_post"):
        return directions
    last, _ = hooks.site(hf, hook)
    return last(directions) - last(torch.zeros_like(directions[:1]))


def final_norm(hf: nn.Module) -> nn.Module:
    """The norm before the unembedding; its weight, if it has one, is a gain [d_model]."""
    for name in ("norm", "ln_f", "final_layer_norm", "ln_out"):
        if hasattr(hf.base_model, name):
            return getattr(hf.base_model, name)
    raise RetraceError(
        f"model type '{hf.config.model_type}': no final norm is known; add its name to "
        f"final_norm in pipeline/splice.py"
    )
