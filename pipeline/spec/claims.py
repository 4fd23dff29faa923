"""What a claim of paper.yaml may say: whose it is, what it compares, and when it may be judged."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.errors import nearest
from pipeline.spec.base import Name, Scale, Section

UNITS = ("samples", "tokens", "steps", "rows", "examples", "prompts", "sequences", "epochs")
BOUNDED = {  # core needs: what their number bounds
    "dead_share": "at most this share of dead latents",
    "l0": "L0 within this share of its target",
    "unread": "a lens leaves less than this share of a constant's loss",
    "past_minimum": "the last validation loss at most this share above the best",
    "budget": "at least this share of the paper's own budget",
    "seeds": "at least so many seeds",
}


class Budget(Section):
    """What the paper spent on a result, and what we spend."""

    unit: str = Field(description=", ".join(UNITS))
    paper: float = Field(gt=0, description="the paper's own, in this unit")
    ours: str = Field(
        min_length=1,
        description="an expression over settings of this paper.yaml and metrics, in this unit, "
        "e.g. sae.training.n_rows or text.n_tokens",
    )
    source: str = Field(min_length=1, description="where the paper says so")

    @field_validator("unit")
    @classmethod
    def _known_unit(cls, unit: str) -> str:
        if unit not in UNITS:
            raise ValueError(
                f"'{unit}' is no unit of a budget{nearest(unit, UNITS)}; there are "
                f"{', '.join(UNITS)}"
            )
        return unit


class Need(Section):
    """What must hold in a run before a claim is judged."""

    bound: float | None = Field(default=None, description="of a core need, e.g. 0.05")
    target: float | None = Field(
        default=None, gt=0, description="need l0: the L0 asked for; default: by the metric l0_off"
    )
    of: list[str] = Field(
        default=[],
        description="what it is asked of, e.g. trained.topk; default: all that the claim names",
    )
    holds: str = Field(default="", description="a need of your own: an expression over metrics")
    because: str = Field(default="", description="the same in words, shown where it fails")


class Claim(Section):
    """One number or ordering that the paper states."""

    id: Name
    text: str = Field(min_length=1, description="what the paper says, in our words")
    source: str = Field(min_length=1, description="where in the paper")
    of: Literal["paper", "control", "ours"] = Field(
        default="paper",
        description="whose claim: the paper's, a control of this replication, or our observation",
    )
    kind: Literal["value", "order"] = Field(
        default="order", description="default: order where it has holds:, value where it has paper:"
    )
    metric: str = Field(default="", description="kind value: the metric compared")
    paper: float | None = Field(default=None, description="kind value: the published number")
    tolerance: float | None = Field(default=None, ge=0, description="absolute, same unit")
    holds: str = Field(default="", description="kind order: e.g. a.ev < b.ev < c.ev")
    null_arm: str = Field(
        default="",
        description="where it must not hold: an arm, put in place of the arms that the claim "
        "names, or an expression",
    )
    no_null_arm: str = Field(default="", description="why there is no such arm")
    needs: dict[Name, float | Need] = Field(
        default={}, description="what must hold before it is judged, e.g. {dead_share: 0.05}"
    )
    budget: str = Field(
        default="",
        description="the budget it rests on, or none; default: the only one of this paper.yaml",
    )
    reason: str = Field(default="", description="why this tolerance, or why not comparable")
    scales: list[Scale] = Field(default=[], description="default: order all, value only paper")
    comparable: bool = Field(default=True, description="false: holds only on the paper's model")
    discussion: str = Field(
        default="", description="why it is not reproduced, and what was tried; shown in the report"
    )
    figure: str = Field(
        default="",
        exclude_if=lambda value: not value,
        description="the figure that shows it; default: found by the words that both use",
    )
    provenance_kind: Literal["R", "R-copy", "N", "M"] = Field(
        default="R", description="R: read in the primary source; N: second-hand; M: from memory"
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_of_its_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.keys() - (cls.model_fields.keys() - {"kind"}):
            return data  # it says its kind, or a key is unknown, which is told then
        found = [kind for kind, key in (("order", "holds"), ("value", "paper")) if key in data]
        if len(found) != 1:
            raise ValueError(
                f"claim '{data.get('id')}': has {'both' if found else 'neither'} holds: (an order) "
                f"{'and' if found else 'nor'} paper: (a published number); write one of the two"
            )
        return data | {"kind": found[0]}

    @model_validator(mode="after")
    def _complete(self) -> "Claim":
        where = f"claim '{self.id}'"
        if self.kind == "order" and not self.holds:
            raise ValueError(f"{where}: kind order needs holds: an expression")
        if self.kind == "value" and self.paper is None:
            raise ValueError(f"{where}: kind value needs paper: the published number")
        judged = self.metric and self.tolerance is not None and self.reason
        if self.kind == "value" and self.comparable and not judged:
            raise ValueError(f"{where}: kind value needs metric, tolerance and its reason")
        if not self.comparable and not self.reason:
            raise ValueError(f"{where}: comparable: false needs a reason")
        if self.null_arm and self.no_null_arm:
            raise ValueError(f"{where}: has null_arm: and no_null_arm: both; keep one")
        for name, need in self.needs.items():
            _check_need(f"{where}: needs.{name}", name, need)
        return self

    def judged_at(self, scale: str) -> bool:
        return scale in self.scales if self.scales else self.kind == "order" or scale == "paper"


def _check_need(where: str, name: str, need: float | Need) -> None:
    """ValueError where a need is neither a core one with its number nor one of the paper's own."""
    need = need if isinstance(need, Need) else Need(bound=need)
    if need.holds:
        if not need.because:
            raise ValueError(f"{where}: needs because: the same in words")
        return
    if name not in BOUNDED:
        raise ValueError(
            f"{where}: unknown need{nearest(name, BOUNDED)}; there are {', '.join(BOUNDED)}, or "
            f"write your own with holds: and because:"
        )
    if need.bound is None or need.bound < 0:
        raise ValueError(f"{where}: needs a number from 0 on: {BOUNDED[name]}")
    if name == "seeds" and need.bound < 2:
        raise ValueError(
            f"{where}: an interval needs at least 2 seeds, and {need.bound:g} is asked"
        )
