"""Every published variant builds, and what cannot work is refused before device time, by name."""

import importlib.util
import pathlib

import pytest

from nr.models.transformer import TransformerSpec
from nr.objectives.attribution import AttributionSpec
from nr.recipes import cocomix
from nr.recipes.cocomix import checks, settings, students

CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs" / "cocomix.py"


def load():
  spec = importlib.util.spec_from_file_location("cocomix_config", CONFIG_FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CONFIG = load()


STAGES = ["tokenizer", "teacher", "sae", "labels", "students", "evaluate", "steer", "report"]
GIVEN = [variant for variant in CONFIG.VARIANTS if variant.startswith("paper")]
GPT2 = TransformerSpec.gpt2()


@pytest.mark.parametrize("variant", [variant for variant in CONFIG.VARIANTS if variant not in GIVEN])
def test_every_variant_builds(variant):
  config = CONFIG.get_config(variant)
  cocomix.validate(config)
  assert [stage.name for stage in cocomix.stages(config)] == STAGES


@pytest.mark.parametrize("variant", GIVEN)
def test_the_paper_s_variants_build_and_ask_for_their_files(variant):
  config = CONFIG.get_config(variant)
  checks.check_trainings(config, GPT2.vocab_size, GPT2)
  assert [stage.name for stage in cocomix.stages(config)] == STAGES
  with pytest.raises(ValueError, match="teacher.checkpoint='GPT2': no such file or folder"):
    cocomix.validate(config)


def test_the_students_of_tiny_are_matched_by_activated_parameters():
  config = CONFIG.get_config("tiny")
  counts = {
    arm: students.activated_parameters(settings.student_spec(config, arm, config.tokenizer.vocab_size))
    for arm in settings.arm_names(config)
  }
  assert counts == {"ntp": 703_000, "cocomix": 707_136}
  assert abs(counts["ntp"] / counts["cocomix"] - 1) < 0.02


def test_every_comparison_of_the_paper_is_an_arm():
  """Section 2.6 of the specification, each by the values that make it differ."""
  config = CONFIG.get_config("paper_69m_ablations")
  arms = config.students.arms
  found = {
    name: (arm.concept.mode, arm.model.model_dim, arm.kd_weight, arm.labels, arm.concept.insert_every)
    for name, arm in arms.items()
  }
  assert found["ntp"] == ("none", 624, 0.0, "", 1)
  assert found["ntp_same_width"] == ("none", 512, 0.0, "", 1)
  assert found["kd"] == ("none", 624, 0.1, "", 1)
  assert found["pause"] == ("pause", 624, 0.0, "", 1)
  assert found["pause_kd"] == ("pause", 624, 0.1, "", 1)
  assert found["activation"] == ("cocomix", 512, 0.0, "activation", 1)
  assert found["every_second"] == ("cocomix", 512, 0.0, "", 2)
  for mode in ("cocomix", "prediction_only", "mix_only", "add"):
    assert found[mode] == (mode, 512, 0.0, "", 1)
  for kind in ("l1", "l2", "cosine"):
    assert (found[f"hidden_{kind}"][0], arms[f"hidden_{kind}"].regression) == ("hidden", kind)
  assert found["thought"][0] == "thought" and arms.thought.concept.insert_at == 0
  signs = [
    settings.attribution_spec(config, arms[name].labels).sign for name in ("cocomix", "negated", "abs")
  ]
  assert signs == ["paper", "negated", "abs"]
  assert settings.attribution_spec(config, "activation").criterion == "activation"


@pytest.mark.parametrize(
  "variant, counts",
  [
    ("paper_69m", [69_445_584, 68_269_568, 69_445_584]),
    ("paper_386m", [386_274_832, 388_410_368, 386_274_832]),
    ("paper_1b", [1_373_389_328, 1_380_800_512, 1_373_389_328]),
  ],
)
def test_01_the_paper_s_students_have_their_published_sizes(variant, counts):
  """Table 2.5 of the specification (base + (C + 32) d for CoCoMix), and the budget of table 6."""
  config = CONFIG.get_config(variant)
  arms = settings.arm_names(config)
  assert arms == ["ntp", "cocomix", "kd"]
  assert counts == [
    students.activated_parameters(settings.student_spec(config, arm, GPT2.vocab_size)) for arm in arms
  ]
  train = config.students.train
  assert train.steps * train.batch_size * config.window.length == 20_971_520_000
  assert train.schedule.warmup_steps * 300 == pytest.approx(train.steps, rel=0.03)
  optimizer = train.optimizer
  assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.weight_decay) == (
    0.9,
    0.95,
    1e-8,
    0.1,
  )
  assert (train.clip, train.schedule.final_fraction, config.seed) == (1.0, 0.1, 22)
  assert settings.attribution_spec(config) == AttributionSpec.parity()
  for arm in arms:  # as the released code trains, whatever its configs say
    spec = settings.student_spec(config, arm, GPT2.vocab_size)
    transformer = getattr(spec, "transformer", spec)
    assert (transformer.dropout, transformer.use_bias, transformer.max_length) == (0.1, True, 1024)
    assert transformer.dtype == "bfloat16"  # of all arms: a loss is never compared across types
  concepts = settings.student_spec(config, "cocomix", GPT2.vocab_size).concepts
  assert (concepts.num_concepts, concepts.top_k, concepts.norm) == (32_768, 32, "reference")
  # Insertion (blocks before it), windows of a batch, learning rate.
  table = {"paper_69m": (3, 512, 6e-4), "paper_386m": (5, 512, 3e-4), "paper_1b": (5, 1024, 2e-4)}
  assert (concepts.insert_at, train.batch_size, optimizer.learning_rate) == table[variant]
  assert (config.teacher.tap_layer, config.students.arms.kd.kd_weight) == (5, 0.1)


