"""Opens sparse autoencoders of other projects: OpenAI, sparsify and SAELens (`sae_save` writes them).

    OpenAI    one file: .safetensors whose metadata say {"activation": "TopK", "k": "32", "postact_fn": "ReLU"}, or
              the published .pt, read as data (see `torch_archive`)
              encoder.weight [C, D], decoder.weight [D, C], pre_bias, latent_bias
    sparsify  a folder: cfg.json, sae.safetensors
              encoder.weight [C, D], encoder.bias, W_dec [C, D], b_dec
    SAELens   a folder: cfg.json, sae_weights.safetensors
              W_enc [D, C], b_enc, W_dec [C, D], b_dec, and threshold, or b_gate, b_mag and r_mag

A TopK file of OpenAI implies activations normalised with the unbiased deviation and 1e-5, a ReLU one
none (their model.py); sparsify normalises nothing; SAELens names it. Settings that would make another
function than ours are refused by name. Nothing is unpickled. Needs `safetensors` (extra [hub]).
Arrays: D model, C latents.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nr import names
from nr.interchange import names as name_maps
from nr.interchange.huggingface import read_json, safetensors_package
from nr.interchange.sae_layouts import (
  CONFIG,
  OPENAI,
  OPENAI_STATISTICS,
  SAELENS,
  SAELENS_NAMES,
  SAELENS_NORMALISATIONS,
  SAELENS_TENSORS,
  SPARSIFY,
  SPARSIFY_TENSORS,
  Row,
  shapes_of,
)
from nr.interchange.torch_archive import ArchivedTensor, read_torch_archive
from nr.models.sparse_autoencoder import SparseAutoencoderSpec


class ForeignAutoencoder(NamedTuple):
  """An autoencoder of another project.

  Attributes:
    spec: its settings.
    origin: format, and what the file says of where its activations come from (hook_name, model_name), where
      it does.
    read_params: reads the parameters, a nested dictionary of NumPy arrays on the host.
  """

  spec: SparseAutoencoderSpec
  origin: dict[str, Any]
  read_params: Callable[[], dict]


def open_autoencoder(
  path: str | pathlib.Path, *, k: int | None = None, **settings: Any
) -> ForeignAutoencoder:
  """Opens a file or folder of another project; its large arrays are not read yet.

  Args:
    path: a .safetensors or .pt file (OpenAI), or a folder (sparsify, SAELens).
    k: active latents a token to expect, for architectures whose files say none (all but TopK).
    **settings: fields of SparseAutoencoderSpec that such files do not have (decoding, top_k, max_active,
      dtype, param_dtype, dead_tokens, ...).

  Raises:
    ImportError: `safetensors` is not installed.
    FileNotFoundError: nothing there, or no known layout.
    ValueError: settings or tensors that are missing, unknown, of a wrong shape or not supported; the
      message names them.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_file():
    return _open_openai(path, settings, k)
  if (path / CONFIG).is_file() and (path / SPARSIFY_TENSORS).is_file():
    return _open_sparsify(path, settings)
  if (path / CONFIG).is_file() and (path / SAELENS_TENSORS).is_file():
    return _open_saelens(path, settings, k)
  raise FileNotFoundError(
    f"{path}: no sparse autoencoder there; give an OpenAI .safetensors or .pt file, or a folder with {CONFIG} and "
    f"{SAELENS_TENSORS} (SAELens) or {SPARSIFY_TENSORS} (sparsify)"
  )


def tap_layer(hook_name: str) -> int:
  """Returns the block (from 0) after which a residual-stream hook of TransformerLens reads.

  >>> tap_layer("blocks.5.hook_resid_post"), tap_layer("blocks.6.hook_resid_pre")
  (5, 5)

  Raises:
    ValueError: another hook, or the stream before the first block.
  """
  found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
  layer = int(found[1]) - (found[2] == "pre") if found else -1
  if layer < 0:
    raise ValueError(f"hook_name={hook_name!r} is not the residual stream after a block")
  return layer


