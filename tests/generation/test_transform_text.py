"""Chains as text, and the orders and settings of peers."""

import jax.numpy as jnp
import pytest

from nr.generation.transforms import (
  REGISTRY,
  Dry,
  LogitBias,
  Temperature,
  TopK,
  TopNSigma,
  TopP,
  chain,
  describe,
  from_settings,
  ordered,
  parse,
)


def test_text_is_read():
  law = parse(
    " temperature(0.7) | top_p(p=[0.9, 1]) | dry(0.8, breakers=[3, [1, 2]]) | top_h(0.5, variant='hf')"
  )
  assert [each.name for each in law.transforms] == ["temperature", "top_p", "dry", "top_h"]
  assert law.transforms[0].tau == 0.7 and law.transforms[1].p == [0.9, 1]
  assert law.transforms[2].breakers == [3, [1, 2]] and law.transforms[3].variant == "hf"
  assert parse("").transforms == () and parse("green_list").transforms[0].name == "green_list"


@pytest.mark.parametrize(
  "text",
  [
    "temperature(0.7)|top_p([0.9, 1])",
    "dry(0.8, breakers=[[3], [1, 2]])",
    "dry(0.8, 1.5, 3, breakers=[[3]])",
    "logit_bias([1, 5], [2, -1e999])",
    "mirostat_v1(4, fitted=5)|mirostat_v2([1e999, 3])|min_length([3], 4, 'all')",
    "adaptive_temperature([0, 0.1, 1], law='argmax')",
    "green_list()",
  ],
)
def test_text_is_written_as_it_was_read(text):
  assert describe(parse(text)) == text
  # Arrays are written as the shortest digits of their float32, sequences without padding.
  assert describe(parse(text).prepared()) == text


@pytest.mark.parametrize(
  "text, words",
  [
    ("temprature(0.7)", "did you mean 'temperature'"),
    ("top_p(q=0.9)", "top_p's parameter='q'"),
    ("temperature(tua=1)", "did you mean 'tau'"),
    ("top_p()", "give p"),
    ("top_p(0.9, p=0.8)", "given twice"),
    ("top_p(0.9, 1, 'sort', 4)", "has 3 parameters"),
    ("top_p(1.5)", "at most 1"),
    ("top_p(0.9, implementation='srot')", "did you mean 'sort'"),
    ("top_p(open('x'))", "no literal"),
    ("top_p(*[0.9])", "no literal"),
    ("top_p(**{'p': 0.9})", "parameter='None'"),
    ("top_p(p)", "no literal"),
    ("__import__('os').system('true')", "no transform"),
    ("temperature(0.7) + top_p(0.9)", "no transform"),
    ("temperature(0.7", "no chain"),
    ("temperature(0.7)||top_p(0.9)", "no chain"),
    ("(" * 5000, "no chain"),
  ],
)
def test_wrong_text_is_answered(text, words):
  with pytest.raises(ValueError, match=words.replace("(", r"\(")):
    parse(text)


def test_what_no_literal_stands_for_is_not_written():
  with pytest.raises(ValueError, match="no literal"):
    describe(Temperature(object()))
  with pytest.raises(ValueError, match="no literal"):
    describe(Temperature(float("nan")))


def test_orders_of_peers():
  mixed = [TopP(0.9), Temperature(0.7), TopK(5)]
  assert describe(ordered(mixed, "hf")) == "temperature(0.7)|top_k(5)|top_p(0.9)"
  assert describe(ordered([chain(*mixed)], "vllm")) == "temperature(0.7)|top_k(5)|top_p(0.9)"
  assert describe(ordered(mixed, "llamacpp")) == "top_k(5)|top_p(0.9)|temperature(0.7)"
  with pytest.raises(ValueError, match="top_n_sigma has no place in the order of 'hf'"):
    ordered([TopNSigma(1)], "hf")
  with pytest.raises(ValueError, match="did you mean 'vllm'"):
    ordered(mixed, "vlm")


def test_orders_name_transforms_that_exist():
  from nr.generation.transforms import mixtures  # noqa: F401  (registers guidance)
  from nr.generation.transforms.presets import ORDERS

  for order in ORDERS.values():
    assert {name for place in order for name in place} <= set(REGISTRY)


