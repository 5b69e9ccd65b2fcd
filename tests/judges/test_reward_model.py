"""Reward models as judges: any batch gives the same rewards, NaN is none, classifiers of transformers agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.examples import LeftOut, PlainText
from nr.data.word_tokenizer import WordTokenizer
from nr.judges.protocol import Item, Judgement
from nr.judges.reward_model import RewardModelJudge
from nr.models import parameters
from nr.models.reward import RewardModelSpec
from nr.training.model_files import build_model
from tests.generation import toy

FORMAT = PlainText(WordTokenizer([f"w{number}" for number in range(31)]))
ITEMS = [
  Item(str(number), "w1 w2", " ".join(f"w{(number + place) % 31}" for place in range(number + 1)))
  for number in range(12)
]


def make(change=lambda leaf: leaf, **settings):
  spec = RewardModelSpec(toy.tiny_spec(**settings))
  params = parameters.split(build_model(spec, jax.random.key(0)))[1]
  return spec, jax.tree.map(change, params)


def scores(judged):
  return [each.score for each in judged]


def test_rewards_are_those_of_the_model_in_any_batch():
  spec, params = make()
  together = RewardModelJudge(spec, params, FORMAT, batch_size=5).judge(ITEMS)
  alone = [RewardModelJudge(spec, params, FORMAT, batch_size=1).judge([item])[0] for item in ITEMS[::-1]][
    ::-1
  ]
  np.testing.assert_allclose(scores(together), scores(alone), atol=1e-5)
  model = parameters.merge(parameters.split(build_model(spec, jax.random.key(0)))[0], params)
  ids = FORMAT.encode_prompt(ITEMS[3].prompt) + FORMAT.encode_response(ITEMS[3].response) + [0]
  np.testing.assert_allclose(together[3].score, model(jnp.array([ids]))[0], atol=1e-5)
  assert together[3].details["tokens"] == len(ids) and len(set(scores(together))) == 12


def test_what_is_no_reward():
  spec, params = make(lambda leaf: jnp.full_like(leaf, jnp.nan))
  judged = RewardModelJudge(spec, params, FORMAT).judge(ITEMS)
  assert scores(judged) == [None] * 12 and judged[0].reason == "the score is nan"
  spec, params = make()
  judged = RewardModelJudge(spec, params, FORMAT, max_length=6).judge(ITEMS)
  assert [each is None for each in scores(judged)] == [False] * 3 + [True] * 9
  assert "7 tokens" in judged[3].reason


class Choosy(PlainText):
  """A format that leaves out one text, as a chat template does with one that spells its special tokens."""

  def encode_response(self, text):
    if text == ITEMS[1].response:
      raise LeftOut("content spells a special token")
    return super().encode_response(text)


def test_one_text_that_cannot_be_encoded_is_no_reward_and_the_others_have_theirs():
  spec, params = make()
  judged = RewardModelJudge(spec, params, Choosy(FORMAT.tokenizer)).judge(ITEMS[:3])
  assert judged[1] == Judgement(None, "no tokens: content spells a special token")
  whole = RewardModelJudge(spec, params, FORMAT).judge(ITEMS[:3])
  np.testing.assert_allclose([judged[0].score, judged[2].score], [whole[0].score, whole[2].score], atol=1e-6)
  # Words outside the vocabulary and no items at all.
  assert "no tokens" in RewardModelJudge(spec, params, FORMAT).judge([Item("a", "w1", "unheard")])[0].reason
  assert RewardModelJudge(spec, params, FORMAT).judge([]) == []


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_classifiers_of_transformers(family, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
  transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
  from nr.interchange.huggingface import load_huggingface, load_huggingface_reward_model

  torch.manual_seed(0)
  config = getattr(transformers, f"{family}Config")(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_labels=1, pad_token_id=31, initializer_range=0.3,
  )  # fmt: skip
  model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
  model.save_pretrained(tmp_path)
  spec, params = load_huggingface_reward_model(tmp_path)
  judged = RewardModelJudge(spec, params, FORMAT, batch_size=5).judge(ITEMS)
  for item, each in zip(ITEMS, judged):
    ids = FORMAT.encode_prompt(item.prompt) + FORMAT.encode_response(item.response) + [0]
    with torch.no_grad():
      theirs = model(torch.tensor([ids])).logits[0, 0].item()
    np.testing.assert_allclose(each.score, theirs, atol=1e-5)
  with pytest.raises(ValueError, match="lm_head.weight"):
    load_huggingface(tmp_path)
  from safetensors.numpy import load_file, save_file

  tensors = load_file(tmp_path / "model.safetensors")
  save_file({**tensors, "score.weight": np.zeros((2, 16), np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"score.weight has shape \(2, 16\)"):
    load_huggingface_reward_model(tmp_path)
  tensors.pop("score.weight")
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="score.weight is missing"):
    load_huggingface_reward_model(tmp_path)