def _open_openai(path: pathlib.Path, settings: dict, k: int | None) -> ForeignAutoencoder:
  if path.suffix == ".safetensors":
    tensors = _Safetensors(path)
    said = tensors.metadata
  else:
    content = read_torch_archive(path)
    tensors = _Archived({name: value for name, value in content.items() if isinstance(value, ArchivedTensor)})
    said = {"activation": content.get("activation"), **content.get("activation_state_dict", {})}
  activation = said.get("activation")
  if activation not in ("TopK", "ReLU"):
    raise ValueError(
      f"{path}: activation {activation!r} is not TopK or ReLU; a safetensors file needs its metadata, such as "
      'save_file(tensors, path, metadata={"activation": "TopK", "k": "32", "postact_fn": "ReLU"})'
    )
  fields: dict[str, Any] = {"arch": "relu", "normalisation": "none", "k": k}
  if activation == "TopK":
    if said.get("postact_fn", "ReLU") != "ReLU" or not str(said.get("k")).isdigit():
      raise ValueError(
        f"{path}: TopK with k={said.get('k')!r}, postact_fn={said.get('postact_fn')!r}; ReLU is read"
      )
    fields = {"arch": "topk", "normalisation": "layer_norm_unbiased", "k": int(said["k"])}
  sizes = _sizes(path, tensors, "encoder.weight")
  spec = _make_spec(path, {**fields, "num_latents": sizes[0], "model_dim": sizes[1]}, settings)
  return _foreign("openai", path, spec, tensors, OPENAI, {}, ignored=OPENAI_STATISTICS)


def _open_sparsify(folder: pathlib.Path, settings: dict) -> ForeignAutoencoder:
  config = read_json(folder / CONFIG)
  plain = {"activation": ("topk", None)}
  off = ("skip_connection", "transcode", "embed_skip", "gram_lookup", "signed")
  _check_config(folder / CONFIG, config, plain | {name: (False, None) for name in off})
  tensors = _Safetensors(folder / SPARSIFY_TENSORS)
  model_dim = _integer(folder / CONFIG, config, "d_in")
  num_latents = config.get("num_latents") or model_dim * _integer(folder / CONFIG, config, "expansion_factor")
  fields = {"arch": "topk", "normalisation": "none", "k": _integer(folder / CONFIG, config, "k")}
  spec = _make_spec(folder, {**fields, "model_dim": model_dim, "num_latents": num_latents}, settings)
  return _foreign("sparsify", folder / SPARSIFY_TENSORS, spec, tensors, SPARSIFY, {})


def _open_saelens(folder: pathlib.Path, settings: dict, k: int | None) -> ForeignAutoencoder:
  path = folder / CONFIG
  config = read_json(path)
  metadata = config.get("metadata") or config  # before version 6 all of it lay side by side
  kwargs = config.get("activation_fn_kwargs") or {}
  activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
  architecture = config.get("architecture", "standard")
  if architecture == "standard" and activation == "topk":
    architecture, config = "topk", {**config, "k": kwargs.get("k")}
  if architecture not in SAELENS:
    raise ValueError(names.unknown(f"{path}, field 'architecture'", str(architecture), SAELENS))
  plain = {"finetuning_scaling_factor": (False, None), "reshape_activations": ("none", None)}
  if architecture != "topk":
    plain["activation_fn"] = plain["activation_fn_str"] = ("relu", None)
  _check_config(path, config, plain)
  normalisation = config.get("normalize_activations") or "none"
  if normalisation not in SAELENS_NORMALISATIONS:
    raise ValueError(
      f"{path}, field 'normalize_activations': {normalisation!r} needs a factor that the file does not hold; fold it "
      "in with SAELens (fold_activation_norm_scaling_factor) and save the autoencoder again"
    )
  fields = {
    "arch": {theirs: ours for ours, theirs in SAELENS_NAMES.items()}[architecture],
    "model_dim": _integer(path, config, "d_in"),
    "num_latents": _integer(path, config, "d_sae"),
    "normalisation": SAELENS_NORMALISATIONS[normalisation],
    "subtract_pre_bias": bool(config.get("apply_b_dec_to_input", True)),
    "decoder_norm": "scaled" if config.get("rescale_acts_by_decoder_norm") else "unit",
    "k": _integer(path, config, "k") if architecture == "topk" else k,
  }
  tensors = _Safetensors(folder / SAELENS_TENSORS)
  if "scaling_factor" in tensors and not np.allclose(tensors.read("scaling_factor"), 1):
    raise ValueError(
      f"{folder}: scaling_factor is not 1; fold it in with SAELens and save the autoencoder again"
    )
  spec = _make_spec(folder, fields, settings)
  origin = {name: metadata[name] for name in ("hook_name", "model_name") if metadata.get(name)}
  found = _foreign("saelens", folder / SAELENS_TENSORS, spec, tensors, SAELENS[architecture], origin,
                   ignored=("scaling_factor",))  # fmt: skip
  if architecture != "jumprelu":
    return found

  def read() -> dict:
    # SAELens passes thresholds through a ReLU.
    params = found.read_params()
    return {**params, "threshold": np.maximum(params["threshold"], 0)}

  return found._replace(read_params=read)


