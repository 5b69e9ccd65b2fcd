"""Models of llama2.c (https://github.com/karpathy/llama2.c), version 0 files.

A file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, max_seq_len; a negative vocab_size says that the head is not tied),
then float32 arrays in a fixed order, each holding all layers. The tokenizer
file beside it is read by `nr.data.tokenizers.load_tokenizer`.
"""

import pathlib
import struct

import numpy as np

from nr.interchange import names
from nr.interchange.names import ADJACENT_HEADS, FROM_HEADS, HEADS, TRANSPOSE, Row
from nr.models.transformer_spec import TransformerSpec

_HEADER = struct.Struct("<7i")

TABLE = (
  Row("tok_embeddings", "token_embedding"),
  Row("layers.{layer}.attention_norm", "blocks/attention_norm/scale"),
  Row("layers.{layer}.wq", "blocks/attention/query/kernel", ADJACENT_HEADS),
  Row("layers.{layer}.wk", "blocks/attention/key/kernel", ADJACENT_HEADS),
  Row("layers.{layer}.wv", "blocks/attention/value/kernel", HEADS),
  Row("layers.{layer}.wo", "blocks/attention/output/kernel", FROM_HEADS),
  Row("layers.{layer}.ffn_norm", "blocks/mlp_norm/scale"),
  Row("layers.{layer}.w1", "blocks/mlp/gate/kernel", TRANSPOSE),
  Row("layers.{layer}.w2", "blocks/mlp/down/kernel", TRANSPOSE),
  Row("layers.{layer}.w3", "blocks/mlp/up/kernel", TRANSPOSE),
  Row("norm", "final_norm/scale"),
)
HEAD = Row("output", "unembedding")


def load_llama2c(path: str | pathlib.Path, **settings) -> tuple[TransformerSpec, dict]:
  """Reads a llama2.c version 0 model.

  Args:
    path: the `.bin` file.
    **settings: fields of TransformerSpec to set otherwise than the file says
      (`layers`, `dtype`, `attention`, ...).

  Returns:
    (spec, parameters): nested dictionary of NumPy arrays, layers stacked.

  Raises:
    ValueError: the file is not a version 0 model or has another length than
      its header says.
  """
  path = pathlib.Path(path)
  spec = _read_spec(path, settings)
  sizes = _sizes(spec)
  expected = 4 * sum(count * int(np.prod(shape)) for _, count, shape in sizes)
  found = path.stat().st_size - _HEADER.size
  if found != expected:
    raise ValueError(f"{path}: {found} bytes after the header, not {expected}; damaged or not version 0")
  values = np.memmap(path, "<f4", mode="r", offset=_HEADER.size)
  tensors, start = {}, 0
  for name, count, shape in sizes:
    size = int(np.prod(shape))
    for layer in range(count):
      tensors[name.replace("{layer}", str(layer))] = values[start : start + size].reshape(shape)
      start += size
  tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("rope")}
  table = TABLE if spec.tied_head else (*TABLE, HEAD)
  return spec, names.to_ours(table, tensors, spec, spec.param_dtype)


def _read_spec(path: pathlib.Path, settings: dict) -> TransformerSpec:
  with open(path, "rb") as file:
    header = file.read(_HEADER.size)
  if len(header) < _HEADER.size:
    raise ValueError(f"{path}: shorter than the header of a llama2.c model (28 bytes)")
  dim, hidden, layers, heads, kv_heads, vocab, length = _HEADER.unpack(header)
  if min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) < 1 or dim % heads or heads % kv_heads:
    raise ValueError(f"{path}: header {_HEADER.unpack(header)} is not that of a llama2.c version 0 model")
  return TransformerSpec.llama(
    **{
      "vocab_size": abs(vocab),
      "num_layers": layers,
      "model_dim": dim,
      "num_heads": heads,
      "num_kv_heads": kv_heads,
      "mlp_dim": hidden,
      "max_length": length,
      "tied_head": vocab > 0,
      "norm_epsilon": 1e-5,
      "rotary_base": 10000.0,
      **settings,
    }
  )


def _sizes(spec: TransformerSpec) -> list[tuple[str, int, tuple[int, ...]]]:
  """(name, how many, shape of one) of the arrays of the file, in file order."""
  layers, dim, head = spec.num_layers, spec.model_dim, spec.head_dim
  kv_dim = spec.num_kv_heads * head
  sizes = [
    ("tok_embeddings", 1, (spec.vocab_size, dim)),
    ("layers.{layer}.attention_norm", layers, (dim,)),
    ("layers.{layer}.wq", layers, (dim, dim)),
    ("layers.{layer}.wk", layers, (kv_dim, dim)),
    ("layers.{layer}.wv", layers, (kv_dim, dim)),
    ("layers.{layer}.wo", layers, (dim, dim)),
    ("layers.{layer}.ffn_norm", layers, (dim,)),
    ("layers.{layer}.w1", layers, (spec.mlp_dim, dim)),
    ("layers.{layer}.w2", layers, (dim, spec.mlp_dim)),
    ("layers.{layer}.w3", layers, (spec.mlp_dim, dim)),
    ("norm", 1, (dim,)),
    ("rope_cos", 1, (spec.max_length, head // 2)),
    ("rope_sin", 1, (spec.max_length, head // 2)),
  ]
  return sizes if spec.tied_head else [*sizes, ("output", 1, (spec.vocab_size, dim))]
