"""Transcoders: dictionaries that read the rows of one hook and reconstruct those of another.

    f = act(x W_enc + b_enc),  y_hat = f W_dec + b_dec            (Dunefsky et al. 2024, 2406.11944)

1. The rows x and y of a token stand side by side, [rows d_in + d_out] (shards.PairedRows).
2. SAELens has transcoders for inference but does not train them. Here its training classes get a
   decoder of y's width, and their losses compare with y in place of x, so that every term of the
   loss is still computed by SAELens.
3. b_dec lies in y's space, so it is not subtracted from x.
4. A trained transcoder is saved as SAELens's `transcoder` (L1) or `jumprelu_transcoder` (others).
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def training_class(sae_class: type, d_out: int) -> type:
    """A SAELens training class that reconstructs rows of width `d_out`."""

    class Transcoder(sae_class):
        """Takes wide rows [batch d_in + d_out] in training, and plain x [batch d_in] as well."""

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            compare = self.mse_loss_fn
            self.mse_loss_fn = lambda y_hat, rows: compare(y_hat, rows[..., -d_out:])

        def initialize_weights(self) -> None:
            """W_enc as in an autoencoder; W_dec in random directions of y's space, b_dec zero."""
            super().initialize_weights()
            norm = self.W_dec.norm(dim=1, keepdim=True)
            W_dec = nn.init.kaiming_uniform_(self.W_dec.new_empty(self.cfg.d_sae, d_out))
            self.W_dec = nn.Parameter(norm.detach() * W_dec / W_dec.norm(dim=1, keepdim=True))
            self.b_dec = nn.Parameter(self.b_dec.new_zeros(d_out))

        def process_sae_in(self, sae_in: Tensor) -> Tensor:
            return self.hook_sae_input(sae_in[..., : self.cfg.d_in].to(self.dtype))

        def calculate_aux_loss(self, step_input: Any, **rest: Any) -> Any:
            y = step_input.sae_in[..., -d_out:]
            return super().calculate_aux_loss(step_input=replace(step_input, sae_in=y), **rest)

        @torch.no_grad()
        def fold_scales(self, scale: float, target_scale: float) -> None:
            """Make a transcoder of scaled x and y one of x and y as they are."""
            self.fold_activation_norm_scaling_factor(target_scale)
            self.W_enc.data *= scale / target_scale

    return Transcoder


def inference_config(config: dict[str, Any], d_out: int) -> dict[str, Any]:
    """An inference autoencoder's configuration as one of SAELens's transcoders, for cfg.json."""
    kind = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}[config["architecture"]]
    return config | {"architecture": kind, "d_out": d_out, "apply_b_dec_to_input": False}
