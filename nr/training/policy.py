"""What of a model is trained: all of it, or an adapter on fixed weights."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.models import lora, parameters
from nr.models.weight_quantization import QuantizedWeight
from nr.training.model_files import ModelSpec, axes_of, build_model, graphdef_of

PyTree = Any
# The model splits the step's key for its own dropout; this number is no layer's.
_ADAPTER_STREAM = 2**32 - 2


class Policy(NamedTuple):
  """A model under fine-tuning, split into what changes and what does not.

  Attributes:
    spec: settings of the model.
    graphdef: its definition, for `nr.models.parameters.merge`.
    start: the trained tree to begin from, in the layout of the spec; None: what `init` makes.
    axes: logical axis names of `start`.
    fixed: arrays that `assemble` reads and training never touches; {} when all is trained.
    fixed_axes: logical axis names of `fixed`.
    assemble: (trained tree, fixed, key=None) -> the parameters of the model. Pure. With
      a key the adapter drops entries of its inputs; without one, as whoever samples,
      evaluates or compares reads the model, it drops none.
    base: fixed -> the parameters of the model before training, or None where they are
      not kept. An adapter's base is there for free, and serves as the reference.
    init: key -> another trained tree.
    dropout: of the adapter; a method that trains with it gives `assemble` a key.
  """

  spec: ModelSpec
  graphdef: Any
  start: PyTree | None
  axes: PyTree
  fixed: PyTree
  fixed_axes: PyTree
  assemble: Callable[..., PyTree]
  base: Callable[[PyTree], PyTree] | None
  init: Callable[[jax.Array], PyTree]
  dropout: float = 0.0

  def adapter_key(self, key: jax.Array) -> jax.Array | None:
    """Returns the key for `assemble` of a training step, independent of the model's own; None without dropout."""
    return jax.random.fold_in(key, _ADAPTER_STREAM) if self.dropout else None


def new_policy(spec: ModelSpec) -> Policy:
  """Returns the policy that trains every parameter of a new model.

  Args:
    spec: settings of the model.
  """
  return Policy(
    spec=spec,
    graphdef=graphdef_of(spec),
    start=None,
    axes=axes_of(spec),
    fixed={},
    fixed_axes={},
    assemble=lambda params, fixed, key=None: params,
    base=None,
    init=lambda key: parameters.split(build_model(spec, key))[1],
  )


def full_policy(spec: ModelSpec, params: PyTree) -> Policy:
  """Returns the policy that trains every parameter of a given model.

  Args:
    spec: settings of the model; `layers` is the layout trained in.
    params: its parameters, in either layout; made float32, the type of the master copy.

  Raises:
    ValueError: quantised parameters.
  """
  if any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
    raise ValueError(
      "params are quantised, and codes cannot be trained; use lora_policy, or whole parameters"
    )
  start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
  return new_policy(spec)._replace(start=_in_layout(spec, start))


def lora_policy(spec: ModelSpec, params: PyTree, adapter: lora.LoraSpec, key: jax.Array) -> Policy:
  """Returns the policy that trains a low-rank adapter on fixed weights.

  Args:
    spec: settings of the model; `layers` is the layout trained in.
    params: its parameters, in either layout and any type, quantised or not.
    adapter: settings of the adapter.
    key: random key of its first values.

  Raises:
    ValueError: targets that match nothing, or what cannot be adapted.
  """
  fixed = _in_layout(spec, jax.tree.map(jnp.asarray, params))
  axes = axes_of(spec)
  # DoRA's magnitudes begin as norms of the weights themselves.
  known = fixed if adapter.is_weight_decomposed else jax.eval_shape(lambda: fixed)
  return Policy(
    spec=spec,
    graphdef=graphdef_of(spec),
    start=lora.init_adapter(adapter, fixed, key),
    axes=lora.adapter_axes(adapter, fixed, axes),
    fixed=fixed,
    fixed_axes=_quantized_axes(axes, fixed),
    assemble=lambda trained, fixed, key=None: lora.attach(fixed, trained, adapter, key),
    base=lambda fixed: fixed,
    init=lambda key: lora.init_adapter(adapter, known, key),
    dropout=adapter.dropout,
  )


def _quantized_axes(axes: PyTree, params: PyTree) -> PyTree:
  """Returns logical axis names for parameters of which some are quantised."""

  def name(leaf: Any, names: tuple[str | None, ...]) -> Any:
    if not _is_quantized(leaf):
      return names

    # Bytes of 4-bit pairs and scales of groups are fewer than the axis has entries.
    def fitting(array: jax.Array) -> tuple[str | None, ...]:
      return tuple(
        name if size == whole else None for name, size, whole in zip(names, array.shape, leaf.shape)
      )

    return dataclasses.replace(leaf, codes=fitting(leaf.codes), scales=fitting(leaf.scales))

  return jax.tree.map(name, params, axes, is_leaf=_is_quantized)


def _is_quantized(node: Any) -> bool:
  return isinstance(node, QuantizedWeight)


def _in_layout(spec: ModelSpec, params: PyTree) -> PyTree:
  """Returns parameters stacked or apart, as the spec asks."""
  if getattr(spec, "layers", "scan") == "unroll":
    return parameters.unstack_layers(params)
  return parameters.stack_layers(params)
