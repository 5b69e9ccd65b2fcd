"""lm-evaluation-harness with our model and with its own of `transformers`, on the same weights."""

import pathlib
import re

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'nr[harness]'")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from nr.evaluation import harness  # noqa: E402

pytestmark = pytest.mark.oracle
TASKS = pathlib.Path(__file__).parents[2] / "configs" / "harness"
TEXT = "The committee met on Tuesday, and its report was read aloud; nobody asked for a vote. "


@pytest.fixture(scope="module")
def models(nr_data, tmp_path_factory):
  """A random GPT-2 of 48 positions with GPT-2's own tokenizer, saved; both models of it."""
  import gzip

  from tokenizers import ByteLevelBPETokenizer

  folder = tmp_path_factory.mktemp("gpt2")
  for name, target in (("gpt2_vocab.json", "vocab.json"), ("gpt2_merges.txt", "merges.txt")):
    (folder / target).write_bytes(gzip.decompress((nr_data / "tokenizers" / f"{name}.gz").read_bytes()))
  tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
  tokenizer.add_special_tokens(["<|endoftext|>"])
  end = "<|endoftext|>"
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._tokenizer, eos_token=end, bos_token=end, clean_up_tokenization_spaces=False
  )
  fast.pad_token = end
  fast.save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3)
  transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
  for name in ("vocab.json", "merges.txt"):
    (folder / name).unlink()
  theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
  return theirs, harness.HarnessModel(str(folder), batch_size=4)


def ask(model, kind, arguments):
  instances = [
    Instance(request_type=kind, doc={}, arguments=each, idx=place) for place, each in enumerate(arguments)
  ]
  return getattr(model, kind)(instances)


def test_log_likelihoods(models):
  theirs, ours = models
  pairs = [
    ("The committee met", " on Tuesday"),
    ("The committee met ", "on Tuesday"),
    ("", "The committee"),
    ("a\n", "\nb"),
    (TEXT * 5, " adjourned at noon"),
    ("naïve", " café 東京"),
  ]
  expected, found = ask(theirs, "loglikelihood", pairs), ask(ours, "loglikelihood", pairs)
  for (log_prob, is_greedy), (our_log_prob, our_is_greedy) in zip(expected, found, strict=True):
    assert our_log_prob == pytest.approx(log_prob, abs=1e-4)
    assert our_is_greedy == is_greedy


def test_rolling_log_likelihoods(models):
  theirs, ours = models
  texts = [("short",), (TEXT * 2,), (TEXT * 7,)]
  expected, found = ask(theirs, "loglikelihood_rolling", texts), ask(ours, "loglikelihood_rolling", texts)
  assert found == pytest.approx(expected, abs=1e-3)  # sums of up to 130 tokens, each near 15 nats


def test_greedy_texts(models):
  theirs, ours = models
  # One continuation that is cut, to know a text that it holds.
  (whole,) = ask(ours, "generate_until", [(TEXT, {"until": [], "max_gen_toks": 12})])
  stop = re.search(r"[A-Za-z]{3}", whole[len(whole) // 3 :]).group()
  contexts = [TEXT, "The", TEXT * 6, "\n\nQuestion: why?\nAnswer:"]
  for settings in ({"until": [stop], "max_gen_toks": 12}, {"until": ["\n\n", "?"], "max_gen_toks": 7}):
    asked = [(context, dict(settings)) for context in contexts]
    # One context at a time: their batch is padded on the left, where GPT-2's positions are learned.
    expected = [ask(theirs, "generate_until", [(context, dict(settings))])[0] for context, _ in asked]
    assert ask(ours, "generate_until", asked) == expected
  assert stop not in ask(ours, "generate_until", [(TEXT, {"until": stop, "max_gen_toks": 12})])[0]


@pytest.mark.slow
def test_tasks_of_questions_give_the_same_answers(models, nr_data, monkeypatch):
  monkeypatch.setenv("NR_DATA", str(nr_data))
  names = sorted(
    f"choice_{path.stem}" for path in (TASKS / "choice").glob("[!_]*.yaml") if path.stem != "all"
  )
  settings = dict(tasks=names, limit=3, bootstrap_iters=0, batch_size=4)
  answers = []
  for model in models:
    results = simple_evaluate(
      model=model, task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), **settings
    )
    answers.append(results)
  theirs, ours = answers
  assert len(names) == 7 and set(ours["results"]) >= set(names)
  for name in names:
    assert ours["results"][name]["acc,none"] == theirs["results"][name]["acc,none"]
    for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
      assert one["arguments"] == other["arguments"]
      log_probs = [[float(answer[0][0]) for answer in each["resps"]] for each in (one, other)]
      assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-3)


def test_the_name_is_known_once_registered():
  from lm_eval.api.registry import get_model

  harness.register()
  harness.register()
  assert get_model("nr") is harness.HarnessModel
  assert get_model("hf") is HFLM  # the others are still there
