"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen weight W plus scale * a b, with a and b trained.

    spec = LoraSpec(rank=8, alpha=16.0)
    adapter = init_adapter(spec, params, key)              # nested dictionaries of a and b: what is trained
    logits = parameters.merge(graphdef, attach(params, adapter, spec))(tokens_BL)
    params = merge(params, adapter, spec)                  # plain weights again, W + scale * a b

`attach` puts a `LowRank` where the weight stood, array or quantised (QLoRA's layout,
arXiv:2305.14314); models read it through `nr.models.weights.contract`, as
x W + scale * (x a) b, so that W + a b is never made. Layers may be stacked or apart.

Why not `flax.nnx.LoRA` (looked at: 0.12.8): it wraps a module of one matrix [in, out] and
changes the model's definition; it has no scale, no stacked layers and no kernels of heads,
and would train through the module tree. Here the definition stays the same, and the
adapter is a plain tree: optimizers, checkpoints and shardings see nothing new.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nr.models.weight_quantization import SUMMED_AXES
from nr.models.weights import as_array, contract
from nr.names import nearest, unknown
from nr.spec import Spec

ATTENTION = "(.*/)?blocks/attention/(query|key|value|output)/kernel"
MLP = "(.*/)?blocks/mlp/(up|gate|down)/kernel"
UNEMBEDDING = "(.*/)?unembedding"
INITS = ("kaiming", "normal")


@dataclasses.dataclass(frozen=True)
class LoraSpec(Spec):
  """Settings of an adapter.

  Attributes:
    rank: columns r of a and rows of b.
    alpha: numerator of the scale, alpha / r; with b at 0 it acts as a learning rate.
    targets: regular expressions that match the whole path of a weight, layer numbers
      left out, such as "blocks/attention/(query|value)/kernel". All kernels of the
      blocks by default; "unembedding" can be added where the head is not tied.
    dropout: of the adapter's input; 0 only, for dropout belongs to the model's spec.
    is_rank_stabilised: the scale is alpha / sqrt(r) (arXiv:2312.03732).
    init: of a: "kaiming" (uniform in +- 1 / sqrt(inputs), the default of PEFT) or
      "normal" (standard deviation 1 / r, its "gaussian"). b begins at 0.

  Raises:
    ValueError: a value out of its range.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = (ATTENTION, MLP)
  dropout: float = 0.0
  is_rank_stabilised: bool = False
  init: str = "kaiming"

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    if not isinstance(self.rank, int) or self.rank < 1:
      raise ValueError(f"LoraSpec.rank={self.rank!r}: give a positive integer")
    if not (math.isfinite(self.alpha) and self.alpha > 0):
      raise ValueError(f"LoraSpec.alpha={self.alpha!r}: give a positive number")
    if self.dropout != 0:
      raise ValueError(
        f"LoraSpec.dropout={self.dropout!r}: adapters have none; set dropout=0 and TransformerSpec.dropout instead"
      )
    if self.init not in INITS:
      raise ValueError(unknown("LoraSpec.init", self.init, INITS))
    if not self.targets:
      raise ValueError("LoraSpec.targets=(): give at least one pattern, such as nr.models.lora.ATTENTION")

  @property
  def scale(self) -> float:
    """Factor of a b."""
    return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight W + scale * a b, kept in its parts.

  Attributes:
    base: W, array or `QuantizedWeight`, with its summed axes S and kept axes O in any order.
    a: [S.., r], behind a layer axis when stacked.
    b: [r, O..], likewise.
    scale: factor of the product.
    summed_axes: S in W, from the end.
  """

  base: Any
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata=dict(static=True))
  summed_axes: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))

  def __getitem__(self, index: Any) -> Any:
    """Returns itself for `...`, which is how models read what a parameter holds."""
    if index is not Ellipsis:
      raise IndexError(f"index {index!r}: an adapted weight is read whole, by [...]")
    return self

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of W."""
    return self.base.shape

  @property
  def ndim(self) -> int:
    """Number of axes of W."""
    return self.base.ndim

  def contract(self, equation: str, x: jax.Array, *, preferred: Any = None) -> jax.Array:
    """Returns x W + scale * (x a) b."""
    inputs, output = equation.split("->")
    left, weight = inputs.split(",")
    summed = [name for name in weight if name not in output]
    kept = [name for name in weight if name in output]
    narrow = "".join(name for name in left if name not in summed) + "z"
    low = jnp.einsum(f"{left},{''.join(summed)}z->{narrow}", x, self.a.astype(x.dtype))
    low = jnp.einsum(
      f"{narrow},z{''.join(kept)}->{output}", low, self.b.astype(x.dtype), preferred_element_type=preferred
    )
    return contract(equation, x, self.base, preferred=preferred) + self.scale * low

  def look_up(self, indices: jax.Array) -> jax.Array:
    """Refuses: tables of embeddings take no adapter here."""
    raise ValueError("an adapted weight is no table of embeddings; adapt an untied 'unembedding' instead")

  def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns W + scale * a b as an array (for a head; kernels are never made)."""
    base = as_array(self.base).astype(jnp.float32)
    a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
    num_stacked = a.ndim + b.ndim - 2 - base.ndim  # 1 where both factors carry the layer axis
    rows = a.reshape(*a.shape[:num_stacked], -1, a.shape[-1])
    product = rows @ b.reshape(*b.shape[: num_stacked + 1], -1)
    product = product.reshape(*a.shape[:-1], *b.shape[num_stacked + 1 :])
    first = range(num_stacked, a.ndim - 1)
    return (base + self.scale * jnp.moveaxis(product, first, self.summed_axes)).astype(dtype)


