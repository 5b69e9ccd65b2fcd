"""The DivPO recipe: which pair each criterion picks, what is refused, and the whole run in miniature."""

import json
import pathlib

import numpy as np
import pytest

from configs.divpo import VARIANTS, get_config
from nr import main
from nr.data.pools import Pool, PoolSample
from nr.judges.protocol import Item
from nr.recipes.divpo import checks, settings
from nr.recipes.divpo.evaluate import winrate
from nr.recipes.divpo.pairs import SelectionSpec, make_pairs
from nr.recipes.divpo.personas import JsonPersonas, PersonaWorld, ShortAnswers
from nr.recipes.stages import read_manifest

WORLD = PersonaWorld(num_values=5)
TEXTS = {
  "{ name_0 city_0 job_0 }": 1.0,
  "{ name_0 city_0 job_1 }": 1.0,
  "{ name_4 city_3 job_2 }": 1.0,
  "{ name_1 name_2 }": 0.0,
  "name_0": 0.0,
}
LOG_PROBS = {0: (-0.1,) * 6, 1: (-0.3,) * 6, 2: (-2.0,) * 6, 3: (-3.0,) * 5, 4: (-0.5, -0.4)}


def pool(scores=None, texts=TEXTS, id="p"):
  scores = list(TEXTS.values()) if scores is None else scores
  samples = tuple(
    PoolSample(index, text, tuple(range(len(LOG_PROBS[index]))), LOG_PROBS[index], score=score)
    for index, (text, score) in enumerate(zip(texts, scores))
  )
  return Pool(id, "persona", samples, prompt_tokens=(1,))


def picked(spec, **changes):
  pairs = make_pairs([pool(**changes)], spec, WORLD)
  return [tuple(pair.provenance["indices"]) for pair in pairs]


@pytest.mark.parametrize(
  "spec, expected",
  [
    (SelectionSpec(method="dpo"), (0, 3)),
    (SelectionSpec(criterion="probability"), (2, 4)),
    # By the sum the two-token text is the more probable one, by the mean too; the long invalid one is rare.
    (SelectionSpec(criterion="probability", norm="sum"), (2, 4)),
    (SelectionSpec(criterion="frequency"), (2, 4)),
    (SelectionSpec(criterion="jaccard"), (2, 4)),
    # Nothing that is not valid has attributes: both count as the same rare value, the first is taken.
    (SelectionSpec(criterion="attribute_frequency"), (2, 3)),
  ],
)
def test_criteria_pick_the_rare_good_and_the_common_bad(spec, expected):
  assert picked(spec) == [expected]


def test_what_was_not_scored_is_never_picked():
  assert picked(SelectionSpec(), scores=[1.0, 1.0, None, 0.0, None]) == [(1, 3)]
  assert picked(SelectionSpec(method="dpo"), scores=[None, 1.0, 1.0, None, 0.0]) == [(1, 4)]
  assert picked(SelectionSpec(), scores=[None] * 5) == []
  failed = pool()
  failed = failed._replace(
    samples=(failed.samples[0]._replace(text=None, log_probs=None, score=None), *failed.samples[1:])
  )
  (pair,) = make_pairs([failed], SelectionSpec(), WORLD)
  assert pair.provenance["indices"] == [2, 4]


def test_tied_pools_follow_the_policy():
  ones = [1.0] * 5
  assert picked(SelectionSpec(), scores=ones) == [(3, 0)]
  assert picked(SelectionSpec(tie_policy="skip"), scores=ones) == []
  assert picked(SelectionSpec(method="dpo"), scores=ones) == []


def test_random_choice_depends_on_the_pool_and_the_seed_alone():
  spec = SelectionSpec(criterion="random")
  pools = [pool(id=str(number)) for number in range(40)]
  first, second = (
    [pair.provenance["indices"] for pair in make_pairs(pools, spec, WORLD, seed)] for seed in (0, 1)
  )
  assert first != second and len({tuple(each) for each in first}) > 3
  assert [pair.provenance["indices"] for pair in make_pairs(pools[::-1], spec, WORLD)][::-1] == first


def test_the_corpus_has_the_shares_it_says():
  texts = [each.response for each in PersonaWorld().corpus(4000, 0)]
  personas = [persona for persona in map(PersonaWorld().read, texts) if persona]
  # Two swapped values of 12 %: all three kinds of mistakes are mistakes.
  np.testing.assert_allclose(len(personas) / len(texts), 0.88, atol=0.02)
  shares = np.arange(1, 41) ** -1.3
  first = np.mean([persona["city"] == "city_0" for persona in personas])
  np.testing.assert_allclose(first, shares[0] / shares.sum(), atol=0.03)


@pytest.mark.parametrize("text, expected", [(text, score) for text, score in TEXTS.items()] + [("", 0.0)])
def test_the_rule_scores_form_alone(text, expected):
  (judged,) = WORLD.judge().judge([Item("0", "persona", text)])
  assert judged.score == expected


