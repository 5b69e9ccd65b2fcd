"""Random conversations through `transformers`' chat templates and ours, live."""

import pathlib

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
pytest.importorskip("jinja2", reason="needs jinja2 (extra [text])")

from nr.data.chat import ChatFormat, ChatTokenizer, load_chat_template  # noqa: E402
from nr.data.tokenizers import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.oracle

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chat"


def random_conversation(generator):
  """1 to 3 exchanges of words, signs and line feeds; turns do not begin or end with space."""
  words = ["Paris", "is", "42", "—", "é", "f(x)", "\n\n", "  ", "the", "7!"]

  def text():
    return "so " + " ".join(generator.choice(words, generator.integers(0, 9))) + "."

  start = [{"role": "system", "content": text()}] if generator.random() < 0.5 else []
  for _ in range(generator.integers(1, 4)):
    start += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
  return start


def test_ids_and_masks_are_those_of_transformers():
  theirs = transformers.AutoTokenizer.from_pretrained(GOLDEN)
  form = ChatFormat(ChatTokenizer(load_tokenizer(GOLDEN), load_chat_template(GOLDEN)))
  generator = np.random.default_rng(0)
  for _ in range(50):
    messages = random_conversation(generator)
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, is_said = form.encode_turns(messages)
    assert ids == expected["input_ids"][: len(ids)]
    assert is_said == [bool(mask) for mask in expected["assistant_masks"][: len(ids)]]
    assert not any(expected["assistant_masks"][len(ids) :])
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert form.encode_prompt(messages[:-1]) == prompt["input_ids"]
