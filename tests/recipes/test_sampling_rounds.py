"""Rounds of sampling and training: whose parameters draw, what a kill loses, what cannot be used."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nr.data.pools import Pool, PoolSample, read_pools
from nr.data.preferences import PreferencePair
from nr.data.word_tokenizer import WordTokenizer
from nr.generators.checkpoints import make_network
from nr.generators.in_process import InProcess
from nr.judges.protocol import Rule
from nr.models import parameters
from nr.models.transformer import TransformerSpec
from nr.objectives.group_relative import GroupRelativeSpec
from nr.objectives.preference import PreferenceSpec
from nr.objectives.sequence_scores import token_statistics
from nr.objectives.unpaired_preference import KtoSpec
from nr.recipes.round_examples import accepted_of, contrasts_of, groups_of, labelled_of, pairs_of
from nr.recipes.sampling_rounds import (
  PoolPrompt,
  RoundBatches,
  RoundSpec,
  prompts_of_round,
  read_notes,
)
from nr.training.defaults import get_training_config
from nr.training.fingerprint import fingerprint
from nr.training.group_relative import group_relative_method
from nr.training.loop import train
from nr.training.model_files import build_model
from nr.training.next_token import next_token_method
from nr.training.policy import full_policy
from nr.training.preference import preference_method
from nr.training.step import accumulate
from nr.training.unpaired import group_preference_method, unpaired_preference_method

TOKENIZER = WordTokenizer(["ask", "tell", "a", "b", "c", "d", "e"])
SPEC = TransformerSpec.llama(
  vocab_size=TOKENIZER.vocab_size, num_layers=1, model_dim=16, num_heads=2, max_length=16, layers="unroll"
)
PROMPTS = [PoolPrompt(str(number), text) for number, text in enumerate(["ask a", "tell b", "ask c b"])]
ROUNDS = RoundSpec(
  steps_per_round=2, prompts_per_round=8, num_samples=3, max_new_tokens=4, prompts_per_write=3
)


def count_a(item):
  return float(item.response.split(" ").count("a"))


def extremes(pools):
  """The first best and the first worst of each pool."""
  pairs = []
  for pool in pools:
    scored = [sample for sample in pool.samples if sample.score is not None]
    if len({sample.score for sample in scored}) < 2:
      continue
    best, worst = max(scored, key=lambda s: s.score), min(scored, key=lambda s: s.score)
    pairs.append(
      PreferencePair(
        pool.id,
        pool.prompt,
        prompt_tokens=pool.prompt_tokens,
        chosen_tokens=best.tokens,
        rejected_tokens=worst.tokens,
      )
    )
  return pairs


def make_run(directory, spec=ROUNDS, rule=count_a, generator=None):
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  policy = full_policy(SPEC, params)
  generator = generator or InProcess(make_network(SPEC, params), TOKENIZER, batch_size=16)
  judge = Rule(rule, "count")
  rounds = RoundBatches(
    directory / "rounds", policy, generator, judge, PROMPTS, pairs_of(extremes), spec, 4, (10,)
  )
  return preference_method(policy, PreferenceSpec()), rounds


def settings(steps, **changes):
  section = get_training_config()
  section.update(dict(steps=steps, batch_size=4, log_every=1, progress=False))
  section.optimizer.update(dict(learning_rate=0.01))
  section.schedule.name = "constant"
  section.mesh.data = 1
  section.checkpoint.update(dict(every=1, keep=20))
  section.update(changes)
  return section


def notes(directory):
  return [json.loads(line) for line in (directory / "rounds" / "rounds.jsonl").read_text().splitlines()]


def same(first, second):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


def test_each_round_is_drawn_by_the_parameters_at_its_beginning(tmp_path):
  method, rounds = make_run(tmp_path)
  seen = {}
  receive = type(iter(rounds)).receive

  def spy(iterator, step, params):
    seen[step] = jax.device_get(params)
    receive(iterator, step, params)

  rounds_type = type(iter(rounds))
  rounds_type.receive = spy
  try:
    train(settings(4), method, rounds, workdir=tmp_path)
  finally:
    rounds_type.receive = receive
  for round, step in ((0, 0), (1, 2)):
    model = parameters.merge(rounds.policy.graphdef, seen[step])
    for pool in read_pools(rounds.path(round)):
      assert pool.model == fingerprint(seen[step]) and len(pool.samples) == 3
      for sample in pool.samples:
        ids = np.array([[*pool.prompt_tokens, *sample.tokens]], np.int32)
        hidden = model.hidden(ids[:, :-1])
        expected = token_statistics(hidden, model.unembedding_VD, ids[:, 1:]).log_probs_RL
        np.testing.assert_allclose(
          sample.log_probs, expected[0, len(pool.prompt_tokens) - 1 :], rtol=1e-4, atol=1e-4
        )
        assert sample.score == sample.text.split(" ").count("a")
  first, second = (read_pools(rounds.path(round)) for round in (0, 1))
  assert first[0].model != second[0].model
  assert [note["examples"] for note in notes(tmp_path)] == [len(extremes(pools)) for pools in (first, second)]


@pytest.mark.parametrize("stop", [2, 3])  # At the beginning of a round, and in its middle.
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
  method, rounds = make_run(tmp_path / "whole")
  whole = train(settings(6), method, rounds, workdir=tmp_path / "whole")
  method, rounds = make_run(tmp_path / "parts")
  train(settings(stop), method, rounds, workdir=tmp_path / "parts")
  method, rounds = make_run(tmp_path / "parts")
  parts = train(settings(6), method, rounds, workdir=tmp_path / "parts")
  same(parts.state.params, whole.state.params)
  for round in range(3):
    name = f"rounds/round_{round:05d}.jsonl"
    assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_sampling_and_training_share_a_mesh(tmp_path):
  """Parameters go from step to sampler where they lie: the run on 8 devices is the run on one."""
  one = train(settings(4), *make_run(tmp_path / "one"), workdir=tmp_path / "one")
  method, rounds = make_run(tmp_path / "eight")
  mesh = dict(data=2, fsdp=2, tensor=2, sequence=1)
  eight = train(settings(4, mesh=mesh), method, rounds, workdir=tmp_path / "eight")
  for round in range(2):
    pools = [read_pools(tmp_path / name / f"rounds/round_{round:05d}.jsonl") for name in ("one", "eight")]
    for first, second in zip(*pools):
      assert [sample.tokens for sample in first.samples] == [sample.tokens for sample in second.samples]
  for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(eight.state.params)):
    np.testing.assert_allclose(a, b, atol=2e-4)


class Killed(Exception):
  pass


def test_a_kill_while_sampling_loses_no_pool_that_was_written(tmp_path):
  calls = []

  def rule(item):
    calls.append(item.id)
    return count_a(item)

  class Dying(InProcess):
    left = 4

    def generate(self, requests):
      Dying.left -= 1
      if Dying.left < 0:
        raise Killed
      return super().generate(requests)

  whole = train(settings(4), *make_run(tmp_path / "whole"), workdir=tmp_path / "whole")
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  dying = Dying(make_network(SPEC, params), TOKENIZER, batch_size=16)
  with pytest.raises(Killed):
    train(
      settings(4), *make_run(tmp_path / "killed", generator=dying, rule=rule), workdir=tmp_path / "killed"
    )
  path = tmp_path / "killed" / "rounds" / "round_00001.jsonl"
  text = path.read_text()
  # Three writes in round 0 and one in round 1, of which a kill left one line and half of the next.
  lines = text.splitlines(keepends=True)
  assert len(lines) == ROUNDS.prompts_per_write
  path.write_text(lines[0] + lines[1][:40])
  judged = list(calls)
  resumed = train(settings(4), *make_run(tmp_path / "killed", rule=rule), workdir=tmp_path / "killed")
  again = calls[len(judged) :]
  # All of the round is judged again: what was written together is drawn together, so that it is the same.
  assert len(again) == len(set(again)) == 3 * 8 and set(judged[-9:]) < set(again)
  assert path.read_text().splitlines()[0] + "\n" == lines[0]
  assert path.read_text() == (tmp_path / "whole" / "rounds" / "round_00001.jsonl").read_text()
  same(resumed.state.params, whole.state.params)


def test_conversations_are_asked_as_they_are_read(tmp_path):
  """The prompt of a pool is the one that was rendered, and its tokens are what the model read."""

  class Chatting(WordTokenizer):
    def render_chat(self, messages):
      return " ".join(message["content"] for message in messages) + " tell"

    def encode(self, text, use_special_tokens=False):
      return super().encode(text)

  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  generator = InProcess(make_network(SPEC, params), Chatting(TOKENIZER.words), batch_size=16)
  prompts = [PoolPrompt("one", ({"role": "user", "content": "ask a"},))]
  rounds = RoundBatches(
    tmp_path,
    full_policy(SPEC, params),
    generator,
    Rule(count_a, "count"),
    prompts,
    pairs_of(extremes),
    ROUNDS,
    4,
    (10,),
  )
  batch = next(rounds.open_round(0, params))
  (pool, *_) = read_pools(rounds.path(0))
  assert pool.prompt_tokens == tuple(TOKENIZER.encode("ask a tell"))
  np.testing.assert_array_equal(batch["tokens"][0, :, :3], [pool.prompt_tokens] * 2)


def test_pools_drawn_in_another_way_are_kept_aside(tmp_path):
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  for number, changes in enumerate(
    (dict(), dict(num_samples=4), dict(num_samples=4, chain="temperature(0.5)"))
  ):
    _, rounds = make_run(tmp_path, dataclasses.replace(ROUNDS, **changes))
    list(rounds.open_round(0, params))
    assert len(list((tmp_path / "rounds").glob("*.other*"))) == number
  assert [len(pool.samples) for pool in read_pools(rounds.path(0))] == [4] * 8


def test_notes_survive_a_kill(tmp_path):
  _, rounds = make_run(tmp_path)
  list(rounds.open_round(0, rounds.policy.start))
  path = tmp_path / "rounds" / "rounds.jsonl"
  seconds = json.loads(path.read_text())["seconds"]
  path.write_text(path.read_text() + '{"round": 1, "poo')
  list(rounds.open_round(0, rounds.policy.start))  # As a run that begins again finds its pools.
  (note,) = read_notes(path.parent)
  assert note["seconds"] == seconds > 0 and len(path.read_text().splitlines()) == 2


def test_a_round_that_is_drawn_again_is_timed_again(tmp_path):
  """Its pools were another law's and were set aside: the new ones were all drawn in this attempt."""
  _, rounds = make_run(tmp_path)
  list(rounds.open_round(0, rounds.policy.start))
  _, cooler = make_run(tmp_path, dataclasses.replace(ROUNDS, chain="temperature(0.5)"))
  list(cooler.open_round(0, cooler.policy.start))
  assert (rounds.path(0).parent / "round_00000.other0.jsonl").exists()
  assert all(note["seconds"] > 0 for note in notes(tmp_path)) and len(notes(tmp_path)) == 2


