"""Adaptive decoding's tasks: rules that score, prompts written here, settings that are refused."""

import jax
import numpy as np
import pytest
from adaptive_decoding_files import CONFIG

from nr.judges.protocol import Item
from nr.models import parameters
from nr.models.transformer import TransformerSpec
from nr.recipes import adaptive_decoding
from nr.recipes.adaptive_decoding import settings
from nr.recipes.adaptive_decoding.tasks import problems, rules
from nr.recipes.adaptive_decoding.tasks.judging import JudgeSpec, make_judge
from nr.recipes.adaptive_decoding.tasks.prompts import PromptTaskSpec, bucket_lengths, read_prompts
from nr.recipes.policies import model_mesh
from nr.training import sharding
from nr.training.model_files import axes_of, build_model


def judged(judge, *responses, reference=None):
  return [
    each.score
    for each in judge.judge([Item(str(i), "", text, reference) for i, text in enumerate(responses)])
  ]


# Rules.


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("So 48 + 24 = 72.", "72"), ("#### 1,234.50", "1234.5"), ("$0.50", "0.5"), ("It is -3", "-3"), ("10-4", "4"),
    ("**18.0** apples", "18"), ("007", "7"), ("-0.0", "0"), ("none at all", None), ("", None), ("x5 y", None),
    ("1" * 60, "1" * 60), ("2,3", "3"), ("\\boxed{12}", "12"),
  ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
  assert rules.last_number(text) == number


def test_numbers_are_compared_as_numbers():
  judge = make_judge(JudgeSpec("number"))
  assert judged(judge, "It is 1,000.0", "1000", "100", "no idea", "", reference="$1000") == [1, 1, 0, 0, 0]
  assert judged(judge, "3") == [None]
  behind = make_judge(JudgeSpec("number", marker="####"))
  assert judged(behind, "2 and 3\n#### 5", "5", "#### 5\n#### 6", reference="5") == [1, 0, 0]
  found = judge.judge([Item("a", "", "12.50 dollars", "12.5")])[0]
  assert found.details == {"answer": "12.5"}


def test_sentences_begin_as_asked():
  """Section 4.4: the share of sentences whose first word begins with two letters."""
  judge = make_judge(JudgeSpec("sentences", beginning="Ab"))
  text = 'Abby saw it. "Above all," she said, "go!" Then Abe ran... about 3.5 miles\n\n* Abel stayed'
  # Abby, Above, Then, about, Abel: a quotation and a list mark do not hide the word, a decimal point ends nothing.
  assert rules.sentences(text)[3] == "about 3.5 miles"
  assert judged(judge, text, "Abide.", "Then.", "", "...") == pytest.approx([4 / 5, 1, 0, 0, 0])


def test_variety_and_repeats():
  assert judged(make_judge(JudgeSpec("variety", words=4)), "a b A, c", "a a a a a", "a b c d e f", "") == [
    0.75, 0.25, 1, 0,
  ]  # fmt: skip
  found = judged(make_judge(JudgeSpec("repeats", ngram=3)), "1 2 3 1 2 3 1", "1 2 3 4 5", "1 2")
  assert found == pytest.approx([-0.4, 0, 0])


def test_written_problems_have_their_answers():
  every = problems.arithmetic()
  assert len({each.text for each in every}) == len(every) == 4 * 11 * 11
  for each in every:
    first, second = (int(word) for word in each.text.split() if word.isdigit())
    is_sum = "How many" in each.text and ("gets" in each.text or "in all" in each.text)
    assert int(each.reference) == (first + second if is_sum else first - second), each.text
  assert len({each.text for each in problems.titles()}) == 400


def test_prompts_written_here_are_parted_between_training_and_testing():
  spec = PromptTaskSpec(source="arithmetic", judge=dict(kind="number"))
  parts = [{each.id for each in read_prompts(spec, part)} for part in ("train", "test")]
  assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 484
  assert len(parts[1]) / 484 == pytest.approx(0.2, abs=0.05)


