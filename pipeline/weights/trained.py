"""Read a training run of the store: its members, checkpoints and models. [torch]"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError, nearest
from pipeline.spec.training import TrainingSpec
from pipeline.store import tables
from pipeline.weights import batches as training_data
from pipeline.weights import initial

BEST = -2


class Run:
    """A finished run.

    Attributes:
        spec: the section of paper.yaml that made it.
        members: names, arms outermost.
        steps: checkpoints, ascending.
    """

    def __init__(self, manifest: str | Path) -> None:
        self.path = Path(manifest)
        self.info = tables.read_json(manifest)
        try:
            self.spec = TrainingSpec.model_validate(self.info["training"])
            self._members = {m["name"]: (m["arm"], m["seed"]) for m in self.info["members"]}
            if not self._members:
                raise ValueError("it has no member")
            for name, (arm, seed) in self._members.items():
                if [type(part) for part in (name, arm, seed)] != [str, str, int]:
                    raise ValueError(f"member {name!r}: arm {arm!r}, seed {seed!r}")
            self.steps: list[int] = list(map(int, self.info["steps"]))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as e:
            said = " ".join(str(e).split())[:200]
            raise RetraceError(
                f"{manifest}: is no manifest of a training run ({said}); delete "
                f"{self.path.parent} and run snakemake again"
            ) from e
        self.members = list(self._members)

    @property
    def name(self) -> str:
        """Its name in paper.yaml; the store calls its folder <run>-<digest>."""
        return self.path.parent.name.rsplit("-", 1)[0]

    def arm(self, member: str) -> str:
        return self._members[member][0]

    def seed(self, member: str) -> int:
        return self._members[member][1]

    def index(self, member: str) -> int:
        """The member's place in a stack; RetraceError where there is none of that name."""
        if member not in self.members:
            raise RetraceError(f"{self.path}: no member '{member}'{nearest(member, self.members)}")
        return self.members.index(member)

    @cached_property
    def history(self) -> Any:
        """history.parquet as a DataFrame."""
        return tables.read_table(self.path.parent / "history.parquet")

    def stacked(self, step: int) -> dict[str, Tensor]:
        """State dict of all members after `step` updates: name -> [members …], float32.

        Args:
            step: one of `steps`; -1 for the last, BEST for the least loss on val or test.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        step = self.steps[-1] if step == -1 else step
        if step != BEST and step not in self.steps:
            raise RetraceError(f"{self.path}: keeps no checkpoint of step {step}")
        name = "best.safetensors" if step == BEST else checkpoint_name(step)
        file = self.path.parent / "checkpoints" / name
        try:
            return load_file(file)
        except (OSError, SafetensorError) as e:
            raise RetraceError(
                f"{file}: not readable ({e}); delete {self.path.parent} and run snakemake again"
            ) from e

    def module(self) -> nn.Module:
        """The model with weights of no meaning, in eval mode."""
        made = initial.build(self.spec.architecture, self.info["d_vocab"])
        return made.float().eval().requires_grad_(False)

    def model(self, member: str, step: int = -1) -> nn.Module:
        """One member's causal LM on the CPU: model(input_ids).logits."""
        out, i = self.module(), self.index(member)
        missing = out.load_state_dict(
            {n: p[i] for n, p in self.stacked(step).items()}, strict=False
        )
        tied = set(missing.missing_keys) - {"lm_head.weight"}
        if missing.unexpected_keys or [k for k in tied if "attn.bias" not in k]:
            raise RetraceError(f"{self.path}: its weights do not fit its architecture ({missing})")
        return out

    def batches(
        self, member: str, data: str | Path, device: torch.device | str = "cpu"
    ) -> training_data.Batches:
        """The member's data again, from the paper's data.py (data: {source: own})."""
        return training_data.own(Path(data), self.spec, self.seed(member), torch.device(device))


def open_run(manifest: str | Path) -> Run:
    """The run whose manifest.json this is."""
    return Run(manifest)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"
