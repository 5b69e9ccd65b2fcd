"""Opens any checkpoint for decoding: a network, its tokenizer, and what a prompt begins with."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.data.tokenizers import load_tokenizer
from nr.generation.language_models import Network
from nr.models import lora, parameters
from nr.models.transformer import TransformerSpec
from nr.training import model_files
from nr.training.adapter_files import Adapter, load_adapter
from nr.training.storage import CheckpointError

MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
  """A model that can be decoded.

  Attributes:
    name: path it was read from.
    network: parameters on the device, in the layout that decodes fastest.
    tokenizer: with encode, decode, vocab_size, end_of_text_id, fingerprint, token_bytes.
    begin_ids: token ids that stand before a prompt.
    end_ids: token ids that end a text.
    spec: settings of the model.
    fingerprint: hash of the parameters as they were saved; None for other people's formats.
  """

  name: str
  network: Network
  tokenizer: Any
  begin_ids: tuple[int, ...]
  end_ids: tuple[int, ...]
  spec: Any
  fingerprint: str | None = None


def open_checkpoint(
  path: str | pathlib.Path,
  *,
  tokenizer: str | pathlib.Path | None = None,
  model: str | None = None,
  dtype: str = "float32",
  layers: str | None = None,
  adapter: str | pathlib.Path | None = None,
) -> Checkpoint:
  """Opens a model of any kind that the house reads.

  Args:
    path: a run directory (with manifest.json), a model folder inside one, a folder
      in Hugging Face's format, a .gguf file, or llama2.c's .bin.
    tokenizer: file or folder, where it does not lie beside the model.
    model: which model of a run directory, by its path inside it.
    dtype: compute and storage type of the parameters.
    layers: "scan" or "unroll"; None: unrolled on CPU, where it decodes faster,
      else stacked.
    adapter: to be added into the weights: a folder in PEFT's format, or one that a
      recipe left (or the run directory, if it left one only).

  Raises:
    ValueError: nothing that is known lies there, a tokenizer that is not the
      model's, or an adapter that does not fit; names what to give instead.
    CheckpointError: damaged files.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise ValueError(
      f"checkpoint={str(path)!r}: no such file or folder; give a run directory, model folder or file"
    )
  layers = layers or ("unroll" if jax.default_backend() == "cpu" else "scan")
  settings = dict(dtype=dtype, param_dtype=dtype, layers=layers)
  if path.suffix == ".gguf":
    found = _open_gguf(path, tokenizer, settings)
  elif path.is_file() and path.suffix == ".bin":
    found = _open_llama2c(path, tokenizer, settings)
  elif (path / "config.json").is_file() and not (path / MANIFEST).is_file():
    found = _open_huggingface(path, tokenizer, settings)
  else:
    found = _open_ours(path, tokenizer, model, settings)
  if found.tokenizer.vocab_size > found.network.vocab_size:
    raise ValueError(
      f"{path}: its tokenizer has {found.tokenizer.vocab_size} ids and the model {found.network.vocab_size}; "
      "give the tokenizer that the model was trained with"
    )
  return found if adapter is None else _with_adapter(found, pathlib.Path(adapter).expanduser())


def _with_adapter(checkpoint: Checkpoint, folder: pathlib.Path) -> Checkpoint:
  """Returns the checkpoint with an adapter added into its weights."""
  found = _open_adapter(folder, checkpoint.spec)
  if found.base is not None and checkpoint.fingerprint not in (None, found.base):
    raise ValueError(
      f"adapter={str(folder)!r} was trained on parameters {found.base[:12]}, and {checkpoint.name} holds "
      f"{checkpoint.fingerprint[:12]}; give the model it was trained on"
    )
  params = checkpoint.network.params
  of_layout = parameters.unstack_layers if model_files.layout_of(checkpoint.spec) == "unroll" else lambda x: x
  try:
    params = lora.merge(params, of_layout(found.params), found.lora)
  except ValueError as error:
    raise ValueError(f"adapter={str(folder)!r} does not fit {checkpoint.name}: {error}") from error
  network = dataclasses.replace(checkpoint.network, params=params)
  return checkpoint._replace(name=f"{checkpoint.name} with {folder}", network=network, fingerprint=None)


