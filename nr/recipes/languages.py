"""How a checkpoint's texts become tokens: its tokenizer, its chat template, and both kept with a run."""

import pathlib
from typing import Any, NamedTuple

from nr.data.chat import ChatFormat, ChatTemplate, ChatTokenizer, load_chat_template
from nr.data.examples import PlainText, TextFormat
from nr.data.tokenizers import load_tokenizer
from nr.generators.checkpoints import Checkpoint, tokenizer_folders
from nr.recipes.stages import Artifact, StageContext

OWN_TEMPLATE = "own"
"""Name of the template that comes with a checkpoint."""


class Language(NamedTuple):
  """How a model's texts become tokens.

  Attributes:
    tokenizer: of the model.
    format: prompts and responses to ids, the same for training and for answering.
    begin_ids: in front of prompts that are plain text.
    end_ids: that end a text.
  """

  tokenizer: Any
  format: TextFormat
  begin_ids: tuple[int, ...]
  end_ids: tuple[int, ...]


def plain_language(tokenizer: Any) -> Language:
  """Returns the language of a toy: plain text, ended by the tokenizer's end of text."""
  return Language(tokenizer, PlainText(tokenizer), (), (tokenizer.end_of_text_id,))


def checkpoint_language(checkpoint: Checkpoint, chat_template: str) -> Language:
  """Returns the language of a checkpoint.

  Args:
    checkpoint: opened.
    chat_template: "own", a built-in name (`nr.chat_templates`), or "" for plain text.

  Raises:
    DataError: a template that is not there, or that the tokenizer cannot write.
  """
  tokenizer = checkpoint.tokenizer
  if chat_template:
    is_own = chat_template == OWN_TEMPLATE
    template = _own_template(checkpoint) if is_own else ChatTemplate.named(chat_template)
    begins = getattr(tokenizer, "adds_begin_of_text", False)
    tokenizer = ChatTokenizer(
      tokenizer, template, begin_of_text_id=tokenizer.begin_of_text_id if begins else None
    )
  return _language(tokenizer, bool(chat_template), checkpoint.begin_ids, checkpoint.end_ids)


def keep_language(context: StageContext, language: Language) -> Artifact:
  """Saves a language in the stage's folder and returns what the stage's artifact says of it."""
  folder = context.directory / "tokenizer"
  language.tokenizer.save(folder)
  return {
    "tokenizer": language.tokenizer.fingerprint,
    "tokenizer_folder": context.relative(folder),
    "is_chat": isinstance(language.format, ChatFormat),
    "begin_of_text_id": getattr(language.tokenizer, "begin_of_text_id", None),
    "begin_ids": list(language.begin_ids),
    "end_ids": list(language.end_ids),
  }


def kept_language(context: StageContext, artifact: Artifact) -> Language:
  """Returns the language that `keep_language` has saved."""
  folder = context.path(artifact["tokenizer_folder"])
  tokenizer = load_tokenizer(folder)
  if artifact["is_chat"]:
    begin = artifact["begin_of_text_id"]
    tokenizer = ChatTokenizer(tokenizer, load_chat_template(folder), begin_of_text_id=begin)
  return _language(tokenizer, artifact["is_chat"], tuple(artifact["begin_ids"]), tuple(artifact["end_ids"]))


def _language(
  tokenizer: Any, is_chat: bool, begin_ids: tuple[int, ...], end_ids: tuple[int, ...]
) -> Language:
  format = ChatFormat(tokenizer) if is_chat else PlainText(tokenizer, begin_ids)
  return Language(tokenizer, format, begin_ids, tuple(dict.fromkeys([*end_ids, format.end_id])))


def _own_template(checkpoint: Checkpoint) -> ChatTemplate:
  """Returns the template in a GGUF file, in a folder, or beside the tokenizer of one of our runs."""
  tokenizer, path = checkpoint.tokenizer, pathlib.Path(checkpoint.name)
  source = getattr(tokenizer, "chat_template", None)
  if source:
    begin, end = (
      "" if id is None else tokenizer.decode([id], use_special_tokens=True)
      for id in (tokenizer.begin_of_text_id, tokenizer.end_of_text_id)
    )
    return ChatTemplate(source, begin, end)
  if not (path / "config.json").is_file():  # a model folder of ours; its run has the tokenizer
    saved = [folder for folder in tokenizer_folders(path) if (folder / "chat_template.jinja").is_file()]
    path = saved[0] if saved else path
  return load_chat_template(path)
