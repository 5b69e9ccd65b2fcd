"""Stages: how a paper runs, is skipped when done, and is resumed when interrupted.

A recipe is a list of stages. A stage is a named function from the config and
the artifacts of earlier stages to an artifact: a dictionary of plain JSON values
(numbers, and paths relative to the work directory). `manifest.json` records for
every stage the fingerprint it was made with; a stage whose fingerprint is
unchanged is skipped, one made by another config, or from a file with another
content, is never silently mixed in.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nr import names
from nr.files import replace_text
from nr.recipes.input_files import MANIFEST, FileHashes
from nr.recipes.processes import Processes
from nr.training.defaults import OPERATIONAL

Artifact = dict[str, Any]
_FINGERPRINTED_PACKAGES = ("nr", "jax", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class StageContext:
  """What a stage may see.

  Attributes:
    config: the whole config; a stage reads only the sections it declared.
    workdir: the run directory.
    directory: the stage's own folder inside it, already made.
    inputs: artifacts of the stages that it declared as inputs, by name.
  """

  config: Any
  workdir: pathlib.Path
  directory: pathlib.Path
  inputs: Mapping[str, Artifact]

  def path(self, relative: str) -> pathlib.Path:
    """Resolves a path that an artifact holds relative to the run directory."""
    return self.workdir / relative

  def relative(self, path: pathlib.Path) -> str:
    """Turns a path inside the run directory into what an artifact may hold."""
    return str(path.relative_to(self.workdir))


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a recipe.

  Attributes:
    name: folder name and value of --stage.
    run: makes the artifact; called again on the same folder after an
      interruption, so it must resume what it finds there.
    sections: top-level config fields that decide its result.
    inputs: names of earlier stages whose artifacts it reads.
    files: config fields, such as "data.pairs", that name files or folders which it reads
      from outside of the run; "" names none. What they hold decides the result as their
      names do (see `nr.recipes.input_files`).
    every_process: whether all processes of a distributed run take part, each with its
      share of the data. Else the first one runs it, with the devices of its host, and the
      others wait: it must use nothing that they would have to join.
  """

  name: str
  run: Callable[[StageContext], Artifact]
  sections: tuple[str, ...] = ()
  inputs: tuple[str, ...] = ()
  files: tuple[str, ...] = ()
  every_process: bool = False


class StageError(ValueError):
  """A run directory and a request that do not fit together."""


def versions() -> dict[str, str]:
  """Returns the package versions that a stage's result may depend on."""
  return {name: importlib.metadata.version(name) for name in _FINGERPRINTED_PACKAGES}


def config_section(config: Any, sections: Sequence[str]) -> dict[str, Any]:
  """Returns the named top-level fields of a ConfigDict as plain JSON values.

  Of training sections (named `train`) the operational fields are left out: a run
  may be continued with another mesh or another checkpoint interval.
  """
  plain = json.loads(config.to_json_best_effort())
  return {name: _without_operational(plain[name]) for name in sections}


def _without_operational(tree: Any, name: str = "") -> Any:
  if not isinstance(tree, dict):
    return tree
  dropped = OPERATIONAL if name == "train" else ()
  return {key: _without_operational(value, key) for key, value in tree.items() if key not in dropped}


def _value(config: Any, field: str) -> Any:
  """Returns the value of a dotted field."""
  for name in field.split("."):
    config = config[name]
  return config


def _contents(stage: Stage, config: Any, hashes: FileHashes) -> dict[str, Any]:
  """Returns what the files of a stage hold, by config field; those that are not there left out."""
  named = {field: _value(config, field) for field in stage.files}
  found = {field: hashes.describe(path) for field, path in named.items() if path}
  return {field: content for field, content in found.items() if content is not None}


