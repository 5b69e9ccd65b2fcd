"""The loop: resume after kill -9, signals, guards, order of events, what it writes."""

import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.training import guards, writers
from nr.training.checkpoints import CheckpointError, tree_hash
from nr.training.guards import Interrupted, TrainingError
from nr.training.loop import train
from nr.training.method import Evaluator
from tests.training import toy
from tests.training.method_suite import Batches

ROOT = pathlib.Path(__file__).parent.parent.parent
VALIDATION = Evaluator(
  "validation", lambda params, frozen, extra: {"loss": float(jnp.square(params["outer"]["kernel"]).sum())}
)


def heavy_method():
  """The toy with some megabytes to save and a fingerprint of the order in which it saw the rows."""

  def loss(params, frozen, extra, batch, key):
    output = toy.loss(params, frozen, extra, batch, key)
    place = jnp.arange(1, batch["index"].shape[0] + 1)
    return output._replace(statistics=output.statistics | {"order": (batch["index"] * place).sum()})

  def init_extra(params):
    noise = jax.random.normal(jax.random.key(1), (1024, 1024))
    return {"order": jnp.int32(1), "ballast": noise, "active": jnp.zeros(toy.DIM)}

  def update_extra(extra, params, statistics, step):
    order = extra["order"] * 31 + statistics["order"]  # Wraps around: a hash of the sequence.
    return extra | {"order": order, "active": extra["active"] + statistics["active"]}

  return toy.make(loss=loss, init_extra=init_extra, update_extra=update_extra)


def heavy_config():
  return toy.config(steps=14, checkpoint__every=2, checkpoint__keep=2)


def child(workdir):
  """What the subprocess runs."""
  from absl import flags

  flags.FLAGS.mark_as_parsed()
  train(heavy_config(), heavy_method(), toy.data(), workdir=workdir)


def start_child(workdir):
  code = f"from tests.training.test_loop import child; child({str(workdir)!r})"
  environment = dict(os.environ, PYTHONPATH=str(ROOT))
  return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def wait_for(condition, process, seconds=120):
  deadline = time.time() + seconds
  while not condition():
    assert process.poll() is None, process.stderr.read().decode()[-2000:]
    assert time.time() < deadline, "the subprocess did not get there in time"
    time.sleep(0.001)


def test_killed_during_an_asynchronous_save_resumes_bit_for_bit(tmp_path, caplog):
  moment = random.Random().uniform(0, 0.02)
  print(f"killed {moment:.4f} s after the save of step 6 began")
  workdir = tmp_path / "killed"
  process = start_child(workdir)
  begun = lambda: any(p.name.startswith("6") for p in (workdir / "checkpoints").glob("*"))  # noqa: E731
  wait_for(begun, process)
  time.sleep(moment)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stderr.close()
  left = {p.name for p in (workdir / "checkpoints").iterdir()}
  with caplog.at_level(logging.INFO):
    resumed = train(heavy_config(), heavy_method(), toy.data(), workdir=workdir)
  whole = train(heavy_config(), heavy_method(), toy.data(), workdir=tmp_path / "whole")
  assert int(resumed.state.extra["order"]) == int(whole.state.extra["order"]), "the data order differs"
  assert tree_hash(resumed.state) == tree_hash(whole.state)
  assert resumed.summary["tokens"] == whole.summary["tokens"]
  assert "restored step" in caplog.text
  cut = [name for name in left if "tmp" in name]
  assert not cut or "was cut short; it is ignored" in caplog.text
  rows = [row["step"] for row in writers.read_metrics(workdir) if "loss" in row]
  assert rows == sorted(set(rows)), "rows written after the checkpoint stand twice"


def test_a_cut_save_is_ignored_and_said(tmp_path, caplog):
  config = toy.config(steps=4, checkpoint__every=2, checkpoint__keep=3)
  train(config, toy.make(), toy.data(), workdir=tmp_path)
  (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp")
  with caplog.at_level(logging.INFO):
    train(config, toy.make(), toy.data(), workdir=tmp_path)
  assert "the save of step 4 was cut short; it is ignored" in caplog.text
  assert "restored step 2" in caplog.text
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} >= {"2", "4"}


def test_sigterm_finishes_the_step_saves_and_leaves(tmp_path):
  class Telling(Batches):
    def __next__(self):
      if self.position == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().__next__()

  config = toy.config(steps=8)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Interrupted, match="signal 15: stopped after step 4; complete checkpoints: ") as caught:
    train(config, toy.make(), Telling(toy.batch()), workdir=tmp_path / "stopped")
  assert caught.value.code == 143
  assert signal.getsignal(signal.SIGTERM) == before
  assert (tmp_path / "stopped" / "checkpoints" / "4").is_dir()
  resumed = train(config, toy.make(), Batches(toy.batch()), workdir=tmp_path / "stopped")
  whole = train(config, toy.make(), Batches(toy.batch()), workdir=tmp_path / "whole")
  assert tree_hash(resumed.state) == tree_hash(whole.state)