# Settings.


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(judge=dict(kind="numbr")), "kind='numbr' is unknown: did you mean 'number'"),
    (dict(judge=dict(kind="number", words=3)), "words=3: kind='number' does not read it"),
    (dict(judge={}), "judge.kind=''"),
    (dict(judge=dict(kind="number"), template="Solve"), "template='Solve': it holds {prompt} 0 times"),
    (dict(judge=dict(kind="number"), source="arithmetics"), "source='arithmetics' is unknown"),
    (dict(judge=dict(kind="number"), first_tokens=5), "first_tokens=5 with is_chat=True"),
    (dict(judge=dict(kind="number"), test_share=1.0), "test_share=1.0"),
    (dict(judge=dict(kind="number"), source="titles", train="x"), "source='titles' reads no file"),
  ],
)
def test_a_task_that_cannot_be_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    PromptTaskSpec.from_dict(settings)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(kind="pattern", pattern="("), r"pattern='\('"),
    (dict(kind="sentences", beginning=""), "beginning=''"),
    (dict(kind="variety", words=0), "words=0"),
    (dict(kind="reward_model"), "path='': name the model"),
    (dict(kind="reward_model", path="/nowhere"), "path='/nowhere': there is no such file"),
    (dict(kind="language_model", url="http://x"), "model='': give the name"),
    (
      dict(kind="language_model", url="http://x", model="m", api_key_variable="NO_SUCH_KEY_HERE"),
      "NO_SUCH_KEY_HERE",
    ),
    (dict(kind="exact", normalization="strp"), "normalization='strp' is unknown"),
  ],
)
def test_a_judge_that_would_fail_later_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    JudgeSpec.from_dict(settings).check()


def checkpoint_config(variant, tmp_path, **files):
  """A variant with files that are named and there, empty: what can be checked before they are opened."""
  config = CONFIG.get_config(variant)
  config.language_model.checkpoint = str(tmp_path)
  for field, value in files.items():
    if value == "file":
      (tmp_path / field).touch()
      value = str(tmp_path / field)
    config.update_from_flattened_dict({field.replace("__", "."): value})
  return config


def test_the_paper_s_experiments_are_run_where_their_files_are_named(tmp_path):
  config = checkpoint_config("paper", tmp_path, tasks__gsm8k__train="file")
  adaptive_decoding.validate(config)
  assert list(settings.experiments(config)) == ["gsm8k", "votes_4", "votes_5"]
  assert settings.left_out(config)["ultra_math_stories"] == [
    "tasks.ultrafeedback.train", "tasks.ultrafeedback.judge.path", "tasks.stories.train", "tasks.stories.judge.path",
  ]  # fmt: skip
  config = checkpoint_config(
    "paper", tmp_path, reward_model=str(tmp_path), tasks__gsm8k__train="file", tasks__ultrafeedback__train="file",
    tasks__stories__train="file", tasks__wikitext__train="file",
  )  # fmt: skip
  adaptive_decoding.validate(config)
  assert settings.left_out(config) == {} and len(settings.experiments(config)) == 7
  # One field names the reward model of all, and titles are shared.
  specs = settings.task_specs(config)
  assert specs["stories"].judge_spec == specs["constrained_stories"].quality_spec
  assert specs["constrained_stories"].train == specs["stories"].train != ""


