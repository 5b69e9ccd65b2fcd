"""Low-rank adapters in the layout of Hugging Face's PEFT, both directions.

A folder of `adapter_config.json` and `adapter_model.safetensors`, with tensors such as
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, in] and .lora_B.weight
[out, r], with DoRA also .lora_magnitude_vector [out]. Names come from the name map of the
model's family. Pickled adapters (`adapter_model.bin`) are never opened. Needs `safetensors`
(extra [hub]), not PEFT.
"""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from nr.interchange import families, names
from nr.interchange.huggingface import read_json, safetensors_package
from nr.models import parameters
from nr.models.lora import LoraSpec, kernel_axes
from nr.models.transformer import Transformer, TransformerSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings under which an adapter is more, or less, than a product added to every layer's weight.
_PLAIN = {
  "peft_type": ("LORA",),
  "use_qalora": (False, None),
  "bias": ("none", None),
  "lora_bias": (False, None),
  "modules_to_save": (None, []),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "layers_to_transform": (None,),
  "layer_replication": (None,),
  "target_parameters": (None, []),
  "trainable_token_indices": (None,),
  "alora_invocation_tokens": (None,),
  "use_bdlora": (False, None),
  **{f"{kind}_config": (None,) for kind in ("arrow", "kasa", "monteclora", "velora")},
  # Other beginnings (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the weights under the adapter too.
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class _Module(NamedTuple):
  """A linear map that PEFT can adapt.

  Attributes:
    theirs: its name with `{layer}`, such as model.layers.{layer}.mlp.up_proj.
    paths: of our kernels that it holds; three for GPT-2's fused projection.
    shapes: of these kernels, without layers.
  """

  theirs: str
  paths: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]

  def names(self, num_layers: int) -> list[str]:
    """Their names in the file, without the factor's: one, or one a layer."""
    return names.Row(_PREFIX + self.theirs, self.paths).names(num_layers)


def _modules(spec: TransformerSpec) -> list[_Module]:
  """Returns every module that can be adapted, from the name map of the spec's family."""
  spec = spec.replace(layers="scan")
  shapes = jax.eval_shape(
    lambda key: parameters.split(Transformer(spec, rngs=nnx.Rngs(key)))[1], jax.random.key(0)
  )
  flat, found = names.flatten(shapes), []
  for row in families.family_of_spec(spec).table(spec):
    if not all(kernel_axes(tuple(path.split("/"))) for path in row.paths):
      continue
    layers = 1 if "{layer}" in row.theirs else 0
    kernels = tuple(flat[path].shape[layers:] for path in row.paths)
    found.append(_Module(row.theirs.removesuffix(".weight"), row.paths, kernels))
  return found


