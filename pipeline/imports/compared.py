"""What all imports share: the hook that is meant, and rows on which both must agree. [torch]

1. `check_hook` holds the hook that a publisher names against the one that paper.yaml names, and the
   model's `skeleton`, which has no weights and runs nothing.
2. `probes` are the rows and latents on which an original and what was written are compared, and
   `differences` how far apart their answers are.
3. `check_same` compares a SAELens folder that was written with its original.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports import saelens as of_saelens
from pipeline.imports.original import Original, decoded
from pipeline.models import hooks
from pipeline.spec import families
from pipeline.text.tokens import checkpoint_of

TOLERANCE = 1e-5
N_ROWS = 8  # of each kind in the check


def check_hook(
    given: str, said: str | None, hf: Any, where: Path, key: str, folded: bool = False
) -> None:
    """Raise where the original names another hook, or the model has none of that name.

    Args:
        folded: whether the gains of the model's norms lie in the weights behind them.
    """
    hooks.check(hf, given)
    if not said or (ours := translated(said, hf, folded)) == given:
        return
    layer_norm = f"; of a model with RMS norms, {said} lies before the norm's gain"
    raise RetraceError(
        f"{where}: was made for {said}{f' ({ours})' * (ours != said)}, and {key} says {given}; "
        f"name its own{layer_norm * ('hook_normalized' in said)}"
    )


def translated(hook: str, hf: Any, folded: bool = False) -> str:
    """Our name of a hook that may have one of TransformerBridge's, or another of the same rows."""
    names = {v: k for k, v in families.BRIDGE_NAMES.items()} | {"hook_mlp_in": "mlp.hook_in"}
    if folded or any("LayerNorm" in type(m).__name__ for m in hf.modules()):
        names["ln2.hook_normalized"] = "mlp.hook_in"  # behind gain and bias, or without them
    layer, at = re.fullmatch(r"(blocks\.\d+\.|)(.+)", hook).groups()
    return layer + names.get(at, at)


def skeleton(model_json: str | Path) -> Any:
    """The modules of a store's model, without weights."""
    from pipeline.models import native

    folder = checkpoint_of(model_json)
    with torch.device("meta"):
        if native.is_native(folder):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return native.NativeForCausalLM({k: v for k, v in config.items() if k != "model_type"})
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config)


def probes(
    directions: Float[Tensor, "d_in d_sae"],
) -> tuple[Float64[Tensor, "n_rows d_in"], Float64[Tensor, "n_latents d_sae"]]:
    """Rows x and latents f on which an original and what was written must agree.

    x: zero, random rows of lengths from 0.01 to 1,000, and rows along encoder directions, which
    make latents fire. f: zero, and random latents, few a row.
    """
    draw = torch.Generator().manual_seed(0)
    d_in, d_sae = directions.shape
    lengths = torch.logspace(-2, 3, N_ROWS, dtype=torch.float64)[:, None]
    rows = torch.randn(N_ROWS, d_in, generator=draw, dtype=torch.float64)
    picked = torch.randint(d_sae, (N_ROWS,), generator=draw)
    along = directions[:, picked].T.double()
    norms = along.norm(dim=1, keepdim=True).clamp_min(1e-12)
    x = torch.cat([torch.zeros(1, d_in), rows * lengths / d_in**0.5, along / norms * lengths])
    f = torch.zeros(N_ROWS + 1, d_sae, dtype=torch.float64)
    for row in f[1:]:
        on = torch.randint(d_sae, (min(32, d_sae),), generator=draw)
        row[on] = torch.rand(len(on), generator=draw, dtype=torch.float64) * 10
    return x, f


def differences(a: Float[Tensor, "rows d"], b: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
    """The largest difference in each row, relative to the row's size, which is 1 at least."""
    return ((a - b).abs() / a.abs().amax(-1, keepdim=True).clamp_min(1)).amax(-1)


class Expected(NamedTuple):
    """What an original makes of `probes`, in their dtype; an encoder alone decodes nothing."""

    x: Float[Tensor, "n_rows d_in"]
    encoded: Float[Tensor, "n_rows d_sae"]
    f: Float[Tensor, "n_latents d_sae"]
    decoded: Float[Tensor, "n_latents d_out"] | None


@torch.no_grad()
def expected(original: Original, where: Path) -> Expected:
    """What an original makes of rows and latents, float32; RetraceError where nothing fires."""
    x, f = (probe.float() for probe in probes(original.directions))
    encoded = original.encode(x)
    if not bool((encoded != 0).any()):
        raise RetraceError(f"{where}: no latent fires on any row of the check; take another file")
    latents = torch.cat([f, encoded])
    return Expected(x, encoded, latents, original.decode(latents) if original.decode else None)


def reproduced(sae: Any, wanted: Expected) -> dict[str, tuple[Tensor, Tensor]]:
    """What was compared -> the original's answers and a dictionary's own, a row each."""
    if wanted.decoded is None:
        return {"encode": (wanted.encoded, sae.encode(wanted.x))}
    plain = decoded(wanted.f, sae.W_dec, sae.b_dec)
    return {
        "encode": (wanted.encoded, of_saelens.encode(sae, wanted.x)),
        "decode": (wanted.decoded, of_saelens.decode(sae, wanted.f)),
        "f W_dec + b_dec": (wanted.decoded, plain),
    }


@torch.no_grad()
def check_same(wanted: Expected, sae: Any, where: Path, again: Callable[[], Original]) -> float:
    """The largest difference between a dictionary and its original, relative to their size.

    All latents of all rows are compared in float32. A latent at its threshold, or two at the k-th
    place, can fall on either side of it by rounding: rows that differ are compared in float64,
    which decides.

    Args:
        sae: what SAELens makes of the written folder; an `encoders.Encoder` where it is one.
        again: reads the original once more.

    Raises:
        RetraceError: it is above TOLERANCE.
    """
    largest, unclear = 0.0, {}
    for what, (a, b) in reproduced(sae, wanted).items():
        off = differences(a, b)
        unclear[what] = ~(off <= TOLERANCE)  # NaN is none
        largest = max([largest, *off[~unclear[what]].tolist()])
    if any(bool(rows.any()) for rows in unclear.values()):
        exact = in_float64(again(), wanted, unclear)
        for what, (a, b) in reproduced(sae, exact).items():
            off = float(differences(a, b).nan_to_num(nan=torch.inf).amax()) if len(a) else 0.0
            if not off <= TOLERANCE:
                raise RetraceError(
                    f"{where}: {what} differs from the original's by {off:.2g} of its size, more "
                    f"than {TOLERANCE:g}; it is not brought in"
                )
            largest = max(largest, off)
    return largest


def in_float64(original: Original, wanted: Expected, unclear: dict[str, Tensor]) -> Expected:
    """The original's answers in float64 on the rows that float32 left unclear."""
    x = wanted.x[unclear["encode"]].double()
    if wanted.decoded is None:
        return Expected(x, original.encode(x), wanted.f[:0].double(), None)
    f = wanted.f[unclear["decode"] | unclear["f W_dec + b_dec"]].double()
    return Expected(x, original.encode(x), f, original.decode(f))
