"""The recipe as a user runs it: a miniature through every stage, and a rerun that does nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from nr.data.pools import read_pools
from nr.data.preferences import read_pairs

ROOT = pathlib.Path(__file__).parents[2]
SPLITS = ("train", "held_out")
EXPERIMENTS = {"mini": ("sums", "words"), "hidden": ("hidden",), "sentences": ("story",)}


def run(workdir, *flags):
  command = [sys.executable, "-m", "nr.main", "--config=configs/adaptive_decoding.py:miniature"]
  # One device, as on a user's laptop; the tests' own process has eight.
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [*command, f"--workdir={workdir}", *flags],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("adaptive_decoding") / "run"
  result = run(workdir)
  assert result.returncode == 0, result.stderr[-4000:]
  return workdir


@pytest.mark.slow
def test_the_report_has_every_arm_with_its_interval(finished):
  report = json.loads((finished / "report.json").read_text())
  heads = {f"{variant}{suffix}" for variant in ("separate", "latent", "nll") for suffix in ("", "_sample")}
  fixed = {f"fixed {value:g}" for value in (0, 0.2, 0.4, 0.6, 0.8, 1)}
  others = fixed | {"entropy", "min_p", "top_n_sigma", "mirostat", "best_single", "oracle"}
  assert set(report["evaluation"]) == set(EXPERIMENTS)
  for name, tasks in EXPERIMENTS.items():
    evaluated = report["evaluation"][name]
    assert set(evaluated["arms"]) == heads | others
    assert set(evaluated["winrates"]) == heads
    for against in evaluated["winrates"].values():
      assert set(against) == others
      for found in against.values():
        assert 0 <= found["low"] <= found["estimate"] <= found["high"] <= 1
    for tasks_of_arm in evaluated["arms"].values():
      assert set(tasks_of_arm) == set(tasks)
      assert all(0 <= found["reward"] <= 1 for found in tasks_of_arm.values())
    accuracies = report["heads"][f"{name}/0"]["baseline_accuracies"]
    assert set(accuracies) == {"always_lower", "constant"}
  text = (finished / "report.md").read_text()
  assert "one small run decides nothing" in text and "always lower" in text
  for plot in report["plots"]:
    assert (finished / plot).stat().st_size > 5000


@pytest.mark.slow
def test_pools_and_pairs_are_in_the_house_s_formats(finished):
  report = json.loads((finished / "report.json").read_text())
  for name in EXPERIMENTS:
    pools = {pool.id: pool for pool in read_pools(finished / report["pools"][f"{name}/0"]["path"])}
    assert all(len(pool.samples) == 8 for pool in pools.values())
    made = report["pairs"][f"{name}/0"]
    for split in SPLITS:
      for pair in read_pairs(finished / made[split]):
        samples = [pools[pair.id].samples[index] for index in pair.provenance["samples"]]
        assert [sample.tokens for sample in samples] == [pair.chosen_tokens, pair.rejected_tokens]
        for sample, choices in zip(samples, pair.provenance["choices"]):
          assert list(sample.extras["choices"]) == choices and len(choices) == len(sample.tokens)
          if name != "sentences":
            assert len(set(choices)) == 1
    counts = made["counts"]
    kept = counts["train"] + counts["held_out"]
    assert kept + counts["no_pair"] == counts["prompts"] == len(pools)
    digits = [{pair.prompt_tokens[1:3] for pair in read_pairs(finished / made[split])} for split in SPLITS]
    assert all(digits) and not digits[0] & digits[1]


@pytest.mark.slow
def test_a_second_run_skips_everything_and_another_seed_is_refused(finished):
  before = (finished / "manifest.json").read_text()
  again = run(finished)
  assert again.returncode == 0 and again.stderr.count("finished earlier, skipped") == 6
  assert (finished / "manifest.json").read_text() == before
  other = run(finished, "--config.seed=1")
  assert other.returncode != 0 and "config.seed: 0 there, 1 now" in other.stderr
