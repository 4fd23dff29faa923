"""What a published dictionary is read from, and what was read: files, tensors, an original. [torch]

1. `tensors` reads a file of weights without running what it brings.
2. `take` and `setting` find what a format promises, in one sentence where it is not there.
3. An `Original` holds the weights in SAELens's layout beside encode and decode as the format's own
   library defines them, which `check_same` of compared.py compares with what SAELens makes of it.
4. A skip connection is a part of x_hat that no f W_dec + b_dec has. One dictionary has no place for
   it; transcoders of all layers have (layers.py).

formats.py has the formats.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports.mapped import npz
from pipeline.spec.yaml_files import load_yaml

Map = Callable[[Tensor], Tensor]
SHOWN = 8  # names of tensors in a sentence
MATRIX = re.compile(r"(^[Ww]_(enc|dec|skip)|weight|connection)(_\d+)?$")  # names of matrices
BIAS = re.compile(r"(^b_|bias)")
BLOCK = 2048  # latents that a product takes at a time


@dataclass(frozen=True)
class Files:
    """What a dictionary is read from.

    Attributes:
        weights: the file of weights; the others lie beside it, by name.
        factor: norm_scaling_factor of paper.yaml or of SAELens's list; 0 is unknown.
        transcoder: whether it is to be read as one.
        repo: of the hub; an empty string where it comes from elsewhere.
        skips: whether a skip connection has a place in what is made of it.
    """

    weights: Path
    beside: dict[str, Path] = field(default_factory=dict)
    factor: float = 0
    transcoder: bool = False
    repo: str = ""
    skips: bool = False

    def all(self) -> list[Path]:
        """The weights, and what lies beside them."""
        return [self.weights, *self.beside.values()]


@dataclass
class Original:
    """A dictionary as published.

    Attributes:
        architecture: SAELens's name.
        weights: SAELens's names and shapes, float32.
        encode, decode: of the original, [... d_in] -> [... d_sae] -> [... d_out], in the dtype of
            what they are given. decode is None where the dictionary is an encoder alone; weights
            then hold W_enc and b_enc.
        about: what it says of its stream: model_name, hook_name, hook_name_out, context_size,
            prepend_bos, dataset_path and the like, each where known.
        writes: None where the file does not tell a transcoder from an autoencoder; else whether it
            reconstructs another hook than it reads.
        settings: further keys of cfg.json.
        notes: what a reader should know.
        skip: x -> what a skip connection adds to decode(f), [... d_in] -> [... d_out]; weights then
            hold W_skip [d_out d_in].
    """

    architecture: str
    weights: dict[str, Tensor]
    encode: Map
    decode: Map | None = None
    about: dict[str, Any] = field(default_factory=dict)
    k: int = 0
    apply_b_dec_to_input: bool = False
    writes: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skip: Map | None = None

    @property
    def directions(self) -> Float[Tensor, "d_in d_sae"]:
        """W_enc; of matching pursuit, which has none of its own, W_dec^T."""
        return self.weights["W_enc"] if "W_enc" in self.weights else self.weights["W_dec"].T

    @property
    def shape(self) -> tuple[int, int]:
        """d_in and d_sae."""
        return tuple(self.directions.shape)

    @property
    def d_out(self) -> int:
        """Width of what it writes; of an encoder alone, of what it reads."""
        return self.weights["W_dec"].shape[1] if self.decode else self.shape[0]

    def config(self) -> dict[str, Any]:
        """The keys of cfg.json that the weights decide."""
        d_in, d_sae = self.shape
        out = {
            "architecture": self.architecture,
            "d_in": d_in,
            "d_sae": d_sae,
            "dtype": "float32",
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }
        if "transcoder" in self.architecture:
            out["d_out"] = self.d_out
        return out | self.settings | ({"k": self.k} if self.k else {})


# --- files ---------------------------------------------------------------------------------


def tensors(path: Path) -> dict[str, Any]:
    """What a file of weights holds, without running what it brings; by its suffix.

    Raises:
        RetraceError: it is cut short, of another kind, or needs pickle.
    """
    try:
        _check_fetched(path)
        match path.suffix:
            case ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            case ".npz":
                return npz(path)
            case ".pt" | ".pth":
                loaded = _torch(path)
            case other:
                raise RetraceError(
                    f"{path}: weights are read from .safetensors, .npz and .pt, not '{other}'"
                )
    except pickle.UnpicklingError as e:
        _check_pickle(path, e)
        raise RetraceError(
            f"{path}: would run pickled code ({_wanted(e)}), and only tensors are read; ask for it "
            f"as .safetensors, or convert it where you trust it"
        ) from e
    except (
        OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile
    ) as e:  # fmt: skip
        raise RetraceError(f"{path}: cannot be read ({_first(e)}); fetch it again") from e
    except Exception as e:  # SafetensorError has no base but Exception
        if type(e).__name__ != "SafetensorError":
            raise
        raise RetraceError(f"{path}: cannot be read ({_first(e)}); fetch it again") from e
    if not isinstance(loaded, dict):
        raise RetraceError(f"{path}: holds a {type(loaded).__name__}, not named tensors")
    return loaded


POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer of Git LFS begins
PICKLES = (b"\x80", b"PK\3\4")  # how a pickle begins, and a zip archive that holds one


def _check_fetched(path: Path) -> None:
    """Raise where a pointer lies in the file's place."""
    with open(path, "rb") as f:
        if f.read(len(POINTER)) == POINTER:
            raise RetraceError(
                f"{path}: is a pointer of Git LFS and not the weights; run git lfs pull where it "
                f"was cloned"
            )