def test_seconds_of_other_pools_are_not_taken_over(tmp_path):
  rows = [dict(round=0, model="a", seconds=5.0), dict(round=0, model="b", seconds=None)]
  path = tmp_path / "rounds.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert read_notes(tmp_path) == [rows[1]]
  path.write_text("".join(json.dumps({**row, "model": "a"}) + "\n" for row in rows))
  assert read_notes(tmp_path)[0]["seconds"] == 5.0


def test_pools_for_other_prompts_or_of_another_seed_are_not_taken_for_these(tmp_path):
  _, rounds = make_run(tmp_path)
  list(rounds.open_round(0, rounds.policy.start))
  _, asked = make_run(tmp_path)
  asked.prompts = [prompt._replace(prompt=f"{prompt.prompt} e") for prompt in PROMPTS]
  list(asked.open_round(0, asked.policy.start))
  assert all(pool.prompt.endswith(" e") for pool in read_pools(asked.path(0)))
  # A run that goes on in the middle of a round would train on them unasked.
  with pytest.raises(ValueError, match="were drawn in another way"):
    rounds.open_round(0, None)
  (rounds.path(0).parent / "round_00000.other0.jsonl").rename(
    rounds.path(0).parent / "round_00000.other1.jsonl"
  )
  kept = (rounds.path(0).parent / "round_00000.other1.jsonl").read_text()
  _, seeded = make_run(tmp_path, dataclasses.replace(ROUNDS, seed=1))
  list(seeded.open_round(0, seeded.policy.start))
  assert (rounds.path(0).parent / "round_00000.other1.jsonl").read_text() == kept, "nothing is written over"
  assert len(list(rounds.path(0).parent.glob("*.other*"))) == 2


