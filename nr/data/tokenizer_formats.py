"""Other people's tokenizers: byte-level BPE (GPT-2's files, tokenizer.json) and llama2.c's vocabulary."""

import gzip
import heapq
import json
import pathlib
import struct
from collections.abc import Sequence

from nr.data.bad_records import DataError
from nr.data.tokenizers import END_OF_TEXT, Tokenizer
from nr.data.word_tokenizer import WORDS_FILE, load_words
from nr.tokenizer_files import bytes_of_library_ids, fingerprint_of, save_files

# Pieces that end a document in the families in use, most specific first.
END_OF_TEXT_PIECES = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>")


def load(path: pathlib.Path, end_of_text: int | str | None = None) -> Tokenizer:
  """Loads a tokenizer from a folder or file, by what it holds.

  Raises:
    DataError: a file or folder of unknown kind, or damaged files.
  """
  if path.is_dir():
    if (path / "tokenizer.json").is_file():
      return JsonTokenizer(_read(path / "tokenizer.json"), end_of_text)
    if (path / WORDS_FILE).is_file():
      return load_words(_read(path / WORDS_FILE))
    vocab, merges = _find(path, "vocab.json"), _find(path, "merges.txt")
    if vocab and merges:
      return ByteLevelBPETokenizer(_read(vocab), _read(merges), end_of_text)
    if _find(path, "tokenizer.bin"):
      return Llama2CTokenizer(_read(_find(path, "tokenizer.bin")))
  elif path.name.endswith((".json", ".json.gz")):
    return JsonTokenizer(_read(path), end_of_text)
  elif path.suffix == ".bin":
    return Llama2CTokenizer(_read(path))
  raise DataError(
    f"tokenizer.path={str(path)!r} holds no tokenizer that is known; give a SentencePiece .model, "
    "a tokenizer.json, llama2.c's .bin, or a folder with tokenizer.model, tokenizer.json, words.json, or "
    "*vocab.json and *merges.txt (.gz too)"
  )


def _find(folder: pathlib.Path, ending: str) -> pathlib.Path | None:
  """Returns the one file of a folder whose name ends so, with .gz or without."""
  found = sorted(path for path in folder.iterdir() if path.name.endswith((ending, ending + ".gz")))
  if len(found) > 1:
    raise DataError(
      f"{folder} holds several files that end in {ending}: {', '.join(p.name for p in found)}; keep one"
    )
  return found[0] if found else None


def _read(path: pathlib.Path) -> bytes:
  """Returns the content of a file, decompressed where it is gzip."""
  content = path.read_bytes()
  return gzip.decompress(content) if path.suffix == ".gz" else content


def _library():
  """Imports the library `tokenizers`. Raises DataError naming the extra that brings it."""
  try:
    import tokenizers
  except ImportError as error:
    raise DataError("byte-level BPE needs the library tokenizers: pip install 'nr[text]'") from error
  return tokenizers


class _LibraryTokenizer:
  """What both kinds that run on the library `tokenizers` share."""

  kind: str

  def __init__(self, tokenizer, files: dict[str, bytes], end_of_text: int | str | None):
    self._tokenizer, self._files = tokenizer, files
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    if end_of_text is None:
      end_of_text = next((piece for piece in END_OF_TEXT_PIECES if piece in vocabulary), "")
    if isinstance(end_of_text, str):
      if end_of_text not in vocabulary:
        raise DataError(
          f"end_of_text={end_of_text!r} is not in the vocabulary; name the piece that ends a document"
        )
      end_of_text = vocabulary[end_of_text]
    if not 0 <= end_of_text < self.vocab_size:
      raise DataError(f"end_of_text={end_of_text} is no id; give one in 0..{self.vocab_size - 1}")
    self.end_of_text_id = end_of_text
    self.fingerprint = fingerprint_of(self.kind, self.end_of_text_id, files)

  def encode(self, text: str, *, use_special_tokens: bool = False) -> list[int]:
    """Returns the ids of a text, nothing added. Raises DataError for lone surrogates.

    Args:
      text: what to encode.
      use_special_tokens: whether "<|im_start|>" and its like, spelled in the text,
        become their ids (a rendered chat) or are text as any other (a user's words).
    """
    self._tokenizer.encode_special_tokens = not use_special_tokens
    try:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    except UnicodeEncodeError as error:
      raise DataError(
        f"text holds a lone surrogate at character {error.start}, which UTF-8 cannot write; correct the text"
      ) from error

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; special ids such as end of text give nothing."""
    return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

  def token_bytes(self) -> list[bytes | None]:
    """Returns the UTF-8 bytes that each id spells inside a text; None for special ids.

    Raises:
      DataError: the tokenizer's decoder gives ids no bytes of their own.
    """
    try:
      spelled = bytes_of_library_ids(self._tokenizer)
    except ValueError as error:
      raise DataError(str(error)) from error
    spelled[self.end_of_text_id] = None
    return spelled

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the defining files, decompressed, and the settings into a folder."""
    save_files(path, self.kind, self.end_of_text_id, self.fingerprint, self._files)


