"""Adapters on disk: their factors, their settings, and which model they were trained on.

One folder an adapter, written as models are (`nr.training.model_files`): layers stacked, a hash a
leaf, nothing pickled. For PEFT's layout see `nr.interchange.peft`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nr.models.lora import LoraSpec
from nr.training import artifacts

KIND = "adapter"


class Adapter(NamedTuple):
  """An adapter read from disk.

  Attributes:
    lora: its settings.
    params: a and b (and magnitude) at the paths of weights, layers stacked.
    base: hash of the parameters that it was trained on (`artifacts.tree_hash`); None: not known.
  """

  lora: LoraSpec
  params: dict
  base: str | None


def save_adapter(
  directory: str | pathlib.Path, lora: LoraSpec, adapter: Mapping[str, Any], base: str | None = None
) -> None:
  """Writes an adapter folder.

  Args:
    directory: where to; replaced if it exists.
    lora: settings of the adapter.
    adapter: its arrays, layers stacked or apart.
    base: hash of the parameters under it, so that it is not put on others; None: not known.

  Raises:
    CheckpointError: the disk is full.
  """
  artifacts.save_tree(directory, adapter, {"kind": KIND, "lora": lora.to_dict(), "base": base})


def load_adapter(directory: str | pathlib.Path) -> Adapter:
  """Reads an adapter folder, its integrity checked.

  Raises:
    ValueError: a folder that holds something else.
    CheckpointError: nothing there, or damaged files.
  """
  params, metadata = artifacts.load_tree(directory)
  if metadata.get("kind") != KIND:
    raise ValueError(
      f"{directory} holds a {metadata.get('kind')}, not an adapter; give what save_adapter wrote"
    )
  return Adapter(LoraSpec.from_dict(metadata["lora"]), params, metadata["base"])