def test_rounds_of_another_length_do_not_go_on(tmp_path):
  _, rounds = make_run(tmp_path)
  iterator = iter(rounds)
  iterator.set_state({"step": 2})  # as older checkpoints say it
  iterator.set_state({"step": 2, "steps_per_round": 2})
  assert iterator.get_state() == {"step": 2, "steps_per_round": 2}
  with pytest.raises(ValueError, match="steps_per_round=2: the checkpoint was made with 5"):
    iterator.set_state({"step": 2, "steps_per_round": 5})


def test_pools_of_other_parameters_are_kept_aside(tmp_path):
  train(settings(2), *make_run(tmp_path / "one"), workdir=tmp_path / "one")
  (tmp_path / "two" / "rounds").mkdir(parents=True)
  path = tmp_path / "two" / "rounds" / "round_00000.jsonl"
  lines = (tmp_path / "one" / "rounds" / "round_00000.jsonl").read_text()
  path.write_text(lines.replace(read_pools(tmp_path / "one/rounds/round_00000.jsonl")[0].model, "0" * 16))
  train(settings(2), *make_run(tmp_path / "two"), workdir=tmp_path / "two")
  assert path.read_text() == lines
  assert (path.parent / "round_00000.other0.jsonl").exists()


def test_the_middle_of_a_round_needs_its_pools(tmp_path):
  train(settings(3), *make_run(tmp_path), workdir=tmp_path)
  (tmp_path / "rounds" / "round_00001.jsonl").unlink()
  with pytest.raises(ValueError, match="middle of round 1 .* checkpoint of step 2 or earlier"):
    train(settings(6), *make_run(tmp_path), workdir=tmp_path)


