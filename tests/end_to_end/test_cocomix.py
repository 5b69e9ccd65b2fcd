"""A miniature of the main job, as a user runs it: every stage, every key of the report, and faults."""

import importlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nr import main
from nr.recipes.cocomix.steering.open_run import open_run
from nr.training.model_files import load_model
from nr.training.writers import read_metrics
from tests.recipes.two_processes import run_two

ROOT = pathlib.Path(__file__).parents[2]


def command(workdir, *flags):
  config = "--config=configs/cocomix.py:miniature"
  return [sys.executable, "-m", "nr.main", config, f"--workdir={workdir}", *flags]


def environment():
  # One device, as on a user's laptop; the tests' own process has eight.
  return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def run(workdir, *flags):
  return subprocess.run(
    command(workdir, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("main_job") / "run"
  result = run(workdir)
  assert result.returncode == 0, result.stderr[-4000:]
  return workdir


@pytest.mark.slow
def test_the_report_has_every_number(finished):
  report = json.loads((finished / "report.json").read_text())
  expected = {
    "corpus": {"name", "documents", "tokens"},
    "teacher": {"params", "val_loss", "val_ppl", "bits_per_byte"},
    "sae": {"fvu", "l0", "dead_fraction", "delta_ce", "loss_recovered"},
    "labels": {"mean_positive", "coverage"},
    "students": {"ntp", "cocomix"},
    "steering": {"mode", "concepts", "compression", "sweeps", "overall", "texts"},
    "environment": {"versions", "device", "commit"},
    "seconds": {"tokenizer", "teacher", "sae", "labels", "students", "evaluate", "steer"},
  }
  for section, keys in expected.items():
    assert keys <= set(report[section]), section
  student = {
    "params",
    "activated_params",
    "train_tokens",
    "val_loss",
    "val_ppl",
    "bits_per_byte",
    "ci95",
    "tokens_per_second",
  }
  assert student <= set(report["students"]["ntp"])
  assert student | {"concept_loss", "label_recall"} <= set(report["students"]["cocomix"])
  assert set(report["corpus"]["tokens"]) == {"train", "validation"}
  for kind in ("ntp", "cocomix"):
    entry = report["students"][kind]
    low, high = entry["ci95"]
    assert low <= entry["val_loss"] <= high
    assert entry["val_ppl"] == pytest.approx(math.exp(entry["val_loss"]))
    assert entry["tokens_per_second"] > 0
  assert 0 <= report["students"]["cocomix"]["label_recall"] <= 1
  assert report["comparison"]["flops_ratio"] > 1


@pytest.mark.slow
def test_steering_is_measured_beside_its_controls(finished):
  steering = json.loads((finished / "report.json").read_text())["steering"]
  lines = [json.loads(line) for line in (finished / steering["texts"]).read_text().splitlines()]
  assert {line["subject"] for line in lines} == {"student", "control", "teacher"}
  assert len(lines) == 3 * 2 * 3 * 4  # subjects, concepts, strengths (one of them no edit), prompts
  frequency = {row["concept"]: row["firing_frequency"] for row in steering["concepts"]}
  for swept in steering["sweeps"]:
    assert swept["unedited_difference"] < 1e-6  # editing nowhere is not steering
    assert swept["control"] not in [each["concept"] for each in steering["sweeps"]]
    for kind in ("points", "control_points", "teacher_points"):
      unedited, *steered = swept[kind]
      assert unedited["strength"] is None and unedited["latent_gain"]["estimate"] == 0
      assert all(point["kl"]["low"] > 0 for point in steered)
    for row in swept["agreement"]:
      assert -1 <= row["rank_correlation"]["estimate"] <= 1
    assert 0 < frequency[swept["concept"]] <= 1
  assert [row["strength"] for row in steering["overall"]] == [0.0, 4.0]
  assert steering["compression"]["norm_left_by_decay_alone"] < steering["compression"]["initial_norm"]


@pytest.mark.slow
def test_a_finished_run_can_be_opened_and_read(finished):
  opened = open_run(finished)
  text = next(piece for piece in opened.validation_texts(tokens=16, count=50) if piece.isascii())
  seen = opened.read(text)
  assert "".join(seen.tokens_L) == text
  assert seen.latents_LC.shape == seen.logits_LC.shape == (len(seen.tokens_L), opened.num_concepts)
  assert (seen.is_selected_LC.sum(1) == 8).all() and ((seen.latents_LC > 0).sum(1) <= 8).all()
  # What the student selects are its largest logits.
  chosen = np.where(seen.is_selected_LC, seen.logits_LC, np.inf).min(1)
  assert (chosen >= np.where(seen.is_selected_LC, -np.inf, seen.logits_LC).max(1)).all()
  for side, values in (("teacher", seen.latents_LC), ("student", seen.logits_LC)):
    np.testing.assert_allclose(opened.features([text], side)[0], values.max(0), atol=1e-5)
  with pytest.raises(ValueError, match="give 1 to 32"):
    opened.read("")


@pytest.mark.slow
def test_all_losses_fell(finished):
  for folder, metric in (
    ("teacher", "next_token_loss"),
    ("sae", "fvu"),
    ("students/ntp_seed0", "next_token_loss"),
    ("students/cocomix_seed0", "next_token_loss"),
    ("students/cocomix_seed0", "concept_loss"),
  ):
    lines = (finished / folder / "metrics" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)[metric] for line in lines if metric in json.loads(line)]
    assert values[-1] < values[0], f"{folder}: {metric} went from {values[0]} to {values[-1]}"


@pytest.mark.slow
def test_both_students_saw_the_same_number_of_tokens(finished):
  report = json.loads((finished / "report.json").read_text())
  assert len({report["students"][kind]["train_tokens"] for kind in ("ntp", "cocomix")}) == 1


@pytest.mark.slow
def test_the_report_is_readable_and_its_plots_exist(finished):
  text = (finished / "report.md").read_text()
  assert "one small run decides nothing" in text
  names = (
    "perplexity",
    "language_models",
    "sae_density",
    "steering_kl",
    "steering_latent",
    "steering_agreement",
  )
  for name in names:
    assert f"plots/{name}.png" in text
    assert (finished / "plots" / f"{name}.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_second_run_skips_everything(finished):
  before = (finished / "manifest.json").read_text()
  result = run(finished)
  assert result.returncode == 0
  assert result.stderr.count("finished earlier, skipped") == 8
  assert (finished / "manifest.json").read_text() == before


@pytest.mark.slow
def test_another_config_is_refused_in_one_line(finished):
  result = run(finished, "--config.students.arms.cocomix.loss_weight=0.2")
  assert result.returncode == 1
  last = result.stderr.strip().splitlines()[-1]
  assert last.startswith("error: stage 'students'") and "loss_weight: 0.1 there, 0.2 now" in last


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--config.teacher.modle.num_layers=3",), 'Did you mean "model"'),
    (("--config.teacher.model.num_layers=many",), "invalid literal for int"),
    (("--config=configs/cocomix.py:minature",), "did you mean 'miniature'"),
    (("--config=configs/nowhere.py",), "nowhere.py"),
    (("--stage=lables",), "did you mean 'labels'"),
  ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, flags, words):
  result = run(tmp_path, *flags)
  assert result.returncode in (1, 2)
  lines = result.stderr.strip().splitlines()
  assert lines[-1].startswith("error: ") and words in lines[-1]
  assert "Traceback (most recent call last)" not in result.stderr


def refusal(workdir, stage, **changes):
  """The line in which a run in this process is refused; `changes` by dotted name."""
  config = importlib.import_module("configs.cocomix").get_config("miniature")
  config.update_from_flattened_dict(changes)
  with pytest.raises((ValueError, RuntimeError)) as caught:  # which the command line turns into one line
    main.run(config, workdir, stage)
  return main.one_line(caught.value)


def test_what_cannot_run_is_refused_by_what_is_missing(tmp_path):
  assert "needs the finished stage 'tokenizer'" in refusal(tmp_path, "labels")
  assert "k_attr=9 is above the 8 active latents" in refusal(tmp_path, None, **{"targets.k_attr": 9})


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda path: None, ("no such file",)),
    (lambda path: path.write_bytes(b"fine\n\xff\xfe bad\n"), ("UTF-8",)),
    (lambda path: path.write_text(""), ("empty", "no document", "no text")),
    (
      lambda path: path.write_text("One short text.\n\nAnother one.\n"),
      ("empty", "vocab", "window", "batch"),
    ),
  ],
)
def test_bad_corpora_are_answered_in_one_line(tmp_path, make, words):
  corpus = tmp_path / "corpus.txt"
  make(corpus)
  changes = {"corpus.name": str(corpus), "corpus.text_unit": "blank_line"}
  line = refusal(tmp_path / "run", "tokenizer", **changes)
  assert any(word in line for word in words), line


