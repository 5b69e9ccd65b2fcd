"""Trees of arrays that one stage leaves for the next: stacked on disk, hashed leaf by leaf."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from nr.models.parameters import stack_layers
from nr.training import integrity, storage
from nr.training.storage import CheckpointError

PyTree = Any


def save_tree(path: str | pathlib.Path, tree: PyTree, metadata: Mapping[str, Any] | None = None) -> str:
  """Writes nested dictionaries of arrays, with layers stacked, a hash a leaf, and metadata.

  Args:
    path: directory to write; what stands there is replaced.
    tree: nested dictionaries of arrays, in either layout of the layers. Where they are spread over several
      processes, all of these call this, and the first one writes.
    metadata: JSON values that say what it is.

  Returns:
    What `tree_hash` returns for the tree.

  Raises:
    CheckpointError: the disk is full, or the tree holds other than dictionaries.
  """
  path = pathlib.Path(path).absolute()
  path.parent.mkdir(parents=True, exist_ok=True)
  tree = stack_layers(tree)
  plain = integrity.to_plain(tree)
  if jax.tree.structure(plain) != jax.tree.structure(tree):
    raise CheckpointError(f"{path}: only nested dictionaries of arrays can be saved, with text keys")
  for name, text in integrity.leaf_types(plain).items():
    if str(jax.dtypes.canonicalize_dtype(text.split("[")[0])) != text.split("[")[0]:
      raise CheckpointError(f"{path}: leaf {name!r} is {text}; convert it to a 32-bit type first")
  if jax.process_count() > 1:  # gathered here, so that nobody waits for the one that writes
    plain = jax.tree.map(integrity.to_host, plain)
  content = {
    "metadata": dict(metadata or {}),
    "types": integrity.leaf_types(plain),
    "hashes": integrity.leaf_hashes(plain),
  }
  fingerprint = integrity.text_hash(content["hashes"])
  if jax.process_index():
    return fingerprint
  storage.require_space(path.parent, plain, path.name)
  try:
    with _open() as checkpointer:
      items = dict(tree=ocp.args.StandardSave(plain), meta=ocp.args.JsonSave(storage.seal(content)))
      checkpointer.save(path, args=ocp.args.Composite(**items), force=True)
  except Exception as error:
    if storage.is_disk_full(error):
      raise CheckpointError(storage.disk_full_text(path.parent, path.name)) from error
    raise
  return fingerprint


def load_tree(
  path: str | pathlib.Path, shardings: PyTree | Callable[[dict], PyTree] | None = None
) -> tuple[dict, dict]:
  """Reads what `save_tree` wrote and checks every leaf.

  Args:
    path: the directory.
    shardings: tree like the saved one (in either layout) of NamedShardings, or a function
      from the metadata to it; by default everything goes to the first device.

  Returns:
    (tree with stacked layers, metadata).

  Raises:
    CheckpointError: nothing there, or a file or leaf is damaged; names it.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise CheckpointError(f"{path}: there is no saved tree; run the stage that makes it")
  try:
    with _open() as checkpointer:
      sealed = checkpointer.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      content = storage.unseal(sealed)
      if callable(shardings):
        shardings = shardings(content["metadata"])
      target = storage.targets(_parse_types(content["types"]), shardings)
      restore = ocp.args.Composite(tree=ocp.args.StandardRestore(target))
      tree = checkpointer.restore(path, args=restore).tree
    storage.compare(content["hashes"], integrity.leaf_hashes(tree), storage.ALTERED)
  except Exception as error:
    raise CheckpointError(
      f"{path} is damaged: {storage.one_line(error)}; remove it and make it again"
    ) from error
  return tree, content["metadata"]


def _open() -> ocp.Checkpointer:
  """Opens Orbax for this process alone: others need not read or write what it does, and are not waited for."""
  if jax.process_count() == 1:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
  index = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
  )
  options = ocp.CompositeOptions(multiprocessing_options=alone)
  handler = ocp.CompositeCheckpointHandler(composite_options=options)
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _parse_types(types: Mapping[str, str]) -> dict:
  """Builds nested dictionaries of abstract arrays from {"a/b": "float32[4,8]"}."""
  plain: dict = {}
  for name, text in types.items():
    dtype, shape = text[:-1].split("[")
    *parents, last = name.split("/")
    node = plain
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jax.ShapeDtypeStruct(tuple(int(size) for size in shape.split(",") if size), dtype)
  return plain


def tree_hash(tree: PyTree) -> str:
  """Returns one SHA-256 of a tree of arrays, equal for both layouts of its layers."""
  return integrity.text_hash(integrity.leaf_hashes(integrity.to_plain(stack_layers(tree))))