class Poisoned(Batches):
  """One batch holds NaN."""

  def __next__(self):
    batch = super().__next__() | {"index": np.arange(16, dtype=np.int32) + 100 * self.position}
    if self.position == 4:
      batch["inputs"] = np.full_like(batch["inputs"], np.nan)
    return batch


def test_nan_names_step_and_batch_and_nothing_bad_is_saved(tmp_path):
  config = toy.config(steps=8, checkpoint__every=1, checkpoint__keep=9)
  with pytest.raises(
    TrainingError, match=r"step 3: loss and gradient_norm not finite.*index \[400, 401"
  ) as caught:
    train(config, toy.make(), Poisoned(toy.batch()), workdir=tmp_path)
  assert "\n" not in str(caught.value)
  steps = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert steps == {"1", "2", "3"}, "the state after the bad update was saved"
  with np.load(tmp_path / "not_finite" / "step_3.npz", allow_pickle=False) as kept:
    assert np.isnan(kept["inputs"]).all()


def test_spike_guard_warns_or_stops(tmp_path, caplog):
  config = toy.config(spike__patience=2, spike__factor=3.0).spike
  batch = {"index": np.arange(3)}
  for action in ("warn", "error", "off"):
    config.action = action
    guard = guards.SpikeGuard(config)
    for step, loss in enumerate([1.0, 1.1, 0.9, 5.0, 1.0, 5.0]):
      guard.observe(step, loss, batch)  # Single spikes pass.
    caplog.clear()
    if action == "error":
      with pytest.raises(TrainingError, match=r"step 6: the loss 6 has been above 3.0 x.*index \[0, 1, 2\]"):
        guard.observe(6, 6.0, batch)
    else:
      guard.observe(6, 6.0, batch)
      assert ("running median" in caplog.text) == (action == "warn")


def test_order_of_events_and_what_is_written(tmp_path):
  events = []

  class Recording(Batches):
    def __next__(self):
      events.append(f"fetch {self.position}")
      return super().__next__()

    def get_state(self):
      events.append(f"save at {self.position}")
      return super().get_state()

  def run(params, frozen, extra):
    events.append("evaluate")
    return {"loss": 1.0}

  config = toy.config(steps=4, log_every=2, eval_every=2, checkpoint__every=2)
  result = train(config, toy.make(), Recording(toy.batch()), [Evaluator("validation", run)], tmp_path)
  assert events == [
    "fetch 0", "fetch 1", "evaluate", "save at 2", "fetch 2", "fetch 3", "evaluate", "save at 4",
  ]  # fmt: skip
  rows = writers.read_metrics(tmp_path)
  assert rows[0]["hparams"]["steps"] == 4
  assert [row["step"] for row in rows if "loss" in row] == [2, 4]
  assert [row["step"] for row in rows if "validation/loss" in row] == [2, 4]
  assert len(next(row["per_output"] for row in rows if "per_output" in row)) == toy.OUT
  last = rows[[("loss" in row and row["step"] == 4) for row in rows].index(True)]
  assert {"learning_rate", "gradient_norm", "tokens_per_second", "step_seconds", "input_wait_seconds"} <= set(
    last
  )
  weight = float(toy.batch()["weights"].sum())
  assert result.summary["tokens"] == 4 * weight
  assert result.summary["evaluations"] == {"validation/loss": 1.0}
  assert result.summary["parameters"] == 16 * 16 + 16 + 16 * 8 + 8
  event_files = list((tmp_path / "metrics" / "tensorboard").glob("events*"))
  assert event_files
  again = train(config, toy.make(), Recording(toy.batch()), [Evaluator("validation", run)], tmp_path)
  assert events[-1] == "save at 4", "a finished run does nothing"
  assert again.summary["evaluations"] == result.summary["evaluations"]


def test_logged_means_are_weighted_over_the_window(tmp_path):
  class TwoWeights(Batches):
    def __next__(self):
      batch = super().__next__()
      value = 1.0 if self.position % 2 else 0.0
      return batch | {"weights": np.where(np.arange(16) < (16 if value else 4), 1, 0).astype(np.float32)}

  config = toy.config(steps=2, log_every=2, optimizer__learning_rate=0.0)
  result = train(config, toy.make(), TwoWeights(toy.batch()), workdir=tmp_path)
  params = result.state.params
  data, total, weight = TwoWeights(toy.batch()), 0.0, 0.0
  for _ in range(2):
    sums = toy.loss(params, toy.make().frozen, (), next(data), None).loss
    total, weight = total + float(sums.total), weight + float(sums.weight)
  assert result.summary["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_tensorboard_reads_the_events_back(tmp_path):
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  writer = writers.make_writer(tmp_path)
  writer.write_scalars(3, {"loss": 1.5})
  writer.close()
  events = accumulator.EventAccumulator(str(tmp_path / "metrics" / "tensorboard"))
  events.Reload()
  assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5)]