class _Safetensors:
  """The tensors of a safetensors file, read when asked for."""

  def __init__(self, path: pathlib.Path):
    try:
      self._file = safetensors_package().safe_open(path, "np")
    except (ImportError, FileNotFoundError):
      raise
    except Exception as error:  # safetensors raises its own class, derived from Exception alone
      raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    self.names = tuple(self._file.keys())
    self.metadata = self._file.metadata() or {}

  def __contains__(self, name: str) -> bool:
    return name in self.names

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor, which is not read for it."""
    return tuple(self._file.get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    """Returns the numbers of a tensor."""
    return self._file.get_tensor(name)


class _Archived:
  """The tensors of a torch archive, read when asked for."""

  def __init__(self, tensors: Mapping[str, ArchivedTensor]):
    self._tensors = tensors
    self.names = tuple(tensors)

  def __contains__(self, name: str) -> bool:
    return name in self._tensors

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor, which is not read for it."""
    return self._tensors[name].shape

  def read(self, name: str) -> np.ndarray:
    """Returns the numbers of a tensor."""
    return self._tensors[name].read()


def _foreign(
  layout: str,
  path: pathlib.Path,
  spec: SparseAutoencoderSpec,
  tensors: "_Safetensors | _Archived",
  rows: tuple[Row, ...],
  origin: dict[str, Any],
  ignored: tuple[str, ...] = (),
) -> ForeignAutoencoder:
  """Checks names and shapes of the tensors and returns the opened autoencoder."""
  shapes = shapes_of(spec)
  known = {row.theirs for row in rows}
  for what, found in (
    ("missing", [row.theirs for row in rows if row.theirs not in tensors]),
    ("not known for this architecture", [name for name in tensors.names if name not in known.union(ignored)]),
  ):
    if found:
      raise ValueError(f"{path}: {', '.join(found[:6])}: tensors {what}")
  for row in rows:
    expected = shapes[row.ours][::-1] if row.is_transposed else shapes[row.ours]
    if tensors.shape(row.theirs) != expected:
      raise ValueError(
        f"{path}: tensor {row.theirs} has shape {tensors.shape(row.theirs)} instead of {expected}"
      )

  def read() -> dict:
    params: dict = {}
    for row in rows:
      array = tensors.read(row.theirs)
      if not np.isfinite(np.asarray(array, np.float32)).all():
        raise ValueError(f"{path}: tensor {row.theirs} holds numbers that are not finite")
      array = array.T if row.is_transposed else array
      name_maps.put(params, row.ours, np.ascontiguousarray(array, np.dtype(spec.param_dtype)))
    return params

  return ForeignAutoencoder(spec, {"format": layout, **origin}, read)


def _make_spec(path: pathlib.Path, fields: dict, settings: dict) -> SparseAutoencoderSpec:
  clash = sorted(name for name in settings if name in fields and settings[name] != fields[name])
  if clash:
    told = ", ".join(f"{name}={settings[name]!r} (the file: {fields[name]!r})" for name in clash)
    raise ValueError(f"{path}: {told}; leave out what the file says")
  if fields["k"] is None:
    raise ValueError(
      f"{path}: an autoencoder with arch={fields['arch']!r} says no number of active latents; pass k (a sparse code "
      "has room for 4 k) or k and max_active"
    )
  return SparseAutoencoderSpec(**{**settings, **fields})


def _check_config(path: pathlib.Path, config: Mapping[str, Any], plain: Mapping[str, tuple]) -> None:
  for field, allowed in plain.items():
    if config.get(field) not in allowed:
      raise ValueError(f"{path}, field {field!r}: {config[field]!r} is not supported, only {allowed[0]!r} is")


def _integer(path: pathlib.Path, config: Mapping[str, Any], field: str) -> int:
  value = config.get(field)
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{path}, field {field!r}: {value!r} is not a positive integer")
  return value


def _sizes(path: pathlib.Path, tensors: "_Safetensors | _Archived", name: str) -> tuple[int, int]:
  if name not in tensors or len(tensors.shape(name)) != 2:
    raise ValueError(f"{path}: tensor {name} is missing or no matrix; give an autoencoder of OpenAI's layout")
  return tensors.shape(name)
