"""Whose tuned lens is trained, and how (pipeline/tuning/tuned_lens.py)."""

from pydantic import Field

from pipeline.tuning.tuned_lens import TunedLensSpec


class Tuning(TunedLensSpec):
    """One entry of own.tuning.models."""

    paper: str = Field(default="", description="whose model; default: this paper's")
    arm: str = Field(default="trained", description="of that paper")