@pytest.mark.parametrize(
  "rule, unscored",
  [(lambda item: float("nan"), 24), (lambda item: None, 24), (lambda item: 1.0, 0), (lambda item: 1 / 0, 24)],
)
def test_rounds_without_a_pair_have_no_gradient(tmp_path, rule, unscored):
  method, rounds = make_run(tmp_path, rule=rule)
  result = train(settings(2), method, rounds, workdir=tmp_path)
  same(result.state.params, method.start)
  (note,) = notes(tmp_path)
  assert (note["examples"], note["unscored"], note["empty_steps"]) == (0, unscored, 2)
  assert result.summary["loss"] == 0


def test_prompts_come_round_in_shuffled_order():
  spec = RoundSpec(1, 2, 2, 1, seed=3)
  found = [prompt for round in range(6) for prompt in prompts_of_round(PROMPTS, spec, round)]
  assert len({prompt.id for prompt in found}) == 12
  for epoch in range(4):
    assert {prompt.prompt for prompt in found[3 * epoch : 3 * epoch + 3]} == {each.prompt for each in PROMPTS}


def test_what_cannot_be_used_is_counted():
  def pair(id, chosen, rejected, prompt=(1, 2, 3)):
    return PreferencePair(id, "", prompt_tokens=prompt, chosen_tokens=chosen, rejected_tokens=rejected)

  pairs = [
    pair("same", (4, 0), (4, 0)),
    pair("long", (4,) * 10, (5, 0)),
    pair("long prompt", (4, 5, 0), (5,)),
    pair("empty", (), (5, 0)),
    pair("fine", (4, 0), (5, 0), prompt=(1, 2)),
  ]
  examples, report, *_ = pairs_of(lambda pools: pairs)([], 5)
  assert [example.id for example in examples] == ["fine"]
  assert dict(report.dropped) == {
    "identical responses": ["same"],
    "too long": ["long", "long prompt"],
    "empty response": ["empty"],
  }
  assert (report.total, report.kept, report.shortened) == (5, 1, 0)
  assert [ids.tolist() for ids in examples[0].tokens] == [[1, 2, 4, 0], [1, 2, 5, 0]]


