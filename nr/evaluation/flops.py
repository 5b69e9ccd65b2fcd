"""Floating-point operations counted from the program, not estimated from a formula.

XLA's own cost analysis counts the body of a loop once; walking the jaxpr lets us
multiply by the trip count, so models scanned over layers are counted right.
"""

import math
from typing import Any

import jax
from jax.extend import core


def count_flops(function, *arguments: Any) -> int:
  """Counts the floating-point operations of all matrix products in a function.

  Two operations a multiply-accumulate. Element-wise work, reductions and
  gathers are not counted: in the models here they are below a few per cent.

  Args:
    function: anything that `jax.make_jaxpr` takes.
    *arguments: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

  Returns:
    Number of operations for one call.

  Raises:
    ValueError: the program has a `while` loop, whose trip count is unknown.

  >>> import jax, jax.numpy as jnp
  >>> count_flops(jnp.dot, jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((4, 5), "float32"))
  120
  """
  return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
  name = equation.primitive.name
  if name == "dot_general":
    return _dot_general_flops(equation)
  if name == "conv_general_dilated":
    return _convolution_flops(equation)
  if name == "while":
    raise ValueError("count_flops: a while loop has no known trip count; use lax.scan or count its body")
  inner = [_inner_jaxpr(value) for value in equation.params.values()]
  counts = [_count(jaxpr) for group in inner for jaxpr in group]
  if name == "cond":  # the most expensive branch is taken as the cost
    return max(counts, default=0)
  return sum(counts) * (equation.params["length"] if name == "scan" else 1)


def _inner_jaxpr(value: Any) -> list[core.Jaxpr]:
  """Returns the jaxprs held by one parameter of an equation."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  if isinstance(value, (tuple, list)):
    return [jaxpr for item in value for jaxpr in _inner_jaxpr(item)]
  return []


def _dot_general_flops(equation: core.JaxprEqn) -> int:
  (left_contracting, _), _ = equation.params["dimension_numbers"]
  left, output = equation.invars[0].aval, equation.outvars[0].aval
  contracted = math.prod(left.shape[axis] for axis in left_contracting)
  return 2 * math.prod(output.shape) * contracted


def _convolution_flops(equation: core.JaxprEqn) -> int:
  kernel, output = equation.invars[1].aval, equation.outvars[0].aval
  out_features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return 2 * math.prod(output.shape) * math.prod(kernel.shape) // out_features
