"""Chat templates and the tokens that the assistant says, against committed numbers of `transformers`."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer

from nr.chat_templates import BUILT_IN, render_chat
from nr.data.bad_records import DataError
from nr.data.chat import ChatFormat, ChatTemplate, ChatTokenizer, load_chat_template
from nr.data.conversations import (
  Conversation,
  encode_conversations,
  pair_of_conversations,
  read_conversations,
)
from nr.data.example_batches import padded_batches
from nr.data.examples import LeftOut, LengthLimits, encode_pairs
from nr.data.preferences import PreferencePair
from nr.data.tokenizers import load_tokenizer

pytest.importorskip("tokenizers", reason="needs tokenizers (extra [text])")
pytest.importorskip("jinja2", reason="needs jinja2 (extra [text])")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chat"
CASES = json.loads((GOLDEN / "expected.json").read_text())
TEMPLATES = ("folder", *BUILT_IN)
ROOMY = LengthLimits(200)


def template_of(name):
  return load_chat_template(GOLDEN) if name == "folder" else ChatTemplate.named(name)


def format_of(name, **settings):
  return ChatFormat(ChatTokenizer(load_tokenizer(GOLDEN), template_of(name)), **settings)


def turn(role, content):
  return {"role": role, "content": content}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_texts_and_ids_are_those_of_transformers(case, name):
  form, expected = format_of(name), case[name]
  text = template_of(name).render(case["messages"])
  assert text == expected["text"]
  assert form.tokenizer.encode(text, use_special_tokens=True) == expected["ids"]
  last = max(index for index, message in enumerate(case["messages"]) if message["role"] == "assistant")
  assert form.encode_prompt(tuple(case["messages"][:last])) == expected["prompt_ids"]
  ids, is_said = form.encode_turns(case["messages"])
  assert ids == expected["ids"][: len(ids)] and len(ids) == len(is_said)
  if name == "folder":
    assert is_said == [bool(said) for said in expected["mask"][: len(ids)]]
    assert not any(expected["mask"][len(ids) :]), "nothing that is said is lost"
  said = [id for id, flag in zip(ids, is_said) if flag]
  spoken = [m["content"] for m in case["messages"] if m["role"] == "assistant"]
  end = form.tokenizer.encode(template_of(name).end_of_turn or "<|im_end|>", use_special_tokens=True)
  trim = str.strip if name == "llama3" else str
  assert said == [id for content in spoken for id in [*form.tokenizer.encode(trim(content)), *end]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_and_a_conversation_have_the_same_tokens(name):
  form, messages = format_of(name), CASES[1]["messages"]
  pair = pair_of_conversations("a", messages, [*messages[:-1], turn("assistant", "no")])
  (example,) = encode_pairs([pair], form, ROOMY).examples
  ids, _ = form.encode_turns(messages, "last")
  assert example.tokens[0].tolist() == ids
  encoded = encode_conversations([Conversation("a", messages)], form, ROOMY, turns="last")
  np.testing.assert_array_equal(encoded.examples[0].is_response[0], example.is_response[0])
  every = encode_conversations([Conversation("a", messages)], form, ROOMY).examples[0]
  assert every.is_response[0].sum() > example.is_response[0].sum()
  np.testing.assert_array_equal(every.tokens[0], example.tokens[0])


def test_no_double_begin_of_text():
  begin = 0  # <|begin_of_text|> of the golden tokenizer
  tokenizer = load_tokenizer(GOLDEN)
  for name, wrapped in (("folder", False), ("chatml", True)):
    form = ChatFormat(ChatTokenizer(tokenizer, template_of(name), begin_of_text_id=begin))
    prompt = form.encode_prompt("hi")
    ids, is_said = form.encode_turns([turn("user", "hi"), turn("assistant", "ho")])
    for found in (prompt, ids):
      assert found[0] == begin and found.count(begin) == 1
    assert len(ids) == len(is_said) and form.begin_ids == (begin,)
    text = form.tokenizer.render_chat([turn("user", "hi")])
    assert text.startswith("<|begin_of_text|>") != wrapped
  assert begin not in ChatFormat(ChatTokenizer(tokenizer, template_of("chatml"))).encode_prompt("hi")


def test_begin_of_text_is_added_only_where_the_tokenizer_asks_for_it():
  tokenizer = ChatTokenizer(load_tokenizer(GOLDEN), template_of("chatml"), begin_of_text_id=0)
  tokenizer.adds_begin_of_text = False  # as a GGUF file can say
  assert 0 not in ChatFormat(tokenizer).encode_prompt("hi")
  tokenizer.adds_begin_of_text = True
  assert ChatFormat(tokenizer).encode_prompt("hi")[0] == 0


def test_shortening_keeps_begin_of_text_and_every_end():
  form = format_of("folder")
  record = Conversation("a", CASES[1]["messages"])
  full = encode_conversations([record], form, ROOMY).examples[0]
  lead = int(full.is_response[0].argmax())
  limits = LengthLimits(len(full.tokens[0]) - lead + 4)
  encoded = encode_conversations([record], form, limits)
  (short,) = encoded.examples
  assert encoded.report.shortened == 1 and len(short.tokens[0]) == limits.max_length
  assert short.tokens[0][0] == 0, "begin of text"
  np.testing.assert_array_equal(short.tokens[0][1:], full.tokens[0][lead - 3 :])
  assert short.is_response[0].sum() == full.is_response[0].sum()
  with pytest.raises(DataError, match="response too long: 1, as a"):
    encode_conversations([record], form, LengthLimits(len(full.tokens[0]) - lead))


def test_weights_of_a_batch_are_the_mask_of_transformers():
  examples = [Conversation(str(i), case["messages"], 0.5) for i, case in enumerate(CASES)]
  encoded = encode_conversations(examples, format_of("folder"), ROOMY)
  (batch,) = padded_batches(encoded.examples, 3, (128,), None, 1)
  for row, case in enumerate(CASES):
    mask = case["folder"]["mask"]
    np.testing.assert_array_equal(batch["weights"][row][: len(mask) - 1], 0.5 * np.array(mask[1:]))
    assert not batch["weights"][row][len(mask) - 1 :].any()


def test_what_is_left_out_is_counted():
  user, said = turn("user", "a"), turn("assistant", "b")
  report = encode_conversations(
    [
      Conversation("good", (user, said)),
      Conversation("silent", (user,)),
      Conversation("empty", (user, said, user, turn("assistant", ""))),
      Conversation("forged", (turn("user", "x<|im_end|>"), said)),
    ],
    format_of("chatml"),
    ROOMY,
  ).report
  assert report.dropped == {
    "no turn of the assistant": ["silent"],
    "empty response": ["empty"],
    "content spells a special token": ["forged"],
  }
  pairs = [PreferencePair("ok", "p", "x", "y"), PreferencePair("forged", "<|im_start|>", "x", "y")]
  assert encode_pairs(pairs, format_of("chatml"), ROOMY).report.dropped == {
    "content spells a special token": ["forged"]
  }
  with pytest.raises(LeftOut):
    format_of("chatml").encode_prompt("<|im_end|>")


def test_special_tokens_can_be_given_to_any_tokenizer():
  special = {"<|im_start|>": 300, "<|im_end|>": 301, "<|im": 302}
  tokenizer = ChatTokenizer(ByteTokenizer(302), ChatTemplate.named("chatml"), special)
  assert tokenizer.encode("a<|im_end|>", use_special_tokens=True) == [97, 301]
  assert tokenizer.encode("<|im_end|>") == list(b"<|im_end|>")
  assert ChatFormat(tokenizer).end_id == tokenizer.end_of_turn_id == 301
  assert ChatFormat(tokenizer).encode_prompt("a") == [300, *b"user\na", 301, *b"\n", 300, *b"assistant\n"]
  assert ChatFormat(tokenizer, system="s").encode_prompt("a")[:10] == [300, *b"system\ns", 301]
  with pytest.raises(DataError, match="give special_tokens"):
    ChatTokenizer(ByteTokenizer(), ChatTemplate.named("chatml"))
  with pytest.raises(DataError, match="'<|eot_id|>', which ends a turn, is 10 tokens"):
    ChatTokenizer(ByteTokenizer(), ChatTemplate.named("llama3"), special)


GEMMA = (
  "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
  "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = ("<s>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # fmt: skip


class Bare:
  """What a tokenizer with a template of its own and no `end_of_turn_id` shows (a GGUF file's)."""

  def __init__(self, tokenizer):
    self.encode, self.render_chat = tokenizer.encode, tokenizer.render_chat
    self.end_of_text_id = tokenizer.end_of_text_id


@pytest.mark.parametrize(
  "source, end",
  [
    (GEMMA, "<end_of_turn>"),
    (BUILT_IN["chatml"][0], "<|im_end|>"),
    (BUILT_IN["llama3"][0], "<|eot_id|>"),
    ("{% for m in messages %}[{{ m.content }}] {{ eos_token }}{% endfor %}", "<eos>"),
    # Nothing special there, nothing there, and a refusal: the template's eos_token.
    ("{% for m in messages %}{{ m.content }} : {% endfor %}", "<eos>"),
    ("<end_of_turn>{% for m in messages %}{{ m.role }}{% endfor %}<end_of_turn>", "<eos>"),
    ("{{ raise_exception('never') }}", "<eos>"),
  ],
)
def test_a_turn_ends_with_what_the_template_writes(source, end, tmp_path):
  (tmp_path / "chat_template.jinja").write_text(source)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<eos>"}))
  special = {piece: 300 + place for place, piece in enumerate(SPECIAL)}
  tokenizer = ChatTokenizer(ByteTokenizer(309), load_chat_template(tmp_path), special)
  assert ChatFormat(tokenizer).end_id == tokenizer.end_of_turn_id == special[end]
  if end != "<eos>":
    assert ChatFormat(Bare(tokenizer)).end_id == special[end]
    (example,) = encode_pairs([PreferencePair("a", "q", "yes", "no")], ChatFormat(tokenizer), ROOMY).examples
    assert [ids[-1] for ids in example.tokens] == [special[end]] * 2
    ids, is_said = ChatFormat(tokenizer).encode_turns([turn("user", "q"), turn("assistant", "yes")])
    assert ids == example.tokens[0].tolist() and is_said == example.is_response[0].tolist()


def test_templates_are_found_where_they_lie(tmp_path):
  folder = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "copy"))
  template = load_chat_template(folder)
  assert template.begin_token == "<|begin_of_text|>" and template.end_token == "<|im_end|>"
  tokenizer = ChatTokenizer(load_tokenizer(folder), template)
  tokenizer.save(tmp_path / "saved")
  assert load_chat_template(tmp_path / "saved") == template
  assert load_tokenizer(tmp_path / "saved").encode("abc") == tokenizer.encode("abc")
  (folder / "chat_template.jinja").unlink()
  with pytest.raises(DataError, match="holds no chat template; name a built-in one: chatml, llama3"):
    load_chat_template(folder)
  several = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
  config = {"chat_template": several, "bos_token": {"content": "<s>"}, "eos_token": None}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  assert load_chat_template(folder, "tool_use") == ChatTemplate("t", "<s>", "")
  with pytest.raises(DataError, match="did you mean 'tool_use'"):
    load_chat_template(folder, "tool_uses")
  (folder / "tokenizer_config.json").write_text("{")
  with pytest.raises(DataError, match="tokenizer_config.json is not valid JSON"):
    load_chat_template(folder)
  with pytest.raises(DataError, match="did you mean 'chatml'"):
    ChatTemplate.named("chat-ml")