def _check_pickle(path: Path, e: Exception) -> None:
    """Raise where what torch took for a pickle is none."""
    with open(path, "rb") as f:
        begins = f.read(8)
    if not begins.startswith(PICKLES):
        raise RetraceError(
            f"{path}: is no file of torch's, but begins with {begins!r}; correct its suffix, or "
            f"fetch it again"
        ) from e


def _wanted(e: Exception) -> str:
    """What a pickle asks for that is no tensor, out of torch's message."""
    named = re.search(r"GLOBAL (\S+)|(?:class|function|type) (\S+)", str(e))
    return next(filter(None, named.groups())) if named else _first(e)


def _torch(path: Path) -> Any:
    """A .pt file's tensors and plain values; torch maps those of its zip format into memory."""
    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as f:
        if not zipped and f.read(4) == b"PK\3\4":
            raise OSError("its end is missing")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)


def _first(e: Exception) -> str:
    lines = [line for line in str(e).splitlines() if line.strip()]
    return (lines or [type(e).__name__])[0][:160]


def read_config(files: Files, name: str) -> dict[str, Any]:
    """A JSON or YAML mapping beside the weights; {} where an optional one is not there."""
    path = files.beside.get(name)
    if path is None:
        return {}
    if path.suffix == ".yaml":
        found = load_yaml(path)
    else:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise RetraceError(f"{path}: not readable JSON ({_first(e)}); fetch it again") from e
    if not isinstance(found, dict):
        raise RetraceError(f"{path}: holds no mapping; correct format, or fetch it again")
    return found


def setting(config: dict[str, Any], files: Files, name: str, *keys: str) -> Any:
    """A value of a configuration; one sentence where it is not there."""
    at: Any = config
    for key in keys:
        at = at.get(key) if isinstance(at, dict) else None
    if at is None:
        raise RetraceError(
            f"{files.beside[name]}: has no '{'.'.join(keys)}', so it is of another format than "
            f"said; correct format"
        )
    return at


def positive(config: dict[str, Any], files: Files, name: str, *keys: str) -> float:
    """A number above zero; one sentence where it is another value."""
    value = setting(config, files, name, *keys)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:
        raise RetraceError(
            f"{files.beside[name]}: {'.'.join(keys)} is {value!r}, and not a number above 0; fetch "
            f"it again"
        )
    return float(value)


def whole(config: dict[str, Any], files: Files, name: str, *keys: str) -> int:
    """A whole number above zero; one sentence where it is another value."""
    value = positive(config, files, name, *keys)
    if value != int(value):
        raise RetraceError(
            f"{files.beside[name]}: {'.'.join(keys)} is {value:g}, and not a whole number; fetch "
            f"it again"
        )
    return int(value)


def a_hook(said: Any, files: Files, name: str) -> str:
    """The name of a hook; one sentence where it is another value."""
    if not isinstance(said, str):
        raise RetraceError(
            f"{files.beside[name]}: says that it reads {said!r}, which is no hook; fetch it again"
        )
    return said


