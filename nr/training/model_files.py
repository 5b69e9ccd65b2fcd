"""Models on disk: parameters, their settings and the tokenizer they belong to.

One folder a model: parameters with stacked layers and a hash a leaf (see
`nr.training.checkpoints`), and its settings as JSON, from which the module is
built again. Nothing is unpickled and no code is loaded.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nr import names
from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoder, AdaptiveDecoderSpec
from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.reward import RewardModel, RewardModelSpec
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from nr.models.transformer import Transformer, TransformerSpec
from nr.training import artifacts, sharding


@dataclasses.dataclass(frozen=True)
class ConceptMixingModelSpec:
  """Settings of a whole CoCoMix model: its transformer and its concept path."""

  transformer: TransformerSpec
  concepts: ConceptMixingSpec

  def __post_init__(self):
    self.concepts.check_model(self.transformer)

  def to_dict(self) -> dict[str, Any]:
    """Returns the settings as plain values that JSON can hold."""
    return {"transformer": self.transformer.to_dict(), "concepts": self.concepts.to_dict()}

  @classmethod
  def from_dict(cls, settings: dict[str, Any]) -> Self:
    """Makes the settings from plain values; raises ValueError for an unknown field."""
    return cls(
      TransformerSpec.from_dict(settings["transformer"]), ConceptMixingSpec.from_dict(settings["concepts"])
    )


ModelSpec = (
  TransformerSpec | ConceptMixingModelSpec | SparseAutoencoderSpec | AdaptiveDecoderSpec | RewardModelSpec
)

KINDS = {
  "transformer": TransformerSpec,
  "concept_mixing": ConceptMixingModelSpec,
  "sparse_autoencoder": SparseAutoencoderSpec,
  "adaptive_decoder": AdaptiveDecoderSpec,
  "reward": RewardModelSpec,
}


class Model(NamedTuple):
  """A model read from disk, ready for `nr.models.parameters.merge`.

  Attributes:
    spec: its settings.
    graphdef: its definition.
    params: nested dictionary of arrays, in the layout that the spec asks for.
    fingerprint: hash of the parameters, hexadecimal.
    metadata: what was saved with it.
  """

  spec: Any
  graphdef: Any
  params: Any
  fingerprint: str
  metadata: dict[str, Any]


def build_model(spec: ModelSpec, key: jax.Array) -> nnx.Module:
  """Returns the module that a spec describes, with initial parameters from `key`."""
  rngs = nnx.Rngs(params=key)
  if isinstance(spec, TransformerSpec):
    return Transformer(spec, rngs=rngs)
  if isinstance(spec, ConceptMixingModelSpec):
    return ConceptMixingTransformer(spec.transformer, spec.concepts, rngs=rngs)
  if isinstance(spec, AdaptiveDecoderSpec):
    return AdaptiveDecoder(spec, rngs=rngs)
  if isinstance(spec, RewardModelSpec):
    return RewardModel(spec, rngs=rngs)
  return SparseAutoencoder(spec, rngs=rngs)


def graphdef_of(spec: ModelSpec) -> Any:
  """Returns the definition of the module that a spec describes, without making its arrays."""
  return parameters.split(nnx.eval_shape(lambda: build_model(spec, jax.random.key(0))))[0]


def axes_of(spec: ModelSpec) -> Any:
  """Returns the logical axis names of its parameters, without making its arrays."""
  return parameters.logical_axes(lambda: build_model(spec, jax.random.key(0)))


def layout_of(spec: ModelSpec) -> str:
  """Returns "scan" (stacked layers) or "unroll"; models without layers count as stacked."""
  transformer = getattr(spec, "transformer", spec)
  return getattr(transformer, "layers", "scan")


def save_model(directory: pathlib.Path, spec: ModelSpec, params: Any, tokenizer: str) -> str:
  """Writes a model folder.

  Args:
    directory: where to; replaced if it exists.
    spec: settings of one of the known kinds.
    params: its parameters, in either layout.
    tokenizer: fingerprint of the tokenizer that the model reads.

  Returns:
    Hash of the parameters, hexadecimal, the same for both layouts.
  """
  kind = next(name for name, spec_class in KINDS.items() if isinstance(spec, spec_class))
  metadata = {"kind": kind, "spec": spec.to_dict(), "tokenizer": tokenizer}
  return artifacts.save_tree(directory, params, metadata)


def load_model(
  directory: pathlib.Path, tokenizer: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> Model:
  """Reads a model folder, its integrity checked, in the layout that it was trained in.

  Args:
    directory: what `save_model` wrote.
    tokenizer: fingerprint that must match the saved one, unless None.
    mesh: devices that the parameters are split over, no device holding all of them; None:
      they go to the first one.

  Raises:
    ValueError: another tokenizer or an unknown kind.
    CheckpointError: nothing there, or damaged files.
  """

  def placed(metadata: dict[str, Any]) -> Any:
    return sharding.shardings(axes_of(_saved_spec(directory, metadata)), mesh)

  params, metadata = artifacts.load_tree(directory, None if mesh is None else placed)
  if tokenizer is not None and metadata["tokenizer"] != tokenizer:
    raise ValueError(
      f"{directory} was trained with tokenizer {metadata['tokenizer'][:12]}, "
      f"this run uses {tokenizer[:12]}; give the tokenizer it was trained with"
    )
  fingerprint = artifacts.tree_hash(params)
  spec = _saved_spec(directory, metadata)
  if layout_of(spec) == "unroll":
    params = parameters.unstack_layers(params)
  return Model(spec, graphdef_of(spec), jax.tree.map(jnp.asarray, params), fingerprint, metadata)


def _saved_spec(directory: pathlib.Path, metadata: dict[str, Any]) -> ModelSpec:
  if metadata["kind"] not in KINDS:
    raise ValueError(names.unknown(f"{directory}: kind", metadata["kind"], KINDS))
  return KINDS[metadata["kind"]].from_dict(metadata["spec"])
