"""The prompts of the stage circuits, which other papers use as well."""

from pipeline.text.prompts_ioi import ioi

__all__ = ["ioi"]