def test_groups_learn_from_every_response(tmp_path):
  """GRPO on the policy's own samples: ratio 1 and no loss before the first update, then more of what is rewarded."""
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  policy, loss = full_policy(SPEC, params), GroupRelativeSpec(kl_weight=0.01)
  generator = InProcess(make_network(SPEC, params), TOKENIZER, batch_size=32)
  spec = RoundSpec(steps_per_round=1, prompts_per_round=8, num_samples=4, max_new_tokens=4)
  rounds = RoundBatches(
    tmp_path, policy, generator, Rule(count_a, "count"), PROMPTS, groups_of(loss), spec, 32, (10,)
  )
  method = group_relative_method(policy, loss, reference="frozen")
  batch = next(rounds.open_round(0, policy.start))
  output = accumulate(method, policy.start, method.frozen, (), batch, jax.random.key(0))[1]
  np.testing.assert_allclose(output.metrics["ratio"].mean(), 1.0, atol=1e-5)
  np.testing.assert_allclose(output.metrics["kl"].mean(), 0.0, atol=1e-6)
  assert float(output.metrics["clip_share"].total) == 0
  advantages = batch["advantages"].reshape(8, 4)
  np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-4)
  scores = np.array([[sample.score for sample in pool.samples] for pool in read_pools(rounds.path(0))])
  mixed = scores.std(axis=1) > 0
  np.testing.assert_allclose(advantages[mixed].std(axis=1, ddof=1), 1.0, atol=1e-4)
  assert (advantages[~mixed] == 0).all() and mixed.any()
  run = tmp_path / "run"
  rounds = RoundBatches(
    run, policy, generator, Rule(count_a, "count"), PROMPTS, groups_of(loss), spec, 32, (10,)
  )
  train(settings(20, batch_size=32, checkpoint=dict(every=0)), method, rounds, workdir=run)
  found = [json.loads(line)["mean_score"] for line in (run / "rounds.jsonl").read_text().splitlines()]
  assert np.mean(found[-4:]) > np.mean(found[:4]) + 0.5


