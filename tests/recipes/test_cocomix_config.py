"""Every published variant builds, and what cannot work is refused before device time, by name."""

import importlib.util
import pathlib

import jax
import pytest

from nr.recipes import cocomix
from nr.recipes.cocomix import settings, students
from nr.recipes.cocomix.method import cocomix_method
from nr.recipes.sections import transformer_spec
from nr.training.model_files import build_model
from nr.training.next_token import next_token_method

CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs" / "cocomix.py"


def load():
  spec = importlib.util.spec_from_file_location("cocomix_config", CONFIG_FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CONFIG = load()


@pytest.mark.parametrize("variant", CONFIG.VARIANTS)
def test_every_variant_builds(variant):
  config = CONFIG.get_config(variant)
  cocomix.validate(config)
  vocab_size = config.tokenizer.vocab_size
  teacher = transformer_spec(config.teacher.model, vocab_size, config.window.length)
  specs = [teacher, settings.autoencoder_spec(config)]
  specs += [settings.student_spec(config, kind, vocab_size) for kind in students.KINDS]
  for spec in specs:
    jax.eval_shape(lambda spec=spec: build_model(spec, jax.random.key(0)) and 0)
  assert next_token_method(teacher).axes and cocomix_method(specs[-1], loss_weight=0.1).axes
  assert [stage.name for stage in cocomix.stages(config)] == [
    "tokenizer",
    "teacher",
    "sae",
    "labels",
    "students",
    "evaluate",
    "steer",
    "report",
  ]


def test_the_students_of_tiny_are_matched_by_activated_parameters():
  config = CONFIG.get_config("tiny")
  counts = {
    kind: students.activated_parameters(settings.student_spec(config, kind, config.tokenizer.vocab_size))
    for kind in students.KINDS
  }
  assert counts == {"ntp": 703_000, "cocomix": 707_136}
  assert abs(counts["ntp"] / counts["cocomix"] - 1) < 0.02


def test_activated_parameters_of_the_papers_sizes():
  """Table 2.5 of the specification: base + (C + 32) d."""
  from nr.models.concept_mixing import ConceptMixingSpec
  from nr.models.transformer import TransformerSpec
  from nr.training.model_files import ConceptMixingModelSpec

  for dim, layers, heads, insert, expected in (
    (512, 8, 8, 3, 68_269_568),
    (1024, 24, 16, 5, 388_410_368),
    (2048, 24, 16, 5, 1_380_800_512),
  ):
    spec = ConceptMixingModelSpec(
      TransformerSpec.gpt2(num_layers=layers, model_dim=dim, num_heads=heads),
      ConceptMixingSpec(insert_at=insert, num_concepts=32_768),
    )
    assert students.activated_parameters(spec) == expected


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"students.cocomix.concept.insert_at": 4}, r"insert_at=4.*4 blocks; choose 0 to 3"),
    ({"targets.k_attr": 17}, r"k_attr=17 is above the 16 active latents"),
    ({"targets.scope": "next"}, r"scope='next' is not available yet"),
    ({"targets.sign": "nagated"}, r"sign='nagated' is unknown: did you mean 'negated'"),
    ({"teacher.tap_layer": 4}, r"tap_layer=4 is outside the teacher: choose 0..3"),
    ({"sae.num_latents": 70_000}, r"num_latents=70000: labels are stored as uint16"),
    ({"sae.arch": "gated"}, r"arch='gated' is not available yet"),
    ({"teacher.model.family": "gpt3"}, r"model.family='gpt3' is unknown: did you mean 'gpt2'"),
    ({"teacher.model.num_heads": 5}, r"num_heads=5: it must divide model_dim=96"),
    ({"students.cocomix.concept.mode": "pause"}, r"mode='pause': not available yet"),
    ({"students.cocomix.concept.mode": "prediction_only"}, r"mode='prediction_only' mixes no concepts"),
    ({"students.cocomix.kd_weight": 0.1}, r"kd_weight=0.1 is not available yet"),
    ({"targets.source": "online"}, r"source='online' is not available yet"),
    ({"students.train.steps": 10}, r"students.train: .*warmup_steps.*20"),
    ({"teacher.train.optimizer.name": "adamw2"}, r"teacher.train: .*adamw2.*is unknown"),
    ({"students.seeds": ()}, r"students.seeds=\(\) is empty"),
    ({"steer.new_tokens": 128}, r"steer.prompt_tokens \+ steer.new_tokens = 160 is more than"),
    ({"steer.mode": "scale"}, r"steer.mode='scale' is unknown"),
    ({"teacher.train.batch_size": 7, "teacher.train.accumulation": 2}, r"accumulation.*does not divide"),
  ],
)
def test_bad_settings_are_named_with_a_remedy(changes, message):
  config = CONFIG.get_config("tiny")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    cocomix.validate(config)


def test_unknown_variants_name_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'tiny'"):
    CONFIG.get_config("tinny")


def test_a_mesh_that_does_not_divide_the_batch_is_refused():
  config = CONFIG.get_config("tiny")
  config.students.train.batch_size = 12
  config.students.train.mesh.data = 8
  with pytest.raises(ValueError, match=r"students.train.*batch_size.*12"):
    cocomix.validate(config)
