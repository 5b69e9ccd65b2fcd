"""From a sweep file to points: overrides checked against the locked config, each with a name.

A sweep file holds plain functions `sweep(config)` and `sweep_<name>(config)` that yield or return
dictionaries of dotted overrides (see `nr.sweeps.combinators`). `config` is the config that is swept,
to be read only: which arms there are, how many layers. `metrics(config)`, or
`metrics_<name>(config)` for one sweep, names what is read of every report: {"name": "dotted.path"}.
"""

import copy
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nr import names
from nr.sweeps.combinators import Overrides

_LONGEST_NAME = 120
"""Characters: file systems allow 255 bytes, and people read names."""


class SweepError(ValueError):
  """A sweep that cannot be run; the message is one line naming file, point, field and remedy."""


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A function of a sweep file.

  Attributes:
    path: the file.
    name: "" for `sweep`, else what follows `sweep_`.
    generate: from the config to points.
    metrics: from the config to {name: dotted path in report.json}.
  """

  path: str
  name: str
  generate: Callable[[Any], Iterable[Overrides]]
  metrics: Callable[[Any], Mapping[str, str]]

  @property
  def text(self) -> str:
    """How the command line names it."""
    return f"{self.path}:{self.name}" if self.name else self.path


@dataclasses.dataclass(frozen=True)
class Point:
  """A setting to run.

  Attributes:
    name: unique in its sweep and safe as the name of a folder.
    overrides: by dotted field.
    values: of every axis of the sweep, the config's own value where the point does not set it.
  """

  name: str
  overrides: Overrides
  values: dict[str, Any]


def load_sweep(text: str) -> Sweep:
  """Reads a sweep.

  Args:
    text: "path.py" for its function `sweep`, "path.py:name" for `sweep_name`.

  Raises:
    SweepError: no such file or function.
  """
  path, _, name = text.partition(":")
  if not pathlib.Path(path).is_file():
    raise SweepError(f"--sweep={text!r}: there is no file {path!r}; give path.py or path.py:name")
  functions = _functions(path)
  wanted = f"sweep_{name}" if name else "sweep"
  if wanted not in functions:
    known = [found.removeprefix("sweep_") for found in functions if found.startswith("sweep_")]
    if not name:
      raise SweepError(f"--sweep={text!r}: {path} has no function 'sweep'; name one of: {', '.join(known)}")
    raise SweepError(f"{path}: " + names.unknown("sweep", name, known))
  metrics = functions.get(f"metrics_{name}") or functions.get("metrics") or (lambda config: {})
  return Sweep(path, name, functions[wanted], metrics)


def sweeps_of(path: str | pathlib.Path) -> list[str]:
  """Returns the names of all sweeps of a file, "" for its function `sweep`."""
  found = [name for name in _functions(str(path)) if re.fullmatch(r"sweep(_\w+)?", name)]
  return [name.removeprefix("sweep").removeprefix("_") for name in found]


def _functions(path: str) -> dict[str, Callable[..., Any]]:
  spec = importlib.util.spec_from_file_location(f"sweeps_in_{pathlib.Path(path).stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return {
    name: value
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__
  }


def flat_fields(config: ConfigDict) -> dict[str, Any]:
  """Returns the values of a config by dotted field."""
  flat: dict[str, Any] = {}
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict):
      flat.update({f"{key}.{inner}": found for inner, found in flat_fields(value).items()})
    else:
      flat[key] = value
  return flat


def applied(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Returns a locked copy of a config with overrides set.

  Args:
    config: of a recipe.
    overrides: by dotted field.

  Raises:
    SweepError: a field that the config does not have, or a value of another type.
  """
  changed = copy.deepcopy(config).lock()
  known = flat_fields(config)
  for field, value in overrides.items():
    if field not in known:
      raise SweepError(_unknown_field(field, known))
    *parents, last = field.split(".")
    section = changed
    for parent in parents:
      section = section[parent]
    _check_type(field, section.get_type(last), known[field], value)
    try:
      section[last] = value
    except (TypeError, ValueError) as error:
      raise SweepError(
        f"{field}={value!r}: the config holds {known[field]!r} there; give its type"
      ) from error
  return changed


def _unknown_field(field: str, known: Mapping[str, Any]) -> str:
  inside = [name for name in known if name.startswith(field + ".")]
  if inside:
    return f"{field}: it is a section; set a field in it, such as {inside[0]}"
  near = names.nearest(field, known)
  section = field.rpartition(".")[0]
  beside = [name for name in known if name.rpartition(".")[0] == section]
  hint = f"did you mean {near!r}?" if near else f"valid beside it: {', '.join(beside)}" if beside else ""
  return f"{field}: the config has no such field{'; ' + hint if hint else ''}"


def _check_type(field: str, wanted: type, old: Any, new: Any) -> None:
  """Refuses what nr.main's flags would refuse, or read as something else. A placeholder has a type and no value."""
  allowed: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    tuple: (tuple,),
  }
  if wanted not in allowed:
    raise SweepError(
      f"{field}={new!r}: the config holds {old!r} there; fields of type {wanted.__name__} cannot be swept"
    )
  if not isinstance(new, allowed[wanted]) or isinstance(new, bool) != (wanted is bool):
    raise SweepError(
      f"{field}={new!r}: the config holds {old!r} there, so it takes a value of type {wanted.__name__}"
    )


