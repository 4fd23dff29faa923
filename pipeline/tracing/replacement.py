"""The replacement model: a model whose MLPs are dictionaries, with and without error nodes. [torch]

    y_m = sum_{l <= m} f_l W_dec_l[:, m - l] + b_dec_m (+ skip) + error_m

1. `Replacement.of` runs the model on a prompt, encodes what each dictionary reads, and keeps as
   errors what the dictionaries do not reconstruct of the MLPs' outputs.
2. `logits` runs the local replacement model: patterns and norms' scales are those of the prompt
   (linear.py), features are encoded anew in every layer. With the errors it gives the model's
   logits; without them it shows what the dictionaries leave out.
3. `spliced` runs the replacement model proper: attention and norms are computed anew, no errors
   (Ameisen et al. 2025, "replacement model"). `fidelity` compares next-token distributions.

At positions below skip_first the dictionaries were not trained. The MLPs' outputs stay there as
they are and count as given, as circuit-tracer leaves out features and errors of a BOS.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, places, splice
from pipeline.tracing.dictionaries import Dictionaries
from pipeline.tracing.linear import Linear

SAME = 1e-3  # share of an activation by which it may differ from its pre-activation


class Features(NamedTuple):
    """The active features of a prompt, in the order of layer, position and number."""

    layer: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    number: Int64[Tensor, " n"]
    activation: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.layer)

    def of_layer(self, layer: int) -> slice:
        """Where the features of a layer stand."""
        first, last = torch.searchsorted(
            self.layer, torch.tensor([layer, layer + 1]).to(self.layer)
        )
        return slice(int(first), int(last))


@dataclass(frozen=True)
class Replacement:
    """The local replacement model of a prompt.

    Attributes:
        errors: of each layer what the dictionaries do not write of y, 0 below skip_first.
        fixed: of each layer what is written whatever is read: b_dec; y itself below skip_first.
    """

    linear: Linear
    dictionaries: Dictionaries
    features: Features
    errors: list[Float[Tensor, "pos d_model"]]
    fixed: list[Float[Tensor, "pos d_model"]]

    @classmethod
    @torch.no_grad()
    def of(
        cls, hf: nn.Module, tokens: Int64[Tensor, " pos"], dictionaries: Dictionaries
    ) -> "Replacement":
        """The replacement model of a prompt.

        Raises:
            RetraceError: an activation is not its encoder row's product, so that edges into it
                would not be its parts.
        """
        d = dictionaries
        linear = Linear.of(hf, tokens, d.hooks, d.W_skip, d.skip_first)
        known = d.known(len(tokens))
        parts, written = [], [torch.zeros_like(linear.embed) for _ in d.hooks]
        for layer, x in enumerate(linear.x):
            f = d.encode(layer, x)
            at = f.nonzero()
            found = f[at[:, 0], at[:, 1]]
            pre = (x[at[:, 0]] * d.W_enc[layer][at[:, 1]]).sum(-1) + d.b_enc[layer][at[:, 1]]
            if len(at) and bool(((pre - found).abs() > SAME * found.abs() + 1e-4).any()):
                raise RetraceError(
                    f"graphs.dictionaries: the activations at {d.hooks[layer]} are not "
                    f"x W_enc + b_enc where they are not 0, so that their parts are not known; "
                    f"fold the scales of the dictionary into its weights"
                )
            parts.append((torch.full_like(at[:, 0], layer), at[:, 0], at[:, 1], found))
            for i, part in enumerate(d.decode(layer, f)):
                written[layer + i] += part
        features = Features(*(torch.cat(column) for column in zip(*parts, strict=True)))
        errors = [
            (y - w - d.rest(layer, x)) * known
            for layer, (x, y, w) in enumerate(zip(linear.x, linear.y, written, strict=True))
        ]
        fixed = [d.b_dec[i] * known + y * (1 - known) for i, y in enumerate(linear.y)]
        return cls(linear, dictionaries, features, errors, fixed)

    @torch.no_grad()
    def logits(self, errors: bool) -> Float[Tensor, "pos d_vocab"]:
        """Logits with attention patterns and norms' scales kept, before any soft cap.

        Args:
            errors: whether error nodes are added.
        """
        d, known = self.dictionaries, self.dictionaries.known(self.linear.n_pos)
        written = [y * (1 - known) for y in self.linear.y]

        def writes(layer: int, x: Tensor) -> Tensor:
            for i, part in enumerate(d.decode(layer, d.encode(layer, x))):
                written[layer + i] = written[layer + i] + part
            y = written[layer] + d.rest(layer, x)
            return y + self.errors[layer] if errors else y

        return self.linear.unembedded(self.linear.forward(writes)[1])


def spliced(
    hf: nn.Module, tokens: Int64[Tensor, "batch pos"], d: Dictionaries
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the model with every MLP's output replaced by the dictionaries' reconstruction.

    Gradients reach those weights of the dictionaries that ask for them.
    """
    read: dict[int, Tensor] = {}
    written: list[Tensor | float] = [0.0] * d.n_layers
    known = d.known(tokens.shape[1])

    def reader(layer: int):
        def see(x: Tensor) -> None:
            read[layer] = places.full(x)

        return see

    def writer(layer: int):
        def see(y: Tensor) -> Tensor:
            for i, part in enumerate(d.decode(layer, d.encode(layer, read[layer]))):
                written[layer + i] = written[layer + i] + part
            return torch.where(known > 0, written[layer] + d.rest(layer, read[layer]), y).to(
                y.dtype
            )

        return see

    with ExitStack() as stack:
        for layer in range(d.n_layers):
            at = hooks.site(hf, d.hooks[layer]).register(reader(layer))
            stack.callback(at.remove)
            at = hooks.site(hf, d.output_hooks[layer]).register(writer(layer))
            stack.callback(at.remove)
        last = f"blocks.{d.n_layers - 1}.hook_resid_post"
        return splice.unembed(hf, hooks.run_to(hf, tokens, [last])[last])


class Fidelity(NamedTuple):
    """Next-token distributions beside the model's: KL(model || ours) in nats, and the share of
    positions where the most probable token is the same."""

    kl: float
    agreement: float


def fidelity(
    logits: Float[Tensor, "*batch d_vocab"], ours: Float[Tensor, "*batch d_vocab"]
) -> Fidelity:
    """How near next-token distributions are, mean over positions."""
    log_p, log_q = logits.float().log_softmax(-1), ours.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Fidelity(float(kl), float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
