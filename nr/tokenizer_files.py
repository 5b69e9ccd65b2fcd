"""What kinds of tokenizers share: the folder they are saved in, and the bytes that their ids spell."""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

SETTINGS_FILE = "nr_tokenizer.json"


def fingerprint_of(kind: str, end_of_text_id: int, files: Mapping[str, bytes]) -> str:
  """Returns the sha256 (hex) over the kind, the end-of-text id and the defining files."""
  digest = hashlib.sha256(f"{kind}\0{end_of_text_id}\0".encode())
  for name in sorted(files):
    digest.update(f"{name}\0{len(files[name])}\0".encode())
    digest.update(files[name])
  return digest.hexdigest()


def save_files(
  path: str | pathlib.Path, kind: str, end_of_text_id: int, fingerprint: str, files: Mapping[str, bytes]
) -> None:
  """Writes the defining files and the settings of a tokenizer into a folder."""
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)
  settings = {"kind": kind, "end_of_text_id": end_of_text_id, "fingerprint": fingerprint}
  (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@functools.cache
def byte_of_character() -> dict[str, int]:
  """Returns the byte behind each character of byte-level BPE's pieces.

  Printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on, in
  order: GPT-2's table (bytes_to_unicode in its encoder.py).
  """
  itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in itself]
  return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_library_ids(tokenizer: Any) -> list[bytes | None]:
  """Returns what each id of a `tokenizers.Tokenizer` spells inside a text; None for special ones and gaps.

  Read off its decoder: byte-level, or SentencePiece-like (a mark for the space,
  and pieces "<0x0A>" for bytes where it falls back to them).

  Raises:
    ValueError: another decoder, under which ids have no bytes of their own.
  """
  decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": None}
  steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
  kinds = {step["type"] for step in steps}
  spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
  spaces += [
    step["pattern"].get("String") for step in steps if step["type"] == "Replace" and step["content"] == " "
  ]

  def spell(piece: str) -> bytes:
    if "ByteLevel" in kinds:
      table = byte_of_character()
      return b"".join(
        bytes([table[character]]) if character in table else character.encode("utf-8") for character in piece
      )
    byte = BYTE_PIECE.fullmatch(piece) if "ByteFallback" in kinds else None
    if byte:
      return bytes([int(byte[1], 16)])
    for mark in filter(None, spaces):
      piece = piece.replace(mark, " ")
    return piece.encode("utf-8")

  if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
    raise ValueError(
      f"the ids of a tokenizer with decoder {decoder['type']} spell no bytes of their own; "
      "use a byte-level or SentencePiece-like one"
    )
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  spelled: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
  added = tokenizer.get_added_tokens_decoder()
  for piece, id in vocabulary.items():
    if id not in added:
      spelled[id] = spell(piece)
    elif not added[id].special:
      spelled[id] = added[id].content.encode("utf-8")
  return spelled
