"""Laws of the data: nothing lost, nothing twice, nothing in the wrong split, text returned as given."""

import random

import numpy as np
import pytest

from nr.data.sources import CorpusSpec, Document
from nr.data.splits import split_documents
from nr.data.token_dataset import write_token_dataset
from nr.data.tokenizers import load_tokenizer, train_sentencepiece
from nr.data.windows import WindowSource, ordered_batches, shuffled_batches

WORDS = [
  a + b + c
  for a in ("un", "pea", "sta", "go")
  for b in ("i", "ver", "tes")
  for c in ("on", "ning", "ce", "s")
]
SPEC = CorpusSpec(validation_fraction=0.3)


@pytest.fixture(scope="module")
def corpus():
  """Documents of real words, some of them copies of others under another id."""
  generator = random.Random(0)
  texts = [" ".join(generator.choices(WORDS, k=generator.randrange(1, 40))) + f" {n}.\n" for n in range(80)]
  found = [Document(f"d{n}", text) for n, text in enumerate(texts)]
  return found + [Document(f"copy{n}", texts[n].replace(" ", "  ") + "\n") for n in range(0, 80, 5)]


@pytest.fixture(scope="module")
def tokenizer(corpus):
  return train_sentencepiece((document.text for document in split_documents(corpus, SPEC, "train")), 300)


@pytest.fixture(scope="module")
def datasets(corpus, tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokens")
  return {
    split: write_token_dataset(folder / split, split_documents(corpus, SPEC, split), tokenizer)
    for split in ("train", "validation")
  }


def random_text(generator):
  """A short text of characters from everywhere in Unicode, white space and marks included."""
  kinds = [
    lambda: chr(generator.randrange(32, 127)),
    lambda: chr(generator.randrange(0x80, 0xD800)),
    lambda: chr(generator.randrange(0xE000, 0x110000)),
    lambda: generator.choice(" \n\t\r\0\u2581\u00a0\u200d\ufeff\ufffd\u0301\u2028"),
    lambda: generator.choice([" the", "<s>", "</s>", "<unk>", "<|endoftext|>", "<0x41>", "  ", "\u2581the"]),
  ]
  return "".join(generator.choice(kinds)() for _ in range(generator.randrange(25)))


def test_decode_undoes_encode_for_any_text(tokenizer, corpus):
  generator = random.Random(1)
  texts = [random_text(generator) for _ in range(1500)] + [document.text for document in corpus]
  for text in texts:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < id < tokenizer.vocab_size and id != tokenizer.end_of_text_id for id in ids)


def test_decode_undoes_encode_for_given_tokenizers(nr_data):
  pytest.importorskip("tokenizers", reason="byte-level BPE needs the extra [text]")
  generator = random.Random(2)
  texts = [random_text(generator) for _ in range(500)]
  for path in ("tokenizers", "models/stories260k/tok512.bin"):
    given = load_tokenizer(nr_data / path)
    for text in texts:
      assert given.decode(given.encode(text)) == text


def test_the_stream_gives_back_every_document(corpus, tokenizer, datasets):
  for split, dataset in datasets.items():
    found = list(split_documents(corpus, SPEC, split))
    assert dataset.document_ids() == [document.id for document in found]
    for index, document in enumerate(found):
      *tokens, last = dataset.document_tokens(index).tolist()
      assert last == tokenizer.end_of_text_id and tokenizer.decode(tokens) == document.text
      assert dataset.document_bytes[index] == len(document.text.encode())


def test_no_validation_document_is_in_training(corpus, tokenizer, datasets):
  """Copies under other names, with other white space, included."""
  words = {}
  for split, dataset in datasets.items():
    texts = [tokenizer.decode(dataset.document_tokens(i)) for i in range(dataset.num_documents)]
    words[split] = {" ".join(text.split()) for text in texts}
  assert words["train"] and words["validation"] and not words["train"] & words["validation"]
  assert sum(dataset.num_documents for dataset in datasets.values()) == len(corpus)


