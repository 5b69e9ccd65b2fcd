"""Writes sparse autoencoders in the layouts of OpenAI, sparsify and SAELens (see `sae` for what they are).

What a layout has no word for is refused by name. Parameters keep their type. Needs `safetensors` (extra
[hub]).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nr.interchange import names
from nr.interchange.huggingface import safetensors_package
from nr.interchange.sae_layouts import (
  CONFIG,
  EPSILON,
  OPENAI,
  SAELENS,
  SAELENS_NAMES,
  SAELENS_NORMALISATIONS,
  SAELENS_TENSORS,
  SPARSIFY,
  SPARSIFY_TENSORS,
  Row,
  shapes_of,
)
from nr.models.sparse_autoencoder import SparseAutoencoderSpec

# Of a version whose configs have today's layout; older ones are converted by SAELens and by us.
_SAELENS_VERSION = "6.0.0"


def save_openai(path: str | pathlib.Path, spec: SparseAutoencoderSpec, params: Mapping[str, Any]) -> None:
  """Writes a .safetensors file with OpenAI's names; its metadata hold what they keep beside the tensors.

  `Autoencoder.from_state_dict` takes the tensors with "activation" and "activation_state_dict" added.

  Raises:
    ImportError: `safetensors` is not installed.
    ValueError: settings that their file cannot say, by name.
  """
  normalisation = {"topk": "layer_norm_unbiased", "relu": "none"}
  _check_can_say("OpenAI's layout", spec, arch=tuple(normalisation), decoder_norm=("unit",))
  _check_can_say(
    "OpenAI's layout",
    spec,
    normalisation=(normalisation[spec.arch],),
    epsilon=(EPSILON,),
    subtract_pre_bias=(True,),
  )
  metadata = {"activation": "ReLU"}
  if spec.arch == "topk":
    metadata = {"activation": "TopK", "k": str(spec.k), "postact_fn": "ReLU"}
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  safetensors_package().numpy.save_file(_to_theirs(OPENAI, spec, params), path, metadata=metadata)


def save_sparsify(folder: str | pathlib.Path, spec: SparseAutoencoderSpec, params: Mapping[str, Any]) -> None:
  """Writes a folder that sparsify's `SparseCoder.load_from_disk` opens.

  Raises:
    ImportError, ValueError: as `save_openai`.
  """
  _check_can_say(
    "sparsify's layout",
    spec,
    arch=("topk",),
    normalisation=("none",),
    decoder_norm=("unit",),
    subtract_pre_bias=(True,),
  )
  config = {
    "activation": "topk",
    "expansion_factor": 32,  # read only where num_latents is 0
    "normalize_decoder": True,
    "num_latents": spec.num_latents,
    "k": spec.k,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": spec.model_dim,
  }
  _write_folder(pathlib.Path(folder), SPARSIFY_TENSORS, _to_theirs(SPARSIFY, spec, params), config)


def save_saelens(
  folder: str | pathlib.Path,
  spec: SparseAutoencoderSpec,
  params: Mapping[str, Any],
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes a folder that `sae_lens.SAE.load_from_disk` opens.

  Args:
    folder: made if absent; its two files are replaced.
    spec: settings, in the form that is used (see `sparse_autoencoder_start.inference_form`).
    params: parameters.
    metadata: what SAELens keeps about the activations, such as hook_name ("blocks.5.hook_resid_post"),
      model_name, context_size.

  Raises:
    ImportError, ValueError: as `save_openai`.
  """
  theirs = {ours: name for name, ours in SAELENS_NORMALISATIONS.items()}
  _check_can_say("SAELens", spec, arch=tuple(SAELENS_NAMES))
  if spec.normalisation == "layer_norm_unbiased":
    _check_can_say("SAELens", spec, epsilon=(EPSILON,))
  if spec.arch != "topk":
    _check_can_say("SAELens", spec, decoder_norm=("unit",))
  architecture = SAELENS_NAMES[spec.arch]
  config = {
    "d_in": spec.model_dim,
    "d_sae": spec.num_latents,
    "dtype": spec.param_dtype,
    "device": "cpu",
    "apply_b_dec_to_input": spec.subtract_pre_bias,
    "normalize_activations": theirs[spec.normalisation],
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": _SAELENS_VERSION, **(metadata or {})},
    "architecture": architecture,
  }
  if spec.arch == "topk":
    config |= {"k": spec.k, "rescale_acts_by_decoder_norm": spec.decoder_norm == "scaled"}
  tensors = _to_theirs(SAELENS[architecture], spec, params)
  _write_folder(pathlib.Path(folder), SAELENS_TENSORS, tensors, config)


def _to_theirs(
  rows: tuple[Row, ...], spec: SparseAutoencoderSpec, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  flat, shapes = names.flatten(params), shapes_of(spec)
  found = {path: np.shape(leaf) for path, leaf in flat.items()}
  if found != shapes:
    raise ValueError(f"parameters {found} are not those of the settings, {shapes}")
  tensors = {row.theirs: np.asarray(flat[row.ours]) for row in rows}
  return {
    row.theirs: np.ascontiguousarray(tensors[row.theirs].T if row.is_transposed else tensors[row.theirs])
    for row in rows
  }


def _write_folder(folder: pathlib.Path, name: str, tensors: dict[str, np.ndarray], config: dict) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_package().numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _check_can_say(layout: str, spec: SparseAutoencoderSpec, **allowed: tuple) -> None:
  """Refuses settings that a layout has no word for."""
  for field, values in allowed.items():
    value = getattr(spec, field)
    if value in values:
      continue
    remedy = f"it knows {', '.join(map(repr, values))}"
    if field == "decoder_norm" or (field == "arch" and spec.is_selecting_in_batch):
      remedy += (
        "; bring the autoencoder into the form that is used with sparse_autoencoder_start.inference_form"
      )
    raise ValueError(f"{field}={value!r} cannot be written in {layout}: {remedy}")
