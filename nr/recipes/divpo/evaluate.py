"""Stage `evaluate`: what every model writes: how much of it is valid, and how diverse the valid part is."""

import collections
import json
from typing import Any

import numpy as np

from nr.generators.protocol import Request, Sample
from nr.judges import diversity
from nr.judges.protocol import Item
from nr.recipes.divpo import settings
from nr.recipes.divpo.arms import run_name
from nr.recipes.divpo.personas import Task
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import load_model

NAMED = 8
"""Most frequent values that the report names."""


def run(context: StageContext) -> Artifact:
  """Samples from every model and measures; the texts are kept in texts.jsonl."""
  config, language = context.config, settings.language_of(context.config)
  trained = context.inputs["arms"]
  runs: dict[str, Any] = {}
  for seed in config.seeds:
    models = {settings.BASE: context.inputs["base"]["models"][str(seed)]}
    models |= {arm: trained["runs"][run_name(arm, seed)] for arm in trained["arms"]}
    base_scores = None
    for arm, entry in models.items():
      samples, scores = _sampled(context, language, entry, seed)
      _keep(context, run_name(arm, seed), samples, scores)
      base_scores = scores if base_scores is None else base_scores
      runs[run_name(arm, seed)] = {
        **measure(settings.task_of(config), samples, scores, config.evaluate.pool_size),
        "winrate": winrate(scores, base_scores),
      }
  return {"runs": runs, "arms": [settings.BASE, *trained["arms"]], "seeds": list(config.seeds)}


def _sampled(
  context: StageContext, language: settings.Language, entry: dict[str, Any], seed: int
) -> tuple[list[Sample], np.ndarray]:
  """Draws the samples of a model and scores them; NaN where there is no score."""
  config = context.config
  model, task = load_model(context.path(entry["model"])), settings.task_of(config)
  generator = settings.make_generator(config, model.spec, model.params, language, model.fingerprint)
  count, size = config.evaluate.samples, config.sampling.batch_size
  requests = [
    Request(
      f"evaluate/{prompt.id}/{start}",
      prompt.prompt,
      num_samples=min(size, count - start),
      max_new_tokens=config.sampling.max_new_tokens,
      chain=config.evaluate.chain,
      seed=config.seed + seed,
    )
    for prompt in task.prompts()
    for start in range(0, count, size)
  ]
  samples = sorted(generator.generate(requests), key=lambda each: (each.request_id, each.index))
  items = [Item(f"{each.request_id}/{each.index}", "", each.text or "") for each in samples]
  scores = [judged.score for judged in task.judge().judge(items)]
  return samples, np.array([np.nan if score is None else score for score in scores])


def _keep(context: StageContext, name: str, samples: list[Sample], scores: np.ndarray) -> None:
  lines = [
    json.dumps({"text": sample.text, "score": None if np.isnan(score) else float(score)})
    for sample, score in zip(samples, scores)
  ]
  (context.directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(task: Task, samples: list[Sample], scores: np.ndarray, pool_size: int) -> dict[str, Any]:
  """Returns the measurements of one model's texts (arXiv 2501.18101, section 4, metrics).

  Args:
    task: reads attributes; only valid texts count towards their diversity.
    samples: texts.
    scores: of each, NaN where there is none.
    pool_size: texts of a pool, for what depends on how many there are (unique words,
      compression, self-BLEU): the mean over pools of this size is given.
  """
  personas = [found for found in (task.read(sample.text or "") for sample in samples) if found is not None]
  texts = [sample.text or "" for sample in samples]
  pools = [texts[start : start + pool_size] for start in range(0, len(texts) - pool_size + 1, pool_size)]
  by_pool = [diversity.pool_metrics(pool) for pool in pools]
  found: dict[str, Any] = {
    "samples": len(samples),
    "validity": len(personas) / len(samples),
    "mean_score": float(np.nanmean(scores)) if np.isfinite(scores).any() else None,
    "mean_tokens": float(np.mean([len(sample.tokens) for sample in samples])),
    "sequence_entropy": diversity.sequence_entropy([sample.log_probs for sample in samples]),
    "pools": {
      name: float(np.mean([each[name] for each in by_pool])) for name in (by_pool[0] if by_pool else ())
    },
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
  means = {
    "uniqueness": float(np.mean([each.uniqueness for each in statistics.values()])),
    "top_share": float(np.mean([each.top_share for each in statistics.values()])),
    "attribute_entropy": float(np.mean([each.entropy for each in statistics.values()])),
    "values": float(np.mean([each["values"] for each in attributes.values()])),
  }
  return {**found, "attributes": attributes, **means}


def winrate(scores: np.ndarray, others: np.ndarray) -> float | None:
  """Returns the share of samples that score higher than the other model's of the same number, ties 0.5."""
  both = np.isfinite(scores) & np.isfinite(others)
  if not both.any():
    return None
  return float(np.mean(0.5 * (1 + np.sign(scores[both] - others[both]))))
