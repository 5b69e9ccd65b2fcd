"""Conversations as tokens: chat templates, and which tokens the assistant says.

    tokenizer = ChatTokenizer(load_tokenizer(folder), load_chat_template(folder))
    format = ChatFormat(tokenizer)
    encoded = encode_pairs(pairs, format, LengthLimits(2048))

A conversation is encoded piece by piece, cut where each of the assistant's turns begins
and ends: the tokens before a turn are those that the model reads when it is asked for
that turn, and the turn's own tokens are those it would have to write, its end included.
What a template writes behind the end (a line feed) is not learnt.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from nr.chat_templates import BUILT_IN, render_chat
from nr.data.bad_records import DataError
from nr.data.examples import LeftOut
from nr.data.preferences import Message, Prompt
from nr.names import unknown

ASSISTANT = "assistant"
TURNS = ("all", "last")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template with the pieces that it refers to.

  Attributes:
    source: jinja2.
    begin_token: `bos_token` of the template.
    end_token: `eos_token` of the template.
    end_of_turn: piece that ends the assistant's turn; when empty, what the template itself
      writes there (see `end_of_turn_of`), `end_token` where that is nothing special.
  """

  source: str
  begin_token: str = ""
  end_token: str = ""
  end_of_turn: str = ""

  @classmethod
  def named(cls, name: str) -> Self:
    """Returns a built-in template. Raises DataError for an unknown name."""
    if name not in BUILT_IN:
      raise DataError(unknown("chat_template", name, BUILT_IN))
    source, begin, end = BUILT_IN[name]
    return cls(source, begin, end, end)

  def render(
    self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
  ) -> str:
    """Returns a conversation as text. Raises DataError where the template refuses it."""
    try:
      return render_chat(
        self.source,
        messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=self.begin_token,
        eos_token=self.end_token,
        **variables,
      )
    except ValueError as error:
      raise DataError(str(error)) from error


def load_chat_template(folder: str | pathlib.Path, name: str = "default") -> ChatTemplate:
  """Reads the template of a folder in Hugging Face's format.

  Args:
    folder: holds chat_template.jinja, or tokenizer_config.json with "chat_template".
    name: which one, where a file has several.

  Raises:
    DataError: there is none, none of that name, or a damaged file.
  """
  folder = pathlib.Path(folder)
  path = folder / "tokenizer_config.json"
  try:
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  except ValueError as error:
    raise DataError(f"{path} is not valid JSON ({error}); copy it again") from error
  source = config.get("chat_template")
  if isinstance(source, list):
    several = {entry.get("name"): entry.get("template") for entry in source}
    if name not in several:
      raise DataError(unknown(f"{path}: chat template", name, map(str, several)))
    source = several[name]
  if (folder / "chat_template.jinja").is_file():
    source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  if not isinstance(source, str):
    raise DataError(f"{folder} holds no chat template; name a built-in one: {', '.join(BUILT_IN)}")
  return ChatTemplate(source, _piece(config.get("bos_token")), _piece(config.get("eos_token")))


def _piece(token: Any) -> str:
  """Returns the text of a token of tokenizer_config.json: a string, an object with "content", or null."""
  return (token.get("content") if isinstance(token, Mapping) else token) or ""


_PROBE, _MOST_BEHIND = "probe4711", 80


def end_of_turn_of(tokenizer: Any) -> int | None:
  """Returns the id of the first special token that a template writes behind a turn of the assistant.

  It need not be the template's `eos_token`: Gemma's turns end with <end_of_turn>, its texts with <eos>.

  Args:
    tokenizer: with `render_chat` and `encode(text, use_special_tokens=)`.

  Returns:
    None where there is none, or the template refuses a user's turn with an answer.
  """
  turns = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": _PROBE}]
  try:
    _, found, behind = tokenizer.render_chat(turns, add_generation_prompt=False).rpartition(_PROBE)
    behind = behind[:_MOST_BEHIND] if found else ""
    for start in range(len(behind)):
      for stop in range(len(behind), start, -1):
        ids = tokenizer.encode(behind[start:stop], use_special_tokens=True)
        if len(ids) == 1 and ids != tokenizer.encode(behind[start:stop]):
          return ids[0]
  except DataError:
    pass
  return None


