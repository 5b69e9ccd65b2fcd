"""Stage `arms`: DPO, R-DPO and LIFT from the same model, one training of each arm a seed."""

from typing import Any

from nr.data.example_batches import padded_batches
from nr.data.examples import encode_pairs
from nr.data.preferences import read_pairs
from nr.recipes.languages import Language
from nr.recipes.length_instruct import augmentation, settings
from nr.recipes.policies import adapter_spec, make_policy, reference_kind, whole_params
from nr.recipes.saved_models import keep_adapter, keep_model
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training.loop import train
from nr.training.preference import preference_method


def run(context: StageContext) -> Artifact:
  """Trains every arm of every seed; those that finished earlier are not trained again."""
  config, language = context.config, settings.language_of(context)
  runs: dict[str, Any] = {}
  for seed in config.seeds if settings.arm_names(config) else ():
    plain = read_pairs(context.path(context.inputs["pairs"]["files"][str(seed)]["path"]))
    limited = read_pairs(context.path(context.inputs["augment"]["files"][str(seed)]["path"]))
    for arm in settings.arm_names(config):
      pairs = augmentation.mixture(plain, limited, config.arms[arm].mix)
      runs[run_name(arm, seed)] = {"arm": arm, "seed": seed, **_train(context, language, arm, seed, pairs)}
  return {"runs": runs, "arms": settings.arm_names(config), "seeds": list(config.seeds)}


def run_name(arm: str, seed: int) -> str:
  """Returns the folder name of one training."""
  return f"{arm}_seed{seed}"


def _train(context: StageContext, language: Language, arm: str, seed: int, pairs: list) -> Artifact:
  config, directory = context.config, context.directory / run_name(arm, seed)
  base = context.inputs["base"]["models"][str(seed)]
  spec, params = settings.open_model(context, base)
  policy = make_policy(config, spec, params, seed)
  method = preference_method(
    policy,
    settings.preference_spec(config, arm),
    name=arm,
    reference=reference_kind(policy),
    loss_chunk=config.compute.loss_chunk or None,
  )
  encoded = encode_pairs(pairs, language.format, settings.length_limits(config))
  training = training_config(settings.train_section(config, arm), seed)
  batches = padded_batches(
    encoded.examples, training.batch_size, settings.encoded_lengths(config), seed=training.seed
  )
  result = train(training, method, batches, workdir=directory, metadata={"arm": arm})
  params = whole_params(config, policy, result.state.params)
  kept = keep_model(context, directory, spec, params, language.tokenizer.fingerprint, result.summary)
  trained = result.state.params
  adapter = keep_adapter(context, directory, adapter_spec(config), trained, base["fingerprint"])
  left_out = {reason: len(ids) for reason, ids in encoded.report.dropped.items()}
  return {**kept, **adapter, "pairs": encoded.report.kept, "left_out": left_out, "mix": config.arms[arm].mix}