PARTS = {"mlp": "hook_mlp_out", "attention": "hook_attn_out", "self_attn": "hook_attn_out",
         "attn": "hook_attn_out"}  # fmt: skip  # modules of a layer -> what they write


def of_module(path: str) -> str | None:
    """Our name of what a module writes, by its path in transformers; None where it is not known.

    model.layers.12 -> blocks.12.hook_resid_post; transformer.h.3.mlp -> blocks.3.hook_mlp_out.
    """
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h)[._](\d+)(?:[._](\w+))?", path)
    part = PARTS.get(found[2], "" if found[2] else "hook_resid_post") if found else ""
    return f"blocks.{found[1]}.{part}" if part else None


def agrees(config: dict[str, Any], files: Files, name: str, **sizes: int) -> None:
    """Raise where a configuration says other sizes than the weights have: its k or its thresholds
    would be another dictionary's.

    Args:
        sizes: by the configuration's keys; a key that it lacks, or 0, says nothing.
    """
    for key, size in sizes.items():
        said = config.get(key)
        if isinstance(said, int) and not isinstance(said, bool) and said and said != size:
            raise RetraceError(
                f"{files.beside[name]}: says {key} {said}, and the weights have {size}; the two "
                f"are of different dictionaries, so fetch both again"
            )


def only(found: dict[str, Any], files: Files, format: str, *names: str) -> None:
    """Raise where a file holds weights that the format has no place for: they would be left out.

    Args:
        names: what it may hold; counts and other whole numbers may stand beside them.
    """
    left = [n for n, t in found.items() if isinstance(t, Tensor) and t.is_floating_point()]
    if more := sorted(set(left) - set(names)):
        raise RetraceError(
            f"{files.weights}: holds '{more[0]}', which format {format} has no place for, and "
            f"would be left out; correct format, or take a dictionary of a class that is read"
        )


def take(
    found: dict[str, Any], files: Files, format: str, *names: str, deep: bool = False
) -> list[Tensor]:
    """Tensors by name; one sentence where one is missing, not of finite numbers, or no matrix.

    Args:
        deep: whether matrices of several layers may lie in one tensor.
    """
    out = []
    for name in names:
        if not isinstance(found.get(name), Tensor):
            part = " (a decoder)" if "dec" in name.lower() and "b_" not in name else ""
            raise RetraceError(
                f"{files.weights}: holds no tensor '{name}'{part} of format {format}, but "
                f"{', '.join(sorted(found)[:SHOWN]) or 'nothing'}; correct format, or take a file "
                f"that is whole"
            )
        tensor = found[name].detach()
        # one pass without a copy; where a number is NaN, so is the least
        if not tensor.is_floating_point() or not all(map(math.isfinite, _ends(tensor))):
            raise RetraceError(f"{files.weights}: '{name}' holds no finite numbers")
        wanted = "matrix" if MATRIX.search(name) else "row" if BIAS.search(name) else ""
        flat = wanted == "matrix" and tensor.ndim != 2 and not deep
        if flat or (wanted and not tensor.ndim):
            raise RetraceError(
                f"{files.weights}: '{name}' is {tuple(tensor.shape)}, and a {wanted} is wanted; "
                f"correct format, or fetch it again"
            )
        out.append(tensor.float())
    return out