def test_windows_put_end_to_end_are_the_stream(datasets):
  dataset = datasets["train"]
  source = WindowSource(dataset, 16, tail="pad")
  joined = np.concatenate([source[i]["tokens"] for i in range(len(source))])
  np.testing.assert_array_equal(joined[: dataset.num_tokens], dataset.tokens)
  assert not joined[dataset.num_tokens :].any() and len(joined) - dataset.num_tokens < 16
  dropped = WindowSource(dataset, 16)
  assert len(dropped) == dataset.num_tokens // 16


@pytest.mark.parametrize("length", [8, 13, 64])
def test_evaluation_scores_every_token_but_the_first_of_each_window_once(datasets, length):
  dataset = datasets["validation"]
  source = WindowSource(dataset, length, tail="pad", with_documents=True)
  scores = np.zeros(dataset.num_documents)
  targets = []
  for batch in ordered_batches(source, 4):
    scored = batch["weights"] > 0
    targets.append(batch["targets"][scored])
    np.add.at(scores, batch["documents"][scored], 1)
  not_first = np.flatnonzero(np.arange(dataset.num_tokens) % length)
  np.testing.assert_array_equal(np.concatenate(targets), dataset.tokens[not_first])
  expected = np.bincount(dataset.document_of(not_first), minlength=dataset.num_documents)
  np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("length", [8, 13, 64])
def test_windows_that_share_a_token_score_every_token_but_the_very_first_once(datasets, length):
  dataset = datasets["validation"]
  source = WindowSource(dataset, length, tail="pad", overlap=1)
  batches = list(ordered_batches(source, 4))
  targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
  np.testing.assert_array_equal(targets, dataset.tokens[1:])


def test_two_processes_cover_every_window_exactly_once(datasets):
  dataset = datasets["train"]
  places = np.arange(dataset.num_tokens)
  source = WindowSource(dataset, 8, labels=np.stack([places] * 4, axis=1))
  batch = max(size for size in range(2, 41, 2) if len(source) % size == 0 or size == 2)
  epoch = len(source) // batch
  begins = []
  for process in range(2):
    share = shuffled_batches(source, batch, seed=0, epochs=1, process_index=process, process_count=2)
    begins += [step["labels"][:, 0, 0] for step in share]
  begins = np.concatenate(begins)
  assert len(begins) == epoch * batch and len(set(begins)) == len(begins)
  assert set(begins) <= set(range(0, dataset.num_tokens, 8)) and len(source) - len(begins) < batch


@pytest.mark.parametrize("shift", ["none", "sample", "epoch"])
@pytest.mark.parametrize("reset", [False, True])
def test_labels_stay_with_their_tokens_under_shift(datasets, shift, reset):
  """Each label here is the place of its token in the stream."""
  dataset = datasets["train"]
  places = np.arange(dataset.num_tokens)
  source = WindowSource(dataset, 16, labels=np.stack([places] * 4, axis=1), reset_at_documents=reset)
  iterator = iter(shuffled_batches(source, 4, seed=0, shift=shift))
  for _ in range(60):
    batch = next(iterator)
    places_BL = batch["labels"][:, :, 3]
    np.testing.assert_array_equal(dataset.tokens[places_BL], batch["tokens"])
    scored = batch["weights"] > 0
    np.testing.assert_array_equal(dataset.tokens[places_BL[scored] + 1], batch["targets"][scored])
    if reset:
      documents_BL = dataset.document_of(places_BL)
      np.testing.assert_array_equal(np.diff(documents_BL, axis=1), np.diff(batch["segment_ids"], axis=1))
      begins = np.maximum(dataset.document_starts[documents_BL], places_BL[:, :1])
      np.testing.assert_array_equal(batch["positions"], places_BL - begins)
      assert not (scored[:, :-1] & (np.diff(documents_BL, axis=1) > 0)).any()


def test_an_epoch_with_one_common_shift_never_overlaps(datasets):
  dataset = datasets["train"]
  places = np.arange(dataset.num_tokens)
  source = WindowSource(dataset, 8, labels=np.stack([places] * 4, axis=1))
  (batch,) = shuffled_batches(source, len(source), seed=3, epochs=1, shift="epoch")
  starts = np.sort(batch["labels"][:, 0, 0])
  assert (np.diff(starts)[:-1] == 8).all() and np.diff(starts)[-1] <= 8
