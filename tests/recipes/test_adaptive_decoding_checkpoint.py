"""Adaptive decoding on a checkpoint: prompts from files, reward models, a run from files to report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaptive_decoding_files import CONFIG, config_of, save_facts, save_talker, save_tokenizer, task_of

from nr import main
from nr.data.pools import read_pools
from nr.data.preferences import read_pairs
from nr.generation.sample import sample
from nr.interchange.huggingface import save_huggingface_reward_model
from nr.models import parameters
from nr.models.reward import RewardModelSpec
from nr.models.transformer import TransformerSpec
from nr.recipes import adaptive_decoding
from nr.recipes.adaptive_decoding import drawing, evaluate, language_model, pairs, pools
from nr.recipes.adaptive_decoding.sampling import with_head
from nr.training.fingerprint import fingerprint
from nr.training.model_files import build_model

pytest.importorskip("tokenizers", reason="needs tokenizers (extra [text])")
pytest.importorskip("jinja2", reason="needs jinja2 (extra [text])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  save_talker(folder / "model")
  save_facts(folder / "train.jsonl.gz")
  save_facts(folder / "test.jsonl.gz", 12, seed=100)
  return folder


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
  """A run with majority votes; the shorter prompts alone, so that one program serves all of an arm."""
  workdir, config = tmp_path_factory.mktemp("run"), config_of(files, tasks__facts__max_prompt_tokens=64)
  config.experiments.facts.update(
    pair_rule="correctness", votes=4, num_tuning_prompts=4, num_prompts=16, num_test_prompts=4
  )
  return workdir, config, main.run(config, workdir)


# Prompts.


def test_prompts_come_from_files_as_the_chat_template_writes_them(files):
  opened, task = task_of(config_of(files))
  train, test = (task.prompts(part, 0, np.random.default_rng(0)).prompts for part in ("train", "test"))
  assert len(train) == 40 and len(test) == 12
  assert not {each.asked for each in train} & {each.asked for each in test}
  prompt = train[0]
  assert prompt.prompt == ({"role": "user", "content": prompt.asked},) and prompt.reference in ("1", "2")
  # The same ids as the format that any generator of the house would read the conversation with.
  assert list(prompt.tokens) == opened.language.format.encode_prompt(prompt.prompt)
  assert {len(each.tokens) > 64 for each in train} == {True, False}
  subset = task.prompts("train", 5, np.random.default_rng(1)).prompts
  assert len({each.id for each in subset}) == 5
  assert subset == task.prompts("train", 5, np.random.default_rng(1)).prompts
  assert subset != task.prompts("train", 5, np.random.default_rng(2)).prompts
  with pytest.raises(ValueError, match="tasks.facts: 40 prompts for 'train' where 41 are asked for"):
    task.prompts("train", 41, np.random.default_rng(0))


def test_prompts_that_are_too_long_are_left_out_and_counted(files):
  _, task = task_of(config_of(files, tasks__facts__max_prompt_tokens=64))
  found = task.prompts("train", 0, np.random.default_rng(0))
  assert len(found.prompts) == 20 and found.left_out == {"too long": 20}
  with pytest.raises(ValueError, match="20 prompts for 'train' where 21 are asked for"):
    task.prompts("train", 21, np.random.default_rng(0))


def test_without_a_test_file_the_prompts_are_parted_by_hash(files):
  _, task = task_of(config_of(files, tasks__facts__test="", tasks__facts__test_share=0.5))
  random = np.random.default_rng(0)
  train, test = ({each.asked for each in task.prompts(part, 0, random).prompts} for part in ("train", "test"))
  assert len(train) + len(test) == 40 and not train & test and 10 < len(test) < 30


def test_text_is_continued_from_its_first_tokens(files, tmp_path):
  (tmp_path / "text.txt").write_text("one two three four five six\n\nshort\n\na b c d e f g h\n")
  settings = dict(train=str(tmp_path / "text.txt"), is_chat=False, first_tokens=6, test_share=0.01)
  config = config_of(files)
  with config.unlocked():
    config.tasks = {"facts": CONFIG._task(dict(kind="repeats"), **settings)}
  opened, task = task_of(config)
  found = task.prompts("train", 0, np.random.default_rng(0))
  assert {len(each.tokens) - len(opened.language.begin_ids) for each in found.prompts} == {6}
  texts = (tmp_path / "text.txt").read_text().split("\n\n")
  for each in found.prompts:
    assert any(text.startswith(each.prompt) for text in texts), each
  assert found.prompts and found.left_out.get("too short", 0) == 3 - len(found.prompts)


# Judges that are models.


def test_a_reward_model_judges_without_the_constraint(files, tmp_path):
  folder = tmp_path / "reward"
  folder.mkdir()
  size = save_tokenizer(folder).vocab_size
  spec = RewardModelSpec(
    TransformerSpec.llama(vocab_size=size, num_layers=1, model_dim=8, num_heads=2, mlp_dim=8, max_length=256)
  )
  save_huggingface_reward_model(folder, spec, parameters.split(build_model(spec, jax.random.key(3)))[1])
  config = config_of(files)
  task = CONFIG._task(
    dict(kind="sentences", beginning="1"),
    dict(kind="reward_model", path=str(folder)),
    source="titles",
    template="Tell of {prompt}. Begin sentences with 1.",
    judged_template="Tell of {prompt}.",
    max_new_tokens=4,
  )
  with config.unlocked():
    config.tasks = {"facts": task, "plain": {**task, "template": task["judged_template"]}}
  config.experiments.facts.families = ("facts", "plain")
  adaptive_decoding.validate(config)
  scores = []
  for name in ("facts", "plain"):
    _, found = task_of(config, name)
    prompts = found.prompts("train", 2, np.random.default_rng(0)).prompts
    assert prompts[0].asked.startswith("Tell of The") and "sentences" not in prompts[0].asked
    scores.append(found.score(prompts, ["1 2. 2 1. 1", "2", "1", None], None))
  np.testing.assert_array_equal(scores[0].scores_R2, scores[1].scores_R2)
  np.testing.assert_allclose(scores[0].scores_R2[:3, 0], [2 / 3, 0, 1])
  assert np.unique(scores[0].scores_R2[:3, 1]).size == 3 and np.isnan(scores[0].scores_R2[3]).all()
  assert scores[0].reasons_R == ["", "", "", "nothing was written"]


# A run.


@pytest.mark.slow
def test_a_run_from_files_to_report(finished):
  workdir, config, _ = finished
  report = json.loads((workdir / "report.json").read_text())
  assert set(report["evaluation"]) == {"facts"} and report["left_out"] == {}
  evaluated, arms = report["evaluation"]["facts"], {"fixed 0", "fixed 1", "separate"}
  assert set(evaluated["arms"]) == arms | {"best_single", "oracle"}
  for found in evaluated["winrates"]["separate"].values():
    assert 0 <= found["low"] <= found["estimate"] <= found["high"] <= 1
  picked = evaluated["picks"]["0"]["separate"]["facts"]
  assert sum(picked["histogram"]) == pytest.approx(1) and 0 <= picked["mean_at_first"] <= 1
  kept = report["heads"]["facts/0"]["heads"]["separate"]
  assert kept["held_out"]["accuracy"] == max(kept["epochs"])
  assert 1 <= kept["epoch"] <= len(kept["epochs"]) <= 2
  votes = evaluated["votes"]
  assert set(votes["arms"]) == arms and votes["count"] == 4 and set(votes["against_tuned"]) == {"separate"}
  # At temperature 0 all samples of a prompt are one answer: the vote is the sample.
  assert votes["arms"]["fixed 0"]["vote"] == votes["arms"]["fixed 0"]["one"]
  text = (workdir / "report.md").read_text()
  assert "by the most frequent of 4 answers" in text and "first token of a sentence" in text
  assert "Toys" not in text and str(config.language_model.checkpoint) in text
  # What was kept of the language model for the heads is gone.
  assert not list((workdir / "heads").glob("features_*"))


@pytest.mark.slow
def test_a_run_keeps_its_texts_with_scores_and_settings(finished):
  workdir, config, _ = finished
  report = json.loads((workdir / "report.json").read_text())
  found = read_pools(workdir / report["pools"]["facts/0"]["path"])
  assert len(found) == 16 and all(len(pool.samples) == 4 for pool in found)
  for pool in found:
    for each in pool.samples:
      assert each.score == float(each.details.get("answer") == pool.reference)
      assert len(each.extras["choices"]) == len(each.tokens) <= 6
  made = report["pairs"]["facts/0"]
  for split in pairs.SPLITS:
    for pair in read_pairs(workdir / made[split]):
      assert pair.provenance["scores"] == [1.0, 0.0]
  assert (workdir / "evaluate" / "facts_seed0" / "tuning_fixed_1_facts.jsonl").is_file()
  # The test prompts are those of the test file.
  tested = read_pools(workdir / "evaluate" / "facts_seed0" / "separate_facts.jsonl")
  assert {pool.prompt[0]["content"].split()[2] for pool in tested} <= {
    str(100 + number) for number in range(12)
  }


@pytest.mark.slow
def test_a_second_run_skips_everything_and_another_file_is_refused(finished, files, tmp_path):
  workdir, config, artifacts = finished
  before = (workdir / "manifest.json").read_text()
  assert main.run(config, workdir) == artifacts and (workdir / "manifest.json").read_text() == before
  fields = {f"tasks.facts.{field}" for field in ("train", "test", "judge.path")}
  assert set(adaptive_decoding.task_files(config)) >= fields
  content = (files / "train.jsonl.gz").read_bytes()
  try:
    save_facts(files / "train.jsonl.gz", seed=7)
    with pytest.raises(ValueError, match="tasks.facts.train"):
      main.run(config, workdir)
  finally:
    (files / "train.jsonl.gz").write_bytes(content)


def test_t8_a_checkpoint_is_not_changed(finished, files):
  _, config, artifacts = finished
  network = language_model.opened_checkpoint(config).network
  assert fingerprint(network.params) == artifacts["language_model"]["runs"]["0"]["fingerprint"]


def test_stories_of_real_text_are_continued(nr_data, tmp_path):
  """A really trained model: prompts by its own tokenizer, temperature 0 is its greedy continuation."""
  config = CONFIG.get_config("smollm_smoke")
  config.language_model.update(
    checkpoint=str(nr_data / "models" / "stories260k" / "stories260K.bin"), chat_template=""
  )
  story = dict(source="titles", template="Once upon a time, {prompt}", is_chat=False, max_new_tokens=8)
  with config.unlocked():
    config.tasks = {"stories": CONFIG._task(dict(kind="variety", words=6), **story)}
    config.experiments = {"stories": CONFIG._experiment(families=("stories",), values=(0.0,))}
  opened, task = task_of(config, "stories")
  prompts = task.prompts("test", 2, np.random.default_rng(0)).prompts
  assert prompts[0].tokens[0] == 1 and prompts[0].prompt.startswith("Once upon a time, The")
  law = pools.drawn(config.experiments.stories, "greedy")
  found = drawing.draw_pools(
    tmp_path / "pools.jsonl", with_head(opened.network, None, 1), task, prompts, opened.room(task, 2),
    drawing.Draw(jax.random.key(0), 2, law), opened.language.tokenizer,
  )  # fmt: skip
  for prompt, pool in zip(prompts, found, strict=True):
    greedy = sample(opened.network, jnp.asarray([prompt.tokens]), max_new_tokens=8).tokens_RN[0]
    assert [each.tokens for each in pool.samples] == [tuple(greedy.tolist())] * 2
    assert pool.samples[0].score == pool.samples[1].score > 0


def test_beginnings_of_sentences_are_found_in_tokens():
  pieces = [
    "I",
    " saw",
    " it",
    '."',
    " He",
    " paid",
    " 3",
    ".",
    "5",
    " coins",
    "!",
    "\n",
    "- ",
    "Then",
    "...",
  ]
  found = np.flatnonzero(evaluate.begins_sentence(pieces)).tolist()
  assert found == [0, 4, 13]
