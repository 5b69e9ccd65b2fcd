"""Checkpoints of a run: asynchronous, hashed leaf by leaf, the newest and the best kept.

Orbax restores an array with a flipped byte without complaint, so every leaf's
SHA-256 is stored beside it and compared. `save_tree`, `load_tree` and `tree_hash`
for the artifacts of stages are here too.
"""

import contextlib
import json
import logging
import math
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from nr.models.parameters import stack_layers, unstack_layers
from nr.training import integrity, storage
from nr.training.artifacts import load_tree, save_tree, tree_hash
from nr.training.storage import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "Restored", "load_tree", "save_tree", "tree_hash"]

PyTree = Any
_TEMPORARY = re.compile(r"^(\d+)\.orbax-checkpoint-tmp")


class Restored(NamedTuple):
  """What a checkpoint gives back. `record` is what the loop stored besides the state."""

  step: int
  state: PyTree
  record: dict


def _is_grain(iterator: Any) -> bool:
  """True for Grain's iterators; without Grain imported there are none."""
  grain = sys.modules.get("grain")
  return grain is not None and isinstance(iterator, grain.DatasetIterator)


class Checkpointer:
  """Saves and restores a run: state, data iterator and record together, asynchronously.

  Keeps the newest `keep` checkpoints and, besides them, the `keep_best` best ones by
  `best_metric`: Orbax's own `max_to_keep` with a metric would delete the newest.
  """

  def __init__(self, directory: str | pathlib.Path, config: Any):
    """Opens a checkpoint directory. `config` is the checkpoint section of a training section."""
    self.directory = pathlib.Path(directory).absolute()
    self.directory.mkdir(parents=True, exist_ok=True)
    self._metric = config.best_metric
    self._config = config
    policies = [LatestN(config.keep)]
    others: dict[str, Any] = {}
    if self._metric and config.keep_best:
      highest = config.best_mode == "max"
      policies.append(
        BestN(
          get_metric_fn=lambda metrics: metrics[self._metric],
          reverse=not highest,
          n=config.keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
      others = dict(best_fn=lambda metrics: metrics[self._metric], best_mode=config.best_mode)
    if jax.process_count() > 1:
      # Grain writes each process's position at once, so that the folder must be there before save goes on.
      others["async_options"] = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies), **others)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """Returns the steps of all complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """Returns the step of the best checkpoint by `best_metric`, or None."""
    return self._manager.best_step() if self._metric and self._config.keep_best else None

  def incomplete_steps(self) -> list[int]:
    """Returns the steps of saves that were cut short."""
    found = (_TEMPORARY.match(entry.name) for entry in self.directory.iterdir())
    return sorted(int(match.group(1)) for match in found if match)

  def save(
    self,
    step: int,
    state: PyTree,
    iterator: Any = None,
    record: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    shardings: PyTree | None = None,
  ) -> None:
    """Starts a save; returns once the arrays are copied and may be donated again.

    Args:
      step: number of updates done.
      state: tree of arrays.
      iterator: data iterator; its `get_state()` is stored if it has one.
      record: JSON values to store with it.
      metrics: evaluation results of this very step; without `best_metric` among
        them the checkpoint is no candidate for the best one.
      shardings: shardings of `state`, needed only where layers are kept apart on a mesh.

    Raises:
      CheckpointError: the disk is full, a parameter is not finite, the step exists,
        or an earlier asynchronous save failed.
    """
    self.check()
    self._list_files()
    plain = integrity.to_plain(storage.stacked(state, shardings))
    bad = integrity.first_not_finite({k: v for k, v in plain.items() if k in ("params", "opt_state")})
    if bad:
      raise CheckpointError(f"step {step} was not saved: {bad!r} holds NaN or infinity")
    storage.require_space(self.directory, plain, f"step {step}")
    is_grain = _is_grain(iterator)
    position = iterator.get_state() if hasattr(iterator, "get_state") else None
    content = {
      "record": dict(record or {}),
      "types": integrity.leaf_types(plain),
      "hashes": integrity.leaf_hashes(plain),
      "data": None if is_grain or position is None else position,
      "data_hash": integrity.text_hash(position) if is_grain and jax.process_count() == 1 else None,
    }
    items = dict(state=ocp.args.StandardSave(plain), meta=ocp.args.JsonSave(storage.seal(content)))
    if is_grain:
      import grain

      items["data"] = grain.checkpoint.CheckpointSave(iterator)
    scored = metrics is not None and self._metric in metrics and math.isfinite(metrics[self._metric])
    with self._explained(step):
      saved = self._manager.save(
        step, args=ocp.args.Composite(**items), metrics=dict(metrics) if scored else None
      )
    if not saved:
      raise CheckpointError(f"step {step} was not saved to {self.directory}: it is there already")

  def check(self) -> None:
    """Raises CheckpointError if an asynchronous save has failed; costs nothing else."""
    with self._explained(None):
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits for the save under way. Raises CheckpointError if it failed."""
    with self._explained(None):
      self._manager.wait_until_finished()
    self._list_files()

  def _list_files(self) -> None:
    """Writes down the files of complete steps: errors of the array store name only its folder."""
    if jax.process_index() == 0:
      for step in self.steps():
        storage.list_files(self.directory / str(step))

  def close(self) -> None:
    """Waits for the save under way and releases what the manager holds."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def restore(self, like: PyTree, iterator: Any = None, shardings: PyTree | None = None) -> Restored | None:
    """Restores the newest complete checkpoint, or `restore_step`; None if there is none.

    Args:
      like: (abstract) state that gives structure, shapes and types, in either layout.
      iterator: data iterator; set to the position it had.
      shardings: where the arrays go; the mesh need not be that of the save.

    Raises:
      CheckpointError: one line naming the damaged file or leaf and the newest intact
        step; or the wished step does not exist; or it holds another model.
    """
    self.wait()
    steps, wish = self.steps(), self._config.restore_step
    for step in self.incomplete_steps():
      logging.warning("the save of step %d was cut short; it is ignored", step)
    if wish >= 0 and wish not in steps:
      raise CheckpointError(
        f"training.checkpoint.restore_step: {wish} is not one of the complete steps {steps} "
        f"of {self.directory}"
      )
    if not steps:
      return None
    step = wish if wish >= 0 else steps[-1]
    state, content = self._load_or_explain(step, like, shardings)
    self._restore_iterator(step, iterator, content)
    self._set_aside([newer for newer in steps if newer > step])
    logging.info("restored step %d from %s", step, self.directory)
    return Restored(step, state, content["record"])

  def load(self, step: int, like: PyTree, shardings: PyTree | None = None) -> Restored:
    """Restores the state of one step (the best one, say) and nothing else. Raises as `restore`."""
    self.wait()
    state, content = self._load_or_explain(step, like, shardings)
    return Restored(step, state, content["record"])

  def _load_or_explain(self, step: int, like: PyTree, shardings: PyTree | None) -> tuple[PyTree, dict]:
    """Loads a step; if it is damaged, looks for the newest intact one to name it."""
    content = self._read(lambda: self._load_content(step), step, like, shardings)
    stacked = stack_layers(storage.abstract(like))
    try:
      storage.compare(
        content["types"],
        integrity.leaf_types(integrity.to_plain(stacked)),
        "was saved as {expected} and the config makes it {found}",
      )
    except CheckpointError as error:
      raise CheckpointError(
        f"checkpoint {self.directory / str(step)} holds another model: {error}; "
        "use the config that made it or another --workdir"
      ) from None
    state = self._read(lambda: self._load_state(step, content, like, shardings), step, like, shardings)
    return state, content

  def _read(self, read: Any, step: int, like: PyTree, shardings: PyTree | None) -> Any:
    """Runs a read of `step`; explains its failure in one line."""
    try:
      return read()
    except Exception as error:
      intact = self._newest_intact(step, like, shardings)
      if intact is None:
        remedy = f"no intact step remains; remove {self.directory} to start again"
      else:
        remedy = f"the newest intact step is {intact}: set training.checkpoint.restore_step={intact}"
      damage = storage.changed_file(self.directory / str(step)) or storage.one_line(error)
      raise CheckpointError(
        f"checkpoint {self.directory / str(step)} is damaged: {damage}; {remedy}"
      ) from error

  def _load_content(self, step: int) -> dict:
    """Reads and checks the JSON part of a step."""
    path = self.directory / str(step) / "meta" / "metadata"
    if not path.is_file():
      raise CheckpointError("file 'meta/metadata' is missing")
    try:
      return storage.unseal(json.loads(path.read_text()))
    except ValueError as error:
      raise CheckpointError(f"file 'meta/metadata' is not JSON ({error})") from error

  def _load_state(self, step: int, content: dict, like: PyTree, shardings: PyTree | None) -> PyTree:
    """Restores the arrays of a step, compares their hashes, and unstacks where `like` is unstacked."""
    target = storage.targets(like, shardings)
    restore = ocp.args.Composite(state=ocp.args.StandardRestore(integrity.to_plain(target)))
    plain = self._manager.restore(step, args=restore).state
    storage.compare(content["hashes"], integrity.leaf_hashes(plain), storage.ALTERED)
    state = integrity.from_plain(plain, target)
    layers = storage.count_layers(like)
    if layers is None:
      return state
    return jax.jit(lambda tree: unstack_layers(tree, layers), out_shardings=shardings)(state)

  def _restore_iterator(self, step: int, iterator: Any, content: dict) -> None:
    """Sets the data iterator to the position it had at the save."""
    if content["data"] is not None and hasattr(iterator, "set_state"):
      iterator.set_state(content["data"])
    elif _is_grain(iterator):
      import grain

      restore = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator))
      try:
        self._manager.restore(step, args=restore)
        if content["data_hash"] not in (None, integrity.text_hash(iterator.get_state())):
          raise CheckpointError("the position of the data is not the one that was saved")
      except Exception as error:
        raise CheckpointError(
          f"checkpoint {self.directory / str(step)}, item 'data': {storage.one_line(error)}; restore "
          "with the data pipeline and process count of the save, or set training.checkpoint.restore_step"
        ) from error

  def _newest_intact(self, damaged: int, like: PyTree, shardings: PyTree | None) -> int | None:
    """Returns the newest step but `damaged` that loads and has all its hashes."""
    for step in reversed([step for step in self.steps() if step != damaged]):
      try:
        self._load_state(step, self._load_content(step), like, shardings)
        return step
      except Exception as error:
        logging.warning("step %d is damaged too: %s", step, storage.one_line(error))
    return None

  def _set_aside(self, steps: list[int]) -> None:
    """Moves checkpoints newer than the restored one out of the way; they would count as the latest."""
    for step in steps:
      aside = self.directory.parent / (self.directory.name + "_set_aside")
      aside.mkdir(exist_ok=True)
      target = aside / str(step)
      if jax.process_index() == 0:
        shutil.rmtree(target, ignore_errors=True)
        (self.directory / str(step)).rename(target)
      logging.warning("step %d is newer than the restored one; moved to %s", step, target)
    if not steps:
      return
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices("checkpoints are set aside")  # before any process lists them again
    self._manager.reload()

  @contextlib.contextmanager
  def _explained(self, step: int | None) -> Iterator[None]:
    """Turns the failure of a save into one line with a remedy."""
    try:
      yield
    except CheckpointError:
      raise
    except Exception as error:
      what = "a checkpoint" if step is None else f"step {step}"
      kept = f"; complete steps on disk: {self.steps()}"
      if storage.is_disk_full(error):
        raise CheckpointError(storage.disk_full_text(self.directory, what) + kept) from error
      text = storage.one_line(error)
      raise CheckpointError(f"saving {what} to {self.directory} failed: {text}{kept}") from error
