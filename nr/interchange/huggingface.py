"""Hugging Face checkpoints of the GPT-2, Llama, Qwen and Gemma families, both directions.

A checkpoint is a folder of `config.json` and safetensors, in one file or in
shards with an index. Pickled weights (`pytorch_model.bin`) are never opened.
Needs the `safetensors` package (extra [hub]), neither torch nor transformers.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from nr.interchange import families, names
from nr.models import parameters
from nr.models.reward import RewardModelSpec
from nr.models.transformer import Transformer, TransformerSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SCORE = "score.weight"


def load_huggingface(folder: str | pathlib.Path, **settings) -> tuple[TransformerSpec, dict]:
  """Reads a checkpoint that `transformers` (or `save_huggingface`) wrote.

  Args:
    folder: holds `config.json` and `model.safetensors`, or shards and their
      `model.safetensors.index.json`.
    **settings: fields of TransformerSpec to set otherwise than the config says
      (`layers`, `dtype`, `param_dtype`, `dropout`, ...). Dropout is 0 unless
      given: it belongs to a training run, not to a model.

  Returns:
    (spec, parameters): nested dictionary of NumPy arrays of `param_dtype` on
    the host, layers stacked.

  Raises:
    ImportError: `safetensors` is not installed.
    FileNotFoundError: a file is missing.
    ValueError: a model type or setting that is not supported, or tensors that
      are missing, unknown or of a wrong shape; the message names them.
  """
  spec, tensors = open_folder(pathlib.Path(folder), settings)
  return spec, _read_transformer(spec, tensors, folder)


def load_huggingface_reward_model(folder: str | pathlib.Path, **settings) -> tuple[RewardModelSpec, dict]:
  """Reads a reward model: a sequence classifier of one label, such as `LlamaForSequenceClassification`.

  Args:
    folder: as `load_huggingface` takes it, with a tensor "score.weight" [1, D].
    **settings: fields of TransformerSpec, likewise.

  Returns:
    (spec, parameters) of `nr.models.reward.RewardModel`, layers stacked, on the host.

  Raises:
    ImportError, FileNotFoundError: as `load_huggingface`.
    ValueError: as `load_huggingface`, or no head of one label.
  """
  # The output head of the language model is gone; a tied one takes no parameters.
  spec, tensors = open_folder(pathlib.Path(folder), {**settings, "tied_head": True})
  head_1D = tensors.take(_SCORE)
  if head_1D is None or head_1D.shape != (1, spec.model_dim):
    found = "is missing" if head_1D is None else f"has shape {head_1D.shape}"
    raise ValueError(
      f"{folder}: tensor {_SCORE} {found}; give a sequence classifier of one label, [1, {spec.model_dim}]"
    )
  params = {"transformer": _read_transformer(spec, tensors, folder)}
  params["reward"] = {"kernel": head_1D.T.astype(spec.param_dtype)}
  return RewardModelSpec(spec), params


def open_folder(folder: pathlib.Path, settings: dict) -> tuple[TransformerSpec, "Tensors"]:
  """Opens a checkpoint folder without reading its tensors.

  Args:
    folder: holds `config.json` and safetensors.
    settings: fields of TransformerSpec to set otherwise than the config says.

  Raises:
    ImportError, FileNotFoundError, ValueError: as `load_huggingface`.
  """
  config = read_json(folder / "config.json")
  family = families.family_of_config(config)
  try:
    spec = family.to_spec(config)
  except KeyError as error:
    raise ValueError(f"{folder / 'config.json'}: field {error} is missing") from error
  return dataclasses.replace(spec, **settings), Tensors(folder, family)


def _read_transformer(spec: TransformerSpec, tensors: "Tensors", folder: Any) -> dict:
  table = tensors.family.table(spec)
  if spec.tied_head:
    tensors.drop_tied_head(table)
  params = names.to_ours(table, tensors, spec, spec.param_dtype)
  names.check_shapes(params, _expected(spec), str(folder))
  return params


def save_huggingface(folder: str | pathlib.Path, spec: TransformerSpec, params: Mapping[str, Any]) -> None:
  """Writes `config.json` and `model.safetensors`, which `transformers` loads.

  Args:
    folder: made if absent; the two files are replaced.
    spec: the model's settings; the family is found from them.
    params: the parameter tree, layers stacked or one entry a layer.

  Raises:
    ImportError: `safetensors` is not installed.
    ValueError: no family computes what the spec does, or the parameters are
      not the spec's.
  """
  family = families.family_of_spec(spec)
  params = parameters.stack_layers(params)
  names.check_shapes(params, _expected(spec), "the parameters")
  tensors = names.to_theirs(family.table(spec), params, spec)
  write_folder(pathlib.Path(folder), family, spec, tensors, {"architectures": [family.architecture]})


def save_huggingface_reward_model(
  folder: str | pathlib.Path,
  spec: RewardModelSpec,
  params: Mapping[str, Any],
  pad_token_id: int | None = None,
) -> None:
  """Writes a reward model as a sequence classifier of one label, which `transformers` loads.

  Args:
    folder: made if absent; the two files are replaced.
    spec: the model's settings.
    params: of `nr.models.reward.RewardModel`, in either layout; an output head is left out.
    pad_token_id: id of padding: `transformers` finds a text's last token by it, and
      takes one text at a time without it.

  Raises:
    ImportError, ValueError: as `save_huggingface`.
  """
  trunk = dataclasses.replace(spec.transformer, tied_head=True)
  family = families.family_of_spec(trunk)
  stacked = parameters.stack_layers(params)
  transformer = {name: leaf for name, leaf in stacked["transformer"].items() if name != "unembedding"}
  names.check_shapes(transformer, _expected(trunk), "the parameters")
  tensors = names.to_theirs(family.table(trunk), transformer, trunk)
  tensors[_SCORE] = np.ascontiguousarray(np.asarray(stacked["reward"]["kernel"]).T)
  architecture = re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", family.architecture)
  labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": pad_token_id}
  write_folder(pathlib.Path(folder), family, trunk, tensors, {"architectures": [architecture], **labels})


def write_folder(
  folder: pathlib.Path,
  family: families.Family,
  spec: TransformerSpec,
  tensors: dict[str, np.ndarray],
  settings: dict[str, Any],
) -> None:
  """Writes the two files of a checkpoint.

  Args:
    folder: made if absent.
    family: of the transformer.
    spec: its settings.
    tensors: by the family's full names.
    settings: further fields of `config.json`, `architectures` among them.
  """
  safetensors_numpy = safetensors_package().numpy
  folder.mkdir(parents=True, exist_ok=True)
  # transformers refuses files whose metadata do not say "pt": its names and layouts, not torch's pickles.
  safetensors_numpy.save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})
  config = {
    **settings,
    **family.to_config(spec),
    "model_type": family.model_type,
    "dtype": str(next(iter(tensors.values())).dtype),
    "bos_token_id": None,
    "eos_token_id": None,
  }
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class Tensors(Mapping):
  """The tensors of a folder under the family's full names, read when asked for."""

  def __init__(self, folder: pathlib.Path, family: families.Family):
    self._open = safetensors_package().safe_open
    self._places: dict[str, tuple[pathlib.Path, str]] = {}
    self._handles: dict[pathlib.Path, Any] = {}
    self.family = family
    for path in _files(folder):
      for stored in self._handle(path).keys():
        name = self._full_name(stored)
        if name in self._places:
          raise ValueError(f"{path}: tensor {stored} is stored twice in {folder}")
        if not re.fullmatch(family.ignored, name):
          self._places[name] = (path, stored)

  def take(self, name: str) -> np.ndarray | None:
    """Returns a tensor that is no longer counted among the folder's; None where there is none."""
    tensor = self[name] if name in self._places else None
    self._places.pop(name, None)
    return tensor

  def drop_tied_head(self, table: names.Table) -> None:
    """Forgets a stored copy of the token embedding; ValueError when it is no copy."""
    head = families.HEAD.theirs
    if head not in self._places:
      return
    embedding = next(row.theirs for row in table if row.ours == "token_embedding")
    if embedding in self._places and not np.array_equal(self[head], self[embedding]):
      raise ValueError(
        f"{head} differs from {embedding}, yet config.json says tie_word_embeddings; "
        "set it to false there, or pass tied_head=False"
      )
    del self._places[head]

  def __getitem__(self, name: str) -> np.ndarray:
    path, stored = self._places[name]
    return self._handle(path).get_tensor(stored)

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def _full_name(self, stored: str) -> str:
    """Base models are saved without the prefix."""
    prefix = self.family.prefix
    return stored if stored.startswith((prefix, families.HEAD.theirs, _SCORE)) else prefix + stored

  def _handle(self, path: pathlib.Path) -> Any:
    if path not in self._handles:
      try:
        self._handles[path] = self._open(path, "np")
      except FileNotFoundError:
        raise
      except Exception as error:  # safetensors raises its own class, derived from Exception alone
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    return self._handles[path]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a folder: one, or the shards that its index names."""
  if (folder / _INDEX).is_file():
    weight_map = read_json(folder / _INDEX).get("weight_map", {})
    shards = sorted(set(weight_map.values()))
    for shard in shards:
      if pathlib.Path(shard).name != shard:
        raise ValueError(f"{folder / _INDEX}: shard {shard!r} is not a file name inside the folder")
      if not (folder / shard).is_file():
        raise FileNotFoundError(f"{folder / shard}: shard named by {_INDEX} is missing")
    return [folder / shard for shard in shards]
  if (folder / _SINGLE).is_file():
    return [folder / _SINGLE]
  hint = ""
  if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
    hint = "; pickled weights are never opened, convert them to safetensors first"
  raise FileNotFoundError(f"{folder}: has neither {_SINGLE} nor {_INDEX}{hint}")


def read_json(path: pathlib.Path) -> dict:
  """Returns the object in a JSON file; FileNotFoundError or ValueError naming the file otherwise."""
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: holds a {type(content).__name__} instead of an object")
  return content


def safetensors_package() -> Any:
  """Imports `safetensors`; ImportError naming the extra that brings it."""
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ImportError("Hugging Face checkpoints need `safetensors`: pip install nr[hub]") from error
  return safetensors


def _expected(spec: TransformerSpec) -> dict:
  """The shapes of the spec's parameters, layers stacked, without making them."""
  spec = dataclasses.replace(spec, layers="scan")

  def build(key: jax.Array) -> dict:
    return parameters.split(Transformer(spec, rngs=nnx.Rngs(key)))[1]

  return jax.eval_shape(build, jax.random.key(0))