def kernel_axes(path: tuple) -> tuple[tuple[int, ...], int] | None:
  """Returns (summed axes from the end, number of axes without layers) of a weight that can be adapted."""
  if path[-1] == "unembedding":
    return (-1,), 2
  if "blocks" in path and path[-1] == "kernel" and path[-2] in SUMMED_AXES:
    summed_axes = SUMMED_AXES[path[-2]]
    return summed_axes, -min(summed_axes)
  return None


def walk(tree: Any, path: tuple = ()) -> dict[tuple, Any]:
  """Returns the leaves of nested dictionaries by path."""
  if not isinstance(tree, Mapping):
    return {path: tree}
  return {key: leaf for name, child in tree.items() for key, leaf in walk(child, (*path, name)).items()}


def _pattern_path(path: tuple) -> str:
  return "/".join(str(name) for name in path if not isinstance(name, int))


def _put(tree: dict, path: tuple, value: Any) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def find_targets(spec: LoraSpec, params: Mapping) -> dict[tuple, Any]:
  """Returns the weights that a spec adapts, by path.

  Args:
    spec: its `targets` say which.
    params: of a model, arrays or their shapes, stacked or apart, quantised or not.

  Raises:
    ValueError: a pattern that matches nothing or is no regular expression, or one that
      matches what cannot be adapted (norms, biases, embeddings).
  """
  weights = walk(params)
  names = {path: _pattern_path(path) for path in weights}
  able = sorted({name for path, name in names.items() if kernel_axes(path)})
  found: dict[tuple, Any] = {}
  for pattern in spec.targets:
    try:
      matched = [path for path, name in names.items() if re.fullmatch(pattern, name)]
    except re.error as error:
      raise ValueError(f"LoraSpec.targets: {pattern!r} is not a regular expression ({error})") from None
    if not matched:
      near = nearest(pattern, able, likeness=0.0)
      raise ValueError(f"LoraSpec.targets: {pattern!r} matches no weight in full; the nearest is {near!r}")
    for path in matched:
      if kernel_axes(path) is None:
        raise ValueError(
          f"LoraSpec.targets: {pattern!r} matches {names[path]!r}, which cannot be adapted; "
          f"these can: {', '.join(able)}"
        )
      found[path] = weights[path]
  return {path: found[path] for path in weights if path in found}


