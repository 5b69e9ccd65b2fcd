"""Stages that points share: one point computes, the others take copies.

A stage's fingerprint covers its part of the config, its inputs, its files and the versions, and its
artifact holds paths relative to the run directory; so where two points have a stage of the same
fingerprint, the folder and the manifest's entry of one serve the other. Copies, not links: a point's
folder stays whole when another one is deleted.
"""

import dataclasses
import functools
import importlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

from nr.recipes import stages as stages_lib
from nr.sweeps.points import Point


@dataclasses.dataclass(frozen=True)
class Work:
  """A point with its run directory.

  Attributes:
    point: what is run.
    directory: its run directory.
    records: what each stage depends on, with its fingerprint, by name in order.
    shared: stages whose artifacts other stages read. The others write the report, which is each point's own.
  """

  point: Point
  directory: pathlib.Path
  records: dict[str, dict[str, Any]]
  shared: frozenset[str]


def make_work(point: Point, config: Any, directory: pathlib.Path, cache: pathlib.Path) -> Work:
  """Returns the work of a point.

  Args:
    point: what is run.
    config: with the point's overrides.
    directory: the point's run directory.
    cache: folder that keeps the hashes of input files.
  """
  stages = importlib.import_module(config.recipe).stages(config)
  records = stages_lib.fingerprints(stages, config, cache)
  shared = frozenset(name for stage in stages for name in stage.inputs)
  return Work(point, directory, records, shared)


def finished_stages(work: Work) -> set[str]:
  """Returns the stages that are finished, with the fingerprint that the point gives them."""
  statuses = _statuses(work.directory)
  return {
    name
    for name, record in work.records.items()
    if statuses.get(name) == ("finished", record["fingerprint"]) and (work.directory / name).is_dir()
  }


def _statuses(directory: pathlib.Path) -> dict[str, tuple[str, str]]:
  """Returns (status, fingerprint) by stage, read again only when the manifest has changed."""
  try:
    found = (directory / stages_lib.MANIFEST).stat()
  except OSError:
    return {}
  return _read_statuses(directory, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=4096)
def _read_statuses(directory: pathlib.Path, modified: int, inode: int) -> dict[str, tuple[str, str]]:
  del modified, inode
  manifest = stages_lib.read_manifest(directory)
  return {name: (entry["status"], entry["fingerprint"]) for name, entry in manifest.items()}


def is_finished(work: Work) -> bool:
  """Whether nothing of a point is left to do."""
  return len(finished_stages(work)) == len(work.records)


def adopt(work: Work, others: Iterable[Work]) -> list[str]:
  """Copies into a point what other points have finished of its stages, as far as there is any.

  A stage that has been begun here is left alone: it will be resumed.

  Returns:
    The names of the stages that were copied.
  """
  donors = {_key(other, name): other for other in others for name in finished_stages(other)}
  done, copied = finished_stages(work), []
  for name in work.records:
    if name in done:
      continue
    donor = donors.get(_key(work, name))
    if donor is None or not _may_copy(work, name) or not _copy(donor, work, name):
      break
    copied.append(name)
  return copied


def _key(work: Work, name: str) -> tuple[str, str]:
  """Returns what tells a result from all others: two stages may depend on the same."""
  return name, work.records[name]["fingerprint"]


def _may_copy(work: Work, name: str) -> bool:
  return name in work.shared and not (work.directory / name).exists()


def next_ready(waiting: Sequence[Work], running: Sequence[Work], everything: Sequence[Work]) -> Work | None:
  """Returns the first point whose next stage, copies counted in, no running point is about to finish."""
  finished = {_key(work, name) for work in everything for name in finished_stages(work)}
  coming = {_key(work, name) for work in running for name in work.records} - finished

  def is_ready(work: Work) -> bool:
    done = finished_stages(work)
    for name in work.records:
      is_there = _key(work, name) in finished and _may_copy(work, name)
      if name not in done and not is_there:
        return _key(work, name) not in coming or not _may_copy(work, name)
    return True

  return next((work for work in waiting if is_ready(work)), None)


def _copy(donor: Work, work: Work, name: str) -> bool:
  """Copies a stage's folder, then its entry of the manifest, so that a kill leaves no half of it.

  Returns:
    Whether it could be: an artifact with a path of the donor's own is good there alone.
  """
  entry = stages_lib.read_manifest(donor.directory)[name]
  if str(donor.directory) in json.dumps(entry["artifact"]):
    logging.warning("%s: stage %s names its own run directory, and is not copied", donor.point.name, name)
    return False
  partial = work.directory / f"{name}.partial"
  shutil.rmtree(partial, ignore_errors=True)
  shutil.copytree(donor.directory / name, partial, symlinks=True)
  partial.rename(work.directory / name)
  manifest = stages_lib.read_manifest(work.directory)
  manifest[name] = {**entry, "copied_from": donor.point.name}
  stages_lib.write_json(work.directory / stages_lib.MANIFEST, manifest)
  logging.info("%s: stage %s copied from %s", work.point.name, name, donor.point.name)
  return True
