"""Documents from dataset libraries: tensorflow-datasets (without TensorFlow) and Hugging Face."""

from collections.abc import Iterator

from nr.data.bad_records import DataError, Quarantine
from nr.data.file_sources import field_document
from nr.data.sources import CorpusSpec, Document


def tensorflow_datasets(spec: CorpusSpec, quarantine: Quarantine) -> Iterator[Document]:
  """Yields the documents of "tfds:NAME", prepared before as array_record, by random access.

  Raises:
    DataError: the library is missing, or the data is not there in a format that
      can be read without TensorFlow; names how to prepare it.
  """
  name = spec.name.removeprefix("tfds:")
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise DataError(
      f"corpus.name={spec.name!r} needs tensorflow-datasets: pip install tensorflow-datasets"
    ) from error
  try:
    source = tfds.data_source(name, split=spec.source_split, data_dir=spec.data_dir or None, download=False)
  except Exception as error:  # the library raises many kinds, some of them plain Exception
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise DataError(
      f"corpus.name={spec.name!r}: tensorflow-datasets cannot read split {spec.source_split!r} under "
      f"corpus.data_dir={spec.data_dir!r} ({reason}); prepare it with "
      f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    ) from error

  def read() -> Iterator[Document]:
    for index in range(len(source)):
      record = source[index]
      yield from field_document(record, spec.name, f"record {index}", f"{name}:{index}", spec, quarantine)

  return read()


def hugging_face(spec: CorpusSpec, quarantine: Quarantine) -> Iterator[Document]:
  """Yields the documents of "hf:NAME" through the library `datasets`, streaming.

  Raises:
    DataError: the library is missing, or it cannot open the dataset.
  """
  name = spec.name.removeprefix("hf:")
  try:
    import datasets
  except ImportError as error:
    raise DataError(f"corpus.name={spec.name!r} needs datasets: pip install 'nr[hub]'") from error
  try:
    source = datasets.load_dataset(name, spec.subset or None, split=spec.source_split, streaming=True)
  except Exception as error:  # network, names, credentials: many kinds
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise DataError(
      f"corpus.name={spec.name!r}: datasets cannot open split {spec.source_split!r} ({reason}); "
      "check the name, corpus.subset, corpus.source_split and the network"
    ) from error

  def read() -> Iterator[Document]:
    for index, record in enumerate(source):
      yield from field_document(record, spec.name, f"record {index}", f"{name}:{index}", spec, quarantine)

  return read()
