"""The first blocks of a network as a network: self-drafting without training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from nr.generation.language_models import Network
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingTransformer
from nr.models.transformer import Transformer


def early_exit(network: Network, num_blocks: int) -> Network:
  """Returns the network of the first blocks, the final norm and the output head: a drafter for free.

  Parameters of the unrolled layout are shared, stacked ones sliced (a copy). A
  concept model keeps its concepts, and its intervention, if the exit lies above them.

  Args:
    network: the target.
    num_blocks: how many blocks are kept.

  Raises:
    ValueError: when that is not 1 to N - 1.

  Source: our choice; self-speculation without any training.
  """
  model, params = network.model(), network.params
  spec = model.spec
  if not 0 < num_blocks < spec.num_layers:
    raise ValueError(f"num_blocks={num_blocks}: give 1 to {spec.num_layers - 1}, of {spec.num_layers} blocks")
  spec = dataclasses.replace(spec, num_layers=num_blocks)
  has_concepts = isinstance(model, ConceptMixingTransformer)
  if has_concepts and num_blocks > model.concept_spec.insert_at:
    concept_spec = model.concept_spec
    cut = {**params, "transformer": _first_blocks(params["transformer"], num_blocks)}
    graphdef = _definition(lambda: ConceptMixingTransformer(spec, concept_spec, rngs=nnx.Rngs(0)))
    intervention = network.intervention
  else:
    cut = _first_blocks(params["transformer"] if has_concepts else params, num_blocks)
    graphdef, intervention = _definition(lambda: Transformer(spec, rngs=nnx.Rngs(0))), None
  return Network(graphdef, cut, intervention, network.intervene_on)


def _first_blocks(params: Any, num_blocks: int) -> dict:
  blocks = params["blocks"]
  if parameters.is_unrolled(blocks):
    blocks = {index: blocks[index] for index in range(num_blocks)}
  else:
    blocks = jax.tree.map(lambda leaf: leaf[:num_blocks], blocks)
  return {**params, "blocks": blocks}


def _definition(build: Callable[[], nnx.Module]) -> Any:
  return nnx.split(jax.eval_shape(build))[0]