SETTINGS = {
  "temperature(0.5)|top_p(0.9)": ("hf", dict(top_p=0.9, temperature=0.5, top_k=0, max_new_tokens=9)),
  "repetition_penalty(1.1)|temperature(0)": (
    "hf",
    dict(do_sample=False, temperature=0.5, repetition_penalty=1.1),
  ),
  "top_k(5, 3)": ("hf", dict(top_k=5, num_beams=3, eos_token_id=[1, 2])),
  "sequence_bias([[1, 2]], [0.5])|suppress_tokens([4], 1)": (
    "hf",
    dict(sequence_bias={(1, 2): 0.5}, begin_suppress_tokens=[4]),
  ),
  "min_length(2, 3, 'all')|max_length(2, 9, 'all')": (
    "hf",
    dict(forced_eos_token_id=2, max_length=9, min_length=3, eos_token_id=2),
  ),
  "bad_words([[1, 3]])": ("hf", dict(bad_words_ids=[[2], [1, 3]], eos_token_id=2)),
  "exponential_decay(2, 3, 1.1)": (
    "hf",
    dict(exponential_decay_length_penalty=(3, 1.1), eos_token_id=2),
  ),
  "frequency_presence(presence=0.5)|temperature(0)": (
    "vllm",
    dict(top_k=-1, temperature=0.0, presence_penalty=0.5, n=2),
  ),
  "allowed_tokens([1])|logit_bias([3], [1.5])|temperature(2)|min_p(0.1)": (
    "vllm",
    dict(logit_bias={"3": 1.5}, min_p=0.1, temperature=2, allowed_token_ids=[1]),
  ),
  "min_length([7], 3)": ("vllm", dict(min_tokens=3, stop_token_ids=[7])),
  "top_k(40)|min_p(0.05)|dynamic_temperature(0.5, 1.1)": (
    "llamacpp",
    dict(temperature=0.8, dynatemp_range=0.3, min_p=0.05, top_k=40),
  ),
  "repetition_penalty(1.1, window=64)|frequency_presence(0.2, scope='all', window=64)": (
    "llamacpp",
    dict(repeat_penalty=1.1, frequency_penalty=0.2),
  ),
  "dry(0.8)": (
    "llamacpp",
    dict(repeat_penalty=1.1, repeat_last_n=0, dry_multiplier=0.8, dry_penalty_last_n=-1),
  ),
  "temperature(0.8)|mirostat_v2(4)": (
    "llamacpp",
    dict(mirostat=2, mirostat_tau=4.0, top_k=40, temperature=0.8),
  ),
  "min_p(0.05)|adaptive_p(0.4)": ("llamacpp", dict(adaptive_target=0.4, min_p=0.05, top_n_sigma=-1)),
  "xtc(0.5)": ("llamacpp", dict(xtc_probability=0.5, typical_p=1.0)),
}


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_of_peers(text):
  order, settings = SETTINGS[text]
  assert describe(from_settings(settings, order)) == text


@pytest.mark.parametrize(
  "order, settings, words",
  [
    ("hf", dict(temprature=0.5), "did you mean 'temperature'"),
    ("hf", dict(min_new_tokens=3), "min_new_tokens needs eos_token_id"),
    ("hf", dict(guidance_scale=1.5), "guidance"),
    ("vllm", dict(repeat_penalty=1.5), "did you mean 'repetition_penalty'"),
    ("llamacpp", dict(mirostat=3), "0, 1 or 2"),
    ("jax", dict(), "order='jax'"),
  ],
)
def test_wrong_settings_are_answered(order, settings, words):
  with pytest.raises(ValueError, match=words):
    from_settings(settings, order)


def test_rows_of_a_transform_are_written_as_lists():
  assert describe(chain(TopP(jnp.array([0.1, 0.7], jnp.float32)), LogitBias([2], 0.3))) == (
    "top_p([0.1, 0.7])|logit_bias([2], 0.3)"
  )
  assert describe(Dry(0.8)) == "dry(0.8)"
