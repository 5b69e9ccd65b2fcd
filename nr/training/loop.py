"""The only training loop. It owns mesh, state, data position, checkpoints, metrics and speed."""

import contextlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.objectives.weighted import Weighted
from nr.training import defaults, guards, integrity, progress, sharding, trees, writers
from nr.training.checkpoints import Checkpointer, CheckpointError
from nr.training.guards import TrainingError
from nr.training.method import Evaluator, Method
from nr.training.metrics import MetricWindow, host_mean
from nr.training.optimizers import make_optimizer
from nr.training.state import TrainState, abstract_state, create_state, place_frozen, state_shardings
from nr.training.step import make_train_step

PyTree = Any
# A resumed run with other values of these would be another run.
_MATHEMATICS = ("batch_size", "seed", "clip", "optimizer", "schedule")


class TrainResult(NamedTuple):
  """What a run leaves.

  Attributes:
    state: the state after the last step, on the devices.
    summary: steps, tokens and seconds of training (all processes that worked on the
      run), parameters, loss (mean of the last logging window), evaluations (latest
      numbers by "evaluator/name"), best_step, and of this process tokens_per_second,
      step_seconds, input_wait_seconds and, where the device's peak is known, mfu.
  """

  state: TrainState
  summary: dict[str, Any]


def _plain_config(config: Any) -> dict[str, Any]:
  """Returns a config section as JSON values."""
  values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  return json.loads(json.dumps(values, default=str))


def _check_same_run(config: Mapping[str, Any], saved: Mapping[str, Any], method: Method) -> None:
  """Raises ValueError if the checkpoint belongs to a run with other mathematics."""
  fields = list(_MATHEMATICS)
  if config["schedule"]["name"] != "constant" and not config["schedule"]["steps"]:
    fields.append("steps")  # They are the length of the schedule.
  pairs = [(f"training.{field}", saved["config"].get(field), config[field]) for field in fields]
  pairs.append(("method", saved["method"], method.name))
  for field, before, now in pairs:
    if before != now:
      raise ValueError(
        f"{field}: the checkpoint was made with {before} and the config says {now}; restore the old value, "
        "choose another --workdir, or set training.checkpoint.allow_changed_config=True"
      )


def _check_rows(batch: Mapping[str, np.ndarray], rows: int, step: int) -> None:
  """Raises TrainingError if a field of the batch does not lead with `rows` rows."""
  for name, value in batch.items():
    if np.shape(value)[:1] != (rows,):
      raise TrainingError(
        f"batch {step}, field {name!r}: shape {np.shape(value)} does not lead with the {rows} rows a process "
        "that training.batch_size asks for; drop the remainder or change training.batch_size"
      )