def custom(source, **settings):
  special = {"<|im_start|>": 300, "<|im_end|>": 301}
  return ChatFormat(ChatTokenizer(ByteTokenizer(302), ChatTemplate(source), special), 301, **settings)


def test_templates_that_cannot_be_learnt_from_are_named():
  talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
  endless = custom("{% for m in messages %}{{ m.content }}{% endfor %}")
  with pytest.raises(DataError, match="message 1: .* does not end the assistant's turn with token 301"):
    endless.encode_turns(talk)
  with pytest.raises(DataError, match="conversation 'x', message 1"):
    encode_conversations([Conversation("x", tuple(talk))], endless, ROOMY)
  # Earlier turns are cut short once others follow, as Qwen3's template does with its thoughts.
  forgetful = custom(
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
  )
  with pytest.raises(DataError, match="message 3: .* set turns='last'"):
    forgetful.encode_turns(talk)
  ids, is_said = forgetful.encode_turns(talk, "last")
  assert [id for id, said in zip(ids, is_said) if said] == [*b"d", 301]
  refusing = custom("{{ raise_exception('no system') }}")
  with pytest.raises(DataError, match="refused the messages: no system"):
    refusing.encode_prompt("a")
  with pytest.raises(DataError, match="ends with the assistant's turn"):
    endless.encode_prompt(tuple(talk))
  with pytest.raises(DataError, match="did you mean 'last'"):
    endless.encode_turns(talk, "lst")


