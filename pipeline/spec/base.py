"""What the sections of config.yaml and paper.yaml share: immutable, closed to unknown keys."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.errors import nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Requirement = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")]
NpmRequirement = Annotated[
    str, Field(pattern=r"^(npm:)?[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9._+!-]+$")
]


def inside(path: str) -> str:
    """The path of a file in a package or a hub's repository; ValueError where it leads out."""
    if path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"'{path}' leads out of the package or repository; name a file in it")
    if any(len(part.encode()) > 255 for part in path.split("/")):
        raise ValueError(f"'{path[:40]}…' is longer than a file's name can be")
    return path


def pairs_of_layers(
    stored: list[str], reads: str, writes: str, layers: list[int] | None = None
) -> list[tuple[str, str]]:
    """(hook read, hook written) of each layer, out of the stored hooks.

    Args:
        layers: default: all from 0 to the last that has one of the two.

    Raises:
        ValueError: a layer has not both.
    """
    named = [f"blocks.{h.split('.')[1]}.{at}" for h in stored for at in (reads, writes)
             if h.startswith("blocks.")]  # fmt: skip
    last = max((int(h.split(".")[1]) for h in stored if h in named), default=0)
    pairs = [(f"blocks.{n}.{reads}", f"blocks.{n}.{writes}") for n in layers or range(last + 1)]
    for hook in (hook for pair in pairs for hook in pair):
        if hook not in stored:
            raise ValueError(
                f"hook '{hook}' is not stored, and every layer is needed; add it to "
                f"activations.hooks"
            )
    return pairs


def once(seeds: list[int]) -> list[int]:
    """Seeds as they are; ValueError where one stands twice and would count as two."""
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(f"seed {seed} stands twice and would count as two; name it once")
    return seeds


def scale_name(name: str) -> str:
    """The name of a scale; ValueError where it cannot name a folder of results/."""
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name in RESULTS:
        raise ValueError(
            f"'{name}' cannot name a scale: take a letter, then letters, digits and underscores, "
            f"and none of {', '.join(RESULTS)}"
        )
    return name


def in_bytes(size: Any) -> Any:
    """Bytes of a size such as 50GB (10^9) or 4GiB (2^30); ValueError where it is none."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT])(i?)B", str(size))
    base = 1024 if found and found[3] else 1000
    n = float(found[1]) * base ** ("KMGT".index(found[2].upper()) + 1) if found else 0
    if n < 1:
        raise ValueError(f"{size!r} is no size; write 50GB, 500MB or 4GiB")
    return int(n)


Size = Annotated[int, BeforeValidator(in_bytes, json_schema_input_type=int | str)]
Inside = Annotated[str, AfterValidator(inside)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(once)]
Scale = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$"), AfterValidator(scale_name)]
Dtype = Literal["float32", "float16", "bfloat16"]
SCALES = ("smoke", "laptop", "paper")  # that every paper has, beside those of its own
RESULTS = ("store", "logs", "benchmarks", "reference")  # folders of results/ that are no scale
# Tags of the kinds of dictionaries; no name holds a space, so no key of a file is one.
TRAINED, IMPORTED = "a trained dictionary", "a published dictionary"
CROSSED, LAYERED = "a crosscoder", "transcoders of all layers"
IMPORTED_LAYERS, IMPORTED_CROSSED = "published transcoders of all layers", "published crosscoder"
# pydantic's tags, which no message shows
KINDS = (TRAINED, IMPORTED, CROSSED, LAYERED, IMPORTED_LAYERS, IMPORTED_CROSSED)


class Section(BaseModel):
    """A section of a YAML file: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key '{key}'{nearest(key, cls.model_fields)}; "
                        f"allowed here: {', '.join(cls.model_fields)}"
                    )
        return data


class OverSources:
    """What crosscoders have, trained or published: `hooks` of a model, or `models` at a `hook`."""

    def check_sources(self) -> None:
        """ValueError where the sources are fewer than two, or said twice."""
        if self.models and self.arms:
            raise ValueError("arms: models names the arms already; remove one of the two")
        if self.hooks and self.hook:
            raise ValueError("hook: hooks names the hooks already; remove one of the two")
        for key in ("hooks", "models"):
            names = getattr(self, key)
            if twice := {n for n in names if names.count(n) > 1}:
                raise ValueError(f"{key}: '{min(twice)}' stands twice; name it once")
        if max(len(self.hooks), 1) * max(len(self.models), 1) < 2:
            one = [*self.hooks, *self.models]
            raise ValueError(
                f"hooks, models: a crosscoder has at least two sources, and {one} is "
                f"{'one' if one else 'none'}; add another, or write hook: for an SAE"
            )

    def sources(self, arm: str, hook: str) -> list[tuple[str, str]]:
        """(arm, hook) of each source, models first.

        Args:
            arm: where it has no `models`.
            hook: where it has neither `hooks` nor `hook`.
        """
        hooks = self.hooks or [self.hook or hook]
        return [(a, h) for a in self.models or [arm] for h in hooks]

    def owners(self, arms: list[str]) -> list[str]:
        """The arms under whose names it stands: the first of `models`, or each of its arms."""
        return self.models[:1] or self.arms or arms


def sentence(error: ValidationError) -> str:
    """The first fault of a section: the key, what is wrong, and the value."""
    first = error.errors()[0]
    return told(first, ".".join(str(p) for p in first["loc"] if p not in KINDS))


def told(fault: Any, where: str) -> str:
    """One of pydantic's faults as 'where: what is wrong, got value'."""
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if fault["type"] == "value_error" else f", got {str(fault['input'])[:80]!r}"
    return f"{where}: {message}{shown}" if where else f"{message}{shown}"
