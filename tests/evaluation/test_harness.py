"""The adapter for lm-evaluation-harness, without it: what it asks of our generators, mistakes, the missing package."""

import types

import pytest

from nr.data.word_tokenizer import WordTokenizer
from nr.evaluation import harness
from nr.generators.checkpoints import Checkpoint
from tests.generation import toy


class ChatWords(WordTokenizer):
  """Words with a chat template, which writes w5 as a special token."""

  chat_template = "w5 w0 {{content}}"

  def render_chat(self, messages, add_generation_prompt=True):
    return " ".join(f"w5 w0 {message['content']}" for message in messages)

  def encode(self, text, use_special_tokens=False):
    return [30 if use_special_tokens and id == 6 else id for id in super().encode(text)]


@pytest.fixture
def make(monkeypatch):
  monkeypatch.setattr(harness, "require_lm_eval", lambda: None)

  def make(tokenizer=None, begin_ids=(), network=None, **settings):
    network = network or toy.tiny_network("concepts", max_length=32)
    tokenizer = tokenizer or WordTokenizer([f"w{number}" for number in range(31)])
    checkpoint = Checkpoint("toy", network, tokenizer, begin_ids, (0,), network.spec, "f" * 64)
    model = harness.HarnessModel(checkpoint, **{"batch_size": 4, **settings})
    model.answered = []
    model.cache_hook = types.SimpleNamespace(add_partial=lambda *answer: model.answered.append(answer))
    return model

  return make


def ask(model, kind, arguments):
  return getattr(model, kind)([types.SimpleNamespace(args=each) for each in arguments])


def test_log_likelihoods_and_texts_agree(make):
  """A greedy text is greedy, and its log-likelihood that of the tokens in one window."""
  model, context = make(begin_ids=(0,)), "w3 w9 w1"
  (text,) = ask(model, "generate_until", [(context, {"until": [], "max_gen_toks": 3})])
  assert len(text.split()) == 3
  answers = ask(model, "loglikelihood", [(context, f" {text}"), (context, " w3 w3 w3 w3")])
  assert [is_greedy for _, is_greedy in answers] == [True, False]
  assert answers[0][0] > answers[1][0]
  (alone,), (whole, before) = (
    ask(model, "loglikelihood", [("", f"{context} {text}")]),
    ask(model, "loglikelihood_rolling", [(f"{context} {text}",), (context,)]),
  )
  assert alone[0] == pytest.approx(whole, abs=1e-4)
  assert whole == pytest.approx(before + answers[0][0], abs=1e-4)  # the chain rule
  assert [kind for kind, *_ in model.answered] == [
    "generate_until", "loglikelihood", "loglikelihood", "loglikelihood", *["loglikelihood_rolling"] * 2,
  ]  # fmt: skip


def test_texts_end_at_stops_and_leave_room(make):
  model = make()
  (text,) = ask(model, "generate_until", [("w3 w9 w1", {"max_gen_toks": 6})])
  word = text.split()[2]
  cut, short, long = ask(
    model,
    "generate_until",
    [
      ("w3 w9 w1", {"until": f" {word}", "max_gen_toks": 6}),
      ("w3 w9 w1", {"until": ["never"], "max_new_tokens": 2}),
      (" ".join(["w1"] * 40 + ["w3 w9 w1"]), {"max_gen_toks": 29}),  # room for 3 tokens of context
    ],
  )
  assert cut == text[: text.index(f" {word}")] and short.split() == text.split()[:2]
  assert long.split()[:6] == text.split()
  with pytest.raises(ValueError, match="max_gen_toks=32: the model has 32 positions"):
    ask(model, "generate_until", [("w1", {"max_gen_toks": 32})])


def test_draws_belong_to_the_seed_and_the_place(make):
  asked = [("w3 w9", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8})] * 2
  first, second = ask(make(), "generate_until", asked)
  assert first != second
  assert ask(make(), "generate_until", asked) == [first, second]
  assert ask(make(seed=1), "generate_until", asked) != [first, second]


@pytest.mark.parametrize(
  ("arguments", "chain"),
  [
    ({}, "temperature(0.0)"),
    ({"do_sample": False, "temperature": 0.8}, "temperature(0.0)"),
    ({"temperature": 0.8}, "temperature(0.8)"),
    ({"do_sample": True}, "temperature(1.0)"),
    (
      {"do_sample": True, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1},
      "repetition_penalty(1.1)|temperature(1.0)|top_k(5)|top_p(0.9)",
    ),
  ],
)
def test_arguments_of_generation(arguments, chain):
  request = harness.generation_request("a", "text", {"until": ["\n", ""], **arguments}, seed=3)
  assert request.chain == chain and request.stop == ("\n",) and request.seed == 3
  assert request.max_new_tokens == 256
  assert harness.generation_request("a", "text", {"max_tokens": 9, "max_gen_toks": 5}).max_new_tokens == 5


def test_chats_are_read_with_their_special_tokens(make):
  model = make(ChatWords([f"w{number}" for number in range(31)]), begin_ids=(30,))
  assert model.scorer.encode_context("w5 w1") == [30, 6, 2]
  assert model.chat_template(False) == "" and model.chat_template(True) == ChatWords.chat_template
  text = model.apply_chat_template([{"role": "user", "content": "w1"}])
  assert text == "w5 w0 w1"
  assert model.scorer.encode_context(text) == [30, 1, 2]  # what it begins with is written by the template
  with pytest.raises(ValueError, match="no chat template; leave --apply_chat_template out"):
    make().apply_chat_template([{"role": "user", "content": "w1"}])


def test_what_is_recorded(make):
  info = make(prefix_token_id=3, max_length=16).get_model_info()
  assert info["model_num_parameters"] > 1000 and info["model_dtype"] == "float32"
  assert (info["model_sha"], info["prefix_token_id"], info["max_length"]) == ("f" * 64, 3, 16)


def test_mistakes_are_named(make):
  for settings, message in [
    (dict(strid=4), "did you mean 'stride'"),
    (dict(batch_size="auto"), "batch_size='auto': give a number"),
    (dict(max_length=0), "max_length=0: give at least 1"),
  ]:
    with pytest.raises(ValueError, match=message):
      make(**settings)
  with pytest.raises(ValueError, match="checkpoint is missing; give checkpoint=PATH"):
    harness.HarnessModel()
  with pytest.raises(ValueError, match="argument of generation='top_q' is unknown: did you mean 'top_"):
    harness.generation_request("a", "text", {"top_q": 0.9})


def test_the_missing_package_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(harness, "LM", object)
  with pytest.raises(
    SystemExit, match=r"error: nr.evaluation.harness needs lm_eval: pip install 'nr\[harness\]'"
  ):
    harness.main()
  with pytest.raises(ImportError, match="needs lm_eval"):
    harness.HarnessModel("runs/cocomix")
