"""What all sections of the settings have in common: frozen, no unknown keys, and the types of their numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MIB = 2**20

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Amount = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Part of the settings. Raises ValidationError on an unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class PlacedSection(Section):
    """Of a deployment."""

    resources: dict[str, Amount] = Field(
        default={},
        description="Ray resources that one replica takes besides CPUs and GPUs: it runs only where they are offered.",
    )
