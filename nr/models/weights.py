"""Products with weights, and look-ups in them, whatever stands where an array stood.

Models read weights through `contract` and `look_up` only. Both take an array, or a
stand-in for one: `nr.models.weight_quantization.QuantizedWeight` (integer codes) and
`nr.models.lora.LowRank` (an array or codes with a product of two factors added).
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class StandIn(Protocol):
  """A pytree that models read in the place of a weight; `stand_in[...]` is itself."""

  shape: tuple[int, ...]

  def contract(self, equation: str, x: jax.Array, *, preferred: Any = None) -> jax.Array:
    """As the function `contract`."""
    ...

  def look_up(self, indices: jax.Array) -> jax.Array:
    """As the function `look_up`."""
    ...

  def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the whole weight as an array."""
    ...


def is_stand_in(weight: Any) -> bool:
  """Says whether something stands in for a weight."""
  return hasattr(weight, "dequantized")


def contract(equation: str, x: jax.Array, weight: Any, *, preferred: Any = None) -> jax.Array:
  """Returns `einsum(equation, x, weight)`.

  Args:
    equation: whose output ends with the axes of the weight that are not summed, in order.
    x: activations.
    weight: array or stand-in.
    preferred: type of the result; that of `x` when None.
  """
  if is_stand_in(weight):
    return weight.contract(equation, x, preferred=preferred)
  return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=preferred)


def look_up(table: Any, indices: jax.Array) -> jax.Array:
  """Returns the rows [..., D] of a table [V, D], array or stand-in."""
  return table.look_up(indices) if is_stand_in(table) else table[indices]


def as_array(weight: Any) -> jax.Array:
  """Returns a weight, array or stand-in, as an array."""
  return weight.dequantized() if is_stand_in(weight) else weight