@pytest.mark.parametrize("variant", ["paper_69m", "paper_386m", "paper_1b"])
def test_a_baseline_with_heads_of_64_can_be_turned_on(variant):
  config = CONFIG.get_config(variant)
  assert "ntp_aligned" not in settings.arm_names(config)
  config.students.arms.ntp_aligned.concept.mode = "none"
  aligned, cocomix = (
    settings.student_spec(config, arm, GPT2.vocab_size) for arm in ("ntp_aligned", "cocomix")
  )
  assert aligned.head_dim == 64
  ratio = students.activated_parameters(aligned) / students.activated_parameters(cocomix)
  assert 1 < ratio < 1.06


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"students.arms.cocomix.concept.insert_at": 4}, r"insert_at=4.*4 blocks; choose 0 to 3"),
    ({"targets.k_attr": 17}, r"k_attr=17 is above the 16 active latents"),
    ({"targets.scope": "nxt"}, r"scope='nxt' is unknown: did you mean 'next'"),
    ({"targets.sign": "nagated"}, r"sign='nagated' is unknown: did you mean 'negated'"),
    ({"teacher.tap_layer": 4}, r"tap_layer=4 is outside the teacher: choose 0..3"),
    ({"sae.num_latents": 70_000}, r"num_latents=70000: labels are stored as uint16"),
    ({"sae.arch": "gatd"}, r"arch='gatd' is unknown: did you mean 'gated'"),
    ({"teacher.model.family": "gpt3"}, r"model.family='gpt3' is unknown: did you mean 'gpt2'"),
    ({"teacher.model.num_heads": 5}, r"num_heads=5: it must divide model_dim=96"),
    (
      {"students.arms.cocomix.concept.mode": "paws"},
      r"students.arms.cocomix: .*mode='paws': choose one of cocomix",
    ),
    ({"students.arms.cocomix.kd_weight": -0.1}, r"students.arms.cocomix.kd_weight=-0.1: give 0 or more"),
    ({"students.arms.cocomix.labels": "negated"}, r"students.arms.cocomix.labels='negated' is unknown"),
    ({"students.arms.cocomix.concept.mlp_dim": 8}, r"mlp_dim=8: mode 'cocomix' does not read it"),
    ({"students.arms.ntp.concept.mode": ""}, r"students.baseline='ntp' is unknown"),
    (
      {"steer.arm": "ntp"},
      r"steer.arm='ntp' is no arm whose concepts reach the stream; choose one of cocomix",
    ),
    ({"targets.source": "on-line"}, r"targets.source='on-line' is unknown: did you mean 'online'"),
    ({"labels.devices": 9}, r"labels.devices=9: this host has 8; give 1 to 8, or 0 for all"),
    ({"labels.batch_size": 12}, r"labels.batch_size=12 must be a positive multiple of the 8 devices"),
    ({"window.shift": "epochs"}, r"window.shift='epochs' is unknown: did you mean 'epoch'"),
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


def test_steering_is_checked_only_where_an_arm_is_steered():
  config = CONFIG.get_config("tiny")
  config.steer.new_tokens = config.window.length
  with pytest.raises(ValueError, match="steer.prompt_tokens"):
    cocomix.validate(config)
  config.students.arms.cocomix.concept.mode = "pause"
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
