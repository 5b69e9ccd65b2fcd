"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen weight W plus scale * a b, with a and b trained.

    spec = LoraSpec(rank=8, alpha=16.0)
    adapter = init_adapter(spec, params, key)              # nested dictionaries of a and b: what is trained
    logits = parameters.merge(graphdef, attach(params, adapter, spec))(tokens_BL)
    params = merge(params, adapter, spec)                  # plain weights again, W + scale * a b

`attach` puts a `LowRank` where the weight stood, array or quantised (QLoRA's layout,
arXiv:2305.14314); models read it through `nr.models.weights.contract`, as
x W + scale * (x a) b, so that W + a b is never made. Layers may be stacked or apart.

DoRA (`is_weight_decomposed`, arXiv:2402.09353, Eq. 5) gives every output a trained magnitude m:
the weight is m (W + scale * a b) / |W + scale * a b|, norms over the inputs and, as in its
section 4.3 and in PEFT, without a gradient. `attach` computes m / | | once, from products as narrow
as the rank. Dropout needs a key, `attach(params, adapter, spec, key)`: a training step gives one,
and whoever samples, evaluates or compares with a reference gives none.

Why not `flax.nnx.LoRA` (looked at: 0.12.8): it wraps a module of one matrix [in, out] and
changes the model's definition; it has no scale, no stacked layers and no kernels of heads,
and would train through the module tree. Here the definition stays the same, and the
adapter is a plain tree: optimizers, checkpoints and shardings see nothing new.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nr.models.layers import drop
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
    dropout: probability that an entry of the adapter's input is 0 in a training step, as
      PEFT's lora_dropout; the frozen weight's input stays whole (under DoRA what the
      magnitudes add to its output is dropped too). Not for "unembedding", whose
      input the losses never have apart from the head.
    is_rank_stabilised: the scale is alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
    is_weight_decomposed: DoRA: outputs have trained magnitudes. Weight decay shrinks these
      too, and with them what the frozen weight computes: leave ".*/magnitude" out of it.
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
  is_weight_decomposed: bool = False
  init: str = "kaiming"

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    if not isinstance(self.rank, int) or self.rank < 1:
      raise ValueError(f"LoraSpec.rank={self.rank!r}: give a positive integer")
    if not (math.isfinite(self.alpha) and self.alpha > 0):
      raise ValueError(f"LoraSpec.alpha={self.alpha!r}: give a positive number")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"LoraSpec.dropout={self.dropout!r}: give a probability in [0, 1)")
    if self.init not in INITS:
      raise ValueError(unknown("LoraSpec.init", self.init, INITS))
    if not self.targets:
      raise ValueError("LoraSpec.targets=(): give at least one pattern, such as nr.models.lora.ATTENTION")

  @property
  def scale(self) -> float:
    """Factor of a b."""
    return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)

  @property
  def factors(self) -> tuple[str, ...]:
    """Names of the arrays that an adapted weight has."""
    return ("a", "b", "magnitude") if self.is_weight_decomposed else ("a", "b")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight W + scale * a b, or gain * (W + scale * a b), kept in its parts.

  Attributes:
    base: W, array or `QuantizedWeight`, with its summed axes S and kept axes O in any order.
    a: [S.., r], behind a layer axis when stacked.
    b: [r, O..], likewise.
    scale: factor of the product.
    summed_axes: S in W, from the end.
    gain: [O..] of DoRA, likewise; None: 1.
    dropout: probability that an entry of the adapter's input is dropped, given a key.
    key: of this weight's dropout, one a layer when stacked; None: nothing is dropped.
  """

  base: Any
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata=dict(static=True))
  summed_axes: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
  gain: jax.Array | None = None
  dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))
  key: jax.Array | None = None

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
    """Returns x W + scale * (x a) b, times the gain; the adapter's x with dropout where there is a key."""
    dropped = drop(x, self.dropout, self.key)
    inputs, output = equation.split("->")
    left, weight = inputs.split(",")
    summed = [name for name in weight if name not in output]
    kept = [name for name in weight if name in output]
    narrow = "".join(name for name in left if name not in summed) + "z"
    low = jnp.einsum(f"{left},{''.join(summed)}z->{narrow}", dropped, self.a.astype(x.dtype))
    low = jnp.einsum(
      f"{narrow},z{''.join(kept)}->{output}", low, self.b.astype(x.dtype), preferred_element_type=preferred
    )
    whole = contract(equation, x, self.base, preferred=preferred)
    if self.gain is None:
      return whole + self.scale * low
    gain = self.gain.astype(whole.dtype)  # Its axes are the last of the output.
    if dropped is x:
      return gain * (whole + self.scale * low)
    # PEFT's order: W reads x itself, and what the gain adds to W reads the dropped x.
    changed = (gain - 1) * contract(equation, dropped, self.base, preferred=preferred)
    return whole + changed + gain * (self.scale * low)

  def look_up(self, indices: jax.Array) -> jax.Array:
    """Refuses: tables of embeddings take no adapter here."""
    raise ValueError("an adapted weight is no table of embeddings; adapt an untied 'unembedding' instead")

  def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the weight as an array (for a head; kernels are never made)."""
    base = as_array(self.base).astype(jnp.float32)
    a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
    num_stacked = a.ndim + b.ndim - 2 - base.ndim  # 1 where both factors carry the layer axis
    rows = a.reshape(*a.shape[:num_stacked], -1, a.shape[-1])
    product = rows @ b.reshape(*b.shape[: num_stacked + 1], -1)
    product = product.reshape(*a.shape[:-1], *b.shape[num_stacked + 1 :])
    first = range(num_stacked, a.ndim - 1)
    whole = base + self.scale * jnp.moveaxis(product, first, self.summed_axes)
    if self.gain is not None:
      summed = [base.ndim + axis for axis in self.summed_axes]
      whole = jnp.expand_dims(self.gain.astype(jnp.float32), summed) * whole
    return whole.astype(dtype)


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
  if spec.dropout and any(path[-1] == "unembedding" for path in found):
    raise ValueError(
      f"LoraSpec.dropout={spec.dropout}: the head is read as a whole and has no input to drop from; leave "
      "'unembedding' out of the targets, or set dropout to 0"
    )
  return {path: found[path] for path in weights if path in found}


def _factor_shapes(path: tuple, shape: Sequence[Any], spec: LoraSpec, rank: Any) -> dict[str, tuple]:
  """Returns what a, b (and the magnitude) have for each axis of a weight, and `rank` for the narrow one."""
  summed_axes, core = kernel_axes(path)
  layers, axes = tuple(shape[: len(shape) - core]), range(-core, 0)
  summed = tuple(shape[axis] for axis in axes if axis in summed_axes)
  kept = tuple(shape[axis] for axis in axes if axis not in summed_axes)
  found = {"a": (*layers, *summed, rank), "b": (*layers, rank, *kept), "magnitude": (*layers, *kept)}
  return {name: found[name] for name in spec.factors}


def init_adapter(spec: LoraSpec, params: Mapping, key: jax.Array) -> dict:
  """Makes an adapter that changes nothing yet: a random, b zero.

  Args:
    spec: settings.
    params: of the model, arrays or (without DoRA) their shapes; the adapter has their
      layout. A weight's key depends on its path and layer, so both layouts begin alike.
    key: random key.

  Returns:
    {.. {"a": float32 [(N,) S.., r], "b": float32 [(N,) r, O..]}} at the path of each target,
    under DoRA with "magnitude": float32 [(N,) O..], the norms of the weight.

  Raises:
    ValueError: as `find_targets`.
  """
  adapter: dict = {}
  for path, weight in find_targets(spec, params).items():
    shapes = _factor_shapes(path, weight.shape, spec, spec.rank)
    keys = _keys_of(path, weight, key)
    is_stacked = keys.ndim == 1
    one = shapes["a"][1:] if is_stacked else shapes["a"]
    drawn = [_draw_a(spec, each, one) for each in (keys if is_stacked else [keys])]
    a = jnp.stack(drawn) if is_stacked else drawn[0]
    b = jnp.zeros(shapes["b"], jnp.float32)
    _put(adapter, (*path, "a"), a)
    _put(adapter, (*path, "b"), b)
    if spec.is_weight_decomposed:
      _put(adapter, (*path, "magnitude"), _norms(path, weight, a, b, spec.scale))
  return adapter


def _keys_of(path: tuple, weight: Any, key: jax.Array) -> jax.Array:
  """Returns the key of a weight, or one for each of its stacked layers: the same in both layouts."""
  name_key = jax.random.fold_in(key, _hash(_pattern_path(path)))
  if len(weight.shape) > kernel_axes(path)[1]:
    return jax.vmap(jax.random.fold_in, (None, 0))(name_key, jnp.arange(weight.shape[0]))
  return jax.random.fold_in(name_key, next((name for name in path if isinstance(name, int)), 0))


def _norms(path: tuple, weight: Any, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """Returns |W + scale * a b| over the summed axes, float32 [(N,) O..].

  From |W|^2 + 2 scale <a^T W, b> + scale^2 <a^T a b, b>, so that a b is never made.
  """
  summed_axes, core = kernel_axes(path)
  axes = "ijkl"[:core]
  summed = "".join(axes[core + axis] for axis in sorted(summed_axes))
  kept = "".join(name for name in axes if name not in summed)
  wide = as_array(weight).astype(jnp.float32)
  inner = jnp.einsum(f"...{summed}r,...{axes}->...r{kept}", a, wide)
  square = jnp.einsum(f"...{summed}r,...{summed}q->...rq", a, a)
  mixed = 2 * scale * inner + scale**2 * jnp.einsum(f"...rq,...q{kept}->...r{kept}", square, b)
  squares = (wide**2).sum(axis=tuple(summed_axes)) + (mixed * b).sum(axis=-1 - len(kept))
  return jnp.sqrt(jnp.maximum(squares, 1e-24))  # An output without weights has the magnitude 0.


def _hash(name: str) -> int:
  """Returns 32 bits that depend on a name alone."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _draw_a(spec: LoraSpec, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  if spec.init == "normal":
    return jax.random.normal(key, shape) / spec.rank
  bound = math.prod(shape[:-1]) ** -0.5
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def attach(params: Mapping, adapter: Mapping, spec: LoraSpec, key: jax.Array | None = None) -> dict:
  """Returns the parameters with a `LowRank` in the place of every adapted weight.

  Pure; makes no array as large as a weight.

  Args:
    params: of the model, arrays or quantised.
    adapter: a and b (and magnitude) at the paths of weights, in the layout of `params`.
    spec: for scale and dropout.
    key: of dropout, of one training step; None: nothing is dropped. Every weight and layer has
      its own, the same for both layouts.

  Raises:
    ValueError: an adapter of a weight that is not there or has another shape.
  """

  def keyed(path: tuple, weight: LowRank) -> LowRank:
    if key is None or not spec.dropout:
      return weight
    return dataclasses.replace(weight, key=_keys_of(path, weight.base, key))

  return _with_adapter(params, adapter, spec, keyed)