def _open_adapter(folder: pathlib.Path, spec: Any) -> Adapter:
  if not folder.is_dir():
    raise ValueError(f"adapter={str(folder)!r}: no such folder; give one in PEFT's format, or one of a run")
  if (folder / "adapter_config.json").is_file():
    from nr.interchange.peft import load_peft

    if not isinstance(spec, TransformerSpec):
      raise ValueError(f"adapter={str(folder)!r}: PEFT adapts plain transformers; this model is another")
    return Adapter(*load_peft(folder, spec), base=None)
  if (folder / MANIFEST).is_file():
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    within = sorted(set(_recorded(manifest, "adapter")))
    if len(within) != 1:
      raise ValueError(
        f"adapter={str(folder)!r} holds {len(within)} adapters; give the folder of one: {', '.join(within) or 'none'}"
      )
    folder = folder / within[0]
  try:
    return load_adapter(folder)
  except CheckpointError as error:
    if (folder / "_CHECKPOINT_METADATA").exists() or (folder / "tree").is_dir():
      raise
    raise ValueError(
      f"adapter={str(folder)!r} holds no adapter that is known: give a folder in PEFT's format or one of a run"
    ) from error


def make_network(spec: Any, params: Any) -> Network:
  """Returns a network from a spec and parameters in either layout, in the layout of the spec."""
  if model_files.layout_of(spec) == "unroll":
    params = parameters.unstack_layers(params)
  else:
    params = parameters.stack_layers(params)
  return Network(model_files.graphdef_of(spec), jax.tree.map(jnp.asarray, params))


def _with_settings(spec: Any, settings: dict) -> Any:
  if isinstance(spec, model_files.ConceptMixingModelSpec):
    return dataclasses.replace(spec, transformer=dataclasses.replace(spec.transformer, **settings))
  return dataclasses.replace(spec, **settings)


def _open_gguf(path: pathlib.Path, tokenizer: Any, settings: dict) -> Checkpoint:
  from nr.interchange.gguf import GgufFile, load_gguf
  from nr.interchange.gguf_tokenizer import GgufTokenizer

  file = GgufFile(path)
  spec, params = load_gguf(file, **settings)
  own = GgufTokenizer(file) if tokenizer is None else load_tokenizer(tokenizer)
  begin = getattr(own, "begin_of_text_id", None)
  begin_ids = (begin,) if begin is not None and getattr(own, "adds_begin_of_text", False) else ()
  return Checkpoint(str(path), make_network(spec, params), own, begin_ids, (own.end_of_text_id,), spec)


def _open_llama2c(path: pathlib.Path, tokenizer: Any, settings: dict) -> Checkpoint:
  from nr.interchange.llama2c import load_llama2c

  spec, params = load_llama2c(path, **settings)
  if tokenizer is None:
    beside = sorted(path.parent.glob("tok*.bin"))
    if len(beside) != 1:
      raise ValueError(f"{path}: {len(beside)} files tok*.bin lie beside it; name one with --tokenizer")
    tokenizer = beside[0]
  own = load_tokenizer(tokenizer)
  # llama2.c begins every text with id 1 (run.c, `generate`).
  return Checkpoint(str(path), make_network(spec, params), own, (1,), (own.end_of_text_id,), spec)