def without(finished, workdir, *stages):
  """Copies a finished run without the artifacts of some stages."""
  shutil.copytree(finished, workdir)
  manifest = json.loads((workdir / "manifest.json").read_text())
  for stage in stages:
    shutil.rmtree(workdir / stage)
    del manifest[stage]
  (workdir / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_two_processes_train_the_models_of_one(finished, tmp_path):
  """Two processes of two devices, a model spread over all four."""
  after = ("evaluate", "steer", "report")
  config = "configs/cocomix.py:miniature"

  def trained(stage, *flags):
    mesh = [f"--config.{stage}.train.mesh.{axis}=2" for axis in ("data", "fsdp")]
    codes, errors = run_two(config, workdir, f"--stage={stage}", *mesh, *flags, seconds=400)
    assert codes == [0, 0], errors
    return json.loads((workdir / "manifest.json").read_text())[stage]["artifact"]

  workdir = tmp_path / "students"
  without(finished, workdir, "students", *after)
  # The baseline learns from the teacher, which each process has from its file and all spread over the devices.
  runs = trained("students", "--config.students.arms.ntp.kd_weight=0.1")["runs"]
  alone, together = (load_model(run / "students" / "cocomix_seed0" / "model") for run in (finished, workdir))
  jax.tree.map(
    lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5), alone.params, together.params
  )
  for name in runs:
    rows = [row for row in read_metrics(workdir / "students" / name) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(2, 31, 2)), "both processes wrote rows"
    assert rows[-1]["loss"] < rows[0]["loss"]

  workdir = tmp_path / "sae"
  without(finished, workdir, "sae", "labels", "students", *after)
  found = trained("sae")
  # Each process shuffles activations of its own windows, so that batches are others than those of one process.
  one = json.loads((finished / "manifest.json").read_text())["sae"]["artifact"]
  assert found["fvu"] == pytest.approx(one["fvu"], rel=0.05)
  assert found["l0"] == one["l0"] and found["fingerprint"] != one["fingerprint"]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_students(finished, tmp_path):
  """Kill -9 in the middle of the students; the same command ends with the same parameters."""
  workdir = tmp_path / "run"
  without(finished, workdir, "students", "evaluate", "steer", "report")
  process = subprocess.Popen(
    command(workdir, "--stage=students"),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  saved = workdir / "students" / "cocomix_seed0" / "checkpoints"
  deadline = time.monotonic() + 300
  while not (saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir())):
    assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()

  result = run(workdir, "--stage=students")
  assert result.returncode == 0, result.stderr[-4000:]

  def fingerprints(folder):
    runs = json.loads((folder / "manifest.json").read_text())["students"]["artifact"]["runs"]
    return {name: entry["fingerprint"] for name, entry in runs.items()}

  assert fingerprints(workdir) == fingerprints(finished)
