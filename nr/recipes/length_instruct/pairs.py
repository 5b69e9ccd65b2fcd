"""Stages `pairs` and `augment`: preference pairs without limits (D), and the same with limits (D')."""

from typing import Any

from nr.data.pools import Pool, PoolSample, write_pools
from nr.data.preferences import PreferencePair, read_pairs, write_pairs
from nr.generators.protocol import Request, samples_by_request
from nr.judges.protocol import Item
from nr.recipes.languages import Language
from nr.recipes.length_instruct import augmentation, settings
from nr.recipes.length_instruct.sampled_pairs import sample_pairs
from nr.recipes.stages import Artifact, StageContext


def run_pairs(context: StageContext) -> Artifact:
  """Samples and judges pairs, of the toy world or of a checkpoint, or takes the given ones; one file a seed."""
  config, language = context.config, settings.language_of(context)
  files: dict[str, Artifact] = {}
  if not (settings.is_toy(config) or settings.is_sampling(config) or config.data.pairs):  # only measured
    return {"files": files}
  for seed in config.seeds:
    counts: Artifact = {}
    if settings.is_toy(config):
      pairs, counts = _sampled(context, language, seed)
    elif settings.is_sampling(config):
      pairs, counts["sampling"] = sample_pairs(context, language, seed)
    else:
      pairs = read_pairs(config.data.pairs)
    path = context.directory / f"seed{seed}.jsonl"
    write_pairs(path, pairs)
    found = augmentation.statistics(pairs, settings.lift_spec(config))
    files[str(seed)] = {"path": context.relative(path), **counts, **found}
  return {"files": files}


def _sampled(
  context: StageContext, language: Language, seed: int
) -> tuple[list[PreferencePair], dict[str, int]]:
  """Returns pairs of two answers of the base model to each prompt, the better one chosen, and counts."""
  config, world = context.config, settings.world_of(context.config)
  base = context.inputs["base"]["models"][str(seed)]
  generator = settings.make_generator(
    config, *settings.open_model(context, base), language, base["fingerprint"]
  )
  requests = [
    Request(
      f"topic{topic}/{number}", prompt, num_samples=2, max_new_tokens=world.max_words + 1, seed=config.seed
    )
    for topic, prompt in enumerate(world.instructions)
    for number in range(config.data.prompts_per_topic)
  ]
  pools, pairs, counts = [], [], {"prompts": len(requests), "ties": 0, "unfinished": 0}
  judge = world.judge()
  grouped = samples_by_request(requests, generator.generate(requests))
  for request, samples in zip(requests, grouped):
    judged = judge.judge([Item(f"{request.id}/{each.index}", request.prompt, each.text) for each in samples])
    pools.append(
      Pool(
        request.id,
        request.prompt,
        tuple(
          PoolSample(
            each.index,
            each.text,
            each.tokens,
            each.log_probs,
            finish_reason=each.finish_reason,
            score=its.score,
          )
          for each, its in zip(samples, judged)
        ),
        model=base["fingerprint"],
        seed=config.seed,
      )
    )
    if not all(each.is_complete and each.text for each in samples):
      counts["unfinished"] += 1
    elif judged[0].score == judged[1].score:
      counts["ties"] += 1
    else:
      best = int(judged[1].score > judged[0].score)
      chosen, rejected = samples[best], samples[1 - best]
      scores = {"chosen": judged[best].score, "rejected": judged[1 - best].score}
      pairs.append(
        PreferencePair(request.id, request.prompt, chosen.text, rejected.text, provenance={"scores": scores})
      )
  write_pools(context.directory / f"pools_seed{seed}.jsonl", pools)
  return pairs, counts


def run_augment(context: StageContext) -> Artifact:
  """Puts limits into the pairs of every seed."""
  spec, files = settings.lift_spec(context.config), {}
  for seed, given in context.inputs["pairs"]["files"].items():
    limited = augmentation.augment(read_pairs(context.path(given["path"])), spec)
    path = context.directory / f"seed{seed}.jsonl"
    write_pairs(path, limited)
    told = [augmentation.lift_of(each) for each in limited]
    files[seed] = {
      "path": context.relative(path),
      "limited": len(limited),
      "swaps": sum(each["is_swapped"] for each in told),
      "mean_limit": {kind: _mean_limit(told, kind) for kind in (augmentation.LOOSE, augmentation.TIGHT)},
    }
  return {"files": files, "counter": spec.counter}


def _mean_limit(told: list[Any], kind: str) -> float | None:
  limits = [each["limit"] for each in told if each["kind"] == kind]
  return sum(limits) / len(limits) if limits else None
