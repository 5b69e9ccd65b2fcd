"""Every sweep in configs/sweeps fits its config, and its metrics are in the committed reports."""

import importlib
import json
import pathlib
import re

import pytest

from nr.recipes.cocomix import settings, students
from nr.sweep import check
from nr.sweeps.points import expand, load_sweep, sweeps_of
from nr.sweeps.results import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "sweeps"
SWEEPS = [(path.stem, name) for path in sorted(FOLDER.glob("*.py")) for name in sweeps_of(path)]
# Variants that sweeps must fit; points of the last one are also checked by the recipe.
VARIANTS = {
  "adaptive_decoding": ("tiny", "miniature"),
  "cocomix": ("tiny", "miniature"),
  "divpo": ("tiny",),
  "length_instruct": ("tiny",),
}
# What the committed report was not asked for.
NOT_REPORTED = {("adaptive_decoding", "losses"): "joint"}


def config_of(recipe, variant="tiny"):
  return importlib.import_module(f"configs.{recipe}").get_config(variant)


def sweep_of(recipe, name):
  return load_sweep(str(FOLDER / f"{recipe}.py") + (f":{name}" if name else ""))


def points_of(recipe, name, variant="tiny"):
  return expand(sweep_of(recipe, name), config_of(recipe, variant))


def test_every_recipe_with_a_report_has_sweeps():
  assert {recipe for recipe, _ in SWEEPS} == set(VARIANTS)
  assert len(SWEEPS) == len(set(SWEEPS)) > 20


@pytest.mark.parametrize("recipe, name", SWEEPS)
def test_sweeps_fit_their_config(recipe, name):
  for variant in VARIANTS[recipe]:
    points = points_of(recipe, name, variant)
    names = [point.name for point in points]
    assert len(set(names)) == len(names) > 1
    assert all(re.fullmatch(r"[A-Za-z0-9_.=+-]{1,120}", each) for each in names), names


@pytest.mark.parametrize("recipe, name", SWEEPS)
def test_every_point_passes_its_recipe(recipe, name, monkeypatch):
  if recipe in ("cocomix", "adaptive_decoding"):  # no sweep changes what an optimizer or a mesh could refuse
    monkeypatch.setattr(f"nr.recipes.{recipe}.checks._check_training", lambda name, section, method: None)
  assert check(points_of(recipe, name, VARIANTS[recipe][-1]), config_of(recipe, VARIANTS[recipe][-1])) == {}


@pytest.mark.parametrize("recipe, name", SWEEPS)
def test_metrics_are_what_reports_hold(recipe, name):
  report = json.loads((ROOT / "benchmarks" / "results" / f"{recipe}_seeds.json").read_text())
  metrics = dict(sweep_of(recipe, name).metrics(config_of(recipe)))
  assert metrics
  _, problems = read_metrics(report, metrics)
  missing = NOT_REPORTED.get((recipe, name))
  assert not [problem for problem in problems if missing is None or f".{missing}." not in problem]


def test_the_grid_of_adaptive_decoding_is_the_specification_s():
  points = points_of("adaptive_decoding", "")
  assert {tuple(point.values.values()) for point in points} == {
    (rate, beta) for rate in (3e-5, 1e-4, 3e-4, 1e-3) for beta in (0.05, 0.1, 0.5, 1.0)
  }
  assert points[0].name == "learning_rate=3e-05__beta=0.05"


def test_a_baseline_is_as_wide_as_what_cocomix_activates():
  points = {point.values["num_latents"]: point.overrides for point in points_of("cocomix", "concepts")}
  # The published pair of configs/cocomix.py: 512 concepts, width 100.
  assert points[512]["students.arms.ntp.model.model_dim"] == 100
  widths = [points[count]["students.arms.ntp.model.model_dim"] for count in sorted(points)]
  assert widths == sorted(widths) and all(width % 2 == 0 for width in widths)


def test_the_llama_baseline_has_what_cocomix_activates():
  point = points_of("cocomix", "backbone")[1].overrides
  config = config_of("cocomix")
  config.update_from_flattened_dict(point)
  counts = {
    arm: students.activated_parameters(settings.student_spec(config, arm, 2048)) for arm in ("ntp", "cocomix")
  }
  assert counts["cocomix"] - counts["ntp"] == 0, counts


def test_the_sign_is_swept_first():
  cocomix = sweeps_of(FOLDER / "cocomix.py")
  assert next(iter(cocomix)) == "sign"
  grid = {tuple(point.overrides.values()) for point in points_of("cocomix", "sign_and_attribution")}
  assert len(grid) == 3 * 2 * 2
  values = {tuple(sorted(point.overrides.items())) for point in points_of("cocomix", "attribution")}
  said = {field.removeprefix("targets.") for point in values for field, _ in point}
  assert {"act", "scope", "eval_point", "criterion"} <= said
