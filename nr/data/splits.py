"""Train, validation and test by a hash of the document's text.

A document belongs to one split whole, wherever and however often it occurs:
two copies of a text always land on the same side. Which side depends on the
text and the salt alone, so adding documents never moves others.
"""

import hashlib
from collections.abc import Iterable, Iterator

from nr.data.bad_records import DataError
from nr.data.sources import CorpusSpec, Document, documents
from nr.names import unknown

SPLITS = ("train", "validation", "test")


def split_point(text: str, salt: str = "") -> float:
  """Returns a number in [0, 1) that depends on the words of the text and the salt.

  White space counts as one space, so that copies which differ in line ends or
  in a final newline stay together.
  """
  words = " ".join(text.split())
  digest = hashlib.sha256(f"{salt}\0{words}".encode("utf-8", "surrogatepass")).digest()
  return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def split_of(text: str, validation_fraction: float = 0.1, test_fraction: float = 0.0, salt: str = "") -> str:
  """Returns "train", "validation" or "test" for a text.

  >>> split_of("a text", validation_fraction=0.0)
  'train'
  """
  point = split_point(text, salt)
  if point < validation_fraction:
    return "validation"
  return "test" if point < validation_fraction + test_fraction else "train"


def split_documents(stream: Iterable[Document], corpus: CorpusSpec, split: str) -> Iterator[Document]:
  """Yields those documents of a stream that belong to one split, in order.

  Raises:
    DataError: unknown split, or none of the documents belongs to it.
  """
  if split not in SPLITS:
    raise DataError(unknown("split", split, SPLITS))

  def select() -> Iterator[Document]:
    kept = seen = 0
    for document in stream:
      seen += 1
      if (
        split_of(document.text, corpus.validation_fraction, corpus.test_fraction, corpus.split_salt) == split
      ):
        kept += 1
        yield document
    if not kept:
      remedy = (
        "set corpus.text_unit='blank_line' or give more documents"
        if seen < 20
        else (f"raise corpus.{split}_fraction" if split != "train" else "lower corpus.validation_fraction")
      )
      raise DataError(
        f"split {split!r} of corpus.name={corpus.name!r} is empty: none of {seen} documents hashes to it "
        f"(corpus.validation_fraction={corpus.validation_fraction}, corpus.test_fraction="
        f"{corpus.test_fraction}); {remedy}, or change corpus.split_salt"
      )

  return select()


def documents_of_split(corpus, split: str) -> Iterator[Document]:
  """Yields the documents of one split of a corpus (name, mapping or `CorpusSpec`)."""
  spec = CorpusSpec.of(corpus)
  return split_documents(documents(spec), spec, split)
