"""Preference losses against TRL, live: its numbers are still the committed ones, and ours are the same."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra [oracles])")
pytest.importorskip("trl", reason="needs trl (extra [oracles])")

from nr.data.examples import LengthLimits, PlainText  # noqa: E402
from nr.data.labelled_responses import LabelledResponse, encode_labelled  # noqa: E402
from nr.data.unpaired_batches import unpaired_batches  # noqa: E402
from tests.data.byte_tokenizer import ByteTokenizer  # noqa: E402
from tests.golden import make_trl_goldens  # noqa: E402
from tests.objectives import trl_cases  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def theirs():
  return make_trl_goldens.compute(make_trl_goldens.inputs())


@pytest.mark.parametrize("name", trl_cases.NAMES)
def test_ours_is_theirs(theirs, name):
  trl_cases.check(name, theirs[name])


def test_the_committed_numbers_are_theirs(theirs):
  for name, case in trl_cases.GOLDEN["cases"].items():
    np.testing.assert_allclose(case["loss"], theirs[name]["loss"], rtol=1e-6)
    np.testing.assert_allclose(case["gradient"], theirs[name]["gradient"], atol=1e-6)


class _Bytes:
  """As much of a tokenizer as TRL asks for: the bytes of a text, "\\n" for its end."""

  eos_token, pad_token_id = "\n", 0

  def __call__(self, text):
    return {"input_ids": list(text.encode())}

  def decode(self, ids):
    return bytes(ids).decode()


def test_mismatched_sequences_are_those_of_trl():
  """The batch that KTOTrainer's own preparation and collator make, prompts with their and with other responses."""
  datasets = pytest.importorskip("datasets", reason="needs datasets (comes with trl)")
  from trl import KTOTrainer
  from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

  records = [
    dict(prompt=f"ask {'abcdef'[i]} ", completion="yes" * (1 + i % 3), label=i % 2 == 0) for i in range(6)
  ]
  stand_in = SimpleNamespace(_tokenizer=_Bytes(), calculate_KL=True)
  settings = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=3)
  settings.desirable_weight = settings.undesirable_weight = 1.0
  stand_in.desirable_weight = stand_in.undesirable_weight = 1.0
  dataset = datasets.Dataset.from_list(records)
  prepared = list(KTOTrainer._prepare_dataset(stand_in, dataset, _Bytes(), settings, "train"))
  collate = DataCollatorForUnpairedPreference(pad_token_id=0)

  class Lines(ByteTokenizer):
    end_of_text_id = 10

    def __init__(self):
      self.vocab_size = 256

  labelled = [
    LabelledResponse(str(i), each["prompt"], each["label"], each["completion"])
    for i, each in enumerate(records)
  ]
  encoded = encode_labelled(labelled, PlainText(Lines()), LengthLimits(32))
  ours = unpaired_batches(encoded.examples, 3, (32,), seed=None)
  for start, batch in zip((0, 3), ours):
    theirs = {name: value.numpy() for name, value in collate(prepared[start : start + 3]).items()}
    for number, prefix in enumerate(("", "KL_")):
      ids, mask = theirs[f"{prefix}input_ids"], theirs[f"{prefix}completion_mask"]
      np.testing.assert_array_equal(batch["tokens"][:, number, : ids.shape[1]], ids)
      np.testing.assert_array_equal(batch["weights"][:, number, : ids.shape[1] - 1], mask[:, 1:])
      assert not batch["tokens"][:, number, ids.shape[1] :].any()
    np.testing.assert_array_equal(batch["is_desirable"][:, 0, 0], theirs["label"])
