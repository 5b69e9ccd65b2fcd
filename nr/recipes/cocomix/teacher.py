"""Stage `teacher`: the language model whose activations the concepts are read from.

It is trained here, or `teacher.checkpoint` names one: any that `nr.generators.checkpoints` opens, such as a
Hugging Face GPT-2.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from nr.data.tokenizers import load_tokenizer
from nr.generators.checkpoints import Checkpoint, open_checkpoint
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix import language_model, settings
from nr.recipes.saved_models import keep_model
from nr.recipes.sections import training_config, transformer_spec
from nr.recipes.stages import Artifact, StageContext
from nr.training.next_token import next_token_method


def run(context: StageContext) -> Artifact:
  """Trains the teacher by the common loop, or opens a given one, and scores it on the validation split."""
  config = context.config
  artifact = (opened if config.teacher.checkpoint else trained)(context)
  if jax.process_index():
    return artifact  # the first process alone measures and reports
  batch_size = config.evaluate.batch_size if config.teacher.checkpoint else config.teacher.train.batch_size
  scores = language_model.score_split(context, artifact, "validation", batch_size)
  artifact.update(val_loss=scores.loss(), val_ppl=scores.perplexity(), bits_per_byte=scores.bits_per_byte())
  return artifact


def trained(context: StageContext) -> Artifact:
  """Trains the teacher."""
  config, vocab_size = context.config, context.inputs["tokenizer"]["vocab_size"]
  spec = transformer_spec(config.teacher.model, vocab_size, config.window.length)
  training = training_config(config.teacher.train, config.seed)
  method = next_token_method(spec, name="teacher", loss_chunk=settings.loss_chunk(config))
  return language_model.train_language_model(context, context.directory, method, spec, training)


def opened(context: StageContext) -> Artifact:
  """Opens the given teacher and keeps it in the run, in float32 and with the compute type of `teacher.model`."""
  config, tokenizer = context.config, context.inputs["tokenizer"]["fingerprint"]
  found = open_given(config)
  spec = dataclasses.replace(found.spec, dtype=config.teacher.model.dtype, remat=config.teacher.model.remat)
  artifact = keep_model(context, context.directory, spec, found.network.params, tokenizer)
  return {"checkpoint": config.teacher.checkpoint, **artifact}


def open_given(config: Any) -> Checkpoint:
  """Opens `teacher.checkpoint` and checks that it is what the config says, and reads the run's tokens.

  Raises:
    ValueError: no plain transformer, other sizes, too few positions, another tokenizer; names the fields
      and what to set them to.
    CheckpointError, DataError: damaged files.
  """
  model, where = config.teacher.model, f"teacher.checkpoint={config.teacher.checkpoint!r}"
  if not pathlib.Path(config.teacher.checkpoint).expanduser().exists():
    raise ValueError(f"{where}: no such file or folder")
  found = open_checkpoint(config.teacher.checkpoint)
  if not isinstance(found.spec, TransformerSpec):
    raise ValueError(f"{where} is a {type(found.spec).__name__}; a teacher is a plain transformer")
  wrong = {name: getattr(found.spec, name) for name in ("num_layers", "model_dim")}
  wrong = {name: value for name, value in wrong.items() if model[name] != value}
  if wrong:
    told = ", ".join(f"{name}={value}" for name, value in wrong.items())
    flags = " ".join(f"--config.teacher.model.{name}={value}" for name, value in wrong.items())
    raise ValueError(f"{where} has {told}, which the config says otherwise; set {flags}")
  if found.spec.positions == "learned" and found.spec.max_length < config.window.length:
    raise ValueError(
      f"window.length={config.window.length} is more than the {found.spec.max_length} positions of {where}; shorten it"
    )
  if config.tokenizer.path:
    own = load_tokenizer(config.tokenizer.path)
    if own.fingerprint != found.tokenizer.fingerprint:
      raise ValueError(
        f"tokenizer.path={config.tokenizer.path!r} is not the tokenizer of {where} (fingerprints "
        f"{own.fingerprint[:12]} and {found.tokenizer.fingerprint[:12]}): teacher and students must read the same "
        "tokens; leave tokenizer.path empty to take the teacher's"
      )
  return found
