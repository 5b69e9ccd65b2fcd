"""Settings of a model or an objective as a frozen record, to and from plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from nr.names import unknown


class Spec:
  """Base of the frozen dataclasses that hold settings; what is invalid, their constructors refuse."""

  def to_dict(self) -> dict[str, Any]:
    """Returns the settings as plain values that JSON can hold."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, settings: Mapping[str, Any]) -> Self:
    """Makes a record from plain values by field name; inverse of `to_dict`.

    Raises:
      ValueError: a field is unknown (the nearest known one is named), missing or invalid.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in settings:
      if name not in fields:
        raise ValueError(unknown(f"field of {cls.__name__}", name, fields))
    for name, field in fields.items():
      is_required = field.default is field.default_factory is dataclasses.MISSING
      if is_required and name not in settings:
        raise ValueError(f"{cls.__name__}.{name} is missing: give a value")
    return cls(**settings)