class ChatTokenizer:
  """A tokenizer with a chat template.

  Args:
    tokenizer: any; it needs special tokens of its own, or `special_tokens`.
    template: how conversations are written.
    special_tokens: piece -> id, for tokenizers that know no special tokens in text.
    begin_of_text_id: put before a conversation whose text does not begin with it; None
      for none. It never stands there twice.

  Attributes:
    end_of_turn_id: what ends a turn of the assistant.

  Raises:
    DataError: special tokens that the tokenizer does not know.
  """

  def __init__(
    self,
    tokenizer: Any,
    template: ChatTemplate,
    special_tokens: Mapping[str, int] | None = None,
    begin_of_text_id: int | None = None,
  ):
    self.tokenizer, self.template = tokenizer, template
    self.vocab_size, self.end_of_text_id = tokenizer.vocab_size, tokenizer.end_of_text_id
    self.fingerprint = tokenizer.fingerprint
    self.begin_of_text_id = begin_of_text_id
    self._special = dict(special_tokens) if special_tokens else None
    if self._special:
      longest_first = sorted(self._special, key=len, reverse=True)
      self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    self.end_of_turn_id = self.end_of_text_id
    written = None if template.end_of_turn else end_of_turn_of(self)
    if written is not None:
      self.end_of_turn_id = written
      return
    end = template.end_of_turn or template.end_token
    if end:
      ids = self.encode(end, use_special_tokens=True)
      if len(ids) != 1:
        raise DataError(
          f"chat template: {end!r}, which ends a turn, is {len(ids)} tokens of this tokenizer; "
          "give special_tokens, or a template with an end that it knows"
        )
      self.end_of_turn_id = ids[0]

  def encode(self, text: str, *, use_special_tokens: bool = False) -> list[int]:
    """Returns the ids of a text; pieces that spell special tokens are these if asked for."""
    if not use_special_tokens:
      return self.tokenizer.encode(text)
    if self._special is None:
      try:
        return self.tokenizer.encode(text, use_special_tokens=True)
      except TypeError as error:
        raise DataError("this tokenizer finds no special tokens in text; give special_tokens") from error
    pieces = self._split.split(text)
    return [
      id
      for place, piece in enumerate(pieces)
      for id in ([self._special[piece]] if place % 2 else self.tokenizer.encode(piece) if piece else [])
    ]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, as the tokenizer does."""
    return self.tokenizer.decode(ids)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the tokenizer and chat_template.jinja into a folder."""
    self.tokenizer.save(path)
    (pathlib.Path(path) / "chat_template.jinja").write_text(self.template.source, encoding="utf-8")
    tokens = {"bos_token": self.template.begin_token, "eos_token": self.template.end_token}
    (pathlib.Path(path) / "tokenizer_config.json").write_text(json.dumps(tokens) + "\n", encoding="utf-8")

  def render_chat(
    self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
  ) -> str:
    """Returns a conversation as the text that the model was trained on."""
    return self.template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


