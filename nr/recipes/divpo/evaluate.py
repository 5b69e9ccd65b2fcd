"""Stage `evaluate`: what every model writes: how much of it is valid, and how diverse the valid part is."""

import collections
import json
from typing import Any, NamedTuple

import numpy as np

from nr.generators.protocol import Request, Sample, samples_by_request
from nr.judges import diversity
from nr.judges.protocol import Item
from nr.recipes.divpo import settings
from nr.recipes.divpo.arms import run_name
from nr.recipes.divpo.personas import Task
from nr.recipes.languages import Language
from nr.recipes.stages import Artifact, StageContext

NAMED = 8
"""Most frequent values that the report names."""


def run(context: StageContext) -> Artifact:
  """Samples from every model and measures; the texts are kept, a file a model."""
  config, language = context.config, settings.language_of(context)
  trained = context.inputs["arms"]
  runs: dict[str, Any] = {}
  for seed in config.seeds:
    models = {settings.BASE: context.inputs["base"]["models"][str(seed)]}
    models |= {arm: trained["runs"][run_name(arm, seed)] for arm in trained["arms"]}
    base_scores = None
    for arm, entry in models.items():
      drawn = _sampled(context, language, entry, seed)
      _keep(context, run_name(arm, seed), drawn)
      scores = np.concatenate([each.scores for each in drawn])
      base_scores = scores if base_scores is None else base_scores
      runs[run_name(arm, seed)] = {
        **measure(settings.task_of(config), drawn, config.evaluate.pool_size),
        "winrate": winrate(scores, base_scores),
      }
  return {"runs": runs, "arms": [settings.BASE, *trained["arms"]], "seeds": list(config.seeds)}


class Drawn(NamedTuple):
  """What a model wrote for one prompt.

  Attributes:
    id: of the prompt.
    samples: texts.
    scores: of each, NaN where there is none.
  """

  id: str
  samples: list[Sample]
  scores: np.ndarray


def _sampled(context: StageContext, language: Language, entry: dict[str, Any], seed: int) -> list[Drawn]:
  """Draws and scores the samples of a model, for every prompt that was held out."""
  config = context.config
  model, task = settings.open_model(context, entry), settings.task_of(config)
  generator = settings.make_generator(config, model.spec, model.params, language, model.fingerprint)
  count, size = config.evaluate.samples, config.sampling.batch_size
  requests = [
    Request(
      f"{prompt.id}/{start}",
      prompt.prompt,
      num_samples=min(size, count - start),
      max_new_tokens=config.sampling.max_new_tokens,
      chain=config.evaluate.chain,
      seed=config.seed + seed,
    )
    for prompt in task.held_out()
    for start in range(0, count, size)
  ]
  by_request = samples_by_request(requests, generator.generate(requests))
  by_prompt: dict[str, list[Sample]] = {}
  for request, samples in zip(requests, by_request):
    by_prompt.setdefault(request.id.rsplit("/", 1)[0], []).extend(samples)
  return [Drawn(id, samples, _scores(task, samples)) for id, samples in by_prompt.items()]


def _scores(task: Task, samples: list[Sample]) -> np.ndarray:
  """Returns the scores; NaN for what could not be judged, and for samples that failed."""
  there = [sample for sample in samples if sample.error is None]
  if not there:
    raise ValueError(
      f"all {len(samples)} samples of {samples[0].request_id!r} failed; the first: {samples[0].error}"
    )
  items = [Item(f"{each.request_id}/{each.index}", "", each.text) for each in there]
  judged = iter(task.judge().judge(items))
  scores = [next(judged).score if sample.error is None else None for sample in samples]
  return np.array([np.nan if score is None else score for score in scores])


def _keep(context: StageContext, name: str, drawn: list[Drawn]) -> None:
  lines = [
    json.dumps({"prompt": each.id, "text": sample.text, "score": None if np.isnan(score) else float(score)})
    for each in drawn
    for sample, score in zip(each.samples, each.scores)
  ]
  (context.directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(task: Task, drawn: list[Drawn], pool_size: int) -> dict[str, Any]:
  """Returns the measurements of one model's texts: means over prompts, and the numbers of each prompt.

  Args:
    task: reads attributes; only valid texts count towards their diversity.
    drawn: what it wrote, by prompt.
    pool_size: texts of a pool, for what depends on how many there are (unique words,
      compression, self-BLEU): the mean over pools of this size is given.
  """
  by_prompt = {each.id: _of_prompt(task, each, pool_size) for each in drawn}
  fields = next(iter(by_prompt.values()))
  means = {
    field: _mean([found[field] for found in by_prompt.values()])
    for field, value in fields.items()
    if not isinstance(value, dict)
  }
  pools = {
    field: _mean([found["pools"].get(field) for found in by_prompt.values()]) for field in fields["pools"]
  }
  return {**means, "pools": pools, "by_prompt": by_prompt}


def _mean(values: list[float | None]) -> float | None:
  """Returns the mean of what there is."""
  there = [value for value in values if value is not None]
  return float(np.mean(there)) if there else None


def _of_prompt(task: Task, drawn: Drawn, pool_size: int) -> dict[str, Any]:
  """Returns the measurements of the texts for one prompt."""
  there = [sample for sample in drawn.samples if sample.error is None]
  texts = [sample.text for sample in there]
  personas = [found for found in map(task.read, texts) if found is not None]
  pools = [texts[start : start + pool_size] for start in range(0, len(texts) - pool_size + 1, pool_size)]
  by_pool = [diversity.pool_metrics(pool) for pool in pools]
  lengths = [len(sample.tokens) for sample in there]
  log_probs = [sample.transformed_log_probs for sample in there]
  found: dict[str, Any] = {
    "samples": len(texts),
    "failed": len(drawn.samples) - len(texts),
    "valid": len(personas),
    "validity": len(personas) / len(texts),
    "distinct_valid": len({tuple(each.values()) for each in personas}) / len(texts),
    "mean_score": _mean([float(score) for score in drawn.scores if np.isfinite(score)]),
    "mean_tokens": _mean(lengths),
    "sequence_entropy": diversity.sequence_entropy(log_probs),
    "pools": {name: _mean([each[name] for each in by_pool]) for name in (by_pool[0] if by_pool else ())},
  }
  if not personas:
    nothing = dict.fromkeys(("uniqueness", "top_share", "attribute_entropy", "values"))
    return {**found, "attributes": {}, **nothing}
  statistics = diversity.attribute_statistics(personas, task.attributes)
  attributes = {
    attribute: {
      **each._asdict(),
      "values": len({persona[attribute] for persona in personas}),
      "most_frequent": collections.Counter(persona[attribute] for persona in personas).most_common(NAMED),
    }
    for attribute, each in statistics.items()
  }
  return {
    **found,
    "attributes": attributes,
    # Over all texts: over valid ones alone it would rise as validity falls.
    "uniqueness": _mean([each["values"] / len(texts) for each in attributes.values()]),
    "top_share": _mean([each.top_share for each in statistics.values()]),
    "attribute_entropy": _mean([each.entropy for each in statistics.values()]),
    "values": _mean([each["values"] for each in attributes.values()]),
  }


def winrate(scores: np.ndarray, others: np.ndarray) -> float | None:
  """Returns the share of samples that score higher than the other model's of the same number, ties 0.5."""
  both = np.isfinite(scores) & np.isfinite(others)
  if not both.any():
    return None
  return float(np.mean(0.5 * (1 + np.sign(scores[both] - others[both]))))
