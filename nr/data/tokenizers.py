"""Tokenizers behind one protocol: text to token ids and back, with a fingerprint.

SentencePiece is trained here in process, lossless for any Unicode text, or read
from a given model. Byte-level BPE (GPT-2's files, or a tokenizer.json) and
llama2.c's vocabulary live in `tokenizer_formats` and are imported when used.
"""

import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from nr.data.bad_records import DataError
from nr.tokenizer_files import SETTINGS_FILE, fingerprint_of, save_files

END_OF_TEXT = "<|endoftext|>"


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the house knows of a tokenizer.

  Attributes:
    vocab_size: number of ids; ids are 0 .. vocab_size - 1.
    end_of_text_id: id that follows each document and ends generation. Text never
      encodes to it, even text that spells it.
    fingerprint: sha256 (hex) of everything that decides the mapping.
  """

  vocab_size: int
  end_of_text_id: int
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, nothing added in front or behind."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
    ...

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the tokenizer into a folder that `load_tokenizer` reads back."""
    ...


def check_fingerprint(tokenizer: str, artifact: str, what: str) -> None:
  """Refuses an artifact made with another tokenizer.

  Args:
    tokenizer: fingerprint of the tokenizer in use.
    artifact: fingerprint recorded in the artifact.
    what: name of the artifact, for the message.

  Raises:
    DataError: they differ; names both.
  """
  if tokenizer != artifact:
    raise DataError(
      f"{what} was made with tokenizer {artifact}, but the tokenizer in use is {tokenizer}; "
      "make it again with this tokenizer or load that one"
    )


# U+2581 stands for a space inside SentencePiece, so text that holds the character
# itself would come back as a space. It is spelled by its UTF-8 bytes instead.
_SPACE_MARK = "\u2581"


class SentencePieceTokenizer:
  """A SentencePiece model.

  Args:
    model: the serialized model (content of a .model file).
    end_of_text_id: None for the model's own end of sentence.

  Raises:
    DataError: bytes that are no model, or no end of sentence and none given.
  """

  kind = "sentencepiece"

  def __init__(self, model: bytes, end_of_text_id: int | None = None):
    import sentencepiece

    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise DataError(
        f"not a SentencePiece model ({str(error).splitlines()[0]}); give a .model file"
      ) from error
    self.vocab_size = self._processor.vocab_size()
    self.end_of_text_id = self._processor.eos_id() if end_of_text_id is None else end_of_text_id
    if not 0 <= self.end_of_text_id < self.vocab_size:
      raise DataError(
        f"end_of_text_id={self.end_of_text_id} is no id of this SentencePiece model; "
        f"give one in 0..{self.vocab_size - 1}"
      )
    self.fingerprint = fingerprint_of(self.kind, self.end_of_text_id, {"tokenizer.model": model})
    spelled = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode("utf-8")]
    self._space_mark_ids = None if any(map(self._processor.is_unknown, spelled)) else spelled

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, nothing added. Raises DataError for lone surrogates."""
    try:
      if self._space_mark_ids is None or _SPACE_MARK not in text:
        return self._processor.encode(text)
      first, *rest = text.split(_SPACE_MARK)
      ids = self._processor.encode(first)
      for segment in rest:
        ids += self._space_mark_ids + self._processor.encode(segment)
      return ids
    except UnicodeEncodeError as error:
      raise DataError(
        f"text holds a lone surrogate at character {error.start}, which UTF-8 cannot write; correct the text"
      ) from error

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; control ids such as end of text give nothing."""
    return self._processor.decode([int(id) for id in ids])

  def token_bytes(self) -> list[bytes | None]:
    """Returns the UTF-8 bytes that each id spells inside a text; None for control ids and "unknown".

    A model that puts a space in front of a text takes it off again when it decodes:
    there the first piece of a text spells one space more than is seen.
    """
    return [None if id == self.end_of_text_id else self._bytes(id) for id in range(self.vocab_size)]

  def _bytes(self, id: int) -> bytes | None:
    if self._processor.is_control(id) or self._processor.is_unknown(id) or self._processor.is_unused(id):
      return None
    piece = self._processor.id_to_piece(id)
    if self._processor.is_byte(id):
      return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE_MARK, " ").encode("utf-8")

  def save(self, path: str | pathlib.Path) -> None:
    """Writes tokenizer.model and the settings into a folder."""
    files = {"tokenizer.model": self._model}
    save_files(path, self.kind, self.end_of_text_id, self.fingerprint, files)


