"""The edge of the loop: metrics by clu, speed, progress, imports that must not be needed."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from nr.objectives.weighted import Weighted
from nr.training import integrity, progress
from nr.training.metrics import MetricWindow, host_mean, weighted_mean
from tests.training import toy


def test_core_imports_without_the_packages_of_the_edge():
  blocked = ("grain", "clu", "ml_collections", "tensorboardX", "tqdm", "tensorflow")
  code = (
    "import sys\n"
    f"for name in {blocked}: sys.modules[name] = None\n"
    "from nr.training import state, step, optimizers, sharding, checkpoints, method, integrity\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_window_divides_once_and_starts_afresh():
  window = MetricWindow()
  window.add(
    {"loss": Weighted(np.float32(6), np.float32(2)), "v": Weighted(np.array([1.0, 2.0]), np.float32(1))}
  )
  window.add(
    {"loss": Weighted(np.float32(0), np.float32(4)), "v": Weighted(np.array([3.0, 2.0]), np.float32(1))}
  )
  scalars, vectors = window.compute()
  assert scalars == {"loss": 1.0}
  np.testing.assert_allclose(vectors["v"], [2.0, 2.0])
  window.add({"loss": Weighted(np.float32(5), np.float32(0))})
  assert window.compute()[0] == {"loss": 0.0}
  assert host_mean(Weighted(np.float32(3), np.float32(2))) == 1.5


def test_weighted_mean_is_a_clu_metric_and_counts_beyond_float32():
  from clu import metrics

  mean = weighted_mean()
  assert issubclass(mean, metrics.Metric)
  total = mean.empty()
  for _ in range(3):
    total = total.merge(mean.from_weighted(Weighted(np.float32(2**24 + 2), np.float32(1))))
  assert total.total == 3 * (2**24 + 2)


def test_throughput_leaves_out_compilation_and_pauses(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
  speed = progress.Throughput(flops_per_token=2e9, device_kind="TPU v4", device_count=2)
  clock[0] = 50.0  # Compilation.
  speed.finished_step(100)
  for _ in range(4):
    with speed.waiting():
      clock[0] += 0.5
    clock[0] += 1.5
    speed.finished_step(100)
  with speed.paused():
    clock[0] += 30.0
  rates = speed.window()
  assert rates["tokens_per_second"] == pytest.approx(400 / 8)
  assert rates["step_seconds"] == pytest.approx(2.0)
  assert rates["input_wait_seconds"] == pytest.approx(0.5)
  assert rates["mfu"] == pytest.approx(50 * 2e9 / (2 * 275e12))
  assert speed.take_seconds() == pytest.approx(8.0) and speed.take_seconds() == pytest.approx(0.0)
  assert speed.overall()["tokens_per_second"] == pytest.approx(50)
  assert speed.window() == {}


def test_peak_is_known_only_for_known_devices():
  assert progress.device_peak("TPU v5 lite") == 197e12
  assert progress.device_peak("TPU v5p") == 459e12
  assert progress.device_peak("NVIDIA H100 80GB HBM3") == 989e12
  assert progress.device_peak("cpu") is None


def test_progress_bar_shows_loss_and_speed(capsys):
  bar = progress.ProgressBar("toy", 2, 4, True)
  bar.show({"loss": 1.25, "tokens_per_second": 1234.0, "mfu": 0.5})
  bar.advance()
  bar.close()
  text = capsys.readouterr().err
  assert "toy" in text and "3/4" in text
  progress.ProgressBar("toy", 0, 4, False).advance()
  assert not capsys.readouterr().err


def test_plain_trees_round_trip_and_keys_are_hashed_by_their_data():
  tree = {"a": (np.ones(2), [np.zeros(3)]), "key": jax.random.key(1)}
  back = integrity.from_plain(integrity.to_plain(tree), tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  hashes = integrity.leaf_hashes(tree)
  assert hashes["key"] == integrity.array_hash(np.asarray(jax.random.key_data(jax.random.key(1))))
  assert integrity.first_not_finite({"a": np.float32([1, np.inf]), "b": np.int32(3)}) == "a"


def test_every_default_is_accepted():
  from nr.training.defaults import get_training_config, validate

  validate(get_training_config(), dict(data=8, fsdp=1, tensor=1, sequence=1))
  assert toy.config().steps == 8
