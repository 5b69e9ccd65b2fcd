"""Stage `pools`: N scored responses to every training prompt, their temperatures drawn at random."""

from typing import Any

import numpy as np

from nr.data.pools import Pool, PoolSample, write_pools
from nr.generation.adaptive_decoding import DrawnSetting
from nr.generation.stopping import FINISH_REASONS, LENGTH, STOP_ID
from nr.recipes.adaptive_decoding import families, language_model, settings
from nr.recipes.adaptive_decoding.sampling import Written, with_head, write
from nr.recipes.stages import Artifact, StageContext


def run(context: StageContext) -> Artifact:
  """Samples the pools of every seed and experiment with an untrained head, which is uniform."""
  config, artifact = context.config, {}
  for seed in config.seeds:
    network = language_model.open_network(context, seed)
    model = context.inputs["language_model"]["runs"][str(seed)]["fingerprint"]
    for name, experiment in config.experiments.items():
      path = context.directory / f"{name}_seed{seed}.jsonl"
      adaptive = with_head(network, None, len(experiment["values"]))
      pools, curves = [], {}
      for family in experiment.families:
        purpose = (config.seed, seed, name, family, "train")
        random = settings.random_of(*purpose)
        prompts = families.make_prompts(family, experiment.num_prompts, random, "train")
        written = write(
          adaptive,
          prompts.tokens_PT,
          key=settings.key_of(*purpose),
          num_samples=experiment.num_samples,
          law=drawn(experiment, "sample"),
        )
        scores_R2 = families.rewards(family, prompts, written.tokens_RN, written.lengths_R)
        pools += make_pools(family, prompts, written, scores_R2, model=model, seed=config.seed + seed)
        curves[family] = reward_curve(written, scores_R2[:, 0], len(experiment["values"]))
      write_pools(path, pools)
      artifact[f"{name}/{seed}"] = {"path": context.relative(path), "mean_reward_by_setting": curves}
  return artifact


def drawn(experiment: Any, selection: str, values: tuple[float, ...] | None = None) -> DrawnSetting:
  """Returns the law by which an experiment picks its settings."""
  values = tuple(experiment["values"]) if values is None else values
  return DrawnSetting(values, experiment.action, experiment.level, selection)


def reward_curve(written: Written, rewards_R: np.ndarray, count: int) -> list[float | None]:
  """Returns the mean reward by setting, a response counted as often as it has tokens drawn with it.

  None stands for a setting that was never drawn.
  """
  curve: list[float | None] = []
  for setting in range(count):
    number_R = (written.choices_RN == setting).sum(axis=1)
    curve.append(float((number_R * rewards_R).sum() / number_R.sum()) if number_R.any() else None)
  return curve


def make_pools(
  family: str,
  prompts: families.Prompts,
  written: Written,
  scores_R2: np.ndarray,
  *,
  model: str,
  seed: int,
) -> list[Pool]:
  """Returns the pools of one family; `extras` of a sample hold the setting of every token."""
  tokenizer, pools = families.TOKENIZER, []
  per_prompt = len(written.tokens_RN) // len(prompts.tokens_PT)
  for place, (tokens_T, is_hard) in enumerate(zip(prompts.tokens_PT, prompts.is_hard_P)):
    samples = []
    for index in range(per_prompt):
      row = place * per_prompt + index
      length = int(written.lengths_R[row])
      tokens = tuple(written.tokens_RN[row, :length].tolist())
      ended = tokens[-1:] == (families.END,)
      samples.append(
        PoolSample(
          index,
          text=tokenizer.decode(tokens),
          tokens=tokens,
          log_probs=tuple(written.log_probs_RN[row, :length].tolist()),
          transformed_log_probs=tuple(written.transformed_log_probs_RN[row, :length].tolist()),
          finish_reason=FINISH_REASONS[STOP_ID if ended else LENGTH],
          score=float(scores_R2[row, 0]),
          details={"quality": float(scores_R2[row, 1])},
          extras={"choices": written.choices_RN[row, :length].tolist()},
        )
      )
    pools.append(
      Pool(
        id=f"{family}-{place}",
        prompt=tokenizer.decode(tokens_T),
        samples=tuple(samples),
        reference={"family": family, "is_hard": bool(is_hard)},
        prompt_tokens=tuple(tokens_T.tolist()),
        model=model,
        seed=seed,
      )
    )
  return pools
