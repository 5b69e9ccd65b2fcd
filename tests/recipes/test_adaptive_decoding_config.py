"""Every published variant of adaptive decoding builds, and what cannot work is refused by name."""

import jax
import pytest
from adaptive_decoding_files import CONFIG

from nr.models import parameters
from nr.recipes import adaptive_decoding
from nr.recipes.adaptive_decoding import settings
from nr.training import trees
from nr.training.model_files import build_model


def count(spec):
  return trees.count(jax.eval_shape(lambda: parameters.split(build_model(spec, jax.random.key(0)))[1]))


@pytest.mark.parametrize("variant", CONFIG.VARIANTS)
def test_every_variant_builds(variant, tmp_path):
  config = CONFIG.get_config(variant)
  if config.language_model.checkpoint:
    config.language_model.checkpoint = str(tmp_path)  # what the user names
  if variant == "llama":
    (tmp_path / "train.jsonl").touch()
    config.tasks.gsm8k.train = str(tmp_path / "train.jsonl")
  adaptive_decoding.validate(config)
  assert [stage.name for stage in adaptive_decoding.stages(config)] == [
    "language_model",
    "pools",
    "pairs",
    "heads",
    "evaluate",
    "report",
  ]


def test_the_head_of_the_paper_has_its_size():
  config = CONFIG.get_config("paper")
  assert count(settings.head_spec(config, config.experiments.mini)) == 12_599_302
  # Llama 3 8B but for its vocabulary: 8,030,261,248 less two tables of 128,256 rows of 4096, plus ours.
  rows = settings.transformer_spec(config).vocab_size
  assert count(settings.transformer_spec(config)) == 8_030_261_248 - 2 * (128_256 - rows) * 4096


def test_seeds_differ_from_tiny_in_their_number_only():
  tiny, seeds = (CONFIG.get_config(variant).to_dict() for variant in ("tiny", "seeds"))
  assert len(seeds.pop("seeds")) == 5 and len(tiny.pop("seeds")) == 1
  assert tiny.pop("variant") != seeds.pop("variant") and tiny == seeds


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"experiments.mini.families": ("sum",)},
      r"experiments.mini: family='sum' is unknown: did you mean 'sums'",
    ),
    ({"language_model.families": ("sums", "words")}, r"experiments.hidden: .*does not learn 'hidden'"),
    ({"experiments.mini.level": "tokens"}, r"level='tokens' is unknown: did you mean 'token'"),
    ({"experiments.mini.pair_rule": "extreme"}, r"pair_rule='extreme' is unknown: did you mean 'extremes'"),
    ({"experiments.mini.action": "temprature"}, r"action='temprature' is unknown"),
    ({"experiments.mini.values": (-0.1, 1.0)}, r"temperature.tau=.*at least 0"),
    ({"experiments.mini.values": (0.0, 0.0)}, r"lpo.variant='latent'.*add a positive temperature"),
    ({"experiments.mini.values": (1.0,)}, r"num_settings=1: a head needs at least 2"),
    ({"experiments.mini.num_samples": 1}, r"num_samples=1: a pair needs at least 2"),
    ({"experiments.sentences.pair_top": 9}, r"pair_top=9: give 1 to half of num_samples=16"),
    ({"experiments.mini.held_out": 0.0}, r"held_out=0.0"),
    ({"experiments.mini.action": "top_p"}, r"words are known for temperatures only"),
    ({"heads.variants": ("seperate",)}, r"lpo.variant='seperate' is unknown: did you mean 'separate'"),
    ({"heads.variants": ()}, r"heads.variants=\(\) is empty"),
    ({"heads.lpo.beta": 0.0}, r"lpo.beta=0.0"),
    ({"heads.train.optimizer.name": "adamw2"}, r"heads.train: .*adamw2"),
    ({"language_model.model.family": "gpt3"}, r"language_model.model.family='gpt3'"),
    ({"language_model.model.num_heads": 5}, r"num_heads=5: it must divide model_dim=48"),
    ({"evaluate.selections": ("greed",)}, r"evaluate.selections='greed' is unknown: did you mean 'greedy'"),
    ({"evaluate.baselines.min_p": "min_q(0.1)"}, r"evaluate.baselines.min_p: .*min_q"),
    ({"seeds": ()}, r"seeds=\(\) is empty"),
    ({"seeds": (0, 3, 3)}, r"seeds=\(0, 3, 3\): 3 is there more than once"),
  ],
)
def test_bad_settings_are_named_with_a_remedy(changes, message):
  config = CONFIG.get_config("tiny")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    adaptive_decoding.validate(config)


def test_top_p_may_be_what_is_chosen():
  config = CONFIG.get_config("tiny")
  config.heads.variants = ("separate", "nll")
  config.experiments.mini.update(action="top_p", values=(0.1, 0.5, 0.9, 1.0))
  adaptive_decoding.validate(config)


def test_unknown_variants_name_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'tiny'"):
    CONFIG.get_config("tinny")
