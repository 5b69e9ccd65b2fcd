"""Checkpoints of the CoCoMix reference (facebookresearch/RAM, projects/cocomix), both directions.

The reference is a Hugging Face GPT-2 with a concept path among its parameters: a folder of `config.json`
and safetensors as its `save_pretrained` writes it. Its config names neither the layer of the insertion
nor the number of concepts mixed; both are arguments of its class, and here. Folders written by
`save_cocomix_reference` say them in the config too, under the names of those arguments, which the
reference's config class keeps and its model ignores. Mode "mix_only" is the same model, trained without
the concept loss; it comes back as "cocomix". Pickled weights are never opened.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from nr.interchange import families, names
from nr.interchange.huggingface import open_folder, read_json, write_folder
from nr.interchange.names import TRANSPOSE, Row
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.transformer import TransformerSpec

ARCHITECTURE = "GPT2CoCoMixLMHeadModel"
FAMILY = families.FAMILIES["gpt2"]

# torch.nn.Linear stores [out, in]: the predictor [C, D], the compression [D, C].
CONCEPTS = (
  Row("transformer.pre_bias", "concepts/pre_bias"),
  Row("transformer.concept_predictor.weight", "concepts/head/kernel", TRANSPOSE),
  Row("transformer.concept_predictor.bias", "concepts/head/bias"),
  Row("transformer.compress_layer.weight", "concepts/compression/kernel", TRANSPOSE),
  Row("transformer.compress_layer.bias", "concepts/compression/bias"),
)
# Our field -> argument of the reference's class.
_ARGUMENTS = {"insert_at": "insert_layer_idx", "top_k": "concept_num", "num_concepts": "concept_dim"}


def load_cocomix_reference(
  folder: str | pathlib.Path, *, insert_at: int | None = None, top_k: int | None = None, **settings: Any
) -> tuple[TransformerSpec, ConceptMixingSpec, dict]:
  """Reads a checkpoint of the reference, or one that `save_cocomix_reference` wrote.

  Args:
    folder: holds `config.json` and `model.safetensors`, or shards and their index.
    insert_at: block before which concepts are inserted, from 0; the config's `insert_layer_idx` when
      None (a checkpoint of the reference itself has none).
    top_k: concepts mixed at a position; the config's `concept_num` when None.
    **settings: fields of TransformerSpec to set otherwise than the config says, as
      `nr.interchange.huggingface.load_huggingface` takes them.

  Returns:
    (transformer, concept path, parameters of ConceptMixingTransformer): nested dictionary of NumPy
    arrays of `param_dtype` on the host, layers stacked.

  Raises:
    ImportError: `safetensors` is not installed.
    FileNotFoundError: a file is missing.
    ValueError: another model type, settings that are missing or contradict the config, or tensors that
      are missing, unknown or of a wrong shape; the message names them.
  """
  folder = pathlib.Path(folder)
  config = read_json(folder / "config.json")
  spec, tensors = open_folder(folder, settings)
  if tensors.family is not FAMILY or not spec.tied_head:
    raise ValueError(
      f"{folder / 'config.json'}: model_type {tensors.family.model_type!r}, tied_head={spec.tied_head}; the "
      "CoCoMix reference is a GPT-2 whose head is its token embedding"
    )
  path = {
    "insert_at": _argument(config, "insert_at", insert_at, folder),
    "top_k": _argument(config, "top_k", top_k, folder),
  }
  tensors.drop_tied_head(FAMILY.table(spec))
  params = names.to_ours(_table(spec), tensors, spec, spec.param_dtype)
  num_concepts = params["concepts"]["head"]["bias"].shape[0]
  _argument(config, "num_concepts", num_concepts, folder)
  concepts = ConceptMixingSpec(num_concepts=num_concepts, **path)
  concepts.check_model(spec)
  names.check_shapes(params, _expected(spec, concepts), str(folder))
  return spec, concepts, params


def save_cocomix_reference(
  folder: str | pathlib.Path, spec: TransformerSpec, concepts: ConceptMixingSpec, params: Mapping[str, Any]
) -> None:
  """Writes `config.json` and `model.safetensors` under the reference's names.

  Its class loads them with `from_pretrained(folder, C, insert_at, top_k)`.

  Args:
    folder: made if absent; the two files are replaced.
    spec: settings of the transformer, a GPT-2 with tied head.
    concepts: settings of the concept path.
    params: of `ConceptMixingTransformer`, layers stacked or one entry a layer.

  Raises:
    ImportError: `safetensors` is not installed.
    ValueError: the reference cannot compute what the settings say, or the parameters are not theirs.
  """
  family = families.family_of_spec(spec)
  if family is not FAMILY or not spec.tied_head:
    raise ValueError(
      f"model_type {family.model_type!r}, tied_head={spec.tied_head}: the CoCoMix reference is a GPT-2 whose head "
      "is its token embedding; other models cannot be written under its names"
    )
  allowed = {"mode": ("cocomix", "mix_only"), "norm": ("reference",), "insert_every": (1,)}
  for field, values in allowed.items():
    if getattr(concepts, field) not in values:
      raise ValueError(
        f"ConceptMixingSpec.{field}={getattr(concepts, field)!r}: the CoCoMix reference computes "
        f"{' or '.join(map(str, values))} only"
      )
  params = parameters.stack_layers(params)
  names.check_shapes(params, _expected(spec, concepts), "the parameters")
  tensors = names.to_theirs(_table(spec), params, spec)
  arguments = {theirs: getattr(concepts, ours) for ours, theirs in _ARGUMENTS.items()}
  write_folder(pathlib.Path(folder), FAMILY, spec, tensors, {"architectures": [ARCHITECTURE], **arguments})


def _table(spec: TransformerSpec) -> names.Table:
  return (*names.prefixed(FAMILY.table(spec), ours="transformer/"), *CONCEPTS)


def _argument(config: Mapping[str, Any], field: str, given: int | None, folder: pathlib.Path) -> int:
  """Returns a setting that is given, or that the config says; ValueError for neither, or for two that differ."""
  theirs = _ARGUMENTS[field]
  said = config.get(theirs)
  if given is None and said is None:
    raise ValueError(
      f"{folder / 'config.json'} has no {theirs!r}, as in checkpoints of the reference; give {field}=..., "
      "the value that the model was trained with"
    )
  if given is not None and said is not None and given != said:
    raise ValueError(
      f"{folder / 'config.json'}: {theirs} is {said}, yet {field} is {given}; which one is it?"
    )
  return said if given is None else given


def _expected(spec: TransformerSpec, concepts: ConceptMixingSpec) -> dict:
  """The shapes of the parameters, layers stacked, without making them."""
  stacked = dataclasses.replace(spec, layers="scan")

  def build(key: jax.Array) -> dict:
    return parameters.split(ConceptMixingTransformer(stacked, concepts, rngs=nnx.Rngs(key)))[1]

  return jax.eval_shape(build, jax.random.key(0))
