"""What bytes token ids spell: all that constraints know of a tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# What one id spells; None for a control id (end of text, "unknown", padding).
Bytes = bytes | None


def token_bytes(tokenizer: Any) -> list[Bytes]:
  """Returns what each id of a tokenizer spells inside a text.

  A constraint is over bytes, so a character may be spread over several tokens. A
  tokenizer that begins every text with a space of its own (SentencePiece's dummy
  prefix, llama2.c) takes it off again when it decodes: its tokens still spell it
  here, which is right behind a prompt. Where generation starts the text itself,
  let the constraint begin with a space.

  Args:
    tokenizer: one with a method `token_bytes` (those of nr.data.tokenizers and
      nr.interchange have it); or the list itself, texts allowed in place of bytes.

  Returns:
    For each id its bytes, or None where it spells none.

  Raises:
    ValueError: a tokenizer that does not tell, or a list of something else.
  """
  if hasattr(tokenizer, "token_bytes"):
    spelled = tokenizer.token_bytes()
  elif isinstance(tokenizer, Sequence) and not isinstance(tokenizer, (str, bytes)):
    spelled = tokenizer
  else:
    raise ValueError(
      f"{type(tokenizer).__name__} does not tell what bytes its ids spell: give a tokenizer with a method "
      "token_bytes, or a list with bytes (None for a control id) for each id"
    )
  return [_as_bytes(id, piece) for id, piece in enumerate(spelled)]


def _as_bytes(id: int, piece: Any) -> Bytes:
  if isinstance(piece, str):
    piece = piece.encode("utf-8")
  if piece is not None and not isinstance(piece, bytes):
    raise ValueError(f"token_bytes[{id}]={piece!r}: give bytes, a text, or None for a control id")
  return piece or None


def packed(spelled: Sequence[Bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns all bytes in a row as uint8, and int64 [V] where each id's begin and how many they are."""
  lengths_V = np.array([len(piece or b"") for piece in spelled], np.int64)
  flat = np.frombuffer(b"".join(piece or b"" for piece in spelled), np.uint8)
  return flat, np.cumsum(lengths_V) - lengths_V, lengths_V
