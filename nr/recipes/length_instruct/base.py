"""Stage `base`: the model that every arm begins from, one a seed.

In the toy world it is trained on the world's answers. A given checkpoint is copied into
the run, fine-tuned first where answers to learn are named (`base.responses`).
"""

import pathlib
from typing import Any

import jax

from nr.data.bad_records import Quarantine
from nr.data.example_batches import padded_batches
from nr.data.examples import Response, encode_responses
from nr.data.json_lines import read_json_lines
from nr.data.preferences import freeze_prompt
from nr.generators.checkpoints import Checkpoint
from nr.recipes.languages import Language, checkpoint_language, keep_language
from nr.recipes.length_instruct import settings
from nr.recipes.policies import open_base
from nr.recipes.saved_models import keep_model
from nr.recipes.sections import training_config, transformer_spec
from nr.recipes.stages import Artifact, StageContext
from nr.training.loop import train
from nr.training.next_token import next_token_method
from nr.training.policy import full_policy

RESPONSES_SCHEMA = {"id": "str", "prompt": "object", "response": "str"}


def run(context: StageContext) -> Artifact:
  """Trains or copies the model of every seed."""
  config = context.config
  checkpoint = None if settings.is_toy(config) else open_base(config.base)
  if checkpoint is None:
    language = settings.toy_language(config)
  else:
    language = checkpoint_language(checkpoint, config.data.chat_template)
  return {
    "seeds": list(config.seeds),
    **keep_language(context, language),
    "models": {str(seed): _one(context, language, checkpoint, seed) for seed in config.seeds},
  }


def _one(context: StageContext, language: Language, checkpoint: Checkpoint | None, seed: int) -> Artifact:
  config, directory = context.config, context.directory / f"seed{seed}"
  responses = _responses(config, seed)
  if checkpoint is None:
    spec = transformer_spec(config.base.model, language.tokenizer.vocab_size, config.data.max_length)
    method = next_token_method(spec, name="base")
  else:
    spec, params = checkpoint.spec, checkpoint.network.params
    if responses is None:
      return keep_model(context, directory, spec, params, language.tokenizer.fingerprint)
    method = next_token_method(full_policy(spec, params), name="base")
  encoded = encode_responses(responses, language.format, settings.length_limits(config))
  training = training_config(config.base.train, seed)
  batches = padded_batches(
    encoded.examples, training.batch_size, settings.encoded_lengths(config), seed=training.seed
  )
  result = train(training, method, batches, workdir=directory)
  params = jax.tree.map(lambda leaf: leaf.astype(spec.param_dtype), result.state.params)
  return keep_model(context, directory, spec, params, language.tokenizer.fingerprint, result.summary)


def _responses(config: Any, seed: int) -> list[Response] | None:
  """Returns what the model is trained on first, None where it is taken as it is."""
  if settings.is_toy(config):
    return list(
      settings.world_of(config).corpus(config.base.examples, config.seed + seed, settings.lift_spec(config))
    )
  if not config.base.responses:
    return None
  lines = read_json_lines(pathlib.Path(config.base.responses), RESPONSES_SCHEMA, Quarantine())
  return [Response(each["id"], freeze_prompt(each["prompt"]), each["response"]) for _, each in lines]
