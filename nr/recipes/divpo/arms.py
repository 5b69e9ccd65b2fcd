"""Stage `arms`: every arm trains on the pools that it draws itself; one training of each a seed."""

import functools
from collections.abc import Callable
from typing import Any

from nr.recipes.divpo import settings
from nr.recipes.divpo.pairs import make_pairs, pool_rewards
from nr.recipes.divpo.personas import Task
from nr.recipes.languages import Language
from nr.recipes.policies import adapter_spec, make_policy, reference_kind, whole_params
from nr.recipes.round_examples import groups_of, pairs_of
from nr.recipes.sampling_rounds import RoundBatches, read_notes
from nr.recipes.saved_models import keep_adapter, keep_model
from nr.recipes.stages import Artifact, StageContext
from nr.training.group_relative import group_relative_method
from nr.training.loop import train
from nr.training.method import Method
from nr.training.policy import Policy
from nr.training.preference import preference_method


def run(context: StageContext) -> Artifact:
  """Trains every arm of every seed; those that finished earlier are not trained again."""
  config, language = context.config, settings.language_of(context)
  runs = {
    run_name(arm, seed): {"arm": arm, "seed": seed, **_train(context, language, arm, seed)}
    for seed in config.seeds
    for arm in settings.arm_names(config)
  }
  return {"runs": runs, "arms": settings.arm_names(config), "seeds": list(config.seeds)}


def run_name(arm: str, seed: int) -> str:
  """Returns the folder name of one training."""
  return f"{arm}_seed{seed}"


def _train(context: StageContext, language: Language, arm: str, seed: int) -> Artifact:
  config, directory = context.config, context.directory / run_name(arm, seed)
  base = settings.open_model(context, context.inputs["base"]["models"][str(seed)])
  task = settings.task_of(config)
  policy = make_policy(config, base.spec, base.params, seed)
  training = settings.training_of(config, arm, seed)
  method, prepare = _learning(config, arm, policy, task, config.seed + seed)
  rounds = RoundBatches(
    directory / "rounds",
    policy,
    settings.make_generator(config, base.spec, base.params, language, base.fingerprint),
    task.judge(),
    task.prompts(),
    prepare,
    settings.round_spec(config, arm, seed),
    training.batch_size,
    (config.sampling.max_length,),
  )
  result = train(training, method, rounds, workdir=directory, metadata={"arm": arm})
  params = whole_params(config, policy, result.state.params)
  kept = keep_model(context, directory, base.spec, params, language.tokenizer.fingerprint, result.summary)
  adapter = keep_adapter(context, directory, adapter_spec(config), result.state.params, base.fingerprint)
  return {**kept, **adapter, "rounds": read_notes(directory / "rounds")}


def _learning(config: Any, arm: str, policy: Policy, task: Task, seed: int) -> tuple[Method, Callable]:
  """Returns the method of an arm, and how pools become what it learns from."""
  selection, sync_every = settings.selection_spec(config, arm), config.arms[arm].sync_reference_every
  kind = "synced" if sync_every else reference_kind(policy)
  shared = dict(name=arm, loss_chunk=config.compute.loss_chunk or None)
  if selection.method == "grpo":
    spec = settings.group_spec(config, arm)
    reference = dict(reference=kind, sync_every=sync_every) if spec.kl_weight else {}
    rewards = functools.partial(pool_rewards, spec=selection, task=task)
    return group_relative_method(policy, spec, **shared, **reference), groups_of(spec, rewards)
  loss = settings.preference_spec(config, arm)
  method = preference_method(policy, loss, reference=kind, sync_every=sync_every, **shared)
  return method, pairs_of(functools.partial(make_pairs, spec=selection, task=task, seed=seed))