def test_plain_iterables_are_wound_forward(tmp_path):
  def batches():
    for number in range(100):
      yield toy.batch(seed=number)

  config = toy.config(steps=6, checkpoint__every=2)
  whole = train(config, toy.make(), batches(), workdir=tmp_path / "whole")
  stopped = toy.config(steps=4, checkpoint__every=2, schedule__steps=6)
  config.schedule.steps = 6
  train(stopped, toy.make(), batches(), workdir=tmp_path / "parts")
  resumed = train(config, toy.make(), batches(), workdir=tmp_path / "parts")
  assert tree_hash(resumed.state) == tree_hash(whole.state)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      dict(batch_size=12),
      "training.batch_size: 12 in 1 microbatch.*data x fsdp = 8 x 1; use a multiple of 8",
    ),
    (dict(accumulation=3), "training.accumulation: 3 does not divide training.batch_size=16"),
    (dict(accumulation=4), "training.batch_size: 16 in 4 microbatch.*use a multiple of 32"),
    (dict(mesh__fsdp=3), "training.mesh.data: -1 cannot be completed"),
    (dict(steps=0), "training.steps: 0 must be 1 or more"),
    (dict(schedule__name="cosin"), "training.schedule.name: 'cosin' is unknown; choose one of constant"),
    (dict(optimizer__name="adamm"), "training.optimizer.name: 'adamm' is unknown"),
    (dict(checkpoint__keep=0), "training.checkpoint.keep: 0 must be 1 or more"),
    (dict(spike__action="stop"), "training.spike.action: 'stop' is unknown"),
    (dict(seed=-1), "training.seed: -1"),
    (
      dict(mesh__data=1, mesh__tensor=3),
      "'inner/bias': dimension 0 of size 16.*'tensor' of size 3",
    ),
  ],
)
def test_bad_settings_are_answered_before_anything_is_made(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    train(toy.config(**changes), toy.make(), toy.data(), workdir=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_data_that_ends_or_has_the_wrong_rows_is_named(tmp_path):
  with pytest.raises(TrainingError, match="the data ended after 3 batches and training.steps=8; repeat"):
    train(toy.config(), toy.make(), [toy.batch()] * 3, workdir=tmp_path / "short")
  with pytest.raises(
    TrainingError, match=r"batch 0, field 'inputs': shape \(8, 16\) does not lead with the 16 rows"
  ):
    train(toy.config(), toy.make(), [toy.batch(8)] * 3, workdir=tmp_path / "rows")


def test_a_checkpoint_of_other_mathematics_is_refused(tmp_path):
  train(toy.config(), toy.make(), toy.data(), workdir=tmp_path)
  changed = toy.config(optimizer__learning_rate=0.5)
  with pytest.raises(ValueError, match="training.optimizer: the checkpoint was made with.*0.01.*0.5"):
    train(changed, toy.make(), toy.data(), workdir=tmp_path)
  with pytest.raises(ValueError, match="method: the checkpoint was made with toy and the config says other"):
    train(toy.config(), toy.make(name="other"), toy.data(), workdir=tmp_path)
  changed.checkpoint.allow_changed_config = True
  train(changed, toy.make(), toy.data(), workdir=tmp_path)
  train(toy.config(log_every=7, mesh__fsdp=2), toy.make(), toy.data(), workdir=tmp_path)


def test_damaged_newest_checkpoint_can_be_left_behind(tmp_path):
  config = toy.config(checkpoint__every=2, checkpoint__keep=9)
  whole = train(config, toy.make(), toy.data(), workdir=tmp_path)
  path = tmp_path / "checkpoints" / "8" / "meta" / "metadata"
  document = json.loads(path.read_text())
  document["content"]["hashes"]["params/inner/bias"] = "0" * 64
  path.write_text(json.dumps(document))
  with pytest.raises(CheckpointError, match="set training.checkpoint.restore_step=6"):
    train(config, toy.make(), toy.data(), workdir=tmp_path)
  config.checkpoint.restore_step = 6
  again = train(config, toy.make(), toy.data(), workdir=tmp_path)
  assert tree_hash(again.state) == tree_hash(whole.state)


def test_profile_is_written(tmp_path):
  train(toy.config(profile__start=2, profile__steps=2), toy.make(), toy.data(), workdir=tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_vector_losses_and_microbatches_pass_through_the_loop(tmp_path):
  one = train(toy.config(mesh__data=1), toy.make(), toy.data(), workdir=tmp_path / "one")
  four = train(toy.config(mesh__data=1, accumulation=4), toy.make(), toy.data(), workdir=tmp_path / "four")
  assert one.summary["loss"] == pytest.approx(four.summary["loss"], rel=1e-5)
