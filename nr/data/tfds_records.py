"""Record directories as a tensorflow-datasets dataset, written without TensorFlow.

For readers outside this house who expect one: `export` prepares a dataset in
ArrayRecord that `tfds.data_source` opens by name, and that "tfds:nr_records/NAME"
names as a corpus. A separate module: tensorflow-datasets wants its builders in
an importable file, and importing it takes seconds.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nr.data.records import RecordSource

_FEATURES = {
  "str": tfds.features.Text,
  "int": lambda: tfds.features.Scalar(np.int64),
  "float": lambda: tfds.features.Scalar(np.float64),
  "bool": lambda: tfds.features.Scalar(np.bool_),
}


class NrRecords(tfds.core.GeneratorBasedBuilder):
  """Splits, each a directory of records with the same schema."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, sources: Mapping[str, RecordSource] | None = None, **kwargs: Any):
    self._sources = dict(sources or {})
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    """Describes the fields by the schema of the first split."""
    schema = next(iter(self._sources.values())).schema
    features = {field: _feature(kind) for field, kind in schema.items()}
    # The records keep their order; whoever trains on them shuffles.
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    return {split: self._generate_examples(source) for split, source in self._sources.items()}

  def _generate_examples(self, source: RecordSource) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, record in enumerate(source):
      yield index, {field: _value(record.get(field), kind) for field, kind in source.schema.items()}


def export(sources: Mapping[str, RecordSource], name: str, data_dir: str | pathlib.Path) -> Any:
  """Prepares a tensorflow-datasets dataset from record directories.

  Types object and those with "?" (which its features cannot say) become JSON text.

  Args:
    sources: split name -> records; all of one schema.
    name: configuration name; the dataset is "nr_records/NAME".
    data_dir: where tensorflow-datasets shall find it.

  Returns:
    The builder: `export(...).as_data_source(split="train")`. Text comes back as bytes.
  """
  config = tfds.core.BuilderConfig(name=name, description="records of nr")
  builder = NrRecords(sources=sources, config=config, data_dir=str(data_dir), file_format="array_record")
  builder.download_and_prepare()
  return builder


def _feature(kind: str) -> Any:
  """Returns the feature of a schema type."""
  inner = kind.removeprefix("list[").removesuffix("]")
  feature = _FEATURES.get(inner, tfds.features.Text)()
  return tfds.features.Sequence(feature) if kind.startswith("list[") and inner in _FEATURES else feature


def _value(value: Any, kind: str) -> Any:
  """Returns a value as its feature takes it."""
  inner = kind.removeprefix("list[").removesuffix("]")
  return value if inner in _FEATURES else json.dumps(value)
