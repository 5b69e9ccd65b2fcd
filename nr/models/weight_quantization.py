"""Weight-only quantisation for inference: int8 by channel, int4 by group.

    params = quantize_weights(params, bits=8)
    logits_BLV = parameters.merge(graphdef, params)(tokens_BL)

A quantised weight stands in the tree where the array stood; `nr.models.weights` says how
models read it. Activations stay as they are.

The kernels of the blocks and the token tables are quantised, which is nearly all of a
model; norms, biases, learned positions and the concept path keep their type: its
selection of concepts turns on small differences.

Why not `qwix` (looked at: 0.1.8): its NNX path replaces parameters inside a live module
while one method of it runs, and finds them again by patching JAX's products during that
one method. Our models are split once, merged under `jit`, scanned over stacked blocks,
and driven through several methods, none of which may mutate them. Its calibrated
methods (GPTQ, AWQ) work offline on arrays and could fill the same leaves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nr.models.weights import is_stand_in

LARGEST_CODE = {8: 127, 4: 7}
TABLES = ("token_embedding", "unembedding")
# Axes of a kernel that a product sums over, from the end, so that stacked layers do not
# matter. Groups lie along the last of them.
SUMMED_AXES = {
  "query": (-3,),
  "key": (-3,),
  "value": (-3,),
  "output": (-3, -2),
  "up": (-2,),
  "gate": (-2,),
  "down": (-2,),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
  """A weight as integer codes times scales.

  Attributes:
    codes: int8 of the weight's shape; with 4 bits uint8, two neighbours along the
      grouped axis in each byte, the first in the low half.
    scales: of the weight's number of axes: 1 along summed axes, or (with groups) the
      number of groups along the grouped one.
    bits: 8 or 4.
    axis: the grouped axis, from the end.
    size: length of that axis.
    group_size: entries of a group; None for one scale a channel.
  """

  codes: jax.Array
  scales: jax.Array
  bits: int = dataclasses.field(metadata=dict(static=True))
  axis: int = dataclasses.field(metadata=dict(static=True))
  size: int = dataclasses.field(metadata=dict(static=True))
  group_size: int | None = dataclasses.field(metadata=dict(static=True))

  def __getitem__(self, index: Any) -> Any:
    """Returns itself for `...`, which is how models read what a parameter holds."""
    if index is not Ellipsis:
      raise IndexError(
        f"index {index!r}: a quantised weight is read whole, by [...], or by rows with look_up"
      )
    return self

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return self.codes.ndim

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight that the codes stand for."""
    axis = self.axis % self.ndim
    return (*self.codes.shape[:axis], self.size, *self.codes.shape[axis + 1 :])

  def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the weight as an array."""
    codes = _unpack(self.codes, self.axis, self.size) if self.bits == 4 else self.codes
    scales = self.scales
    if self.group_size is not None:
      scales = jnp.repeat(scales, self.group_size, axis=self.axis)
      scales = jax.lax.slice_in_dim(scales, 0, self.size, axis=self.axis % self.ndim)
    return (codes.astype(jnp.float32) * scales).astype(dtype)

  def contract(self, equation: str, x: jax.Array, *, preferred: Any = None) -> jax.Array:
    """Returns `einsum(equation, x, weight)`; scales by channel multiply the product, by group the weight."""
    if self.group_size is not None or self.bits == 4:
      return jnp.einsum(equation, x, self.dequantized(x.dtype), preferred_element_type=preferred)
    product = jnp.einsum(equation, x, self.codes.astype(x.dtype), preferred_element_type=jnp.float32)
    inputs, output = equation.split("->")
    kept = [axis for axis, name in enumerate(inputs.split(",")[1]) if name in output]
    scales = self.scales.reshape([self.scales.shape[axis] for axis in kept])
    return (product * scales).astype(x.dtype if preferred is None else preferred)

  def look_up(self, indices: jax.Array) -> jax.Array:
    """Returns the rows [..., D] of a table [V, D]."""
    rows = dataclasses.replace(self, codes=self.codes[indices], scales=self.scales[indices])
    return rows.dequantized()


def quantize(
  weight: jax.Array, bits: int, summed_axes: tuple[int, ...], group_size: int | None = None
) -> QuantizedWeight:
  """Rounds a weight to symmetric codes: scale = max |w| / (2^(bits - 1) - 1) (a common choice).

  No entry is off by more than half its scale.

  Args:
    weight: [..., axes].
    bits: 8 or 4.
    summed_axes: negative; the axes that share a scale.
    group_size: neighbours along the last summed axis that share a scale; the last
      group may be shorter. None: the whole of all summed axes does.
  """
  wide, axis = jnp.asarray(weight).astype(jnp.float32), summed_axes[-1]
  size, most = wide.shape[axis], LARGEST_CODE[bits]
  magnitude = jnp.abs(wide)
  if group_size is not None:
    group_size = min(group_size, size)
    magnitude = _grouped(magnitude, axis, group_size).max(axis=axis)
  else:
    magnitude = magnitude.max(axis=summed_axes, keepdims=True)
  scales = magnitude / most
  safe = jnp.where(scales > 0, scales, 1.0)
  spread = safe
  if group_size is not None:
    spread = jax.lax.slice_in_dim(jnp.repeat(safe, group_size, axis=axis), 0, size, axis=axis % wide.ndim)
  codes = jnp.clip(jnp.round(wide / spread), -most, most).astype(jnp.int8)
  codes = _pack(codes, axis) if bits == 4 else codes
  return QuantizedWeight(codes, scales, bits, axis, size, group_size)


def _padded(array: jax.Array, axis: int, multiple: int) -> jax.Array:
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, -array.shape[axis] % multiple)
  return jnp.pad(array, widths)


def _grouped(array: jax.Array, axis: int, size: int) -> jax.Array:
  """Splits an axis (from the end) into groups: the groups stand at `axis - 1`, their entries at `axis`."""
  array = _padded(array, axis, size)
  axis %= array.ndim
  return array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])


def _pack(codes: jax.Array, axis: int) -> jax.Array:
  pairs = jnp.moveaxis(_grouped(codes, axis, 2), axis, 0).astype(jnp.uint8) & 15
  return pairs[0] | (pairs[1] << 4)


def _unpack(packed: jax.Array, axis: int, size: int) -> jax.Array:
  # Moved up and down again, the top bit of each half becomes the sign.
  halves = [
    jax.lax.shift_right_arithmetic((packed << shift).astype(jnp.int8), jnp.int8(4)) for shift in (4, 0)
  ]
  axis %= packed.ndim
  codes = jnp.stack(halves, axis=axis + 1)
  codes = codes.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])
  return jax.lax.slice_in_dim(codes, 0, size, axis=axis)


def quantize_weights(params: Mapping, bits: int = 8, *, group_size: int | None = None) -> dict:
  """Quantises the kernels of the blocks and the token tables of a model.

  Args:
    params: of a `Transformer` or `ConceptMixingTransformer`, stacked or unrolled.
    bits: 8, one scale an output channel (a row of a table), or 4.
    group_size: entries along the summed axis that share a scale; 32 when None and
      bits=4, none when None and bits=8.

  Returns:
    A tree like `params`, with `QuantizedWeight` in the place of those arrays.

  Raises:
    ValueError: for other bits, a group size that is not positive, or weights that
      are quantised already.
  """
  if bits not in LARGEST_CODE:
    raise ValueError(f"bits={bits!r}: give 8 or 4")
  if group_size is not None and group_size < 1:
    raise ValueError(f"group_size={group_size}: give a positive number of entries, or None")
  group_size = 32 if bits == 4 and group_size is None else group_size

  def visit(node: Any, path: tuple) -> Any:
    if isinstance(node, Mapping):
      return {name: visit(child, (*path, name)) for name, child in node.items()}
    if isinstance(node, QuantizedWeight):
      raise ValueError(f"params{list(path)} is quantised already: quantise the weights as they were trained")
    if is_stand_in(node):
      raise ValueError(f"params{list(path)} carries an adapter: quantise the weights under it, then attach it")
    summed_axes = _summed_axes(path)
    return node if summed_axes is None else quantize(node, bits, summed_axes, group_size)

  return visit(params, ())


def _summed_axes(path: tuple) -> tuple[int, ...] | None:
  """Returns the summed axes of a leaf to be quantised, or None."""
  if path[-1] in TABLES:
    return (-1,)
  if "blocks" in path and path[-1] == "kernel":
    return SUMMED_AXES.get(path[-2])
  return None


def count_bytes(params: Any) -> int:
  """Returns the bytes that the arrays of a tree take."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