def fingerprints(stages: Sequence[Stage], config: Any, workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns, for every stage, what its result depends on and the hash of that.

  Args:
    stages: the recipe.
    config: a ConfigDict with the sections that the stages name.
    workdir: folder that keeps the hashes of input files.

  Returns:
    By stage `fingerprint`, and what it is made from: config, inputs, versions and, where there are any, files.
  """
  records: dict[str, dict[str, Any]] = {}
  hashes = FileHashes(workdir)
  for stage in stages:
    record = {
      "config": config_section(config, stage.sections),
      "inputs": {name: records[name]["fingerprint"] for name in stage.inputs},
      "versions": versions(),
    }
    if files := _contents(stage, config, hashes):
      record["files"] = files
    text = json.dumps(record, sort_keys=True)
    records[stage.name] = {"fingerprint": hashlib.sha256(text.encode()).hexdigest(), **record}
  if Processes().is_first:
    hashes.save()
  return records


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
  return flat


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  before, after = _flatten(old), _flatten(new)
  return [
    f"{key}: {before.get(key, 'absent')!r} there, {after.get(key, 'absent')!r} now"
    for key in sorted(set(before) | set(after))
    if before.get(key, "absent") != after.get(key, "absent")
  ]


def _changed_files(old: Mapping[str, Any], new: Mapping[str, Any], config: Any) -> list[str]:
  """Says which files hold something else than when a stage was made."""

  def told(content: Mapping[str, Any] | None) -> str:
    return "nothing" if content is None else f"{content['bytes']} bytes, sha256 {content['sha256'][:12]}"

  return [
    f"the content of {field}={_value(config, field)!r} is another: "
    f"{told(old.get(field))} there, {told(new.get(field))} now"
    for field in sorted(set(old) | set(new))
    if old.get(field) != new.get(field)
  ]


def read_manifest(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads the manifest of a run directory; empty when there is none yet."""
  path = workdir / MANIFEST
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise StageError(f"{path} is not valid JSON ({error}); delete it to run every stage again") from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, never half.

  Numbers that are not finite become null: JSON has no word for them.
  """
  replace_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_against_manifest(
  stages: Sequence[Stage],
  records: dict[str, Any],
  manifest: dict[str, Any],
  config: Any,
  workdir: pathlib.Path,
) -> None:
  """Refuses a work directory whose stages were made from something else."""
  stale = [
    stage.name
    for stage in stages
    if stage.name in manifest and manifest[stage.name]["fingerprint"] != records[stage.name]["fingerprint"]
  ]
  if not stale:
    return
  first = stale[0]
  old = {key: manifest[first].get(key, {}) for key in ("config", "versions")}
  new = {key: records[first][key] for key in ("config", "versions")}
  reasons = _differences(old, new)
  reasons += _changed_files(manifest[first].get("files", {}), records[first].get("files", {}), config)
  told = "; ".join(reasons[:4]) or "an input of it has changed"
  remove = " ".join(str(workdir / name) for name in stale)
  raise StageError(
    f"stage {first!r} in {workdir} was made by another config ({told}). "
    f"Use a new --workdir, or remove what is outdated with: rm -r {remove}"
  )


def _forget_removed(manifest: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """Drops manifest entries whose folder the user has deleted."""
  return {name: entry for name, entry in manifest.items() if (workdir / name).is_dir()}


def require_distributed(stages: Sequence[Stage], recipe: str, count: int) -> None:
  """Refuses several processes where they could not help, or would get in each other's way.

  Raises:
    StageError: no stage is for all processes.
  """
  if count > 1 and not any(stage.every_process for stage in stages):
    raise StageError(
      f"--distributed: {count} processes: no stage of recipe {recipe!r} is for several; run it without, on one "
      "host (all its devices are used), and spread sweeps over hosts with nr.sweep --shard"
    )


def run_stages(
  stages: Sequence[Stage], config: Any, workdir: pathlib.Path, only: str | None = None
) -> dict[str, Artifact]:
  """Runs what is not finished yet, in order, and returns every artifact made so far.

  Args:
    stages: the recipe, in an order in which inputs come before their users.
    config: a ConfigDict with the sections that the stages name.
    workdir: the run directory, made if missing.
    only: run this stage alone; its inputs must be finished.

  Returns:
    Artifacts by stage name; all of them unless `only` is given.

  Raises:
    StageError: an unknown stage, an unfinished input, or a run directory that
      was made by another config.
    ProcessError: of several processes, the first has failed, or they see other run directories.
  """
  known = [stage.name for stage in stages]
  if only is not None and only not in known:
    raise StageError(names.unknown("--stage", only, known))
  workdir.mkdir(parents=True, exist_ok=True)
  processes = Processes()
  if processes.is_first:  # it keeps the hashes of input files for the others
    fingerprints(stages, config, workdir)
  processes.meet(workdir)
  records = fingerprints(stages, config, workdir)
  manifest = _forget_removed(read_manifest(workdir), workdir)
  _check_against_manifest(stages, records, manifest, config, workdir)
  if processes.is_first:
    write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))

  artifacts: dict[str, Artifact] = {}
  for number, stage in enumerate(stages, start=1):
    finished = manifest.get(stage.name, {}).get("status") == "finished"
    title = f"[{number}/{len(stages)}] {stage.name}"
    if finished:
      artifacts[stage.name] = manifest[stage.name]["artifact"]
      logging.info("%s: finished earlier, skipped", title)
    elif only is None or stage.name == only:
      logging.info("%s: starting", title)
      _require_inputs(stage, workdir, artifacts)
      if processes.is_first:
        _run_stage(stage, config, workdir, artifacts, records, manifest, processes)
      else:
        manifest[stage.name] = _follow_stage(stage, config, workdir, artifacts, processes)
      artifacts[stage.name] = manifest[stage.name]["artifact"]
      logging.info("%s: done in %.1f s", title, manifest[stage.name]["seconds"])
    if stage.name == only:
      break
  return artifacts


def _require_inputs(stage: Stage, workdir: pathlib.Path, artifacts: dict[str, Artifact]) -> None:
  """Raises StageError where an input of a stage is not finished."""
  missing = [name for name in stage.inputs if name not in artifacts]
  if missing:
    raise StageError(
      f"--stage={stage.name} needs the finished stage {missing[0]!r} in {workdir}; "
      f"run without --stage, or --stage={missing[0]} first"
    )


def _context(
  stage: Stage, config: Any, workdir: pathlib.Path, artifacts: dict[str, Artifact]
) -> StageContext:
  """Returns what a stage may see; its folder is made."""
  directory = workdir / stage.name
  directory.mkdir(exist_ok=True)
  return StageContext(config, workdir, directory, {name: artifacts[name] for name in stage.inputs})


def _follow_stage(
  stage: Stage, config: Any, workdir: pathlib.Path, artifacts: dict[str, Artifact], processes: Processes
) -> dict[str, Any]:
  """Takes part in a stage that is for all processes, and returns the first one's entry of the manifest."""
  if stage.every_process:
    stage.run(_context(stage, config, workdir, artifacts))
  return processes.wait_for(workdir / MANIFEST, stage.name)


def _run_stage(
  stage: Stage,
  config: Any,
  workdir: pathlib.Path,
  artifacts: dict[str, Artifact],
  records: dict[str, Any],
  manifest: dict[str, Any],
  processes: Processes,
) -> None:
  """Runs one stage and records it, time of interrupted attempts included."""
  context = _context(stage, config, workdir, artifacts)
  spent = manifest.get(stage.name, {}).get("seconds", 0.0)
  entry = {**records[stage.name], "status": "running", "seconds": spent, **processes.mark()}
  manifest[stage.name] = entry
  write_json(workdir / MANIFEST, manifest)
  start = time.monotonic()
  try:
    artifact = stage.run(context)
  except BaseException:
    if processes.count > 1:  # the others are waiting
      entry["status"] = "failed"
    entry["seconds"] = round(spent + time.monotonic() - start, 3)
    with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
      write_json(workdir / MANIFEST, manifest)
    raise
  entry["seconds"] = round(spent + time.monotonic() - start, 3)
  entry.update(status="finished", artifact=artifact)
  write_json(workdir / MANIFEST, manifest)
