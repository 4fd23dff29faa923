"""The stream read as predictions: logit lens, tuned lens, direct logit attribution. [torch]

For the stream x_l after l blocks (x_0: embeddings, x_n: what the model's own prediction is read
from), the model's final norm N and unembedding W_U:

    logit lens   softmax(W_U N(x_l))                  nostalgebraist (2020)
    tuned lens   softmax(W_U N(x_l + A_l x_l + b_l))  Belrose et al. (2023, 2303.08112), Section 3

1. `streams` gives x_0 … x_(n-1) and the logits out of one forward pass of any model of
   `families.json`.
2. `measure` compares lenses with the prediction over held-out text, layer by layer.
3. `trajectory` shows the likeliest tokens at every layer and position of one text.
4. `parts` splits a logit into what each attention and each MLP wrote: x_n is their sum, and N is
   linear once its scale is held.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, modules, places, splice

PASS_LOGITS = 1 << 25  # numbers in the logits of a forward pass, about
GPU_LOGITS = 1 << 27  # on a GPU, which waits for the next launch where passes are small
PASS_TOKENS = 1 << 14
MEASURES = ("kl", "loss", "accuracy", "agreement", "echo")
Lens = Callable[[int, Tensor], Tensor]  # (layer, x [… d_model]) -> logits [… d_vocab]


def n_layers(hf: nn.Module) -> int:
    return len(hf.get_submodule(modules.family(hf).layers))


def streams(hf: nn.Module, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """x_0 … x_(n-1), [batch pos d_model] each, and the logits [batch pos d_vocab].

    Args:
        tokens: [batch pos].
    """
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers(hf))]
    with hooks.capture(hf, names) as seen:
        logits = hf(input_ids=tokens, use_cache=False).logits
    return [places.full(seen[name]) for name in names], places.full(logits)


def unembed(hf: nn.Module, x: Tensor) -> Tensor:
    """W_U N(x): logits [… d_vocab] of a stream [… d_model]."""
    return splice.unembed(hf, x)


@dataclass(frozen=True)
class Translators:
    """The affine maps of a tuned lens.

    Attributes:
        A: layer -> [d_model d_model]; a map takes x to x + A x + b, so 0 is the identity.
        b: layer -> [d_model].
    """

    A: dict[int, Tensor]
    b: dict[int, Tensor]

    @property
    def layers(self) -> list[int]:
        return list(self.A)

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """x [… d_model] as the final layer would have it."""
        return x + F.linear(x, self.A[layer], self.b[layer])


def logit_lens(hf: nn.Module) -> Lens:
    return lambda _, x: unembed(hf, x)


def tuned_lens(hf: nn.Module, translators: Translators) -> Lens:
    return lambda layer, x: unembed(hf, translators(layer, x))


def kl(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats over the last dimension: […]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_of(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats of two distributions [d_vocab]; tokens that p never gives do not count."""
    p, q = p[p > 0], q[p > 0]
    return max(float((p * (p / q).log()).sum()), 0.0)


class Sums:
    """What is summed over tokens for one lens at one layer."""

    def __init__(self) -> None:
        self.n, self.means, self.marginal = 0, torch.zeros(len(MEASURES), dtype=torch.float64), 0.0

    def add(self, log_p: Tensor, log_q: Tensor, tokens: Tensor, targets: Tensor) -> None:
        """
        Args:
            log_p, log_q: of the model and of the lens, [tokens d_vocab].
            tokens, targets: [tokens].
        """
        top = log_q.argmax(-1)
        found = [
            kl(log_p, log_q),
            -log_q.gather(-1, targets[:, None]),
            top == targets,
            top == log_p.argmax(-1),
            top == tokens,
        ]
        self.means += torch.stack([f.double().sum() for f in found]).cpu()
        # in float32 a token far below the likeliest would have probability 0, and bias no bound
        self.marginal = self.marginal + log_q.double().exp().sum(0)
        self.n += len(targets)