class _Run:
  """The moving parts of one run besides its state: what is counted, written and saved."""

  def __init__(self, config: Any, method: Method, workdir: pathlib.Path, metadata: Mapping[str, Any]):
    self.config, self.method, self.workdir = config, method, workdir
    sizes = sharding.mesh_sizes(config.mesh, jax.device_count())
    defaults.validate(config, sizes, jax.process_count())
    self.mesh = sharding.make_mesh(config.mesh)
    sharding.check_processes(self.mesh)
    self.optimizer = make_optimizer(config, method)
    self.like = abstract_state(method, self.optimizer)
    self.placed = state_shardings(method, self.like, self.mesh)
    self.plain_config = _plain_config(config)
    trained = trees.count(
      trees.partition(self.like.params, trees.match_mask(self.like.params, method.trainable))[0]
    )
    self.throughput = progress.Throughput(
      config.flops_per_token or 6.0 * trained, jax.devices()[0].device_kind, self.mesh.size
    )
    self.checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint)
    self.metadata = dict(metadata)
    self.record: dict[str, Any] = dict(tokens=0.0, seconds=0.0, evaluations={}, row={}, rates={})
    self.pending: tuple[int, dict[str, Weighted], Mapping[str, np.ndarray]] | None = None
    self.window, self.spikes = MetricWindow(), guards.SpikeGuard(config.spike)
    self.writer: Any = None
    self.bar: Any = None

  def begin(self, data: Any) -> tuple[TrainState, Iterator[Any], int]:
    """Restores or initialises. Returns state, data iterator and the first step."""
    iterator = iter(data)
    try:
      restored = self.checkpointer.restore(self.like, iterator, self.placed)
      if restored is None:
        state, step = create_state(self.method, self.optimizer, self.config.seed, self.mesh), 0
      else:
        state, step = restored.state, restored.step
        saved = restored.record
        if not self.config.checkpoint.allow_changed_config:
          _check_same_run(self.plain_config, saved, self.method)
        self.record.update({name: saved[name] for name in self.record})
        if not hasattr(iterator, "set_state"):
          logging.info("the data has no position to restore: skipping %d batches", step)
          for _ in range(step):
            next(iterator)
    except BaseException:
      with contextlib.suppress(CheckpointError):
        self.checkpointer.close()
      raise
    is_first = jax.process_index() == 0
    self.writer = writers.make_writer(self.workdir, step) if is_first else writers.MultiWriter(())
    if restored is None:
      self.writer.write_hparams(self.plain_config)
      self._log_parameters()
    self.bar = progress.ProgressBar(
      self.method.name, step, self.config.steps, is_first and self.config.progress
    )
    return state, iterator, step

  def _log_parameters(self) -> None:
    """Logs the table of parameters where clu is installed."""
    with contextlib.suppress(ImportError):
      from clu import parameter_overview

      plain = integrity.to_plain(self.like.params)
      logging.info("\n%s", parameter_overview.get_parameter_overview(plain, include_stats=False))

  def drain(self) -> None:
    """Waits for the step in flight; counts it, checks that it is finite, writes its metrics when due."""
    if self.pending is None:
      return
    step, metrics, batch = self.pending
    self.pending = None
    values = jax.device_get(metrics)
    tokens = float(values["tokens"].total if "tokens" in values else values["loss"].weight)
    self.throughput.finished_step(tokens)
    guards.check_finite(step, values, batch, self.workdir)
    self.spikes.observe(step, host_mean(values["loss"]), batch)
    self.record["tokens"] += tokens
    self.window.add(values)
    self.bar.advance()
    done = step + 1
    if done % self.config.log_every == 0 or done == self.config.steps:
      self._write_window(done)

  def _write_window(self, done: int) -> None:
    """Writes the means since the last row, and the speed."""
    scalars, vectors = self.window.compute()
    scalars |= self.throughput.window()
    self.writer.write_scalars(done, scalars)
    if vectors:
      self.writer.write_histograms(done, vectors)
    self.bar.show(scalars)
    self.record["row"] = scalars
    self.checkpointer.check()

  def evaluate(self, step: int, state: TrainState, frozen: PyTree, evaluators: Sequence[Evaluator]) -> dict:
    """Runs all evaluators on the state after `step` updates; returns and writes their numbers."""
    results: dict[str, float] = {}
    with self.throughput.paused():
      for evaluator in evaluators:
        found = evaluator.run(state.params, frozen, state.extra)
        results |= {f"{evaluator.name}/{name}": float(value) for name, value in found.items()}
    if results:
      self.writer.write_scalars(step, results)
      self.record["evaluations"] = results
    return results

  def save(self, step: int, state: TrainState, iterator: Any, results: Mapping[str, float]) -> None:
    """Starts the save of state, data position and record after `step` updates."""
    self._take_time()
    record = self.record | dict(
      config=self.plain_config, method=self.method.name, metadata=self.metadata,
      versions={"jax": jax.__version__, "numpy": np.__version__},
    )  # fmt: skip
    with self.throughput.paused():
      self.checkpointer.save(step, state, iterator, record, results or None, self.placed)

  def _take_time(self) -> None:
    """Moves the training seconds of this process into the record."""
    rates = self.throughput.overall()
    self.record["seconds"] += self.throughput.take_seconds()
    self.record["rates"] = rates or self.record["rates"]

  def summary(self, step: int) -> dict[str, Any]:
    """Returns the numbers of the run so far."""
    self._take_time()
    self.checkpointer.wait()
    return dict(
      steps=step,
      tokens=self.record["tokens"],
      seconds=self.record["seconds"],
      parameters=trees.count(self.like.params),
      loss=self.record["row"].get("loss"),
      metrics=self.record["row"],
      evaluations=self.record["evaluations"],
      best_step=self.checkpointer.best_step(),
      **self.record["rates"],
    )

  def close(self, is_failing: bool) -> None:
    """Waits for the save under way and closes the files."""
    self.bar.close()
    self.writer.close()
    try:
      self.checkpointer.close()
    except CheckpointError as error:
      if not is_failing:
        raise
      logging.error("%s", error)


