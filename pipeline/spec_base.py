"""What the sections of config.yaml and paper.yaml share: immutable, closed to unknown keys."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Dtype = Literal["float32", "float16", "bfloat16"]


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
