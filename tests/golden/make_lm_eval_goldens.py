"""Writes tests/golden/lm_eval_gpt2.json: log-likelihoods by lm-evaluation-harness and `transformers`.

Run: python tests/golden/make_lm_eval_goldens.py   (needs lm_eval, torch and transformers)

The model is tests/golden/huggingface_gpt2, read by lm_eval's own `hf` model; words w0 .. w17 are ids 1 .. 18, and
id 0 ends a text. Remake the file only when that model or the requests change.
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
PAIRS = [(1, 1), (2, 3), (4, 1), (0, 5), (13, 10), (20, 3), (22, 7), (40, 2), (6, 1), (6, 1), (6, 1)]
TEXTS = [1, 5, 23, 24, 25, 49, 70]


def words(draws, count: int) -> str:
  return " ".join(f"w{number}" for number in draws.integers(0, 18, count))


def make_requests():
  draws = np.random.default_rng(0)
  pairs = []
  for before, behind in PAIRS:
    context, continuation = words(draws, before), words(draws, behind)
    pairs.append((context, f" {continuation}" if context else continuation))
  context = pairs[-1][0]
  pairs += [(context, f" w{number}") for number in range(18)]  # one of them is greedy
  return pairs, [words(draws, count) for count in TEXTS]


def main():
  import transformers
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM
  from tokenizers import Tokenizer, models, pre_tokenizers

  tokenizer = Tokenizer(
    models.WordLevel({"<end>": 0, **{f"w{i}": i + 1 for i in range(18)}}, unk_token="<end>")
  )
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>"
  )
  model = transformers.GPT2LMHeadModel.from_pretrained(FOLDER / "huggingface_gpt2").eval()
  harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=24)

  def ask(kind, arguments):
    instances = [
      Instance(request_type=kind, doc={}, arguments=each, idx=place) for place, each in enumerate(arguments)
    ]
    return getattr(harness, kind)(instances)

  pairs, texts = make_requests()
  found = {
    "loglikelihood": [
      [list(pair), [float(log_prob), bool(is_greedy)]]
      for pair, (log_prob, is_greedy) in zip(pairs, ask("loglikelihood", pairs))
    ],
    "loglikelihood_rolling": [
      [text, float(log_prob)]
      for text, log_prob in zip(texts, ask("loglikelihood_rolling", [(text,) for text in texts]))
    ],
  }
  (FOLDER / "lm_eval_gpt2.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