@dataclasses.dataclass(frozen=True)
class ChatFormat:
  """A `nr.data.examples.TextFormat` that writes prompts by a chat template.

  Attributes:
    tokenizer: with `render_chat` and `encode(text, use_special_tokens=)`: a
      `ChatTokenizer`, or a `nr.interchange.gguf_tokenizer.GgufTokenizer`.
    end_id: ends a turn of the assistant; None: the tokenizer's `end_of_turn_id`, or
      else what its template writes there, or else `end_of_text_id`.
    system: content of a system message put before conversations without one; None: none.
    variables: further variables of the template.
  """

  tokenizer: Any
  end_id: int | None = None
  system: str | None = None
  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.end_id is None:
      own = getattr(self.tokenizer, "end_of_turn_id", None)
      own = end_of_turn_of(self.tokenizer) if own is None else own
      own = self.tokenizer.end_of_text_id if own is None else own
      object.__setattr__(self, "end_id", own)

  @property
  def begin_ids(self) -> tuple[int, ...]:
    """What a prompt begins with, if anything."""
    begin = getattr(self.tokenizer, "begin_of_text_id", None)
    if begin is None and getattr(self.tokenizer, "template", None) and self.tokenizer.template.begin_token:
      ids = self.tokenizer.encode(self.tokenizer.template.begin_token, use_special_tokens=True)
      begin = ids[0] if len(ids) == 1 else None
    return () if begin is None else (begin,)

  def encode_prompt(self, prompt: Prompt) -> list[int]:
    """Returns the ids of a conversation with the assistant's turn opened; text is one user message.

    Raises:
      DataError: a conversation that ends with the assistant, or that the template refuses.
      LeftOut: content that spells a special token.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if messages[-1]["role"] == ASSISTANT:
      raise DataError("prompt ends with the assistant's turn; leave that message out, it is the response")
    self._refuse_special(messages)
    return self._with_begin(self._encode(self._render(messages, add_generation_prompt=True)))

  def encode_response(self, text: str) -> list[int]:
    """Returns the ids of a response without its end; nothing in it is special."""
    return self.tokenizer.encode(text)

  def encode_turns(self, messages: Sequence[Message], turns: str = "all") -> tuple[list[int], list[bool]]:
    """Encodes a whole conversation, up to the last turn to be learnt.

    Args:
      messages: of a conversation.
      turns: which turns of the assistant are learnt, "all" or the "last".

    Returns:
      Token ids, and which of them the assistant says in those turns, ends included.

    Raises:
      LeftOut: no turn of the assistant, an empty one, or content that spells a special token.
      DataError: a template that does not end the assistant's turn with `end_id`, or
        writes earlier turns otherwise once others follow.
    """
    if turns not in TURNS:
      raise DataError(unknown("turns", turns, TURNS))
    places = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    places = places if turns == "all" else places[-1:]
    if not places:
      raise LeftOut("no turn of the assistant")
    if any(not messages[place]["content"] for place in places):
      raise LeftOut("empty response")
    self._refuse_special(messages)
    ids: list[int] = []
    is_said: list[bool] = []
    text = ""
    for place in places:
      before = self._render(messages[:place], add_generation_prompt=True)
      after = self._render(messages[: place + 1], add_generation_prompt=False)
      if not before.startswith(text) or not after.startswith(before):
        raise DataError(
          f"message {place}: the chat template writes what came before otherwise once this turn follows; "
          "set turns='last' and give each turn a conversation of its own"
        )
      said, rest = self._said(after[len(before) :], place)
      context = self._encode(before[len(text) :])
      ids += context + said
      is_said += [False] * len(context) + [True] * len(said)
      text = after[: len(after) - len(rest)]
    with_begin = self._with_begin(ids)
    return with_begin, [False] * (len(with_begin) - len(ids)) + is_said

  def _said(self, text: str, place: int) -> tuple[list[int], str]:
    """Returns the ids of a turn up to its end, and the text behind the end."""
    ids = self._encode(text)
    if self.end_id not in ids:
      raise DataError(
        f"message {place}: the chat template does not end the assistant's turn with token {self.end_id}; "
        "the model would not learn to stop, give the end_id that it writes"
      )
    said = ids[: len(ids) - ids[::-1].index(self.end_id)]
    # What is left is short (a line feed): the shortest ending whose ids are those behind the end.
    behind = ids[len(said) :]
    for size in range(len(text) + 1):
      rest = text[len(text) - size :]
      if self._encode(rest) == behind and self._encode(text[: len(text) - size]) == said:
        return said, rest
    raise DataError(
      f"message {place}: what the chat template writes behind the end cannot be told from the turn"
    )

  def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if self.system is not None and (not messages or messages[0]["role"] != "system"):
      messages = [{"role": "system", "content": self.system}, *messages]
    return self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, **self.variables)

  def _encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, use_special_tokens=True) if text else []

  def _with_begin(self, ids: list[int]) -> list[int]:
    """Puts begin of text in front where the tokenizer asks for it and the template did not write it."""
    begin = getattr(self.tokenizer, "begin_of_text_id", None)
    wanted = begin is not None and getattr(self.tokenizer, "adds_begin_of_text", True)
    return [begin, *ids] if wanted and ids[:1] != [begin] else ids

  def _refuse_special(self, messages: Sequence[Message]) -> None:
    """Raises LeftOut where a content spells a special token: it would become one."""
    for message in messages:
      content = message["content"]
      plain = self.tokenizer.encode(content) if content else []
      if plain != self._encode(content):
        raise LeftOut("content spells a special token")
