"""Models and tokenizers of llama2.c (https://github.com/karpathy/llama2.c), version 0 files.

A model file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, max_seq_len; a negative vocab_size says that the head is not tied),
then float32 arrays in a fixed order, each holding all layers. A tokenizer file
is an int32 (longest token in bytes), then for each token a float32 score, an
int32 length and that many bytes.
"""

import hashlib
import pathlib
import struct

import numpy as np

from nr.interchange import names
from nr.interchange.names import ADJACENT_HEADS, FROM_HEADS, HEADS, TRANSPOSE, Row
from nr.models.transformer_spec import TransformerSpec

_HEADER = struct.Struct("<7i")

# In file order after the embedding; the rotary tables are read over, they are computed here.
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
  values = np.memmap(path, "<f4", mode="r", offset=_HEADER.size)
  expected = sum(count * int(np.prod(shape)) for _, count, shape in sizes)
  if len(values) != expected:
    raise ValueError(f"{path}: {len(values)} numbers after the header instead of {expected}; truncated or not version 0")
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


class Llama2cTokenizer:
  """The tokenizer of a llama2.c model: SentencePiece BPE reduced to pieces and scores.

  Written here because the file holds no SentencePiece model that a package
  could read. Follows `encode` of llama2.c's run.c: characters, bytes for the
  characters that are no piece, then the best-scored merge until none is left.

  Attributes:
    vocab_size: number of pieces.
    begin_of_text_id: 1, put before a text by whoever wants it.
    end_of_text_id: 2.
    fingerprint: sha256 of the file, hex.
  """

  begin_of_text_id = 1
  end_of_text_id = 2

  def __init__(self, path: str | pathlib.Path, vocab_size: int):
    """Reads the file; `vocab_size` is the model's, the file does not hold it."""
    self._data = pathlib.Path(path).read_bytes()
    self.vocab_size = vocab_size
    self.fingerprint = hashlib.sha256(self._data).hexdigest()
    self._pieces: list[bytes] = []
    self._scores: list[float] = []
    start = 4
    for index in range(vocab_size):
      if start + 8 > len(self._data):
        raise ValueError(f"{path}: ends after {index} tokens instead of {vocab_size}")
      score, length = struct.unpack_from("<fi", self._data, start)
      start += 8 + length
      self._pieces.append(self._data[start - length : start])
      self._scores.append(score)
    if start != len(self._data):
      raise ValueError(f"{path}: goes on after {vocab_size} tokens; pass the vocab_size of its model")
    self._ids: dict[bytes, int] = {}
    for index, piece in enumerate(self._pieces):
      self._ids.setdefault(piece, index)
    # Ids 3 .. 258 stand for single bytes and are written <0x0A>.
    self._bytes = {3 + byte: bytes([byte]) for byte in range(256) if self._pieces[3 + byte] == b"<0x%02X>" % byte}

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, with the format's leading space and without ids 1 and 2."""
    if not text:
      return []
    ids = [self._ids[b" "]]
    for character in text:
      piece = character.encode()
      ids.extend([self._ids[piece]] if piece in self._ids else [byte + 3 for byte in piece])
    while True:
      merges = [
        (index, merged)
        for index, (left, right) in enumerate(zip(ids, ids[1:]))
        if (merged := self._ids.get(self._pieces[left] + self._pieces[right])) is not None
      ]
      if not merges:
        return ids
      index, merged = max(merges, key=lambda merge: self._scores[merge[1]])  # the first of equals
      ids[index : index + 2] = [merged]

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, leading space included; ids 0, 1 and 2 are left out."""
    joined = b"".join(self._bytes.get(i, self._pieces[i]) for i in map(int, ids) if i > 2)
    return joined.decode("utf-8", errors="replace")

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the file it was read from."""
    pathlib.Path(path).write_bytes(self._data)
