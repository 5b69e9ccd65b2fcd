"""GGUF files of Llama-family models, as llama.cpp writes them (needs the extra [hub]).

Tensors of types F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are brought to
`param_dtype` one at a time by the `gguf` package. llama.cpp's converter
permutes the rows of the query and key projections so that rotary pairs are
adjacent; the table undoes that. The tokenizer and the chat template that the
file carries are in `nr.interchange.gguf_tokenizer`.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nr.interchange import names
from nr.interchange.names import ADJACENT_HEADS, FROM_HEADS, HEADS, TRANSPOSE, Row
from nr.models.transformer_spec import TransformerSpec

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

TABLE = (
  Row("token_embd.weight", "token_embedding"),
  Row("blk.{layer}.attn_norm.weight", "blocks/attention_norm/scale"),
  Row("blk.{layer}.attn_q.weight", "blocks/attention/query/kernel", ADJACENT_HEADS),
  Row("blk.{layer}.attn_k.weight", "blocks/attention/key/kernel", ADJACENT_HEADS),
  Row("blk.{layer}.attn_v.weight", "blocks/attention/value/kernel", HEADS),
  Row("blk.{layer}.attn_output.weight", "blocks/attention/output/kernel", FROM_HEADS),
  Row("blk.{layer}.ffn_norm.weight", "blocks/mlp_norm/scale"),
  Row("blk.{layer}.ffn_gate.weight", "blocks/mlp/gate/kernel", TRANSPOSE),
  Row("blk.{layer}.ffn_up.weight", "blocks/mlp/up/kernel", TRANSPOSE),
  Row("blk.{layer}.ffn_down.weight", "blocks/mlp/down/kernel", TRANSPOSE),
  Row("output_norm.weight", "final_norm/scale"),
)
HEAD = Row("output.weight", "unembedding")


class GgufFile:
  """An open GGUF file: metadata by name, tensors dequantised when asked for.

  Attributes:
    path: the file.
    tensors: mapping from tensor name to a float32 array, made on each look-up.
  """

  def __init__(self, path: str | pathlib.Path):
    """Maps the file into memory.

    Raises:
      ImportError: the `gguf` package is not installed.
      FileNotFoundError, ValueError: no such file, or not GGUF.
    """
    try:
      import gguf
    except ImportError as error:
      raise ImportError("reading GGUF needs the `gguf` package: pip install nr[hub]") from error
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise FileNotFoundError(f"{self.path}: no such file")
    with open(self.path, "rb") as file:
      if (magic := file.read(4)) != b"GGUF":
        raise ValueError(f"{self.path}: starts with {magic!r} instead of b'GGUF'; not a GGUF file")
    try:
      self._reader = gguf.GGUFReader(self.path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
      raise ValueError(f"{self.path}: damaged or truncated GGUF file ({error})") from error
    self.tensors: Mapping[str, np.ndarray] = _Tensors(self._reader, self.path)

  def get(self, key: str, default: Any = None) -> Any:
    """Returns a metadata value, or the default where the file has none."""
    field = self._reader.fields.get(key)
    return default if field is None else field.contents()

  def require(self, key: str) -> Any:
    """Returns a metadata value; ValueError naming the key where the file has none."""
    value = self.get(key)
    if value is None:
      raise ValueError(f"{self.path}: metadata {key!r} is missing")
    return value


class _Tensors(Mapping):
  """Tensors of a reader by name, dequantised at look-up."""

  def __init__(self, reader: Any, path: pathlib.Path):
    self._by_name = {tensor.name: tensor for tensor in reader.tensors}
    self._path = path

  def __getitem__(self, name: str) -> np.ndarray:
    import gguf

    tensor = self._by_name[name]
    if tensor.tensor_type.name not in TYPES:
      raise ValueError(
        f"{self._path}: tensor {name} has type {tensor.tensor_type.name}, which is not read; "
        f"requantise the model to one of {', '.join(TYPES)}"
      )
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

  def __iter__(self) -> Iterator[str]:
    return iter(self._by_name)

  def __len__(self) -> int:
    return len(self._by_name)


def load_gguf(path: str | pathlib.Path | GgufFile, **settings) -> tuple[TransformerSpec, dict]:
  """Reads a Llama-family model from a GGUF file.

  Args:
    path: the `.gguf` file, or one that is open already.
    **settings: fields of TransformerSpec to set otherwise than the file says
      (`layers`, `dtype`, `param_dtype`, `max_length`, ...).

  Returns:
    (spec, parameters): nested dictionary of NumPy arrays, layers stacked.

  Raises:
    ImportError: the `gguf` package is not installed.
    ValueError: another architecture, a setting or tensor type that is not
      supported, or missing or unknown tensors; the message names it.
  """
  file = path if isinstance(path, GgufFile) else GgufFile(path)
  spec = _read_spec(file, settings)
  table = TABLE if spec.tied_head else (*TABLE, HEAD)
  return spec, names.to_ours(table, file.tensors, spec, spec.param_dtype)


def _read_spec(file: GgufFile, settings: dict) -> TransformerSpec:
  architecture = file.require("general.architecture")
  if architecture != "llama":
    raise ValueError(f"{file.path}: architecture {architecture!r} is not read, only 'llama'")
  scaling = file.get("llama.rope.scaling.type", "none")
  if scaling != "none" or "rope_freqs.weight" in file.tensors:
    raise ValueError(
      f"{file.path}: scaled rotary positions (rope.scaling.type {scaling!r}) are not supported"
    )
  model_dim = file.require("llama.embedding_length")
  num_heads = file.require("llama.attention.head_count")
  head_dim = file.get("llama.attention.key_length", model_dim // num_heads)
  for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
    if file.get(key, head_dim) != head_dim:
      raise ValueError(f"{file.path}: {key} {file.get(key)} is not the head size {head_dim}; not supported")
  if file.get("llama.expert_count", 0):
    raise ValueError(f"{file.path}: mixtures of experts (llama.expert_count) are not supported")
  return TransformerSpec.llama(
    **{
      "vocab_size": int(file.get("llama.vocab_size") or len(file.require("tokenizer.ggml.tokens"))),
      "num_layers": int(file.require("llama.block_count")),
      "model_dim": int(model_dim),
      "num_heads": int(num_heads),
      "num_kv_heads": int(file.get("llama.attention.head_count_kv", num_heads)),
      "head_dim": int(head_dim),
      "mlp_dim": int(file.require("llama.feed_forward_length")),
      "max_length": int(file.require("llama.context_length")),
      "rotary_base": float(file.get("llama.rope.freq_base", 10000.0)),
      "norm_epsilon": float(file.require("llama.attention.layer_norm_rms_epsilon")),
      "tied_head": HEAD.theirs not in file.tensors,
      **settings,
    }
  )