def _summed(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the sizes of the summed and of the kept axes of a kernel."""
  axes = [axis % len(shape) for axis in kernel_axes(tuple(path.split("/")))[0]]
  return (
    tuple(shape[axis] for axis in axes),
    tuple(size for axis, size in enumerate(shape) if axis not in axes),
  )


def load_peft(folder: str | pathlib.Path, spec: TransformerSpec) -> tuple[LoraSpec, dict]:
  """Reads an adapter that PEFT (or `save_peft`) wrote.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    spec: of the model it was made for.

  Returns:
    (settings, adapter): the targets are the very weights that the file has factors
    for; float32 NumPy arrays, layers stacked. Dropout is 0: it belongs to a training run.

  Raises:
    ImportError: `safetensors` is not installed.
    FileNotFoundError: a file is missing.
    ValueError: settings other than those of LoRA, rsLoRA and DoRA, or tensors that are missing,
      unknown or of a wrong shape; the message names them.
  """
  folder = pathlib.Path(folder)
  config = read_json(folder / CONFIG)
  _check_plain(config, folder)
  tensors = _read_tensors(folder)
  lora = LoraSpec(
    rank=config["r"],
    alpha=float(config["lora_alpha"]),
    is_rank_stabilised=bool(config.get("use_rslora", False)),
    is_weight_decomposed=bool(config.get("use_dora", False)),
  )
  adapter: dict = {}
  targets = []
  for module in _modules(spec):
    expected = module.names(spec.num_layers)
    present = [name for name in expected if f"{name}.lora_A.weight" in tensors]
    if not present:
      continue
    layers = []
    for name in expected:
      keys = _keys(name, lora)
      if missing := [key for key in keys.values() if key not in tensors]:
        raise ValueError(f"{folder / TENSORS}: {missing[0]} is missing; every layer needs all of its factors")
      layers.append({factor: np.asarray(tensors.pop(key), np.float32) for factor, key in keys.items()})
    _split_module(module, expected, layers, lora, adapter)
    targets += [re.escape(path) for path in module.paths]
  if tensors:
    shown = ", ".join(sorted(tensors)[:4])
    raise ValueError(
      f"{folder / TENSORS}: {shown} fits no linear map of this model; give the spec it was made for "
      "(adapters of embeddings are not read)"
    )
  if not targets:
    raise ValueError(f"{folder / TENSORS}: holds no factors; save the adapter again")
  return dataclasses.replace(lora, targets=tuple(targets)), adapter


def _keys(name: str, lora: LoraSpec) -> dict[str, str]:
  """Returns the names in the file of a module's factors, by ours."""
  theirs = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
  return {factor: f"{name}.{theirs[factor]}" for factor in lora.factors}


def _check_plain(config: Mapping[str, Any], folder: pathlib.Path) -> None:
  for field, plain in _PLAIN.items():
    if field in config and config[field] not in plain:
      raise ValueError(
        f"{folder / CONFIG}: {field} {config[field]!r} is not supported; merge the adapter with PEFT and read the model"
      )
  for field in ("r", "lora_alpha"):
    if not isinstance(config.get(field), int | float):
      raise ValueError(f"{folder / CONFIG}: field {field!r} is missing or no number")


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  if not (folder / TENSORS).is_file():
    hint = "; pickled adapters are never opened" if any(folder.glob("*.bin")) else ""
    raise FileNotFoundError(f"{folder}: has no {TENSORS}{hint}")
  try:
    tensors = safetensors_package().numpy.load_file(folder / TENSORS)
  except Exception as error:  # safetensors raises its own class, derived from Exception alone
    raise ValueError(f"{folder / TENSORS}: not a readable safetensors file ({error})") from error
  # PEFT stores a copy of an adapted head.
  copies = [name for name in tensors if name.endswith(".base_layer.weight")]
  if copies:
    logging.warning(
      "%s: %s is taken to be the base model's and left out", folder / TENSORS, ", ".join(copies)
    )
  return {name: tensor for name, tensor in tensors.items() if name not in copies}


def _split_module(
  module: _Module, stored: list[str], layers: list[dict[str, np.ndarray]], lora: LoraSpec, adapter: dict
) -> None:
  """Puts the factors of a module, all layers, into our tree."""
  sizes = [_summed(path, shape) for path, shape in zip(module.paths, module.shapes)]
  inputs, outputs = int(np.prod(sizes[0][0])), [int(np.prod(kept)) for _, kept in sizes]
  expected = {"a": (lora.rank, inputs), "b": (sum(outputs), lora.rank), "magnitude": (sum(outputs),)}
  for name, factors in zip(stored, layers):
    for factor, key in _keys(name, lora).items():
      if factors[factor].shape != expected[factor]:
        raise ValueError(
          f"{key}: has shape {factors[factor].shape} instead of {expected[factor]}; the adapter belongs to another "
          "model"
        )
  starts = np.cumsum([0, *outputs])
  for index, (path, (summed, kept)) in enumerate(zip(module.paths, sizes)):
    own = slice(starts[index], starts[index + 1])
    found = {
      "a": [each["a"].T.reshape(*summed, lora.rank) for each in layers],
      "b": [each["b"][own].T.reshape(lora.rank, *kept) for each in layers],
    }
    if lora.is_weight_decomposed:
      found["magnitude"] = [each["magnitude"][own].reshape(kept) for each in layers]
    for factor, values in found.items():
      whole = np.stack(values) if "{layer}" in module.theirs else np.ascontiguousarray(values[0])
      names.put(adapter, f"{path}/{factor}", whole)


def save_peft(
  folder: str | pathlib.Path,
  spec: TransformerSpec,
  lora: LoraSpec,
  adapter: Mapping[str, Any],
  base_model: str | None = None,
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads.

  Args:
    folder: made if absent; the two files are replaced.
    spec: of the model.
    lora: settings of the adapter.
    adapter: a and b (and magnitude), layers stacked or apart.
    base_model: name or path of the model, for PEFT's users.

  Raises:
    ImportError: `safetensors` is not installed.
    ValueError: no family computes what the spec does, or a weight that PEFT has no
      module for: GPT-2's query, key and value share one a there.
  """
  flat = names.flatten(parameters.stack_layers(adapter))
  family = families.family_of_spec(spec)
  tensors: dict[str, np.ndarray] = {}
  targets = []
  for module in _modules(spec):
    found = [path for path in module.paths if f"{path}/a" in flat]
    if not found:
      continue
    joined = _joined(module, found, flat, lora)
    for layer, name in enumerate(module.names(spec.num_layers)):
      for factor, key in _keys(name, lora).items():
        tensors[key] = np.ascontiguousarray(joined[factor][layer])
    targets.append(".".join(module.theirs.split(".")[-2:]))
  if not tensors:
    raise ValueError("the adapter has no factors of this model's weights; give the spec it was made for")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_package().numpy.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "r": lora.rank,
    "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
    "use_rslora": lora.is_rank_stabilised,
    "use_dora": lora.is_weight_decomposed,
    "target_modules": targets,
    "lora_dropout": lora.dropout,
    "bias": "none",
    "fan_in_fan_out": family.model_type == "gpt2",
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
  }
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _joined(
  module: _Module, found: list[str], flat: Mapping[str, Any], lora: LoraSpec
) -> dict[str, list[np.ndarray]]:
  """Returns lora_A [r, in], lora_B [out, r] and the magnitudes [out] of a module, one a layer."""

  def layers(path: str) -> np.ndarray:
    value = np.asarray(flat[path], np.float32)
    return value if "{layer}" in module.theirs else value[None]

  if len(found) < len(module.paths):
    raise ValueError(
      f"PEFT adapts {', '.join(module.paths)} together, and only {found[0]} has factors; merge instead"
    )
  first = layers(f"{found[0]}/a")
  if any(not np.array_equal(layers(f"{path}/a"), first) for path in found[1:]):
    raise ValueError(
      f"PEFT has one a for {', '.join(found)}, which have three here; merge the adapter and save the model instead"
    )
  outputs = [layers(f"{path}/b") for path in found]
  joined = {
    "a": [one.reshape(-1, lora.rank).T for one in first],
    "b": [
      np.concatenate([one[layer].reshape(lora.rank, -1) for one in outputs], axis=1).T
      for layer in range(len(first))
    ],
  }
  if lora.is_weight_decomposed:
    magnitudes = [layers(f"{path}/magnitude") for path in found]
    joined["magnitude"] = [
      np.concatenate([one[layer].reshape(-1) for one in magnitudes]) for layer in range(len(first))
    ]
  return joined
