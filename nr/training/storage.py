"""What all checkpoints share: the layout on disk, seals, errors in one line."""

import errno
import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from nr.files import replace_text
from nr.models.parameters import is_unrolled, stack_layers
from nr.training import integrity

PyTree = Any
ALTERED = "does not have the bytes that were saved"


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written or read; the message is one line with a remedy."""


def one_line(error: BaseException) -> str:
  """Returns the telling part of an error's text, shortened to one line."""
  while error.__cause__ is not None and not isinstance(error, CheckpointError):
    error = error.__cause__  # The first cause is the one that names the file.
  text = " ".join(str(error).split()).split(" See full TensorStore details")[0] or type(error).__name__
  return text if len(text) <= 400 else text[:400] + " ..."


def is_disk_full(error: BaseException | None) -> bool:
  """True if the error, or what caused it, is a full disk or quota."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


# --- Layout on disk: layers are always stacked. ---


def count_layers(tree: PyTree) -> int | None:
  """Returns the number of layers kept apart in `tree`, None if its layers are stacked."""
  nodes = [n for n in jax.tree.leaves(tree, is_leaf=is_unrolled) if is_unrolled(n)]
  return len(nodes[0]) if nodes else None


def stack_shardings(shardings: PyTree) -> PyTree:
  """Returns the shardings of the stacked tree, given those of a tree in either layout."""

  def visit(node: Any) -> Any:
    if not is_unrolled(node):
      return node
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), node[min(node)])

  return jax.tree.map(visit, shardings, is_leaf=is_unrolled)


def stacked(tree: PyTree, shardings: PyTree | None) -> PyTree:
  """Stacks the layers of a tree of device arrays, keeping it sharded."""
  if count_layers(tree) is None:
    return tree
  if shardings is None:
    return jax.jit(stack_layers)(tree)
  return jax.jit(stack_layers, out_shardings=stack_shardings(shardings))(tree)


def abstract(tree: PyTree) -> PyTree:
  """Returns the shapes and types of a tree of (abstract) arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def targets(tree: PyTree, shardings: PyTree | None) -> PyTree:
  """Returns what to restore: stacked abstract arrays that know their shardings."""
  tree = stack_layers(abstract(tree))
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, stack_shardings(shardings)
  )


def compare(expected: Mapping[str, str], found: Mapping[str, str], complaint: str) -> None:
  """Raises CheckpointError naming the first leaf on which two tables differ."""
  for name in sorted(set(expected) | set(found)):
    if expected.get(name) != found.get(name):
      detail = complaint.format(expected=expected.get(name, "absent"), found=found.get(name, "absent"))
      raise CheckpointError(f"leaf {name!r} {detail}")


def seal(content: dict) -> dict:
  """Adds the hash of a JSON document to it. Floats and text survive JSON exactly."""
  content = json.loads(json.dumps(content, default=repr))
  return {"content": content, "sha256": integrity.text_hash(content)}


def unseal(document: Any) -> dict:
  """Returns a sealed document's content. Raises CheckpointError if it was altered."""
  if not isinstance(document, dict) or document.get("sha256") != integrity.text_hash(document.get("content")):
    raise CheckpointError("file 'meta/metadata' does not have the content that was saved")
  return document["content"]


def require_space(directory: pathlib.Path, tree: PyTree, what: str) -> None:
  """Raises CheckpointError if the disk has less room than the arrays take."""
  needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  usage = shutil.disk_usage(directory)
  if usage.total and usage.free < needed:
    raise CheckpointError(disk_full_text(directory, what, f" ({needed / 1e9:.3g} GB needed)"))


def disk_full_text(directory: pathlib.Path, what: str, detail: str = "") -> str:
  """Returns the one line for a full disk."""
  free = shutil.disk_usage(directory).free / 1e9
  return (
    f"disk full while saving {what} to {directory}: {free:.3g} GB free{detail}; "
    "free some space or choose another --workdir, then start again"
  )


_FILE_LIST = "files.json"


def list_files(directory: pathlib.Path) -> None:
  """Writes the names and sizes of a finished checkpoint's files beside them, once."""
  target = directory / _FILE_LIST
  if target.exists() or not directory.is_dir():
    return
  files = sorted(path for path in directory.rglob("*") if path.is_file())
  sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
  replace_text(target, json.dumps(sizes, indent=1) + "\n")


def changed_file(directory: pathlib.Path) -> str | None:
  """Says which file of a checkpoint is missing or has another size than was written; None if none is known to."""
  try:
    sizes = json.loads((directory / _FILE_LIST).read_text())
  except (OSError, ValueError):  # the process was killed before it was written, or it is damaged itself
    return None
  for name, size in sizes.items():
    path = directory / name
    if not path.is_file():
      return f"file {name!r} is missing"
    if path.stat().st_size != size:
      return f"file {name!r} has {path.stat().st_size} bytes, {size} were written"
  return None
