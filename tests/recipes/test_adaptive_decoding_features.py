"""What heads read of a checkpoint, whatever the lengths of its texts and the devices that it lies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaptive_decoding_files import CONFIG, TAUS, config_of, save_facts, save_talker, task_of

from nr.data.preferences import PreferencePair, write_pairs
from nr.generation.adaptive_decoding import DrawnSetting, sample_adaptively
from nr.generation.decoding import pad_prompts
from nr.models import parameters
from nr.objectives.latent_preference import LatentPreferenceSpec, tempered_log_probs
from nr.recipes.adaptive_decoding import drawing, features, heads, language_model, pairs, pools, settings
from nr.recipes.adaptive_decoding.method import latent_preference_method, score_pairs
from nr.recipes.adaptive_decoding.sampling import pieces_of, with_head
from nr.training.model_files import Model, axes_of, build_model, graphdef_of

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


def drawn(files, path, mesh=None):
  config = config_of(files)
  if mesh:
    config.devices.mesh.update(mesh)
  opened, task = task_of(config)
  everything = task.prompts("train", 0, np.random.default_rng(3)).prompts
  prompts = [prompt for prompt in everything if len(prompt.tokens) <= 64][:4]
  law = pools.drawn(config.experiments.facts, "sample")
  draw = drawing.Draw(jax.random.key(0), 4, law)
  room = opened.room(task, 4)
  return opened, drawing.draw_pools(
    path, with_head(opened.network, None, 2), task, prompts, room, draw, opened.language.tokenizer
  )


def test_a_mesh_of_eight_devices_draws_and_reads_the_same(files, tmp_path):
  """The model is split over devices, and no number of it depends on how."""
  opened, one = drawn(files, tmp_path / "one.jsonl")
  split, eight = drawn(files, tmp_path / "eight.jsonl", dict(data=2, fsdp=2, tensor=2))
  kernel = split.network.params["blocks"][0]["mlp"]["up"]["kernel"]
  assert split.mesh.size == 8 and kernel.addressable_shards[0].data.size == kernel.size // 4
  for first, second in zip(one, eight, strict=True):
    assert [each.tokens for each in first.samples] == [each.tokens for each in second.samples]
    assert [each.extras for each in first.samples] == [each.extras for each in second.samples]
  arrays, spec = arrays_of(opened), LatentPreferenceSpec("latent", "token")
  found = [
    features.read_features(
      features.Reader(each.network, TAUS, each.mesh, 4, 16), arrays, spec, tmp_path / name, (128,), (128,)
    )
    for name, each in (("one", opened), ("eight", split))
  ]
  np.testing.assert_allclose(found[0].hidden, found[1].hidden, atol=1e-5)
  np.testing.assert_allclose(found[0].words, found[1].words, atol=1e-4)


def arrays_of(opened, rows=6, length=100):
  """Pairs with prompts of 3 to 70 tokens, and responses that the model is not asked for."""
  random = np.random.default_rng(0)
  tokens = random.integers(3, opened.network.vocab_size, (rows, 2, length + 1)).astype(np.int32)
  first = np.asarray([2, 69, 30, 66, 10, 25])[:rows]
  tokens[:, 1] = np.where(np.arange(length + 1) <= first[:, None], tokens[:, 0], tokens[:, 1])
  stop = first[:, None] + random.integers(1, 30, (rows, 2))
  place = np.arange(length)
  weights = ((place >= first[:, None, None]) & (place < stop[..., None])).astype(np.float32)
  choices = random.integers(0, 2, weights.shape).astype(np.int32) * (weights > 0)
  return pairs.PairArrays(tokens[..., :-1], tokens[..., 1:], weights, choices)


@pytest.mark.parametrize(
  ("variant", "level"), [("latent", "token"), ("separate", "sequence"), ("joint", "sequence")]
)
def test_features_of_rows_of_any_length_are_those_of_the_model(files, tmp_path, variant, level):
  opened = language_model.opened_checkpoint(config_of(files))
  arrays, spec = arrays_of(opened), LatentPreferenceSpec(variant, level, beta=0.5)
  reader = features.Reader(opened.network, TAUS, pairs_per_call=2)
  found = features.read_features(reader, arrays, spec, tmp_path, (32, 64, 128), (32, 64, 128))
  model = opened.network.model()
  hidden_P2TD = model.hidden(jnp.asarray(arrays.tokens).reshape(12, -1)).reshape(6, 2, 100, 16)
  places = features.Places.of(arrays)
  if level == "sequence":
    np.testing.assert_allclose(
      found.hidden, [hidden_P2TD[p, 0, places.first_P[p]] for p in range(6)], atol=1e-5
    )
    assert (found.words is not None) == (variant == "joint")
  rows = features.PairRows(arrays, found, (32, 64, 128))
  whole = features.PairRows(arrays, None, (32, 64, 128))
  # Whole blocks of prompt tokens are left out of the rows, not of what the model reads.
  assert rows.lengths == (32, 64) and whole.lengths == (32, 64, 128)
  np.testing.assert_array_equal(whole.sizes_P - rows.sizes_P, np.where(places.first_P >= 64, 64, 0))
  if level == "token":
    row = rows.row(1, 64)
    is_response = row["weights"] > 0
    np.testing.assert_allclose(row["hidden"][is_response], hidden_P2TD[1][arrays.weights[1] > 0], atol=1e-5)
    assert not row["hidden"][~is_response].any()
    words = tempered_log_probs(
      hidden_P2TD[1], model.unembedding_VD, jnp.asarray(arrays.targets[1]), jnp.asarray(TAUS)
    )
    np.testing.assert_allclose(row["words"][is_response], np.asarray(words)[arrays.weights[1] > 0], atol=1e-4)
  # The loss of batches of several lengths is that of a method that runs the model itself.
  head = settings.head_spec(config_of(files), config_of(files).experiments.facts, 16)
  frozen = opened.network.graphdef, opened.network.params, axes_of(opened.network.spec)
  params = build_params(head)
  losses = []
  for source, model_of in ((rows, None), (whole, frozen)):
    method = latent_preference_method(head, spec, TAUS, language_model=model_of)
    loss = jax.jit(lambda frozen, batch, method=method: method.loss(params, frozen, (), batch, None).loss)
    parts = [loss(method.frozen, dict(batch)) for batch in features.ordered_batches(source, 4)]
    assert sum(float(each.weight) for each in parts) == 6
    losses.append(sum(float(each.total) for each in parts))
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def build_params(head):
  params = parameters.split(build_model(head, jax.random.key(0)))[1]
  return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)


def test_t10_the_trainer_finds_the_sampler_s_log_probabilities_of_a_checkpoint(files, tmp_path):
  """Prompts of two lengths, padded on the left to write and on the right to read."""
  config = config_of(files)
  opened = language_model.opened_checkpoint(config)
  spec = settings.head_spec(config, config.experiments.facts, 16)
  head = Model(spec, graphdef_of(spec), build_params(spec), "", {})
  random = np.random.default_rng(0)
  prompts = [random.integers(3, opened.network.vocab_size, size).tolist() for size in (5, 40)]
  found = sample_adaptively(
    with_head(opened.network, head, 2), *pad_prompts(prompts, 64), key=jax.random.key(1),
    law=DrawnSetting(TAUS), max_new_tokens=6, num_samples=2,
  )  # fmt: skip
  made = [
    PreferencePair(
      str(row), "", prompt_tokens=tuple(prompt),
      chosen_tokens=tuple(np.asarray(found.generation.tokens_RN[2 * row]).tolist()),
      rejected_tokens=tuple(np.asarray(found.generation.tokens_RN[2 * row + 1]).tolist()),
      provenance={"choices": np.asarray(found.choices_RN[2 * row : 2 * row + 2]).tolist()},
    )
    for row, prompt in enumerate(prompts)
  ]  # fmt: skip
  write_pairs(tmp_path / "pairs.jsonl", made)
  arrays, loss = pairs.read_arrays(tmp_path / "pairs.jsonl"), LatentPreferenceSpec("separate", "token")
  read = features.read_features(
    features.Reader(opened.network, TAUS), arrays, loss, tmp_path, (32, 64), (32, 64)
  )
  (batch,) = features.ordered_batches(features.PairRows(arrays, read, (64,)), 4)
  log_pi = parameters.merge(head.graphdef, head.params)(jnp.asarray(batch["hidden"]))
  sides = score_pairs(loss, log_pi, batch, None)
  recomputed = np.stack([side.choices for side in sides], axis=1).ravel()
  np.testing.assert_allclose(recomputed, found.choice_log_probs_RN.sum(axis=1), atol=1e-4)
  assert np.ptp(recomputed) > 0.01


def test_batches_have_the_length_of_their_rows_and_resume(files, tmp_path):
  arrays = arrays_of(language_model.opened_checkpoint(config_of(files)))
  rows = features.PairRows(arrays, None, (32, 64, 128))
  batches = features.training_batches(rows, 2, seed=0)
  iterator = iter(batches)
  first = [next(iterator) for _ in range(5)]
  state = iterator.get_state()
  then = [next(iterator) for _ in range(4)]
  again = iter(features.training_batches(rows, 2, seed=0))
  again.set_state(state)
  for one, other in zip(then, [next(again) for _ in range(4)], strict=True):
    assert all(np.array_equal(one[name], other[name]) for name in one)
  assert {batch["tokens"].shape for batch in first} <= {(2, 2, 32), (2, 2, 64), (2, 2, 128)}
  # An epoch holds every pair once; a batch is filled up with rows that count nothing.
  epoch = first[:3]
  assert sum(batch["pair_weights"].sum() for batch in epoch) == 6
  for batch in epoch:
    fits = (batch["weights"] > 0).any(axis=(0, 1))
    assert fits[batch["tokens"].shape[-1] // 2 :].any() or batch["tokens"].shape[-1] == 32


def test_features_are_kept_in_the_model_s_own_type(files, tmp_path):
  config = config_of(files, language_model__dtype="bfloat16")
  opened = language_model.opened_checkpoint(config)
  arrays = arrays_of(opened)
  reader = features.Reader(opened.network, TAUS, pairs_per_call=3)
  found = features.read_features(
    reader, arrays, LatentPreferenceSpec("separate", "token"), tmp_path, (128,), (128,)
  )
  assert found.hidden.dtype == jnp.bfloat16 and found.words is None
  assert (tmp_path / "hidden.bin").stat().st_size == int(arrays.weights.sum()) * 16 * 2


def test_pieces_have_one_shape_a_length():
  found = list(pieces_of([5, 40, 7, 8, 33, 60, 2], (8, 64), 2))
  assert [(piece.places, piece.rows, piece.length) for piece in found] == [
    ([0, 2], [0, 2], 8), ([3, 6], [3, 6], 8), ([1, 4], [1, 4], 64), ([5], [5, 5], 64),
  ]  # fmt: skip
  with pytest.raises(ValueError, match="prompt 1 has 9 tokens, at most 8"):
    list(pieces_of([1, 9], (8,), 2))


def test_lengths_of_rows_end_where_learned_positions_do():
  config = CONFIG.get_config("smollm_smoke")
  arrays = {"train": pairs.PairArrays(*[np.zeros((1, 2, 70))] * 4)}
  assert heads.lengths_of(config, arrays, None).pairs == (32, 64, 128)
  assert heads.lengths_of(config, arrays, 100).pairs == (32, 64, 100)
  assert heads.lengths_of(config, arrays, 128).pairs == (32, 64, 128)
