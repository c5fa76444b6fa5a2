"""How a study file writes a hyperparameter: a fixed value, a list of choices, or a range."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Scalar = bool | int | float | str


class Range(BaseModel):
    """An interval ``low..high`` that the sampler draws from, both ends included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float = Field(description="Smallest value")
    high: float = Field(description="Largest value")
    log: bool = Field(default=False, description="Draw on a logarithmic scale (sensible for learning rates and ranks)")
    step: float | None = Field(default=None, gt=0, description="Draw only low, low + step, ... (not with log)")

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError("low and high must be finite numbers")
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g}): swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0, not {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other: drop one")
        return self

    @property
    def values(self) -> tuple[float, ...] | None:
        """All of its values, in order; None for a range without a step, which has no end of them."""
        if self.low == self.high:
            return (self.low,)
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        # Added up by multiplication and rounded, as 0.1 + 2 * 0.1 is not 0.3.
        return tuple(float(f"{self.low + index * self.step:.12g}") for index in range(count))


def _parse(value: Any) -> Any:
    """Tell the three forms apart here, so that an error names the form that the writer meant."""
    if isinstance(value, dict):
        return Range.model_validate(value)
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list of choices: name at least one value")
        for item in value:
            if not isinstance(item, bool | int | float | str):
                raise ValueError(f"choices must be numbers, words or true/false, not {item!r}")
        if len({(type(item), item) for item in value}) < len(value):
            raise ValueError("a choice is listed twice")
        return tuple(value)
    if isinstance(value, tuple | Range | bool | int | float | str):
        return value
    raise ValueError(f"expected a value, a list of choices or {{low: ..., high: ...}}, not {value!r}")


Space = Annotated[Range | tuple[Scalar, ...] | Scalar, BeforeValidator(_parse)]
"""A fixed value, a tuple of choices, or a `Range`."""
