"""A chat model, prompts and a config small enough for tests of adaptive decoding on a checkpoint."""

import gzip
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np

from nr.data.tokenizers import load_tokenizer
from nr.interchange.huggingface import save_huggingface
from nr.models import parameters
from nr.models.transformer import TransformerSpec
from nr.recipes.adaptive_decoding import language_model
from nr.training.model_files import build_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chat"
CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs" / "adaptive_decoding.py"
TAUS = (0.0, 1.0)
LONG = " and that is a long story that goes on and on" * 4


def load():
  spec = importlib.util.spec_from_file_location("adaptive_decoding_config", CONFIG_FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CONFIG = load()


def save_tokenizer(folder):
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    shutil.copy(GOLDEN / name, folder / name)
  return load_tokenizer(folder)


def save_talker(folder):
  """Writes a chat model that says " 1", " 2" or ends, whatever it is asked; which of them depends on the last token."""
  folder.mkdir()
  tokenizer = save_tokenizer(folder)
  size = tokenizer.vocab_size + tokenizer.vocab_size % 2
  spec = TransformerSpec.llama(
    vocab_size=size, num_layers=1, model_dim=16, num_heads=2, mlp_dim=16, max_length=512
  )
  params = jax.tree.map(np.array, parameters.split(build_model(spec, jax.random.key(0)))[1])
  random = np.random.default_rng(0)
  said = [tokenizer.encode("1")[-1], tokenizer.encode(" 2")[-1], tokenizer.encode("2")[-1]]
  said.append(tokenizer.encode("<|im_end|>", use_special_tokens=True)[0])
  params["token_embedding"] = random.normal(0, 0.3, (size, 16)).astype(np.float32)
  # What all states have in common; rows of the output head that have it too are what is said.
  params["token_embedding"][:, 0] = 2.0
  params["unembedding"] = random.normal(0, 0.1, (size, 16)).astype(np.float32)
  params["unembedding"][said] = random.normal(0, 0.6, (len(said), 16))
  params["unembedding"][:, 0], params["unembedding"][said, 0] = -1.5, 1.5
  save_huggingface(folder, spec, params)
  return folder


def save_facts(path, count=40, seed=0):
  """Writes questions of two lengths whose answers are 1 or 2, as gzipped JSON lines."""
  random = np.random.default_rng(seed)
  with gzip.open(path, "wt") as stream:
    for number in range(count):
      question = f"What is {seed + number} in the box" + (LONG if number % 2 else "") + "?"
      record = {"question": question, "answer": f"So it is\n#### {random.integers(1, 3)}", "id": f"q{number}"}
      stream.write(json.dumps(record) + "\n")
  return path


def config_of(files, **changes):
  config = CONFIG.get_config("smollm_smoke")
  config.language_model.checkpoint = str(files / "model")
  task = config.tasks.arithmetic.to_dict()
  task.update(
    source="file", train=str(files / "train.jsonl.gz"), test=str(files / "test.jsonl.gz"),
    prompt_field="question", reference_field="answer", reference_marker="####", template="{prompt}",
    max_prompt_tokens=256, max_new_tokens=6,
  )  # fmt: skip
  experiment = config.experiments.two_tasks.to_dict()
  experiment.update(
    families=("facts",),
    values=TAUS,
    level="token",
    num_prompts=16,
    num_test_prompts=8,
    num_samples=4,
    held_out=0.3,
  )
  with config.unlocked():
    config.tasks = {"facts": task}
    config.experiments = {"facts": experiment}
    config.evaluate.baselines = {}
  config.heads.train.update(batch_size=4, progress=False)
  config.heads.train.mesh.data = 1
  config.heads.epochs = 2
  config.evaluate.num_samples = 4
  config.devices.update(prompts_per_call=4, pairs_per_call=4)
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config


def task_of(config, name="facts"):
  opened = language_model.opened_checkpoint(config)
  with language_model.tasks_of(config, opened) as tasks:
    return opened, tasks[name]