def _open_huggingface(folder: pathlib.Path, tokenizer: Any, settings: dict) -> Checkpoint:
  from nr.interchange.huggingface import load_huggingface

  spec, params = load_huggingface(folder, **settings)
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  extra = folder / "tokenizer_config.json"
  extra = json.loads(extra.read_text(encoding="utf-8")) if extra.is_file() else {}
  generation = folder / "generation_config.json"
  if generation.is_file():
    config = {**config, **json.loads(generation.read_text(encoding="utf-8"))}
  ends = config.get("eos_token_id")
  ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
  own = load_tokenizer(folder if tokenizer is None else tokenizer, ends[0] if ends else None)
  begin = config.get("bos_token_id")
  begin_ids = (begin,) if extra.get("add_bos_token") and begin is not None else ()
  end_ids = tuple(dict.fromkeys([*ends, own.end_of_text_id]))
  return Checkpoint(str(folder), make_network(spec, params), own, begin_ids, end_ids, spec)


def _open_ours(path: pathlib.Path, tokenizer: Any, model: str | None, settings: dict) -> Checkpoint:
  folder = _model_folder(path, model)
  try:
    saved = model_files.load_model(folder)
  except CheckpointError as error:
    if (folder / "_CHECKPOINT_METADATA").exists() or (folder / "tree").is_dir():
      raise
    raise ValueError(
      f"{folder} holds no model that is known: give a run directory, a model folder, a Hugging Face folder, "
      "a .gguf file or llama2.c's .bin"
    ) from error
  if not isinstance(saved.spec, TransformerSpec | model_files.ConceptMixingModelSpec):
    raise ValueError(f"{folder} holds a {saved.metadata['kind']}; only language models generate text")
  spec = _with_settings(saved.spec, settings)
  params = jax.tree.map(lambda leaf: leaf.astype(settings["param_dtype"]), saved.params)
  own = _our_tokenizer(folder, saved.metadata["tokenizer"], tokenizer)
  # Documents follow the end of the one before them.
  end = (own.end_of_text_id,)
  return Checkpoint(str(folder), make_network(spec, params), own, end, end, spec, saved.fingerprint)


def _model_folder(path: pathlib.Path, model: str | None) -> pathlib.Path:
  if not (path / MANIFEST).is_file():
    return path if model is None else path / model
  manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
  found = sorted(set(_recorded(manifest, "model")))
  if model is None and len(found) == 1:
    return path / found[0]
  if model not in found:
    if model is None:
      raise ValueError(f"{path} holds several models; choose one with --model: {', '.join(found)}")
    raise ValueError(names.unknown("--model", model, found))
  return path / model


def _recorded(node: Any, name: str) -> list[str]:
  """Returns the paths that stages have recorded under "model", or under another name."""
  if isinstance(node, dict):
    own = [node[name]] if isinstance(node.get(name), str) else []
    return own + [path for value in node.values() for path in _recorded(value, name)]
  if isinstance(node, list):
    return [path for value in node for path in _recorded(value, name)]
  return []


def _our_tokenizer(folder: pathlib.Path, fingerprint: str, given: Any) -> Any:
  candidates = [pathlib.Path(given)] if given is not None else tokenizer_folders(folder)
  for candidate in candidates:
    own = load_tokenizer(candidate)
    if own.fingerprint == fingerprint:
      return own
  tried = ", ".join(map(str, candidates)) or "nothing"
  raise ValueError(
    f"{folder} was trained with tokenizer {fingerprint[:12]}; {tried} is not that one; "
    "name its folder with --tokenizer"
  )


def tokenizer_folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the tokenizer folders of the run that a model folder belongs to, nearest first.

  The run is the nearest folder above that holds a manifest; without one only the folder itself is looked into,
  since what lies beside it may belong to anybody.
  """
  from nr.tokenizer_files import SETTINGS_FILE

  parents = (folder, *folder.absolute().parents[:5])
  run = next((depth for depth, parent in enumerate(parents) if (parent / MANIFEST).is_file()), 0)
  found = []
  for parent in parents[: run + 1]:
    found += [path.parent for path in sorted(parent.glob(f"*/*/{SETTINGS_FILE}"))]
    found += [path.parent for path in sorted(parent.glob(f"*/{SETTINGS_FILE}"))]
  return list(dict.fromkeys(found))