def train_sentencepiece(
  texts: Iterable[str],
  vocab_size: int,
  *,
  model_type: str = "bpe",
  max_bytes: int = 20_000_000,
  character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
  """Trains a SentencePiece tokenizer in process, lossless and deterministic.

  Byte fallback and the identity normalisation, without added or removed spaces,
  make decode(encode(text)) == text for every text. The same texts give the same
  model, byte for byte. Id 0 is "unknown" (never produced), id 1 end of text.

  Args:
    texts: the training split, in a fixed order.
    vocab_size: number of ids, at least 259 (256 bytes, two control ids, one piece).
    model_type: "bpe" (seconds for 10 MB of text) or "unigram" (about 2 % fewer tokens, ten times slower).
    max_bytes: text beyond so many UTF-8 bytes is not looked at.
    character_coverage: fraction of characters with a piece of their own; the
      others are spelled in bytes.

  Returns:
    The tokenizer, of exactly `vocab_size` ids.

  Raises:
    DataError: no text, or a vocabulary too small or too large for it.
  """
  import sentencepiece

  if vocab_size < 259:
    raise DataError(f"tokenizer.vocab_size={vocab_size} must be at least 259: 256 bytes and the control ids")
  if model_type not in ("unigram", "bpe"):
    raise DataError(f"tokenizer.model_type={model_type!r} must be 'unigram' or 'bpe'")
  sentences = _sentences(texts, max_bytes)
  first = next(sentences, None)
  if first is None:
    raise DataError("there is no text to train a tokenizer on; check corpus.name and the train split")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_chain(first, sentences),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=model_type,
      character_coverage=character_coverage,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      hard_vocab_limit=True,
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      eos_piece=END_OF_TEXT,
      max_sentence_length=_MAX_SENTENCE_BYTES,
      num_threads=1,  # the result must not depend on the machine
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).strip().splitlines()[-1]
    raise DataError(
      f"tokenizer.vocab_size={vocab_size} does not suit this corpus ({reason}); choose a smaller vocabulary "
      "or give more text"
    ) from error
  return SentencePieceTokenizer(model.getvalue())


_MAX_SENTENCE_BYTES = 16_384


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
  """Yields the lines of the texts with their line ends, cut to what the trainer accepts."""
  budget = max_bytes
  for text in texts:
    for line in text.splitlines(keepends=True):
      # A character has at most four bytes, so a quarter of the limit always fits.
      for start in range(0, len(line), _MAX_SENTENCE_BYTES // 4):
        piece = line[start : start + _MAX_SENTENCE_BYTES // 4].replace("\0", "")
        if piece:
          budget -= len(piece.encode("utf-8"))
          if budget < 0:
            return
          yield piece


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
  yield first
  yield from rest


def load_tokenizer(path: str | pathlib.Path, end_of_text: int | str | None = None) -> Tokenizer:
  """Loads a tokenizer from a file or folder.

  Args:
    path: a folder written by `save`; a folder with tokenizer.model,
      tokenizer.json, or vocab and merges files; or a file: a SentencePiece
      .model, a tokenizer.json, or llama2.c's tok*.bin.
    end_of_text: id or piece that ends a document, where the files do not say.

  Raises:
    DataError: nothing there, an unknown kind, or files that no longer have the
      fingerprint they were saved with (both are named).
  """
  from nr.data import tokenizer_formats

  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise DataError(f"tokenizer.path={str(path)!r}: no such file or folder; give a tokenizer file or folder")
  settings = {}
  if (path / SETTINGS_FILE).is_file():
    try:
      settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
      end_of_text = settings["end_of_text_id"]
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(f"{path / SETTINGS_FILE} is damaged ({error!r}); save the tokenizer again") from error
  if path.is_file() and path.suffix == ".model":
    tokenizer = SentencePieceTokenizer(path.read_bytes(), _as_id(path.read_bytes(), end_of_text))
  elif (path / "tokenizer.model").is_file():
    model = (path / "tokenizer.model").read_bytes()
    tokenizer = SentencePieceTokenizer(model, _as_id(model, end_of_text))
  else:
    tokenizer = tokenizer_formats.load(path, end_of_text)
  if settings:
    check_fingerprint(tokenizer.fingerprint, settings["fingerprint"], f"{path} (its files were changed:)")
  return tokenizer


def _as_id(model: bytes, end_of_text: int | str | None) -> int | None:
  """Returns the id of an end-of-text piece of a SentencePiece model, ids and None unchanged."""
  if not isinstance(end_of_text, str):
    return end_of_text
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(model)
  id = processor.piece_to_id(end_of_text)
  if processor.is_unknown(id):
    raise DataError(f"end_of_text={end_of_text!r} is no piece of this SentencePiece model; give its id")
  return id
