import pytest

from nr.data.bad_records import DataError
from nr.data.tokenizers import Tokenizer, load_tokenizer
from nr.data.word_tokenizer import WORDS_FILE, WordTokenizer

WORDS = ["the", "cat", "sat", "limit_5", "naïve", "\n\n"]


def test_words_are_tokens_and_come_back():
  tokenizer = WordTokenizer(WORDS)
  assert isinstance(tokenizer, Tokenizer)
  text = "limit_5 the naïve cat \n\n sat"
  ids = tokenizer.encode(text)
  assert ids == [4, 1, 5, 2, 6, 3]
  assert tokenizer.decode(ids + [tokenizer.end_of_text_id]) == text
  assert tokenizer.encode("") == [] and tokenizer.decode([0]) == ""
  assert tokenizer.vocab_size == 7
  spelled = tokenizer.token_bytes()
  assert spelled[0] is None and b"".join(spelled[id] for id in ids).decode() == " " + text


def test_unknown_words_are_named():
  tokenizer = WordTokenizer(WORDS)
  with pytest.raises(DataError, match="'catt'.*did you mean 'cat'"):
    tokenizer.encode("the catt")
  for text in ("the  cat", " the", "the ", "the\ncat"):
    with pytest.raises(DataError):
      tokenizer.encode(text)
  with pytest.raises(DataError, match="id 7"):
    tokenizer.decode([7])


@pytest.mark.parametrize("words", [[], "the", ["a", "a"], ["a b"], [""], ["a", 3]])
def test_bad_lists_are_refused(words):
  with pytest.raises(DataError, match="words"):
    WordTokenizer(words)


def test_saved_and_loaded(tmp_path):
  tokenizer = WordTokenizer(WORDS)
  tokenizer.save(tmp_path / "words")
  loaded = load_tokenizer(tmp_path / "words")
  assert loaded.fingerprint == tokenizer.fingerprint and loaded.words == tokenizer.words
  assert WordTokenizer(WORDS[::-1]).fingerprint != tokenizer.fingerprint
  path = tmp_path / "words" / WORDS_FILE
  path.write_bytes(path.read_bytes().replace(b"cat", b"dog"))
  with pytest.raises(DataError, match="changed"):
    load_tokenizer(tmp_path / "words")
  path.write_text("{", encoding="utf-8")
  with pytest.raises(DataError, match=WORDS_FILE):
    load_tokenizer(tmp_path / "words")
