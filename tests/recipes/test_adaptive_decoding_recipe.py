"""Adaptive decoding on toys: rewards, pairs as arrays, the head's method, the cache, the rules compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.data.pools import Pool, PoolSample, read_pools
from nr.data.preferences import PreferencePair, write_pairs
from nr.generation.language_models import Network
from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoderSpec
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives.latent_preference import LatentPreferenceSpec
from nr.recipes.adaptive_decoding import (
  drawing,
  evaluate,
  families,
  features,
  heads,
  pairs,
  pools,
  sampling,
  settings,
)
from nr.recipes.adaptive_decoding.method import latent_preference_method
from nr.recipes.adaptive_decoding.tasks.toy import ToyTask
from nr.training.model_files import axes_of
from tests.training import method_suite

TAUS = (0.0, 0.5, 1.0)
HEAD = AdaptiveDecoderSpec(16, 3, hidden_dim=8)
GPT2 = TransformerSpec.gpt2(
  vocab_size=families.TOKENIZER.vocab_size, num_layers=1, model_dim=16, num_heads=2,
  max_length=families.LENGTH, dropout=0.0, init_std=0.3, layers="unroll",
)  # fmt: skip


def network():
  return Network(*parameters.split(Transformer(GPT2, rngs=nnx.Rngs(0))))


def ids(text):
  return np.asarray([families.TOKENIZER.encode(text)], np.int32)


# Tasks.


def test_sums_are_checked_to_the_last_digit():
  prompts = families.Prompts(ids("sums 7 8 ="), np.asarray([False]))
  for answer, expected in (("5 2 0", 1), ("5 2 1", 0), ("5 2", 0), ("5 2 0 4", 1)):
    tokens = ids(answer)
    assert families.rewards("sums", prompts, tokens, np.asarray([tokens.shape[1]])).tolist() == [
      [expected] * 2
    ]
  # What lies behind the end does not count.
  ended = np.concatenate([ids("5 2"), [[families.END]], ids("0")], axis=1)
  assert families.rewards("sums", prompts, ended, np.asarray([3]))[0, 0] == 0


def test_words_are_counted_once_and_missing_ones_count_nothing():
  prompts = families.Prompts(np.repeat(ids("words 1 2 ="), 2, 0), np.asarray([False, True]))
  tokens = np.concatenate([ids("w0 w1 w0 w2 w0 w0 w0 w3"), ids("w0 w0 w0 w0 w1 w1 w1 w1")])
  assert families.rewards("words", prompts, tokens, np.asarray([8, 5]))[:, 0].tolist() == [4 / 8, 2 / 8]
  # Hidden: the coin decides between the share of w0 and variety, and is not in the prompt.
  assert families.rewards("hidden", prompts, tokens, np.asarray([8, 8]))[:, 0].tolist() == [5 / 8, 2 / 8]


def test_stories_are_scored_by_their_first_words_and_then_by_variety():
  prompts = families.Prompts(ids("story 1 2 ="), np.asarray([False]))
  text = "mark w0 w1 w2 w5 mark w1 w2 mark w0 w0 w0 mark w1 w2 w3"
  found = families.rewards("story", prompts, ids(text), np.asarray([16]))
  # Different free words: w0, w1, w2, w3; the marker is none, and w11 is no word of stories.
  np.testing.assert_allclose(found, [[3 / 4, 4 / 12]])
  found = families.rewards("story", prompts, ids(text.replace("w3", "w11")), np.asarray([16]))
  np.testing.assert_allclose(found, [[3 / 4, 3 / 12]])


def test_only_the_words_that_were_asked_for_are_counted():
  prompts = families.Prompts(np.repeat(ids("words 1 2 ="), 2, 0), np.asarray([True, True]))
  tokens = np.concatenate([ids("w0 w23 mark 3 sums = 4 words"), ids("mark 3 sums = 4 words 5 6")])
  for name in ("words", "hidden"):
    assert families.rewards(name, prompts, tokens, np.asarray([8, 8]))[:, 0].tolist() == [2 / 8, 0]


def test_heads_are_tested_on_prompts_that_none_was_trained_on():
  found = {}
  for part, count in (("train", 70), ("test", 30)):
    found[part] = {tuple(pair) for pair in families.digit_pairs(part).tolist()}
    prompts = families.make_prompts("sums", 3000, np.random.default_rng(0), part)
    drawn = {tuple(pair) for pair in (prompts.tokens_PT[:, 1:3] - families.DIGIT).tolist()}
    assert drawn == found[part] and len(drawn) == count
  assert not found["train"] & found["test"]
  # The language model learns sums on all.
  prompts = families.make_prompts("sums", 3000, np.random.default_rng(0))
  assert len(np.unique(prompts.tokens_PT, axis=0)) == 100


def test_training_texts_follow_their_laws():
  texts = families.training_texts(("sums", "words", "story"), 9000, 0)
  assert len(texts) == 9000
  rows = {name: texts[k * 3000 : (k + 1) * 3000] for k, name in enumerate(("sums", "words", "story"))}
  prompts = np.asarray([row["tokens"][:4] for row in rows["sums"]])
  answers = np.asarray([row["targets"][3:6] for row in rows["sums"]])
  right = families.rewards("sums", families.Prompts(prompts, np.zeros(3000, bool)), answers, np.full(3000, 3))
  assert right[:, 0].mean() == pytest.approx((0.8 + 0.2 / 10) ** 3, abs=0.03)
  words = np.asarray([row["targets"][3:11] for row in rows["words"]])
  share = (words == families.NOUN).mean()
  assert share == pytest.approx(1 / sum(1 / k for k in range(1, 25)), abs=0.01)
  first = np.asarray([row["targets"][3:19:4] for row in rows["story"]])
  assert (first == families.MARK).mean() == pytest.approx(0.6, abs=0.02)
  for name, length in (("sums", 3), ("words", 8), ("story", 16)):
    row = rows[name][0]
    assert row["weights"].sum() == length + 1 and row["targets"][row["weights"] > 0][-1] == families.END
    np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])


def test_the_coin_of_hidden_is_not_in_the_prompt():
  prompts = families.make_prompts("hidden", 4000, np.random.default_rng(0))
  assert prompts.is_hard_P.mean() == pytest.approx(0.5, abs=0.03)
  for value in range(10):
    is_value = prompts.tokens_PT[:, 1] == families.DIGIT + value
    assert prompts.is_hard_P[is_value].mean() == pytest.approx(0.5, abs=0.12)


# Pools and pairs.


class Section(dict):
  """A config section that a test writes out."""

  __getattr__ = dict.__getitem__


EXPERIMENT = Section(level="sequence", action="temperature", values=TAUS, pair_rule="extremes", pair_top=2)


TASK = ToyTask("words")


def drawn_pools(path, level, count=6, per_prompt=8, per_call=250):
  prompts = TASK.prompts("train", count, np.random.default_rng(0)).prompts
  adaptive = sampling.with_head(network(), None, len(TAUS))
  law = pools.drawn(Section(EXPERIMENT, level=level), "sample")
  room = sampling.Room(TASK.max_new_tokens, (families.END,), TASK.lengths, per_call)
  draw = drawing.Draw(jax.random.key(0), per_prompt, law, model="m")
  return drawing.draw_pools(path, adaptive, TASK, prompts, room, draw, families.TOKENIZER)


@pytest.mark.parametrize("level", ("sequence", "token"))
def test_pairs_read_back_are_what_was_sampled(level, tmp_path):
  made = drawn_pools(tmp_path / "pools.jsonl", level)
  assert read_pools(tmp_path / "pools.jsonl") == made
  experiment = Section(EXPERIMENT, level=level)
  chosen, counts = pairs.pairs_of(made, experiment, np.random.default_rng(0))
  assert counts["prompts"] == 6 == counts["no_pair"] + len(chosen)
  is_same = [pair.provenance["choices"][0][0] == pair.provenance["choices"][1][0] for pair in chosen]
  assert counts["same_setting"] == (sum(is_same) if level == "sequence" else 0)
  write_pairs(tmp_path / "pairs.jsonl", chosen)
  arrays = pairs.read_arrays(tmp_path / "pairs.jsonl", families.LENGTH)
  by_id = {pool.id: pool for pool in made}
  for row, pair in enumerate(chosen):
    pool = by_id[pair.id]
    for side, response in enumerate((pair.chosen_tokens, pair.rejected_tokens)):
      sample = pool.samples[pair.provenance["samples"][side]]
      is_scored = arrays.weights[row, side] > 0
      np.testing.assert_array_equal(arrays.targets[row, side][is_scored], sample.tokens)
      np.testing.assert_array_equal(arrays.choices[row, side][is_scored], sample.extras["choices"])
      np.testing.assert_array_equal(arrays.tokens[row, side, :4], pool.prompt_tokens)
      # Position 3, the prompt's last token, predicts the first word and owns its temperature.
      assert np.flatnonzero(is_scored)[0] == 3 and is_scored.sum() == len(response)
    rewards = pair.provenance["scores"]
    assert rewards[0] == max(sample.score for sample in pool.samples) > rewards[1]
  # As long as the longest pair, unless told otherwise.
  short = pairs.read_arrays(tmp_path / "pairs.jsonl")
  longest = max(len(response) for pair in chosen for response in (pair.chosen_tokens, pair.rejected_tokens))
  assert short.tokens.shape[-1] == 4 + longest - 1 and short.weights.sum() == arrays.weights.sum()


def test_samples_of_a_prompt_do_not_depend_on_how_prompts_are_cut(tmp_path):
  whole = drawn_pools(tmp_path / "whole.jsonl", "token")
  cut = drawn_pools(tmp_path / "cut.jsonl", "token", per_call=4)
  for first, second in zip(whole, cut, strict=True):
    for one, other in zip(first.samples, second.samples, strict=True):
      assert (one.tokens, one.extras, one.score) == (other.tokens, other.extras, other.score)


def test_pools_that_are_there_are_not_drawn_again(tmp_path, monkeypatch):
  path, calls = tmp_path / "pools.jsonl", []
  whole = drawn_pools(path, "token", per_call=4)
  lines = path.read_text().splitlines(keepends=True)
  # A kill in the second of two pieces: one pool of it is whole, one is cut.
  path.write_text("".join(lines[:5]) + lines[5][:50])
  piece = drawing.write_piece
  monkeypatch.setattr(drawing, "write_piece", lambda *a, **k: calls.append(a[2].places) or piece(*a, **k))
  again = drawn_pools(path, "token", per_call=4)
  assert again == whole == read_pools(path) and calls == [[4, 5]]
  path.write_text(path.read_text().replace('"model": "m"', '"model": "n"'))
  with pytest.raises(ValueError, match="was drawn by another model"):
    drawn_pools(path, "token")


def test_a_pair_with_one_setting_on_both_sides_is_kept_and_counted():
  sample = dict(tokens=(20, 0), finish_reason="stop_id", details={"quality": 0.0})
  make = PoolSample
  samples = tuple(make(index, score=1.0 - index, extras={"choices": [1, 1]}, **sample) for index in range(2))
  pool = Pool("words-0", "words 1 2 =", samples, prompt_tokens=(2, 6, 7, 5))
  found, counts = pairs.pairs_of([pool], EXPERIMENT, np.random.default_rng(0))
  assert len(found) == 1 and counts["same_setting"] == 1
  found, counts = pairs.pairs_of([pool], Section(EXPERIMENT, level="token"), np.random.default_rng(0))
  assert len(found) == 1 and counts["same_setting"] == 0


def test_pairs_are_held_out_by_prompt():
  prompts = families.make_prompts("words", 200, np.random.default_rng(0), "train").tokens_PT
  made = [
    PreferencePair(str(row), "", "a", "b", prompt_tokens=tuple(prompt)) for row, prompt in enumerate(prompts)
  ]
  group = pairs.group_of(Section(language_model=Section(checkpoint="")))
  is_held_out = pairs.held_out_pairs(made, 0.1, np.random.default_rng(0), group)
  of_splits = [
    {made[row].prompt_tokens for row in np.flatnonzero(members)} for members in (is_held_out, ~is_held_out)
  ]
  assert len(of_splits[0]) == round(0.1 * len(np.unique(prompts, axis=0)))
  assert not of_splits[0] & of_splits[1]
  # As few as two prompts are one for each.
  two = [made[0], next(pair for pair in made if pair.prompt_tokens != made[0].prompt_tokens)]
  assert pairs.held_out_pairs(two, 0.1, np.random.default_rng(0), group).sum() == 1
  assert pairs.held_out_pairs(two, 0.9, np.random.default_rng(0), group).sum() == 1


# The head's method.


def pair_batch(rows=16):
  random = np.random.default_rng(0)
  shape = (rows, 2, families.LENGTH)
  tokens = random.integers(0, GPT2.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
  tokens[:, 1, :4] = tokens[:, 0, :4]  # One prompt.
  stops = random.integers(5, families.LENGTH, shape[:2])
  weights = ((np.arange(shape[2]) >= 3) & (np.arange(shape[2]) < stops[..., None])).astype(np.float32)
  choices = random.integers(0, 3, shape).astype(np.int32)
  return pairs.PairArrays(tokens[..., :-1], tokens[..., 1:], weights, choices), random.random(rows).astype(
    np.float32
  )


def rows_of(arrays, spec, folder):
  """All pairs as one batch, with features where there is a folder for them."""
  lengths = (families.LENGTH,)
  reader = features.Reader(network(), TAUS)
  found = None if folder is None else features.read_features(reader, arrays, spec, folder, lengths, lengths)
  rows = features.PairRows(arrays, found, lengths)
  return features.stacked(rows, range(len(rows)), families.LENGTH)


def batch_of(spec, folder=None):
  arrays, pair_weights = pair_batch()
  return {**rows_of(arrays, spec, folder), "pair_weights": pair_weights}


def method_of(spec, is_cached):
  model = None if is_cached else (network().graphdef, network().params, axes_of(GPT2))
  return latent_preference_method(HEAD, spec, TAUS, language_model=model)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("variant", "level", "is_cached"),
  [("separate", "sequence", True), ("latent", "token", True), ("latent", "sequence", False)],
)
def test_method_suite(variant, level, is_cached, tmp_path):
  spec = LatentPreferenceSpec(variant, level, beta=0.5)
  name = f"latent_preference_{level}" if is_cached else None
  batch = batch_of(spec, tmp_path / "features" if is_cached else None)
  # A head that prefers nothing yet ranks all pairs alike, but for rounding.
  method_suite.check_all(method_of(spec, is_cached), batch, tmp_path, golden=name, ties=("accuracy", "margin"))


@pytest.mark.parametrize("level", ("sequence", "token"))
@pytest.mark.parametrize("variant", ("separate", "latent", "nll", "joint"))
def test_cached_features_give_the_same_loss_and_gradient(variant, level, tmp_path):
  spec = LatentPreferenceSpec(variant, level, beta=0.5)
  params = method_suite.perturbed(method_of(spec, True).init(jax.random.key(0)), scale=0.3)
  found = []
  for is_cached in (True, False):
    method, batch = method_of(spec, is_cached), batch_of(spec, tmp_path if is_cached else None)

    def loss(params, method=method, batch=batch):
      return method.loss(params, method.frozen, (), batch, jax.random.key(0)).loss.mean()

    found.append(jax.value_and_grad(loss)(params))
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0][1], found[1][1])
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0][1])) > 1e-3


def test_one_setting_on_both_sides_teaches_all_losses_but_eq_10(tmp_path):
  arrays, pair_weights = pair_batch()
  arrays = arrays._replace(choices=np.ones_like(arrays.choices))
  for variant, is_taught in (("separate", False), ("latent", True), ("nll", True)):
    spec = LatentPreferenceSpec(variant, "sequence", beta=0.5)
    method = method_of(spec, True)
    batch = {**rows_of(arrays, spec, tmp_path / variant), "pair_weights": pair_weights}
    params = method_suite.perturbed(method.init(jax.random.key(0)), scale=0.3)
    slopes = jax.grad(lambda p: method.loss(p, {}, (), batch, None).loss.mean())(params)  # noqa: B023
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    assert largest > 1e-3 if is_taught else largest < 1e-7
    evaluator = heads.held_out_evaluator(HEAD, spec, lambda: [batch], TAUS)  # noqa: B023
    assert evaluator.run(params, {}, ())["accuracy"] == 0.5


@pytest.mark.parametrize("level", ("sequence", "token"))
def test_t9_joint_trains_the_head_as_separate_does(level, tmp_path):
  slopes = []
  for variant in ("joint", "separate"):
    spec = LatentPreferenceSpec(variant, level, beta=0.5)
    method, batch = method_of(spec, True), batch_of(spec, tmp_path / variant)
    params = method_suite.perturbed(method.init(jax.random.key(0)), scale=0.3)
    slopes.append(jax.value_and_grad(lambda p: method.loss(p, {}, (), batch, None).loss.mean())(params))  # noqa: B023
  np.testing.assert_allclose(slopes[0][0], slopes[1][0], atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slopes[0][1], slopes[1][1])


def test_the_frozen_model_gets_no_gradient():
  spec = LatentPreferenceSpec("latent", "token", beta=0.5)
  method, batch = method_of(spec, False), batch_of(spec)
  params = method_suite.perturbed(method.init(jax.random.key(0)), scale=0.3)
  slopes = jax.grad(lambda frozen: method.loss(params, frozen, (), batch, jax.random.key(0)).loss.total)(
    method.frozen
  )
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), slopes)


# What heads are compared with.


def test_rules_that_see_no_prompt():
  weights = np.zeros((3, 2, 4), np.float32)
  weights[..., 1:3] = 1
  choices = np.zeros((3, 2, 4), np.int32)
  choices[0, :, 1:3] = [[0, 0], [2, 2]]  # chosen lower
  choices[1, :, 1:3] = [[2, 2], [0, 0]]  # chosen higher
  choices[2, :, 1:3] = [[1, 1], [1, 1]]  # tie
  arrays = pairs.PairArrays(choices, choices, weights, choices)
  counts = {"chosen": [1.0, 5.0, 9.0], "rejected": [9.0, 5.0, 1.0]}
  found = heads.baseline_accuracies(arrays, counts, EXPERIMENT)
  assert found == {"always_lower": 0.5, "constant": 0.5}
  first = pairs.PairArrays(*(values[:1] for values in arrays))
  assert heads.baseline_accuracies(first, counts, EXPERIMENT) == {"always_lower": 1.0, "constant": 0.0}
  # A tie is one whatever the lengths.
  weights = (np.arange(20) < np.asarray([3, 7])[:, None]).astype(np.float32)[None]
  choices = np.ones(weights.shape, np.int32)
  ties = pairs.PairArrays(choices, choices, weights, choices)
  assert heads.baseline_accuracies(ties, counts, EXPERIMENT) == {"always_lower": 0.5, "constant": 0.5}
  of_first = pairs.setting_counts(first, 3)
  assert of_first == {"chosen": [1.0, 0.0, 0.0], "rejected": [0.0, 0.0, 1.0]}


def test_best_single_and_oracle_are_fixed_arms():
  scores = {
    "fixed 0": {"a": np.full((2, 1, 2), 0.9), "b": np.full((2, 1, 2), 0.1)},
    "fixed 1": {"a": np.full((2, 1, 2), 0.2), "b": np.full((2, 1, 2), 0.7)},
  }
  evaluate.add_chosen_settings(scores, (0.0, 1.0), {"chosen": [3.0, 7.0], "rejected": [5.0, 5.0]})
  assert scores["best_single"]["a"][0, 0, 0] == 0.2
  assert [scores["oracle"][task][0, 0, 0] for task in "ab"] == [0.9, 0.7]


def test_what_a_head_picked_is_summarised_by_setting_and_position():
  choices = np.asarray([[0, 2, -1], [1, 2, 2]])
  found = evaluate.pick_summary(choices, TAUS)
  assert found["histogram"] == [0.2, 0.2, 0.6] and found["not_lowest"] == pytest.approx(0.8)
  assert found["mean"] == pytest.approx(3.5 / 5)
  assert found["mean_by_position"] == [0.25, 1.0, 1.0]


def test_seeds_of_purposes_differ():
  assert settings.number_of(0, 1, "a") != settings.number_of(0, 1, "b")
  assert settings.number_of(0, 11) != settings.number_of(0, 1, 1)
