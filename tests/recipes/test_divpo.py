"""The DivPO recipe: which pair each criterion picks, what is refused, and the whole run in miniature."""

import json
import pathlib

import numpy as np
import pytest

from configs.divpo import VARIANTS, get_config
from nr import main
from nr.data.pools import Pool, PoolSample
from nr.generators.protocol import Sample
from nr.judges.protocol import Item
from nr.recipes.divpo import checks, settings
from nr.recipes.divpo.evaluate import Drawn, measure, winrate
from nr.recipes.divpo.pairs import SelectionSpec, make_pairs, pool_rewards
from nr.recipes.divpo.personas import JsonPersonas, PersonaWorld, ShortAnswers
from nr.recipes.divpo.report import of_steps
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


# Of the good texts 0 to 3 and the bad ones 4 to 6, each criterion finds another pair the most and least diverse.
DIVERSE = (
  ("{ name_0 city_0 job_0 }", 1.0, (-9.0, -0.1, -0.1, -0.1, -0.1, -0.1)),
  ("{ name_0 city_0 job_0 }", 1.0, (-2.0,)),
  ("{ name_0 city_0 name_1 name_2 name_3 }", 1.0, (-0.2,) * 7),
  ("{ name_4 city_4 job_4 }", 1.0, (-0.3,) * 6),
  ("{", 0.0, (-0.1,)),
  ("{ name_0 city_0 job_0 job_0", 0.0, (-0.01,) * 8),
  ("", 0.0, (-5.0,)),
)


@pytest.mark.parametrize(
  "spec, expected",
  [
    (SelectionSpec(method="dpo"), (0, 4)),
    (SelectionSpec(criterion="probability"), (1, 5)),
    (SelectionSpec(criterion="probability", norm="sum"), (0, 5)),
    (SelectionSpec(criterion="frequency"), (3, 4)),
    (SelectionSpec(criterion="jaccard"), (3, 5)),
    (SelectionSpec(criterion="attribute_frequency"), (3, 4)),
  ],
)
def test_criteria_pick_the_rare_good_and_the_common_bad(spec, expected):
  texts, scores, log_probs = zip(*DIVERSE)
  samples = tuple(
    PoolSample(index, text, tuple(range(len(each))), each, score=score)
    for index, (text, score, each) in enumerate(zip(texts, scores, log_probs))
  )
  (pair,) = make_pairs([Pool("p", "persona", samples, prompt_tokens=(1,))], spec, WORLD)
  assert tuple(pair.provenance["indices"]) == expected


def test_rewards_of_groups_are_scores_times_diversity():
  spec = SelectionSpec(method="grpo", reward="score_times_diversity", criterion="frequency")
  (rewards,) = pool_rewards([pool(scores=[1.0, 1.0, 1.0, 0.0, None])], spec, WORLD)
  assert rewards[2] > rewards[0] > 0 and rewards[3] == 0 and np.isnan(rewards[4])
  (plain,) = pool_rewards([pool()], SelectionSpec(method="grpo"), WORLD)
  np.testing.assert_array_equal(plain, list(TEXTS.values()))


def test_uniqueness_is_over_all_texts_and_failures_are_no_texts():
  def sample(index, text, **changes):
    given = dict(tokens=(1, 2), log_probs=(-1.0, -1.0), transformed_log_probs=(-1.0, -1.0))
    return Sample("p/0", index, text, **{**given, **changes})

  valid = [sample(index, f"{{ name_{index % 2} city_0 job_0 }}") for index in range(4)]
  invalid = [sample(index, "{") for index in range(4, 8)]
  lost = [sample(8, None, tokens=None, log_probs=None, transformed_log_probs=None, error="too long")]
  scores = np.array([1.0] * 4 + [0.0] * 4 + [np.nan])
  found = measure(WORLD, [Drawn("p", valid + invalid + lost, scores)], 2)
  assert (found["samples"], found["failed"], found["valid"], found["validity"]) == (8, 1, 4, 0.5)
  assert found["by_prompt"]["p"]["attributes"]["name"]["values"] == 2
  np.testing.assert_allclose(found["uniqueness"], np.mean([2, 1, 1]) / 8)
  assert found["distinct_valid"] == 2 / 8 and found["mean_score"] == 0.5


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
    (dict(examples=(("b", "Ada"),)), "'b' is in held_out_subjects and in examples"),
    (dict(examples=(("c", "ada smith"),)), "'ada smith' is not of the form"),
  ):
    with pytest.raises(ValueError, match=message):
      answers(**changes)


def test_examples_are_earlier_turns():
  task = answers(examples=(("c", "Ada"), ("d", "Bo.")))
  (asked,) = task.held_out()
  assert [each["role"] for each in asked.prompt] == ["user", "assistant"] * 2 + ["user"]
  assert [each["content"] for each in asked.prompt] == ["Name c.", "Ada", "Name d.", "Bo.", "Name b."]
  assert task.prompts()[0].prompt[:-1] == asked.prompt[:-1]


def test_a_checkpoint_that_is_not_there_is_named():
  config = get_config("smollm")
  config.train.batch_size = config.base.train.batch_size = 16
  config.base.checkpoint = "/nowhere"
  with pytest.raises(ValueError, match="base.checkpoint='/nowhere': there is no such file"):
    checks.validate(config)


def test_winrates_count_ties_half_and_skip_what_has_no_score():
  assert winrate(np.array([1.0, 0, 1, np.nan]), np.array([0.0, 0, 1, 1])) == pytest.approx(2 / 3)
  assert winrate(np.array([np.nan]), np.array([0.0])) is None


def test_seconds_of_a_step_are_parted():
  config = get_config("tiny")
  config.arms.divpo_online.steps_per_round = 2

  def parted(arm, step_seconds, *seconds):
    rounds = [{"seconds": each} for each in seconds]
    return of_steps(config, {"arm": arm, "rounds": rounds, "summary": step_seconds})

  # The first round compiles, and one that an earlier attempt drew has no time.
  found = parted("divpo_online", {"step_seconds": 10.0}, 99.0, 4.0, None, 8.0)
  assert found == {"step": 10.0, "sampling": 3.0, "training": 7.0}
  assert parted("divpo_offline", {"step_seconds": 10.0}, 99.0)["training"] == 10.0
  assert parted("divpo_online", {}, 1.0, 1.0) == {"step": None, "sampling": None, "training": None}


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
    ("base.model.family", "gpt2", "base.max_length=8: pools need 9 positions"),
    ("arms.divpo_online.select.rule", "absolute", "thresholds=None with rule='absolute'"),
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