def argument(field: str, value: Any) -> str:
  """Returns the flag of nr.main that sets a field.

  >>> argument("seeds", (0, 1)), argument("train.progress", False), argument("base.checkpoint", "")
  ('--config.seeds=(0, 1)', '--config.train.progress=false', '--config.base.checkpoint=')
  """
  if isinstance(value, bool):
    return f"--config.{field}={str(value).lower()}"
  return f"--config.{field}={value}"


def expand(sweep: Sweep, config: ConfigDict, given: Iterable[str] = ()) -> list[Point]:
  """Returns the points of a sweep, in its order.

  Args:
    sweep: what to go through.
    config: of the recipe, with what the command line sets.
    given: fields that the command line sets.

  Raises:
    SweepError: a point that does not fit the config, sets a field that the command line sets, or is
      there twice; or no point at all.
  """
  overrides = [dict(point) for point in sweep.generate(copy.deepcopy(config).lock())]
  if not overrides:
    raise SweepError(f"{sweep.text}: it gives no point for this config")
  configs, seen, given = [], {}, set(given)
  for number, point in enumerate(overrides):
    taken = sorted(given & point.keys())
    if taken:
      raise SweepError(
        f"{sweep.text}: --config.{taken[0]} is set on the command line, and swept by point {number}; leave one out"
      )
    try:
      configs.append(applied(config, point))
    except SweepError as error:
      raise SweepError(f"{sweep.text}, point {number}: {error}") from error
    content = json.dumps(flat_fields(configs[-1]), sort_keys=True, default=str)
    if content in seen:
      raise SweepError(
        f"{sweep.text}: points {seen[content]} and {number} are the same setting; leave one out"
      )
    seen[content] = number
  axes = _axes(overrides, [flat_fields(found) for found in configs])
  found_names = _names(overrides, axes)
  return [
    Point(name, point, {label: flat_fields(found)[fields[0]] for label, fields in axes.items()})
    for name, point, found in zip(found_names, overrides, configs, strict=True)
  ]


def _axes(overrides: list[Overrides], flat: list[dict[str, Any]]) -> dict[str, list[str]]:
  """Returns the fields that tell the points apart, by label.

  Fields that end alike and have the same value as each other in every point are one axis: beta of
  all arms. A field that follows from those before it is none: the width that goes with a depth. A label
  is as short as tells the axes apart.
  """
  fields = list(dict.fromkeys(field for point in overrides for field in point))
  columns: dict[tuple[str, ...], list[str]] = {}
  for field in fields:
    values = [repr(found[field]) for found in flat]
    columns.setdefault((field.rpartition(".")[2], *values), []).append(field)
  kept, told_apart = [], [()] * len(flat)
  for (_, *values), group in columns.items():
    further = [(*before, value) for before, value in zip(told_apart, values)]
    if len(set(further)) > len(set(told_apart)):
      told_apart = further
      kept.append(group)
  labels = _short_labels([group[0] for group in kept])
  return dict(zip(labels, kept, strict=True))


def _short_labels(fields: list[str]) -> list[str]:
  """Returns the shortest dotted endings of fields that are all different."""
  parts = [field.split(".") for field in fields]
  lengths = [1] * len(fields)
  while True:
    labels = [".".join(part[-length:]) for part, length in zip(parts, lengths)]
    alike = [labels.count(label) > 1 for label in labels]
    if not any(alike):
      return labels
    lengths = [length + is_alike for length, is_alike in zip(lengths, alike)]


def _names(overrides: list[Overrides], axes: Mapping[str, list[str]]) -> list[str]:
  """Returns a name a point: the axes that it sets itself; one that sets none is "default"."""
  found = []
  for point in overrides:
    told = [
      f"{label}={_safe(next(point[field] for field in fields if field in point))}"
      for label, fields in axes.items()
      if any(field in point for field in fields)
    ]
    found.append("__".join(told) or "default")
  return [
    name
    if len(name) <= _LONGEST_NAME and found.count(name) == 1
    else f"{name[: _LONGEST_NAME - 9]}-{_digest(point)}"
    for name, point in zip(found, overrides, strict=True)
  ]


def _safe(value: Any) -> str:
  """Writes a value with letters, digits and ._+- only.

  >>> _safe(3e-05), _safe((0, 1)), _safe(""), _safe("top_k(5)|greedy")
  ('3e-05', '0-1', 'empty', 'top_k_5_greedy')
  """
  if isinstance(value, tuple):
    return "-".join(map(_safe, value)) or "empty"
  text = value if isinstance(value, str) else repr(value)
  return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_") or "empty"


def _digest(point: Overrides) -> str:
  return hashlib.sha256(json.dumps(point, sort_keys=True, default=str).encode()).hexdigest()[:8]