def merge(params: Mapping, adapter: Mapping, spec: LoraSpec) -> dict:
  """Returns parameters of the plain model that computes the same: W + scale * a b (under DoRA its magnitudes).

  Weights keep their type; quantised ones that are adapted become float32, since codes
  cannot hold the sum. Arguments and errors as in `attach`.
  """

  def settle(path: tuple, weight: LowRank) -> jax.Array:
    del path
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
      weight = settle(path, _low_rank(path, weight, found, spec))
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
  if kernel_axes(path) is None or set(factors) != set(spec.factors):
    raise ValueError(
      f"the adapter has {', '.join(factors)} at {name}: give {', '.join(spec.factors)} of a kernel or unembedding"
    )
  expected = _factor_shapes(path, weight.shape, spec, spec.rank)
  found = {each: tuple(factors[each].shape) for each in spec.factors}
  if found != expected:
    raise ValueError(
      f"adapter of {name}: {', '.join(found)} have shapes {tuple(found.values())}, a weight of {weight.shape} "
      f"and rank {spec.rank} need {tuple(expected.values())}"
    )
  gain = None
  if spec.is_weight_decomposed:
    fixed = jax.lax.stop_gradient((factors["a"], factors["b"]))
    gain = factors["magnitude"] / _norms(path, weight, *fixed, spec.scale)
  summed_axes = kernel_axes(path)[0]
  return LowRank(weight, factors["a"], factors["b"], spec.scale, summed_axes, gain, spec.dropout)


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
    for factor, found in _factor_shapes(path, names[path], spec, None).items():
      _put(tree, (*path, factor), found)
  return tree


def count_parameters(adapter: Mapping) -> int:
  """Returns how many numbers are trained."""
  return sum(leaf.size for leaf in jax.tree.leaves(adapter))
