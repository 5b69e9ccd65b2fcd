"""A tokenizer for tests: one id a byte, 256 for end of text."""

import numpy as np

from nr.data.sources import Document
from nr.data.token_dataset import write_token_dataset


class ByteTokenizer:
  """Ids are the UTF-8 bytes of the text."""

  def __init__(self, vocab_size=257):
    self.vocab_size, self.end_of_text_id = vocab_size, vocab_size - 1
    self.fingerprint = f"{vocab_size:064x}"

  def encode(self, text):
    return list(text.encode("utf-8"))

  def decode(self, ids):
    return bytes(id for id in ids if id < 256).decode("utf-8", "replace")

  def save(self, path):
    raise NotImplementedError


def random_documents(count, seed=0, longest=60):
  """Documents of distinct random lower-case text."""
  generator = np.random.default_rng(seed)
  return [
    Document(
      f"d{i}", f"{i} " + "".join(map(chr, generator.integers(97, 123, generator.integers(1, longest))))
    )
    for i in range(count)
  ]


def random_dataset(directory, count=50, seed=0, longest=60):
  """A token dataset of random documents."""
  return write_token_dataset(directory, random_documents(count, seed, longest), ByteTokenizer())