def passes(hf: nn.Module, tokens: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """tokens [windows pos], and what goes with them, in pieces for a forward pass each."""
    width, most = max(tokens.shape[1], 1), PASS_LOGITS if tokens.is_cpu else GPU_LOGITS
    at_once = min(most // (width * hf.config.vocab_size), PASS_TOKENS // width)
    return zip(*(t.split(max(at_once, 1)) for t in (tokens, *others)), strict=True)


@torch.no_grad()
def measure(
    hf: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    lenses: dict[str, Lens],
    layers: list[int] | None = None,
    first: int = 0,
) -> pd.DataFrame:
    """One row a lens and layer; the last layer of each is the prediction itself.

    Args:
        tokens, targets: [windows pos].
        layers: those that are read, by default all.
        first: positions below this do not count.

    Returns:
        lens, layer, then means over tokens: kl, KL(p_n || p_l) in nats; loss, cross entropy of the
        target in nats; accuracy, agreement and echo, the shares where the likeliest token is the
        target, the model's and the token just read; bias, KL between the means over all tokens of
        p_n and p_l in nats (Belrose et al. 2023, Sec. 3); kl_marginal, the mean KL(p_n || mean of
        p_n), which a reader of the marginal alone would have; n_tokens.
    """
    layers = list(range(n_layers(hf))) if layers is None else layers
    sums: dict[tuple[str, int], Sums] = {}
    negative_entropy = 0.0

    def flat(x: Tensor) -> Tensor:
        """The positions that count, of all rows."""
        return x[:, first:].flatten(0, 1)

    for some, wanted in passes(hf, tokens, targets):
        x, logits = streams(hf, some)
        read, wanted = flat(some), flat(wanted)
        log_p = flat(logits).log_softmax(-1)
        negative_entropy += float((log_p.exp() * log_p).sum(dtype=torch.float64))
        for name, lens in lenses.items():
            for layer in layers:
                log_q = lens(layer, flat(x[layer])).log_softmax(-1)
                sums.setdefault((name, layer), Sums()).add(log_p, log_q, read, wanted)
            sums.setdefault((name, n_layers(hf)), Sums()).add(log_p, log_p, read, wanted)
    rows = []
    for (name, layer), s in sums.items():
        p = sums[name, n_layers(hf)].marginal / s.n
        rows.append(
            {"lens": name, "layer": layer}
            | dict(zip(MEASURES, (s.means / s.n).tolist(), strict=True))
            | {"bias": kl_of(p, s.marginal / s.n)}
            | {"kl_marginal": negative_entropy / s.n - float(torch.xlogy(p, p).sum())}
            | {"n_tokens": s.n}
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def trajectory(
    hf: nn.Module,
    tokens: Tensor,
    lenses: dict[str, Lens],
    decode: Callable[[int], str],
    layers: list[int] | None = None,
    first: int = 0,
    n_top: int = 5,
    behind: int | None = None,
) -> pd.DataFrame:
    """One row a lens, layer and position: the likeliest tokens, most likely first.

    Args:
        tokens: [pos], read from left to right.
        decode: token id -> its text.
        first: positions below this are left out.
        behind: the token that follows the last, where it is known.

    Returns:
        lens, layer (n is the prediction), position, token (just read), target (the next; empty
        where it is not known), p_target, kl to the prediction in nats, top and p_top, lists of
        n_top.
    """
    layers = list(range(n_layers(hf))) if layers is None else layers
    x, logits = streams(hf, tokens[None])
    final = logits[0].log_softmax(-1)
    ids = tokens.tolist()
    following = [*ids[1:], behind]
    rows = []
    for name, lens in lenses.items():
        read = {layer: lens(layer, x[layer][0]).log_softmax(-1) for layer in layers}
        for layer, log_q in (read | {n_layers(hf): final}).items():
            p = log_q.exp().cpu()
            p_top, top = p.topk(min(n_top, p.shape[-1]))
            far = kl(final, log_q).tolist()
            for at, target in list(enumerate(following))[first:]:
                rows.append(
                    {
                        "lens": name, "layer": layer, "position": at, "token": decode(ids[at]),
                        "target": "" if target is None else decode(target),
                        "p_target": float("nan") if target is None else float(p[at, target]),
                        "kl": far[at],
                        "top": [decode(i) for i in top[at].tolist()],
                        "p_top": p_top[at].tolist(),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def held_norm(hf: nn.Module, x: Tensor, part: Tensor) -> Tensor:
    """The final norm of `part` with the scale that it has at x; its bias is left out.

    Linear in `part`: over parts that sum to x, it sums to N(x) less the bias.

    Args:
        x, part: [… d_model].
    """
    norm = splice.final_norm(hf)
    if isinstance(norm, nn.Identity):
        return part
    if type(norm) is nn.LayerNorm and norm.weight is not None:  # no subclass: Nemotron's gain
        part, x, eps = part - part.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True), norm.eps
    elif type(norm).__name__ == "LlamaRMSNorm":
        eps = norm.variance_epsilon
    else:  # gains of 1 + weight (Gemma), norms without weights (OLMo)
        return places.linear_part(norm, part) / places.standardised(norm, x)[1]
    gain = places.full(norm.weight)
    return part * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


@torch.no_grad()
def parts(hf: nn.Module, tokens: Tensor, first: int = 0) -> pd.DataFrame:
    """Direct logit attribution: what each part of the model adds to its likeliest token's logit.

    A logit is taken from the mean over the vocabulary, which the softmax does not see. With
    u = W_U[t] - mean of W_U for the likeliest token t, a part c gives u · held_norm(c).

    Args:
        tokens: [pos].

    Returns:
        position; part, one of embedding, attention, MLP, bias; layer (of embedding and bias: -1);
        id, the likeliest token; contribution; logit, which the contributions of a position sum to.
    """
    n, known = n_layers(hf), set(hooks.hook_names(hf))
    names = {("embedding", -1): "blocks.0.hook_resid_pre"}
    for layer in range(n):
        names["attention", layer] = f"blocks.{layer}.hook_attn_out"
        names["MLP", layer] = f"blocks.{layer}.hook_mlp_out"
    names = {part: hook for part, hook in names.items() if hook in known}
    end = f"blocks.{n - 1}.hook_resid_post"
    with hooks.capture(hf, [*names.values(), end]) as seen:
        logits = places.full(hf(input_ids=tokens[None], use_cache=False).logits[0])
    seen = {hook: places.full(x) for hook, x in seen.items()}
    top = logits.argmax(-1)
    head, norm = hf.get_output_embeddings(), splice.final_norm(hf)
    scale, cap = splice.tail(hf)
    if cap:
        raise RetraceError(
            f"model type '{hf.config.model_type}': its logits are capped by a tanh, so that they "
            f"are no sum of what its parts write; take a lens"
        )
    W_U = places.full(head.weight)
    u = (W_U[top] - W_U.mean(0)) * scale  # [pos d_model]
    found = {
        part: (held_norm(hf, seen[end][0], seen[hook][0]) * u).sum(-1)
        for part, hook in names.items()
    }
    found["bias", -1] = torch.zeros_like(found["embedding", -1])
    if getattr(norm, "bias", None) is not None:
        found["bias", -1] += u @ places.full(norm.bias)
    if head.bias is not None:
        b_U = places.full(head.bias)
        found["bias", -1] += (b_U[top] - b_U.mean()) * scale
    whole = logits.gather(-1, top[:, None])[:, 0] - logits.mean(-1)
    columns = {"position": range(len(tokens)), "id": top.tolist(), "logit": whole.tolist()}
    frames = [
        pd.DataFrame({"part": part, "layer": layer, "contribution": c.tolist(), **columns})
        for (part, layer), c in found.items()
    ]
    out = pd.concat(frames, ignore_index=True)
    return out[out["position"] >= first].reset_index(drop=True)