def fitting(files: Files, W: Tensor, W_d: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
    """Raise where tensors of linear layers do not fit each other.

    Args:
        W: [d_sae d_in].
        W_d: [d_out d_sae].
    """
    (d_sae, _), d_out = W.shape, len(W_d)
    found = [tuple(t.shape) for t in (W_d, b_enc, b_dec)]
    if found != (wanted := [(d_out, d_sae), (d_sae,), (d_out,)]):
        raise RetraceError(
            f"{files.weights}: decoder, encoder bias and decoder bias are {found} beside an "
            f"encoder of {tuple(W.shape)}, and not {wanted}; correct format, or fetch it again"
        )


def per_latent(threshold: Tensor, d_sae: int) -> Tensor:
    """One threshold of all latents as one of each; others as they are, for shapes to be checked."""
    return threshold.expand(d_sae).contiguous() if threshold.numel() == 1 else threshold


def _ends(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest number."""
    least, largest = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    return float(least), float(largest)


def check_shapes(files: Files, original: Original) -> Original:
    """The original; one sentence where its tensors do not fit each other."""
    for name in sorted({"W_enc", "W_dec"} & set(original.weights)):
        if original.weights[name].ndim != 2:
            shape = tuple(original.weights[name].shape)
            raise RetraceError(
                f"{files.weights}: {name} is {shape}, and a matrix is wanted; correct format, or "
                f"fetch it again"
            )
    (d_in, d_sae), d_out = original.shape, original.d_out
    wanted = {"W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    for name, tensor in original.weights.items():
        if name == "W_enc":
            continue
        shape = wanted.get(name, (d_sae,))
        if tuple(tensor.shape) != shape:
            raise RetraceError(
                f"{files.weights}: {name} is {tuple(tensor.shape)} beside an encoder of {d_in} to "
                f"{d_sae}, and not {shape}; correct format, or fetch it again"
            )
    if original.k > d_sae:
        raise RetraceError(f"{files.weights}: k {original.k} is more than its {d_sae} latents")
    if "transcoder" not in original.architecture and d_out != d_in:
        raise RetraceError(
            f"{files.weights}: reads rows of {d_in} and writes rows of {d_out}; it is a "
            f"transcoder, so name its output_hook"
        )
    return original


def skip_of(files: Files, found: dict[str, Any], name: str, said: Any = None) -> Tensor | None:
    """The matrix of a skip connection, as it lies in the file; None where it has none, or zeros.

    Args:
        said: whether the configuration says that there is one.

    Raises:
        RetraceError: it has no place, and decode(f) would leave it out.
    """
    if said and name not in found:
        raise RetraceError(
            f"{files.weights}: its configuration says that it has a skip connection, and it holds "
            f"no '{name}'; take a file that is whole"
        )
    if not isinstance(found.get(name), Tensor) or not bool((found[name] != 0).any()):
        return None
    if not files.skips:
        raise RetraceError(
            f"{files.weights}: has a skip connection '{name}', which is no part of f W_dec + b_dec "
            f"and would be left out of every reconstruction; bring it in as a transcoder of its "
            f"layer, with layers: [its number], or take one without"
        )
    (matrix,) = take(found, files, "", name)
    return matrix


def skipping(W_skip: Tensor | None) -> dict[str, Any]:
    """What an `Original` takes of a skip connection y += x W_skip^T; W_skip is [d_out d_in]."""
    if W_skip is None:
        return {}
    return {"skip": lambda x: x @ W_skip.T.to(x)}


# --- activation functions ------------------------------------------------------------------


def jump(
    h: Float[Tensor, "*rows d_sae"], threshold: Float[Tensor, " #d_sae"] | Float[Tensor, ""]
) -> Float[Tensor, "*rows d_sae"]:
    """JumpReLU (Rajamanoharan et al. 2024): ReLU(h) where h is above the threshold."""
    return torch.relu(h) * (h > threshold.to(h))


def top(h: Float[Tensor, "*rows d_sae"], k: int) -> Float[Tensor, "*rows d_sae"]:
    """The k largest of ReLU(h), zero elsewhere."""
    best = torch.relu(h).topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, best.indices, best.values)


def product(
    x: Float[Tensor, "*rows d_in"], W: Float[Tensor, "d_in d_sae"], b: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*rows d_sae"]:
    """x W + b in the dtype of x; W is cast block by block, never as a whole."""
    parts = [x @ some.to(x) for some in W.split(BLOCK, 1)]
    return torch.cat(parts, -1) + b.to(x)


def linear(
    x: Float[Tensor, "*rows d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*rows d_sae"]:
    """x W^T + b in the dtype of x; W as in torch's own layers."""
    return product(x, W.T, b)


def decoded(
    f: Float[Tensor, "*rows d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> Float[Tensor, "*rows d_out"]:
    """f W_dec + b_dec in the dtype of f."""
    out = b_dec.to(f).expand(*f.shape[:-1], -1)
    for start in range(0, len(W_dec), BLOCK):
        out = out + f[..., start : start + BLOCK] @ W_dec[start : start + BLOCK].to(f)
    return out


def kind_of(files: Files, jumps: bool) -> str:
    """SAELens's architecture of an encoder without k."""
    if files.transcoder:
        return "jumprelu_transcoder" if jumps else "transcoder"
    return "jumprelu" if jumps else "standard"