def test_generation_marks_and_loop_controls_are_understood():
  marked = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
  marked += "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
  assert render_chat(marked, [turn("user", "a"), turn("user", "b")]) == "a"
  assert render_chat("{{ strftime_now is defined }}", []) == "False"
  assert render_chat("{% if true %}\n  {% if true %}\nx{% endif %}{% endif %}", []) == "x", (
    "blocks leave no space"
  )


def test_conversations_on_disk(tmp_path):
  path = tmp_path / "talks.jsonl"
  good = {"id": "a", "messages": [turn("user", "x"), turn("assistant", "y")], "weight": 2}
  path.write_text(json.dumps(good) + "\n")
  assert read_conversations(path) == [Conversation("a", tuple(good["messages"]), 2)]
  for change, field in (
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"weight": -1}, "weight"),
    ({}, "id"),
  ):
    bad = {**good, **({"id": "b", **change} if change else {})}
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=f"talks.jsonl, line 2, field '{field}'"):
      read_conversations(path)


def test_pairs_of_conversations():
  user, yes, no = turn("user", "x"), turn("assistant", "y"), turn("assistant", "n")
  assert pair_of_conversations("a", [user, yes], [user, no]) == PreferencePair("a", (user,), "y", "n")
  for chosen, rejected, match in (
    ([user, yes], [turn("user", "z"), no], "differ before the last message"),
    ([user, yes], [user], "field 'rejected': does not end"),
    ([yes], [no], "holds no prompt"),
    ([], [no], "field 'chosen': is an empty list"),
  ):
    with pytest.raises(DataError, match=match):
      pair_of_conversations("a", chosen, rejected)
