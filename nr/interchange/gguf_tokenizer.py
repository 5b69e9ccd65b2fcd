"""The tokenizer and chat template inside a GGUF file (needs the extras [hub] and [text]).

Only byte-level BPE (`tokenizer.ggml.model` = "gpt2") is read, through the
`tokenizers` package. Chat templates are run by `nr.chat_templates`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from nr.chat_templates import render_chat
from nr.interchange.gguf import GgufFile
from nr.tokenizer_files import bytes_of_library_ids, fingerprint_of, save_files

# Token types of GGUF (gguf.TokenType).
_CONTROL, _USER_DEFINED = 3, 4

# How the text is cut before merging, by tokenizer.ggml.pre; from llama.cpp's src/llama-vocab.cpp.
# None: the regular expression of GPT-2, which `tokenizers` has built in.
_GPT2_SPLIT = None
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# name -> (each digit alone, split)
PRE_TOKENIZERS = {
  "default": (False, _GPT2_SPLIT),
  "gpt-2": (False, _GPT2_SPLIT),
  "smollm": (True, _GPT2_SPLIT),
  "llama-bpe": (False, _LLAMA3_SPLIT),
  "qwen2": (False, _QWEN2_SPLIT),
}


class GgufTokenizer:
  """Byte-level BPE tokenizer made from GGUF metadata, with its chat template.

  Has what the rest of the house asks of a tokenizer (see nr.data.tokenizers),
  and beyond that the special tokens of a chat.

  Attributes:
    vocab_size: number of tokens.
    begin_of_text_id: or None where the file names none.
    end_of_text_id: what ends a document or a turn of the assistant.
    adds_begin_of_text: whether the model wants begin_of_text_id before a prompt.
    chat_template: jinja2 source, or None.
    fingerprint: sha256, hex; that of the same tokenizer saved and loaded again.
  """

  kind = "tokenizer_json"

  def __init__(self, path: str | pathlib.Path | GgufFile):
    """Reads the metadata.

    Raises:
      ImportError: `tokenizers` or `gguf` is not installed.
      ValueError: another kind of tokenizer, or an unknown pre-tokenizer.
    """
    file = path if isinstance(path, GgufFile) else GgufFile(path)
    self._tokens: list[str] = file.require("tokenizer.ggml.tokens")
    self._tokenizer = _build(file, self._tokens)
    self.vocab_size = len(self._tokens)
    self.begin_of_text_id: int | None = file.get("tokenizer.ggml.bos_token_id")
    self.end_of_text_id: int = file.require("tokenizer.ggml.eos_token_id")
    self.adds_begin_of_text: bool = bool(file.get("tokenizer.ggml.add_bos_token", False))
    self.chat_template: str | None = file.get("tokenizer.chat_template")
    self._files = {"tokenizer.json": self._tokenizer.to_str(pretty=False).encode()}
    self.fingerprint = fingerprint_of(self.kind, self.end_of_text_id, self._files)

  def encode(self, text: str, *, use_special_tokens: bool = False) -> list[int]:
    """Returns the ids of a text, nothing added.

    Args:
      text: what to encode.
      use_special_tokens: whether "<|im_start|>" and its like, spelled in the text,
        become their ids (a rendered chat) or are text as any other (a user's words).
    """
    self._tokenizer.encode_special_tokens = not use_special_tokens
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], *, use_special_tokens: bool = False) -> str:
    """Returns the text of ids; special tokens give nothing unless asked for."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not use_special_tokens)

  def token_bytes(self) -> list[bytes | None]:
    """Returns the UTF-8 bytes that each id spells inside a text; None for special ids."""
    spelled = bytes_of_library_ids(self._tokenizer)
    spelled += [None] * (self.vocab_size - len(spelled))
    spelled[self.end_of_text_id] = None
    return spelled

  def render_chat(
    self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True, **variables
  ) -> str:
    """Writes a conversation as the text the model was trained on.

    Args:
      messages: dictionaries with "role" ("system", "user", "assistant") and "content".
      add_generation_prompt: whether to open the assistant's turn at the end.
      **variables: further variables that the template knows (tools, dates).

    Raises:
      ValueError: the file has no template, or the template refuses the messages.
    """
    if self.chat_template is None:
      raise ValueError("the GGUF file carries no chat template (tokenizer.chat_template)")
    return render_chat(
      self.chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      bos_token=self._token(self.begin_of_text_id),
      eos_token=self._token(self.end_of_text_id),
      **variables,
    )

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a folder that `nr.data.tokenizers.load_tokenizer` reads (without the chat template)."""
    save_files(path, self.kind, self.end_of_text_id, self.fingerprint, self._files)

  def _token(self, index: int | None) -> str:
    return "" if index is None else self._tokens[index]


def _build(file: GgufFile, tokens: list[str]) -> Any:
  """Returns a `tokenizers.Tokenizer` made from the metadata."""
  try:
    import tokenizers
    from tokenizers import decoders, models
  except ImportError as error:
    raise ImportError("the tokenizer in a GGUF file needs `tokenizers`: pip install nr[text]") from error
  kind = file.require("tokenizer.ggml.model")
  if kind != "gpt2":
    raise ValueError(f"{file.path}: tokenizer.ggml.model {kind!r} is not read, only 'gpt2' (byte-level BPE)")
  merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges")]
  tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  tokenizer.pre_tokenizer = _pre_tokenizer(file.get("tokenizer.ggml.pre", "default"), file.path)
  tokenizer.decoder = decoders.ByteLevel()
  types = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
  for token, kind in zip(tokens, types, strict=True):
    if kind in (_CONTROL, _USER_DEFINED):
      added = tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
      (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
  return tokenizer


def _pre_tokenizer(name: str, path: pathlib.Path) -> Any:
  from tokenizers import Regex
  from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

  if name not in PRE_TOKENIZERS:
    known = ", ".join(PRE_TOKENIZERS)
    raise ValueError(f"{path}: tokenizer.ggml.pre {name!r} is not known; known are {known}")
  digits_alone, split = PRE_TOKENIZERS[name]
  steps = [Digits(individual_digits=True)] if digits_alone else []
  if split is not None:
    steps.append(Split(Regex(split), behavior="isolated"))
  return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=split is None)])