def train(
  config: Any,
  method: Method,
  data: Any,
  evaluators: Sequence[Evaluator] = (),
  workdir: str | pathlib.Path = ".",
  *,
  metadata: Mapping[str, Any] | None = None,
) -> TrainResult:
  """Trains a method, resuming what the work directory holds.

  The order is fixed. Restore or initialise; then before every step: evaluate if
  due, save if due (state, data position and record together), fetch, dispatch the
  step, and while it runs take in the metrics of the one before: the host never
  waits for the step it has just sent. Evaluations and saves come after the metrics
  of all earlier steps were found finite. Both also happen after the last step.

  Args:
    config: training section, see `nr.training.defaults.get_training_config`.
    method: what to train.
    data: iterable of batches, dictionaries of NumPy arrays with this process's rows;
      an iterator with get_state and set_state (Grain's have them) resumes where it
      stood, any other one is wound forward. One with `receive(step, params)` is shown
      the parameters before every batch, to sample from them; it must not keep them.
    evaluators: measurements taken every `eval_every` steps and at the end.
    workdir: gets checkpoints/, metrics/ and, when asked for, profile/.
    metadata: JSON values to keep in every checkpoint (tokenizer hash, model spec).

  Returns:
    TrainResult(state, summary).

  Raises:
    ValueError: a setting cannot work or does not belong to the checkpoint.
    TrainingError: loss or gradient not finite, a spike, a bad or missing batch.
    CheckpointError: a checkpoint is damaged or cannot be written.
    Interrupted: SIGTERM or SIGINT came; the state is saved.
  """
  workdir = pathlib.Path(workdir).absolute()
  run = _Run(config, method, workdir, metadata or {})
  rows = config.batch_size // jax.process_count()
  with sharding.context(run.mesh), guards.StopSignal() as stop:
    state, iterator, start = run.begin(data)
    profiler = guards.Profiler(config.profile, workdir, start)
    is_failing = True
    try:
      frozen = place_frozen(method, run.mesh)
      train_step = make_train_step(method, run.optimizer, config.accumulation, config.seed, mesh=run.mesh)
      for step in range(start, config.steps + 1):
        is_last, is_stopped = step == config.steps, stop.is_set(step, config.log_every)
        is_new = step > start
        is_evaluation = is_new and (is_last or _is_due(step, config.eval_every))
        is_save = is_new and (is_last or is_stopped or _is_due(step, config.checkpoint.every))
        if is_evaluation or is_save:
          run.drain()
        results = run.evaluate(step, state, frozen, evaluators) if is_evaluation else {}
        if is_save:
          run.save(step, state, iterator, results)
        if is_stopped:
          run.checkpointer.wait()
          saved = run.checkpointer.steps()
          raise guards.Interrupted(stop.number, step, saved)
        if is_last:
          break
        profiler.before_step(step, state)
        with run.throughput.waiting():
          if hasattr(iterator, "receive"):
            iterator.receive(step, state.params)
          batch = next(iterator, None)
        if batch is None:
          raise TrainingError(
            f"the data ended after {step} batches and training.steps={config.steps}; "
            "repeat the data or lower training.steps"
          )
        _check_rows(batch, rows, step)
        arrays = sharding.put_batch(batch, run.mesh)
        # The first call compiles, which moves constants to the devices.
        with jax.transfer_guard("allow" if step == start else "disallow"):
          state, metrics = train_step(state, frozen, arrays)
        run.drain()
        run.pending = (step, metrics, batch)
      summary = run.summary(config.steps)
      is_failing = False
    finally:
      profiler.close(state)
      if iterator is not data and hasattr(iterator, "close"):
        iterator.close()  # Grain's worker processes end here.
      run.close(is_failing)
  return TrainResult(state, summary)


def _is_due(step: int, every: int) -> bool:
  """True every `every` steps; never for 0."""
  return every > 0 and step % every == 0