def test_accepted_responses_are_imitated(tmp_path):
  """Rejection-sampling fine-tuning: rounds of one's own best texts raise their score."""

  def pool(id, *samples):
    return Pool(
      id,
      "ask",
      tuple(
        PoolSample(index, text, tokens, score=score) for index, (text, tokens, score) in enumerate(samples)
      ),
      prompt_tokens=(1,),
    )

  pools = [
    pool(
      "one", ("a", (3, 0), 1.0), ("b", (4, 0), 0.0), ("a", (3, 0), 1.0), ("c", (5, 0), 2.0), ("d", (6,), None)
    ),
    pool("two", ("b", (4, 0), 0.5), ("c", (5, 0), 0.4)),
  ]

  def kept(**given):
    return [example.id for example in accepted_of(**given)(pools, 8).examples]

  assert [id.split("/")[0] for id in kept(threshold=1.0)] == ["one"] * 2
  assert sorted(kept(threshold=1.0, is_distinct=False)) == ["one/0", "one/2", "one/3"]
  assert kept(threshold=-np.inf, per_prompt=1) == ["one/3", "two/0"]
  assert kept(threshold=9.0) == []
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  policy = full_policy(SPEC, params)
  generator = InProcess(make_network(SPEC, params), TOKENIZER, batch_size=32)
  spec = RoundSpec(steps_per_round=1, prompts_per_round=8, num_samples=8, max_new_tokens=4)
  rounds = RoundBatches(
    tmp_path, policy, generator, Rule(count_a, "count"), PROMPTS, accepted_of(1.0), spec, 32, (10,)
  )
  train(
    settings(20, batch_size=32, checkpoint=dict(every=0)), next_token_method(policy), rounds, workdir=tmp_path
  )
  found = [json.loads(line)["mean_score"] for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
  assert np.mean(found[-4:]) > np.mean(found[:4]) + 0.5


def scored(id, prompt, *scores):
  """A pool whose sample i is the token 3 + i."""
  samples = [PoolSample(i, "a", (3 + i, 0), score=score) for i, score in enumerate(scores)]
  return Pool(id, "ask", tuple(samples), prompt_tokens=prompt)


def test_pools_become_labelled_responses_in_turns():
  pools = [scored("one", (1,), 1.0, 0.0, None, 2.0), scored("two", (2,), 0.5, 0.4)]
  found = labelled_of(1.0)(pools, 8)
  assert [(each.id, each.labels[0]) for each in found.examples] == [
    ("one/0", True),
    ("two/0", False),
    ("one/1", False),
    ("two/1", False),
    ("one/3", True),
  ]
  groups = contrasts_of(1.0)([*pools, scored("three", (1, 2), 2.0, 3.0)], 8)
  assert [(each.id, each.labels) for each in groups.examples] == [("one", (True, False, True, False))]
  assert [mask.any() for mask in groups.examples[0].is_response] == [True, True, True, False]
  assert groups.report.kept == 1 and groups.report.dropped == {
    "no good and bad response of the prompt": ["two/0", "two/1", "three/0", "three/1"]
  }


@pytest.mark.parametrize("kind", ["labelled", "contrasts"])
def test_rounds_learn_from_labels(tmp_path, kind):
  """KTO and group DPO on the policy's own samples, none of it in pairs: more of what is rewarded."""
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  policy = full_policy(SPEC, params)
  generator = InProcess(make_network(SPEC, params), TOKENIZER, batch_size=32)
  spec = RoundSpec(steps_per_round=1, prompts_per_round=8, num_samples=4, max_new_tokens=4)
  if kind == "labelled":
    prepare, rows, method = labelled_of(1.0), 32, unpaired_preference_method(policy, KtoSpec(beta=0.5))
  else:
    prepare, rows, method = contrasts_of(1.0), 8, group_preference_method(policy, beta=0.5)
  judge = Rule(count_a, "count")
  rounds = RoundBatches(tmp_path, policy, generator, judge, PROMPTS, prepare, spec, rows, (10,))
  train(settings(20, batch_size=rows, checkpoint=dict(every=0)), method, rounds, workdir=tmp_path)
  found = [note["mean_score"] for note in read_notes(tmp_path)]
  assert np.mean(found[-4:]) > np.mean(found[:4]) + 0.3
  # A round without anything to learn gives batches of the same shapes.
  nothing = RoundBatches(
    tmp_path / "none", policy, generator, Rule(lambda item: None, "none"), PROMPTS, prepare, spec, rows, (10,)
  )
  (empty,) = nothing.open_round(0, params)
  (full,) = rounds.open_round(0, params)
  assert {name: value.shape for name, value in empty.items()} == {
    name: value.shape for name, value in full.items()
  }
  assert empty["pair_weights"].sum() == 0 < full["pair_weights"].sum()


def test_failed_samples_are_kept_with_their_reason(tmp_path):
  params = parameters.split(build_model(SPEC, jax.random.key(0)))[1]
  broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
  generator = InProcess(make_network(SPEC, params), TOKENIZER)
  policy = full_policy(SPEC, broken)
  rounds = RoundBatches(
    tmp_path, policy, generator, Rule(count_a, "count"), PROMPTS, pairs_of(extremes), ROUNDS, 4, (10,)
  )
  with pytest.raises(ValueError, match="round 0: all 24 samples failed; the first: .*NaN"):
    rounds.open_round(0, broken)
  pools = read_pools(rounds.path(0))
  samples = [sample for pool in pools for sample in pool.samples]
  assert all(sample.text is None and "NaN" in sample.details["reason"] for sample in samples)
  assert len(samples) == 24


def test_a_pool_remembers_how_it_was_drawn(tmp_path):
  spec = RoundSpec(1, 4, 2, 4, chain="temperature(0.5)|top_k(3)", seed=7)
  _, rounds = make_run(tmp_path, spec)
  list(rounds.open_round(0, rounds.policy.start))
  for pool in read_pools(rounds.path(0)):
    assert isinstance(pool, Pool) and pool.chain == spec.chain
    for sample in pool.samples:
      assert isinstance(sample, PoolSample) and len(sample.log_probs) == len(sample.tokens)
      # The law that was drawn from is sharper than the model's own.
      assert sum(sample.transformed_log_probs) > sum(sample.log_probs)
