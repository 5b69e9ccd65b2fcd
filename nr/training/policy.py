"""What of a model is trained: all of it, or an adapter on fixed weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.models import parameters
from nr.training.model_files import ModelSpec, axes_of, build_model, graphdef_of

PyTree = Any


class Policy(NamedTuple):
  """A model under fine-tuning, split into what changes and what does not.

  Attributes:
    spec: settings of the model.
    graphdef: its definition, for `nr.models.parameters.merge`.
    start: the trained tree to begin from, in the layout of the spec.
    axes: logical axis names of `start`.
    fixed: arrays that `assemble` reads and training never touches; {} when all is trained.
    fixed_axes: logical axis names of `fixed`.
    assemble: (trained tree, fixed) -> the parameters of the model. Pure.
    base: fixed -> the parameters of the model before training, or None where they are
      not kept. An adapter's base is there for free, and serves as the reference.
    init: key -> another trained tree.
  """

  spec: ModelSpec
  graphdef: Any
  start: PyTree
  axes: PyTree
  fixed: PyTree
  fixed_axes: PyTree
  assemble: Callable[[PyTree, PyTree], PyTree]
  base: Callable[[PyTree], PyTree] | None
  init: Callable[[jax.Array], PyTree]


def full_policy(spec: ModelSpec, params: PyTree) -> Policy:
  """Returns the policy that trains every parameter.

  Args:
    spec: settings of the model; `layers` is the layout trained in.
    params: its parameters, in either layout; made float32, the type of the master copy.
  """
  return Policy(
    spec=spec,
    graphdef=graphdef_of(spec),
    start=_in_layout(spec, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)),
    axes=axes_of(spec),
    fixed={},
    fixed_axes={},
    assemble=lambda params, fixed: params,
    base=None,
    init=lambda key: parameters.split(build_model(spec, key))[1],
  )


def _in_layout(spec: ModelSpec, params: PyTree) -> PyTree:
  """Returns parameters stacked or apart, as the spec asks."""
  if getattr(spec, "layers", "scan") == "unroll":
    return parameters.unstack_layers(params)
  return parameters.stack_layers(params)