def test_json_personas_are_read():
  task = JsonPersonas()
  good = {"first_name": " Ada ", "city": "Turin", "occupation": "smith", "age": 3}
  assert task.read(json.dumps(good)) == {"first_name": "Ada", "city": "Turin", "occupation": "smith"}
  for bad in ({**good, "city": ""}, {**good, "city": 3}, {"first_name": "Ada"}, [good], "Ada"):
    assert task.read(json.dumps(bad)) is None
  assert task.read("{") is None


def answers(**changes):
  given = dict(
    template="Name {subject}.", subjects=("a",), held_out_subjects=("b",), pattern="[A-Z][a-z]+[.]?"
  )
  return ShortAnswers(**{**given, **changes})


def test_short_answers_are_read_by_their_pattern():
  task = answers()
  assert [each.id for each in task.prompts()] == ["a"] and [each.id for each in task.held_out()] == ["b"]
  assert task.prompts()[0].prompt[0]["content"] == "Name a."
  assert task.read(" Ada.\n") == task.read("Ada") == {"answer": "ada"}
  assert task.read("Ada Smith") is None and task.read("") is None
  for changes, message in (
    (dict(template="Name."), "no slot"),
    (dict(subjects=("b",)), "'b' is in subjects and in held_out_subjects"),
    (dict(pattern="["), "pattern"),
    (dict(subjects=()), "give subjects"),
  ):
    with pytest.raises(ValueError, match=message):
      answers(**changes)


def test_a_checkpoint_that_is_not_there_is_named():
  config = get_config("smollm")
  config.train.batch_size = config.base.train.batch_size = 16
  config.base.checkpoint = "/nowhere"
  with pytest.raises(ValueError, match="base.checkpoint='/nowhere': there is no such file"):
    checks.validate(config)


def test_winrates_count_ties_half_and_skip_what_has_no_score():
  assert winrate(np.array([1.0, 0, 1, np.nan]), np.array([0.0, 0, 1, 1])) == pytest.approx(2 / 3)
  assert winrate(np.array([np.nan]), np.array([0.0])) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_configs_are_valid(variant, tmp_path):
  config = get_config(variant)
  if not settings.is_toy(config):
    config.base.checkpoint = str(tmp_path)
  config.train.mesh.update(dict(data=-1, fsdp=1))
  config.train.batch_size *= 8
  checks.validate(config)
  for arm in settings.arm_names(config):
    settings.round_spec(config, arm, 0)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("seeds", (), "name at least one seed"),
    ("sampling.num_samples", 1, "a pair takes at least 2"),
    ("sampling.chain", "temprature(1)", "sampling.chain: .*did you mean 'temperature'"),
    ("sampling.max_length", 3, "a persona takes 7 tokens"),
    ("evaluate.pool_size", 5000, "evaluate.pool_size=5000"),
    ("arms.divpo_online.select.rho", 0.7, r"arms.divpo_online.select: rho=0.7"),
    ("arms.divpo_online.select.criterion", "frequenzy", "did you mean 'frequency'"),
    ("arms.dpo_online.loss.beta", -1.0, r"arms.dpo_online.loss: beta=-1"),
    ("arms.dpo_online.steps_per_round", -1, "give 0 or more"),
    ("base.checkpoint", "/nowhere", "everything else by a checkpoint"),
    ("task.kind", "anwsers", "did you mean 'answers'"),
  ],
)
def test_mistakes_are_named_before_anything_runs(field, value, message):
  config = get_config("tiny")
  config.train.batch_size = 16
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    checks.validate(config)


@pytest.mark.slow
def test_the_recipe_runs_and_a_second_run_skips(tmp_path):
  config = get_config("miniature")
  for section in (config.base.train, config.train):
    section.mesh.data = 1
    section.progress = False
  artifacts = main.run(config, tmp_path)
  report = json.loads((tmp_path / "report.json").read_text())
  assert set(report["arms"]) == {"base", *settings.arm_names(config)}
  for arm in report["arms"]:
    found = report["runs"][f"{arm}_seed0"]
    assert found["samples"] == 64 and 0 <= found["validity"] <= 1
    assert len((tmp_path / "evaluate" / f"{arm}_seed0.jsonl").read_text().splitlines()) == 64
  assert report["runs"]["base_seed0"]["winrate"] == 0.5
  rounds = artifacts["arms"]["runs"]["dpo_online_seed0"]["rounds"]
  assert [each["round"] for each in rounds] == list(range(6))
  assert len(artifacts["arms"]["runs"]["divpo_offline_seed0"]["rounds"]) == 1
  for plot in report["plots"]:
    assert (tmp_path / plot).stat().st_size > 1000
  before = read_manifest(pathlib.Path(tmp_path))
  assert main.run(config, tmp_path).keys() == artifacts.keys()
  assert read_manifest(pathlib.Path(tmp_path)) == before
