"""Chains as text: "repetition_penalty(1.2)|temperature(0.7)|top_p(0.9)", and back."""

import ast
import dataclasses
from typing import Any

import jax
import numpy as np

from nr.generation.transforms.algebra import REGISTRY, Chain, Transform, chain
from nr.names import unknown


def parse(text: str) -> Chain:
  """Reads a chain.

  Args:
    text: transforms by name, applied from left to right, with "|" between them. Arguments
      are literals, by position or by name: numbers, lists with a value for each row,
      strings, None. Empty text is the chain that does nothing.

  Returns:
    The chain; its values are checked against their bounds.

  Raises:
    ValueError: no such text, or an unknown transform or parameter, with the nearest
      that is known, or a value outside its bounds.

  >>> describe(parse("temperature(0.7) | top_p(p=0.9)"))
  'temperature(0.7)|top_p(0.9)'
  """
  if not text.strip():
    return chain()
  try:
    tree = ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ValueError(f"{text!r} is no chain ({error}); write it like 'temperature(0.7)|top_p(0.9)'") from None
  calls = []
  while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
    calls.append(tree.right)
    tree = tree.left
  calls.append(tree)
  return chain(*(_build(call, text) for call in reversed(calls)))


def _build(node: ast.expr, text: str) -> Transform:
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  if not isinstance(call.func, ast.Name):
    raise ValueError(
      f"{ast.unparse(node)!r} in {text!r} is no transform; write it like 'temperature(0.7)|top_p(0.9)'"
    )
  name = call.func.id
  if name not in REGISTRY:
    raise ValueError(unknown("transform", name, sorted(REGISTRY)))
  cls = REGISTRY[name]
  fields = {field.name: field for field in dataclasses.fields(cls)}
  if len(call.args) > len(fields):
    raise ValueError(
      f"{ast.unparse(node)}: {len(call.args)} arguments, and {name} has {len(fields)} parameters"
    )
  values = {parameter: _literal(value, node) for parameter, value in zip(fields, call.args)}
  for keyword in call.keywords:
    if keyword.arg not in fields:
      raise ValueError(unknown(f"{name}'s parameter", str(keyword.arg), fields))
    if keyword.arg in values:
      raise ValueError(f"{ast.unparse(node)}: {keyword.arg} is given twice")
    values[keyword.arg] = _literal(keyword.value, node)
  for parameter, field in fields.items():
    if field.default is dataclasses.MISSING and parameter not in values:
      raise ValueError(f"{ast.unparse(node)}: give {parameter}")
  built = cls(**values)
  built.prepared()
  return built


def _literal(node: ast.expr, call: ast.expr) -> Any:
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
    raise ValueError(
      f"{ast.unparse(call)}: {ast.unparse(node)} is no literal; give a number or a list"
    ) from None


def describe(transforms: Transform) -> str:
  """Returns the text that `parse` reads as this chain; parameters at their defaults are left out.

  Raises:
    ValueError: a parameter that no literal stands for.
  """
  parts = transforms.transforms if isinstance(transforms, Chain) else (transforms,)
  return "|".join(_describe(part) for part in parts)


def _describe(part: Transform) -> str:
  arguments, is_positional = [], True
  for field in dataclasses.fields(part):
    text = _text(getattr(part, field.name), f"{part.name}.{field.name}")
    if field.default is not dataclasses.MISSING and text == _text(field.default, field.name):
      is_positional = False
      continue
    arguments.append(text if is_positional else f"{field.name}={text}")
  return f"{part.name}({', '.join(arguments)})"


def _text(value: Any, label: str) -> str:
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f"{label} is traced and has no value yet; describe chains outside of jit")
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    if value.dtype.kind == "f":
      # The shortest digits that read back as the same float32.
      array = np.asarray(value)
      value = np.reshape([float(str(each)) for each in array.ravel()], array.shape).tolist()
    elif value.ndim == 2:
      # Sequences, which are padded with negative ids.
      value = [[each for each in row if each >= 0] for row in np.asarray(value).tolist()]
    else:
      value = np.asarray(value).tolist()
  if isinstance(value, bool | str | None):
    return repr(value)
  if isinstance(value, int | float):
    if value != value:
      raise ValueError(f"{label}={value}: no literal stands for it")
    return {float("inf"): "1e999", float("-inf"): "-1e999"}.get(value) or _number(value)
  if isinstance(value, list | tuple):
    inner = [_text(each, label) for each in value]
    return f"[{', '.join(inner)}]"
  if isinstance(value, dict):
    return f"{{{', '.join(f'{key!r}: {_text(each, label)}' for key, each in value.items())}}}"
  raise ValueError(f"{label}={value!r}: no literal stands for it")


def _number(value: int | float) -> str:
  # 2 and 2.0 are the same parameter.
  return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
