"""Tokenizers: what they encode, what they refuse, and that they stay what they were."""

import gzip
import json

import pytest

from nr.data import tokenizer_formats
from nr.data.bad_records import DataError
from nr.data.tokenizers import (
  SentencePieceTokenizer,
  Tokenizer,
  check_fingerprint,
  load_tokenizer,
  train_sentencepiece,
)

TEXTS = [
  " ".join(
    f"{first}{second}ing {second}{first}ed" for first in "bcdfglmnprst" for second in ("a", "el", "or", "un")
  ),
  "The house stands on a hill.\n\nIt has two  doors and\tone window.\n" * 3,
  "Numbers 1790 to 2026, é and ü.\n" * 5,
]


@pytest.fixture(scope="module")
def trained():
  return train_sentencepiece(TEXTS, 300)


def bytes_to_pieces():
  """GPT-2's printable stand-ins for bytes, written from its published rule."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


@pytest.fixture
def gpt2_style(tmp_path):
  pieces = list(bytes_to_pieces().values()) + ["he", "hel", "Ġw", "<|endoftext|>"]
  (tmp_path / "vocab.json").write_text(json.dumps({piece: id for id, piece in enumerate(pieces)}))
  (tmp_path / "my_merges.txt.gz").write_bytes(gzip.compress("#version: 0.2\nh e\nhe l\nĠ w\n".encode()))
  pytest.importorskip("tokenizers", reason="byte-level BPE needs the extra [text]")
  return load_tokenizer(tmp_path)


def test_training_is_deterministic_and_exact_in_size(trained):
  again = train_sentencepiece(iter(TEXTS), 300)
  assert again.fingerprint == trained.fingerprint and again.vocab_size == 300
  assert train_sentencepiece(TEXTS, 301).fingerprint != trained.fingerprint
  assert isinstance(trained, Tokenizer) and trained.end_of_text_id == 1
  assert train_sentencepiece(TEXTS, 300, model_type="unigram").decode([trained.end_of_text_id]) == ""


def test_text_never_encodes_to_the_control_ids(trained, gpt2_style):
  for tokenizer in (trained, gpt2_style):
    ids = tokenizer.encode("a<|endoftext|>b<unk></s>")
    assert tokenizer.end_of_text_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b<unk></s>"
    assert tokenizer.decode([*ids, tokenizer.end_of_text_id]) == "a<|endoftext|>b<unk></s>"
  assert tokenizer.encode("") == []


@pytest.mark.parametrize(
  "texts, size, message",
  [
    (TEXTS, 100, "vocab_size=100 must be at least 259"),
    (TEXTS, 30_000, "vocab_size=30000 does not suit this corpus.*smaller"),
    ([], 300, "no text to train"),
    (["\0"], 300, "no text to train"),
  ],
)
def test_training_refuses_in_one_line(texts, size, message):
  with pytest.raises(DataError, match=message) as caught:
    train_sentencepiece(texts, size)
  assert "\n" not in str(caught.value)


def test_save_and_load_keep_the_fingerprint(trained, gpt2_style, tmp_path, nr_data):
  llama = load_tokenizer(nr_data / "models/stories260k/tok512.bin")
  for tokenizer in (trained, gpt2_style, llama):
    folder = tmp_path / tokenizer.kind
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("hello world é") == tokenizer.encode("hello world é")
    assert loaded.end_of_text_id == tokenizer.end_of_text_id


def test_changed_files_are_noticed(trained, tmp_path):
  trained.save(tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(TEXTS, 301)._model)
  with pytest.raises(DataError, match=trained.fingerprint):
    load_tokenizer(tmp_path)


def test_damaged_settings_are_named(trained, tmp_path):
  trained.save(tmp_path)
  (tmp_path / "nr_tokenizer.json").write_text("{}")
  with pytest.raises(DataError, match="nr_tokenizer.json is damaged"):
    load_tokenizer(tmp_path)


def test_a_given_model_file_and_its_end_of_text(trained, tmp_path):
  path = tmp_path / "given.model"
  path.write_bytes(trained._model)
  assert load_tokenizer(path).fingerprint == trained.fingerprint
  assert load_tokenizer(path, end_of_text=5).end_of_text_id == 5
  assert load_tokenizer(path, end_of_text="<|endoftext|>").end_of_text_id == 1
  with pytest.raises(DataError, match="'nonsense' is no piece"):
    load_tokenizer(path, end_of_text="nonsense")
  with pytest.raises(DataError, match="end_of_text_id=300 is no id.*0..299"):
    load_tokenizer(path, end_of_text=300)
  with pytest.raises(DataError, match="not a SentencePiece model"):
    SentencePieceTokenizer(b"nonsense")


def test_fingerprints_are_compared_by_name():
  check_fingerprint("a", "a", "labels")
  with pytest.raises(DataError, match="labels was made with tokenizer bbb, but the tokenizer in use is aaa"):
    check_fingerprint("aaa", "bbb", "labels")


def test_byte_level_bpe_merges_by_rank(gpt2_style):
  by_id = [gpt2_style._tokenizer.id_to_token(id) for id in gpt2_style.encode("hello wé")]
  assert by_id == ["hel", "l", "o", "Ġw", "Ã", "©"]
  assert gpt2_style.vocab_size == 260 and gpt2_style.end_of_text_id == 259


def test_gpt2_vocabulary_gives_the_known_ids(nr_data):
  pytest.importorskip("tokenizers", reason="byte-level BPE needs the extra [text]")
  tokenizer = load_tokenizer(nr_data / "tokenizers")
  assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (50257, 50256)
  assert tokenizer.encode("Hello world") == [15496, 995]


def test_tokenizer_json_adds_nothing(gpt2_style, tmp_path):
  library = pytest.importorskip("tokenizers")
  inner = library.Tokenizer.from_str(gpt2_style._tokenizer.to_str())
  inner.post_processor = library.processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 259)]
  )
  path = tmp_path / "other" / "tokenizer.json"
  path.parent.mkdir()
  path.write_text(inner.to_str())
  for place in (path, path.parent):
    loaded = load_tokenizer(place)
    assert loaded.encode("hello <|endoftext|>") == gpt2_style.encode("hello <|endoftext|>")
    assert loaded.end_of_text_id == 259
  with pytest.raises(DataError, match="'</s>' is not in the vocabulary"):
    load_tokenizer(path, end_of_text="</s>")
  path.write_text("{}")
  with pytest.raises(DataError, match="not a tokenizer.json"):
    load_tokenizer(path)


def test_llama2c_reproduces_the_ids_of_a_real_story(nr_data):
  folder = nr_data / "models/stories260k"
  expected = json.loads((folder / "expected.json").read_text())
  tokenizer = load_tokenizer(folder / "tok512.bin")
  ids = expected["greedy_from_bos_tokens"]
  text = expected["greedy_from_bos_text"].removeprefix(" ")
  assert tokenizer.decode(ids) == text and tokenizer.encode(text) == ids[1:]
  with pytest.raises(DataError, match="ends inside piece 511"):
    tokenizer_formats.Llama2CTokenizer((folder / "tok512.bin").read_bytes()[:-1])


def test_ids_spell_the_bytes_of_the_text(trained, gpt2_style, tmp_path):
  text = "The hill\n stands \u65e5\u00e9 2026"
  library = pytest.importorskip("tokenizers")
  pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581hi", "l", "\u00e9"]
  fallback = library.Tokenizer(
    library.models.BPE(
      {piece: id for id, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
  )
  fallback.normalizer = library.normalizers.Replace(" ", "\u2581")
  replace = library.decoders.Replace("\u2581", " ")
  fallback.decoder = library.decoders.Sequence(
    [replace, library.decoders.ByteFallback(), library.decoders.Fuse()]
  )
  fallback.add_special_tokens(["<unk>", "</s>"])
  fallback.add_tokens(["hill"])
  llama_like = tokenizer_formats.JsonTokenizer(fallback.to_str().encode())
  for tokenizer in (trained, gpt2_style, llama_like):
    spelled = tokenizer.token_bytes()
    assert len(spelled) == tokenizer.vocab_size and spelled[tokenizer.end_of_text_id] is None
    assert b"".join(spelled[id] for id in tokenizer.encode(text)).decode() == text
    assert len({piece for piece in spelled if piece and len(piece) == 1}) == 256
  assert llama_like.token_bytes()[0] is None and b"hill" in llama_like.token_bytes()
  fallback.decoder = library.decoders.WordPiece()
  with pytest.raises(DataError, match="decoder WordPiece spell no bytes"):
    tokenizer_formats.JsonTokenizer(fallback.to_str().encode()).token_bytes()


def test_llama2c_ids_spell_the_bytes_of_the_text(nr_data):
  tokenizer = load_tokenizer(nr_data / "models/stories260k/tok512.bin")
  spelled = tokenizer.token_bytes()
  # The space in front is the tokenizer's own.
  assert b"".join(spelled[id] for id in tokenizer.encode("Once \u00e9")).decode() == " Once \u00e9"
  assert spelled[:3] == [None] * 3 and len(spelled) == 512


@pytest.mark.parametrize("name", ["nothing", "file.xyz", "folder"])
def test_what_is_no_tokenizer_is_refused(tmp_path, name):
  (tmp_path / "file.xyz").write_text("x")
  (tmp_path / "folder").mkdir()
  with pytest.raises(DataError, match="tokenizer.path="):
    load_tokenizer(tmp_path / name)