class ByteLevelBPETokenizer(_LibraryTokenizer):
  """GPT-2's byte-level BPE from its two files, in its "ordinary" encoding.

  Args:
    vocab: JSON object from piece to id.
    merges: one merge a line, possibly under a "#version" line.
    end_of_text: piece or id; None to look for the usual ones.
  """

  kind = "byte_level_bpe"

  def __init__(self, vocab: bytes, merges: bytes, end_of_text: int | str | None = None):
    library = _library()
    try:
      pieces = json.loads(vocab)
      lines = [
        line for line in merges.decode("utf-8").split("\n") if line and not line.startswith("#version")
      ]
      pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
      tokenizer = library.Tokenizer(library.models.BPE(vocab=pieces, merges=pairs))
    except Exception as error:  # the library raises plain Exception
      raise DataError(
        f"not GPT-2's vocabulary and merges ({error}); give vocab.json and merges.txt"
      ) from error
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    special = [piece for piece in (END_OF_TEXT,) if piece in pieces]
    tokenizer.add_special_tokens(special)
    super().__init__(tokenizer, {"vocab.json": vocab, "merges.txt": merges}, end_of_text)


class JsonTokenizer(_LibraryTokenizer):
  """Any tokenizer.json of the library `tokenizers`.

  Lossless where the file's own normaliser and decoder are; nothing is added.
  """

  kind = "tokenizer_json"

  def __init__(self, content: bytes, end_of_text: int | str | None = None):
    library = _library()
    try:
      tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
      raise DataError(
        f"not a tokenizer.json ({error}); give one, or a folder of vocab.json and merges.txt"
      ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    super().__init__(tokenizer, {"tokenizer.json": content}, end_of_text)


class Llama2CTokenizer:
  """llama2.c's tokenizer file: int32 longest piece; then float32 score, int32 size, bytes a piece.

  Encodes as llama2.c does: a space in front, single characters, unknown ones
  spelled in bytes (ids 3 .. 258), then the best-scored neighbours merged first.

  Args:
    content: the file.

  Raises:
    DataError: the file ends inside a piece, or has too few of them.
  """

  kind = "llama2c"
  begin_id, end_of_text_id, first_byte_id = 1, 2, 3

  def __init__(self, content: bytes):
    pieces, scores, offset = [], [], 4
    while offset < len(content):
      if offset + 8 > len(content):
        raise DataError(f"llama2.c tokenizer ends inside piece {len(pieces)}; copy the file again")
      score, size = struct.unpack_from("<fi", content, offset)
      piece = content[offset + 8 : offset + 8 + size]
      if size < 0 or len(piece) != size:
        raise DataError(f"llama2.c tokenizer ends inside piece {len(pieces)}; copy the file again")
      pieces.append(piece)
      scores.append(score)
      offset += 8 + size
    if len(pieces) < 259:
      raise DataError(
        f"llama2.c tokenizer has {len(pieces)} pieces, fewer than the 259 of bytes and control ids"
      )
    self._content, self._pieces, self._scores = content, pieces, scores
    self._ids = {piece: id for id, piece in reversed(list(enumerate(pieces))) if id >= self.first_byte_id}
    self.vocab_size = len(pieces)
    self.fingerprint = fingerprint_of(self.kind, self.end_of_text_id, {"tokenizer.bin": content})

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; [] for "", else as if a space stood in front of it."""
    ids = []
    for character in " " + text if text else "":
      spelled = character.encode("utf-8")
      known = self._ids.get(spelled)
      ids += [known] if known is not None else [byte + self.first_byte_id for byte in spelled]
    return self._merge(ids)

  def _merge(self, ids: list[int]) -> list[int]:
    """Merges neighbours, best score first and leftmost among equals, until none can be."""
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    queue: list[tuple[float, int, int, int, int]] = []

    def offer(left: int, right: int) -> None:
      if left < 0 or right >= len(ids):
        return
      merged = self._ids.get(self._pieces[ids[left]] + self._pieces[ids[right]])
      if merged is not None:
        heapq.heappush(queue, (-self._scores[merged], left, ids[left], ids[right], merged))

    for place in range(len(ids) - 1):
      offer(place, place + 1)
    while queue:
      _, left, first, second, merged = heapq.heappop(queue)
      right = after[left] if ids[left] >= 0 else len(ids)
      if right >= len(ids) or ids[left] != first or ids[right] != second:
        continue  # one of the two was merged meanwhile
      ids[left], ids[right] = merged, -1
      after[left] = after[right]
      if after[left] < len(ids):
        before[after[left]] = left
      offer(before[left], left)
      offer(left, after[left])
    return [id for id in ids if id >= 0]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids without the space in front; control ids give nothing."""
    spelled = b"".join(self._bytes(int(id)) for id in ids)
    return spelled.removeprefix(b" ").decode("utf-8", "replace")

  def _bytes(self, id: int) -> bytes:
    """Returns the bytes of one id."""
    if id < self.first_byte_id:
      return b""
    byte = id - self.first_byte_id
    return bytes([byte]) if byte < 256 else self._pieces[id]

  def token_bytes(self) -> list[bytes | None]:
    """Returns the bytes that each id spells inside a text; None for control ids.

    The first token of a text spells a space that `decode` takes off.
    """
    return [self._bytes(id) or None for id in range(self.vocab_size)]

  def save(self, path: str | pathlib.Path) -> None:
    """Writes tokenizer.bin and the settings into a folder."""
    save_files(path, self.kind, self.end_of_text_id, self.fingerprint, {"tokenizer.bin": self._content})
