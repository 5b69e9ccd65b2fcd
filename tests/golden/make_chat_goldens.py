"""Writes tests/golden/chat: a small tokenizer with a chat template, and what `transformers` makes of conversations.

Run: python tests/golden/make_chat_goldens.py   (needs transformers)

Remake it only when a case is added; texts, ids and masks come from `transformers`, never
from our own code. The template of the folder marks the assistant's turns with
{% generation %}; `expected.json` holds, for it and for each built-in template, the text,
the ids, the mask of the assistant's tokens (of the folder's template) and the prompt's ids.
"""

import json
import pathlib
import shutil

FOLDER = pathlib.Path(__file__).parent / "chat"
SPECIAL = [
  "<|begin_of_text|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
]
# As ChatML, with the turns marked; the line feed behind the end is not the assistant's.
TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}"
  "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
  "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)


def turn(role: str, content: str) -> dict[str, str]:
  return {"role": role, "content": content}


CONVERSATIONS = [
  [turn("user", "What is the capital of France?"), turn("assistant", "Paris.")],
  [
    turn("system", "You are brief."),
    turn("user", "Count to 3."),
    turn("assistant", "1, 2, 3"),
    turn("user", "And on?"),
    turn("assistant", "4, 5, 6.\n\n7!"),
  ],
  [
    turn("user", "  spaces  and\ttabs\n"),
    turn("assistant", "def f(x):\n    return x  # é ☃"),
    turn("user", "ok"),
  ],
]


def make_tokenizer(folder: pathlib.Path):
  """A byte-level BPE tokenizer of 330 ids, trained on the cases themselves."""
  import tokenizers
  import transformers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=SPECIAL,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([m["content"] for c in CONVERSATIONS for m in c] * 3, trainer)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|im_end|>"
  )
  fast.chat_template = TEMPLATE
  shutil.rmtree(folder, ignore_errors=True)
  fast.save_pretrained(folder)
  return fast


def expectation(tokenizer, messages: list, template: str | None, begin: str) -> dict:
  """What `transformers` makes of a conversation; the template's own where None."""
  tokenizer.bos_token = begin
  named = {} if template is None else {"chat_template": template}
  text = tokenizer.apply_chat_template(messages, tokenize=False, **named)
  found = {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
  if template is None:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == found["ids"]
    found["mask"] = encoded["assistant_masks"]
  last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
  prompt = tokenizer.apply_chat_template(
    messages[:last], add_generation_prompt=True, return_dict=True, **named
  )
  return {**found, "prompt_ids": prompt["input_ids"]}


def main() -> None:
  from nr.chat_templates import BUILT_IN

  tokenizer = make_tokenizer(FOLDER)
  cases = []
  for messages in CONVERSATIONS:
    case = {"messages": messages, "folder": expectation(tokenizer, messages, None, "<|begin_of_text|>")}
    for name, (template, begin, _) in BUILT_IN.items():
      case[name] = expectation(tokenizer, messages, template, begin or "<|begin_of_text|>")
    cases.append(case)
  (FOLDER / "expected.json").write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
  main()