def _factor_shapes(path: tuple, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the shapes of a and b for a weight of this shape."""
  summed_axes, core = kernel_axes(path)
  layers, axes = shape[: len(shape) - core], range(-core, 0)
  summed = tuple(shape[axis] for axis in axes if axis in summed_axes)
  kept = tuple(shape[axis] for axis in axes if axis not in summed_axes)
  return (*layers, *summed, rank), (*layers, rank, *kept)


def init_adapter(spec: LoraSpec, params: Mapping, key: jax.Array) -> dict:
  """Makes an adapter that changes nothing yet: a random, b zero.

  Args:
    spec: settings.
    params: of the model, arrays or their shapes; the adapter has their layout. A
      weight's key depends on its path and layer, so both layouts begin alike.
    key: random key.

  Returns:
    {.. {"a": float32 [(N,) S.., r], "b": float32 [(N,) r, O..]}} at the path of each target.

  Raises:
    ValueError: as `find_targets`.
  """
  adapter: dict = {}
  for path, weight in find_targets(spec, params).items():
    a_shape, b_shape = _factor_shapes(path, weight.shape, spec.rank)
    _, core = kernel_axes(path)
    is_stacked = len(weight.shape) > core
    layers = range(weight.shape[0]) if is_stacked else [next((n for n in path if isinstance(n, int)), 0)]
    one = a_shape[1:] if is_stacked else a_shape
    name_key = jax.random.fold_in(key, _hash(_pattern_path(path)))
    drawn = [_draw_a(spec, jax.random.fold_in(name_key, layer), one) for layer in layers]
    _put(adapter, (*path, "a"), jnp.stack(drawn) if is_stacked else drawn[0])
    _put(adapter, (*path, "b"), jnp.zeros(b_shape, jnp.float32))
  return adapter


def _hash(name: str) -> int:
  """Returns 32 bits that depend on a name alone."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _draw_a(spec: LoraSpec, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  if spec.init == "normal":
    return jax.random.normal(key, shape) / spec.rank
  bound = math.prod(shape[:-1]) ** -0.5
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def attach(params: Mapping, adapter: Mapping, spec: LoraSpec) -> dict:
  """Returns the parameters with a `LowRank` in the place of every adapted weight. Pure; makes no array.

  Args:
    params: of the model, arrays or quantised.
    adapter: a and b at the paths of weights, in the layout of `params`.
    spec: for the scale.

  Raises:
    ValueError: an adapter of a weight that is not there or has another shape.
  """
  return _with_adapter(params, adapter, spec, lambda weight: weight)


def merge(params: Mapping, adapter: Mapping, spec: LoraSpec) -> dict:
  """Returns parameters of the plain model that computes the same: W + scale * a b.

  Weights keep their type; quantised ones that are adapted become float32, since codes
  cannot hold the sum. Arguments and errors as in `attach`.
  """

  def settle(weight: LowRank) -> jax.Array:
    base = weight.base
    return weight.dequantized(jnp.float32 if hasattr(base, "codes") else base.dtype)

  return _with_adapter(params, adapter, spec, settle)


def _with_adapter(params: Mapping, adapter: Mapping, spec: LoraSpec, settle: Any) -> dict:
  factors: dict[tuple, dict[str, Any]] = {}
  for path, leaf in walk(adapter).items():
    factors.setdefault(path[:-1], {})[path[-1]] = leaf
  tree: dict = {}
  for path, weight in walk(params).items():
    found = factors.pop(path, None)
    if found is not None:
      weight = settle(_low_rank(path, weight, found, spec))
    _put(tree, path, weight)
  if factors:
    names = ", ".join("/".join(map(str, path)) for path in factors)
    raise ValueError(
      f"the adapter has factors for {names}, and the parameters have no such weight; give those it was "
      "made for, in the same layout (stack_layers and unstack_layers change it)"
    )
  return tree


def _low_rank(path: tuple, weight: Any, factors: Mapping[str, Any], spec: LoraSpec) -> LowRank:
  name = "/".join(map(str, path))
  if kernel_axes(path) is None or set(factors) != {"a", "b"}:
    raise ValueError(
      f"the adapter has {', '.join(factors)} at {name}: give a and b of a kernel or unembedding"
    )
  expected = _factor_shapes(path, weight.shape, spec.rank)
  found = factors["a"].shape, factors["b"].shape
  if found != expected:
    raise ValueError(
      f"adapter of {name}: a, b have shapes {found}, a weight of {weight.shape} and rank {spec.rank} need {expected}"
    )
  return LowRank(weight, factors["a"], factors["b"], spec.scale, kernel_axes(path)[0])


def adapter_axes(spec: LoraSpec, params: Mapping, axes: Mapping) -> dict:
  """Returns the logical axis names of an adapter: those of the weights, and None for the rank.

  Args:
    spec: settings.
    params: of the model, arrays or their shapes.
    axes: logical axis names of the model's parameters.
  """
  tree: dict = {}
  names = walk(axes)
  for path in find_targets(spec, params):
    summed_axes, core = kernel_axes(path)
    layers, own = names[path][:-core], names[path][-core:]
    summed = tuple(own[axis] for axis in range(-core, 0) if axis in summed_axes)
    kept = tuple(own[axis] for axis in range(-core, 0) if axis not in summed_axes)
    _put(tree, (*path, "a"), (*layers, *summed, None))
    _put(tree, (*path, "b"), (*layers, None, *kept))
  return tree


def count_parameters(adapter: Mapping) -> int:
  """Returns how many numbers are trained."""
  return sum(leaf.size for leaf in jax.tree.leaves(adapter))