def test_what_the_paper_states_is_what_the_variant_has(tmp_path):
  config = checkpoint_config("paper", tmp_path)
  experiments = config.experiments
  assert experiments.repeats["values"] == (0.0, 0.1, 0.2, 0.4, 0.6) and experiments.repeats.num_samples == 10
  assert experiments.votes_4["values"] == (0.0, 0.4, 0.8, 1.0) and experiments.votes_4.num_samples == 8
  assert experiments.votes_5["values"] == (0.0, 0.4, 0.8, 1.0, 1.2) and experiments.votes_5.votes == 8
  for name in ("ultra_math_stories", "ultra_math_stories_token", "constrained_stories", "gsm8k"):
    assert (
      experiments[name]["values"] == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) and experiments[name].num_samples == 16
    )
  specs = settings.task_specs(config)
  counts = [specs[name].num_prompts or experiments.ultra_math_stories.num_prompts
            for name in experiments.ultra_math_stories.families]  # fmt: skip
  assert counts == [2000, 1000, 1000] and specs["gsm8k"].num_test_prompts == 1319
  assert (
    specs["constrained_stories"].judge_spec.beginning == "Ab"
    and experiments.constrained_stories.pair_top == 4
  )
  assert (
    "Ab" in specs["constrained_stories"].template and "Ab" not in specs["constrained_stories"].judged_template
  )
  assert specs["wikitext"].first_tokens == 50 and not specs["wikitext"].is_chat


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"language_model.checkpoint": ""}, "language_model.checkpoint='': this variant's experiments"),
    ({"language_model.checkpoint": "/nowhere"}, "language_model.checkpoint='/nowhere': there is no such"),
    ({"language_model.dtype": "float8"}, "language_model.dtype='float8' is unknown"),
    ({"language_model.chat_template": "chatlm"}, "chat_template='chatlm' is unknown: did you mean 'chatml'"),
    (
      {"language_model.chat_template": ""},
      "is_chat=True: language_model.chat_template is ''",
    ),
    (
      {"experiments.two_tasks.families": ("arithmetc", "stories")},
      "family='arithmetc' is unknown: did you mean",
    ),
    (
      {"experiments.two_tasks.families": ("sums",), "experiments.beginnings.families": ("sums",)},
      "are of toys",
    ),
    ({"experiments.beginnings.votes": 2}, "the judge of 't_stories' finds no answers to vote on"),
    ({"devices.pairs_per_call": 0}, "devices.pairs_per_call=0"),
    ({"devices.mesh.fsdp": 8, "devices.pairs_per_call": 4}, "pairs_per_call=4 is not divided by .* 8"),
    ({"devices.mesh.tensor": 9}, "devices.mesh: .*needs 9 devices"),
    ({"heads.patience": 0}, "heads.patience=0"),
    ({"tasks.stories.judge.words": 0}, "tasks.stories.judge.words=0"),
  ],
)
def test_bad_settings_of_a_checkpoint_are_named(changes, message, tmp_path):
  config = checkpoint_config("smollm_smoke", tmp_path)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    adaptive_decoding.validate(config)


def test_a_toy_variant_has_nothing_for_a_checkpoint(tmp_path):
  config = checkpoint_config("tiny", tmp_path)
  with pytest.raises(ValueError, match="experiments are of toys; choose a variant with tasks"):
    adaptive_decoding.validate(config)


def test_eight_billion_parameters_split_over_a_host():
  """The mesh of variant `llama` divides Llama 3 8B, and no device holds more than its share of a kernel."""
  config = CONFIG.get_config("llama")
  section = config.language_model
  spec = TransformerSpec.llama(
    vocab_size=128_256, num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14_336,
    max_length=8192, dtype=section.dtype, param_dtype=section.dtype, layers=section.layers,
  )  # fmt: skip
  params = jax.eval_shape(lambda: parameters.split(build_model(spec, jax.random.key(0)))[1])
  mesh = model_mesh(config.devices.mesh)
  placed = sharding.shardings(axes_of(spec), mesh, params)
  shares = jax.tree.map(
    lambda leaf, place: np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, params, placed
  )
  assert mesh.shape["fsdp"] == 8 and 1.8e9 < sum(jax.tree.leaves(shares)) < 2.2e9  # bytes, of 16.1e9
  assert config.devices.pairs_per_call % 8 == 0


def test_lengths_double():
  assert (
    bucket_lengths(100) == (32, 64, 128) and bucket_lengths(32) == (32,) and bucket_lengths(33) == (32, 64)
  )
