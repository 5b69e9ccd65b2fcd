"""Stage `evaluate`: violations, words, quality and wins of every arm, with limits and without.

In the toy world four measurements of each model:
  limited     every topic with the limits of `evaluate.limits`, several answers each
  scaled      the same with every limit scaled, as in the paper's out-of-distribution figure
  unlimited   prompts without a limit: what is lost
  benchmark   the rule of AlpacaEval-LI: the shortest of three answers of the base model is
              baseline and limit, a violation loses, quality decides the rest
A given checkpoint is measured on the benchmark files that the config names:
  the benchmark itself, with its own limits, by intervals over prompts
  scaled      the same with every limit scaled
  by_limit    every prompt with each limit of `evaluate.limits`
  unlimited   every prompt without a limit, where `evaluate.answers_without_limit` asks for it
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nr.data.json_lines import json_line, write_json_lines
from nr.data.preferences import read_pairs
from nr.evaluation.statistics import bootstrap_ratio
from nr.generators.in_process import InProcess
from nr.generators.protocol import Sample
from nr.judges.protocol import PairJudge, ScorePairs
from nr.recipes.length_instruct import benchmarks, settings
from nr.recipes.length_instruct.arms import run_name
from nr.recipes.length_instruct.augmentation import LiftSpec
from nr.recipes.length_instruct.benchmarks import LengthCase, Outcome
from nr.recipes.length_instruct.judges import open_judge
from nr.recipes.stages import Artifact, StageContext

BASELINE_ANSWERS = 3


def run(context: StageContext) -> Artifact:
  """Measures the base model and every arm of every seed."""
  config, language = context.config, settings.language_of(context)
  runs: dict[str, Any] = {}
  for seed in config.seeds:
    base = context.inputs["base"]["models"][str(seed)]
    generator = settings.make_generator(
      config, *settings.open_model(context, base), language, base["fingerprint"]
    )
    toy = _ToyBenchmark(context, generator, seed) if settings.is_toy(config) else None
    measure = toy.measure if toy else lambda generator, name: measure_on_files(context, generator, name)
    name = run_name(settings.REFERENCE_ARM, seed)
    runs[name] = {"arm": settings.REFERENCE_ARM, "seed": seed, **measure(generator, name)}
    for arm in context.inputs["arms"]["arms"]:
      trained = context.inputs["arms"]["runs"][run_name(arm, seed)]
      _, params = settings.open_model(context, trained)
      own = generator.with_params(params, model=trained["fingerprint"])
      runs[run_name(arm, seed)] = {"arm": arm, "seed": seed, **measure(own, run_name(arm, seed))}
  return {
    "runs": runs,
    "arms": [settings.REFERENCE_ARM, *context.inputs["arms"]["arms"]],
    "seeds": list(config.seeds),
  }


class _ToyBenchmark:
  """The measurements of the toy world; its cases are made once a seed, from the base model."""

  def __init__(self, context: StageContext, base: InProcess, seed: int):
    self.context, self.config = context, context.config
    self.world, self.spec = settings.world_of(self.config), settings.lift_spec(self.config)
    self.judge = ScorePairs(self.world.judge())
    self.asking = {"max_new_tokens": self.world.max_words + 1, "seed": self.config.seed + seed}
    self.limited = self._grid(self.config.evaluate.limits, self.config.evaluate.answers_per_limit)
    self.unlimited = [
      case._replace(prompt=case.instruction)
      for case in self._grid([self.world.max_limit], self.config.evaluate.answers_without_limit)
    ]
    self.benchmark = self._benchmark(base)

  def _grid(self, limits: Sequence[int], answers: int) -> list[LengthCase]:
    return [
      LengthCase(f"topic{topic}/{limit}/{number}", instruction, limit, self.spec.render(instruction, limit))
      for topic, instruction in enumerate(self.world.instructions)
      for limit in limits
      for number in range(answers)
    ]

  def _benchmark(self, base: InProcess) -> list[LengthCase]:
    """Returns cases whose limit is the shortest of three answers of the base model, as the paper makes them."""
    asked = [
      LengthCase(f"topic{topic}/{number}/{place}", instruction, self.world.max_limit, instruction)
      for topic, instruction in enumerate(self.world.instructions)
      for number in range(self.config.evaluate.cases_per_topic)
      for place in range(BASELINE_ANSWERS)
    ]
    samples = benchmarks.answer(asked, base, tag="baseline:", **self.asking)
    cases = []
    for start in range(0, len(asked), BASELINE_ANSWERS):
      answers = [
        each.text for each in samples[start : start + BASELINE_ANSWERS] if each.text and each.is_complete
      ]
      if answers:
        first = asked[start]
        cases.append(benchmarks.make_case(first.id, first.instruction, answers, self.spec))
    return cases

  def measure(self, generator: InProcess, name: str) -> dict[str, Any]:
    """Returns all measurements of one model, and writes its answers under limits."""
    samples = benchmarks.answer(self.limited, generator, tag="limited:", **self.asking)
    outcomes = benchmarks.judge_cases(self.limited, samples, None, self.spec.counter)
    folder = self.context.directory / name
    write_answers(folder / "limited.jsonl", self.limited, samples, outcomes)
    scaled = {}
    for scale in self.config.evaluate.scales:
      cases = benchmarks.scale_cases(self.limited, scale, self.spec)
      found = benchmarks.answer(cases, generator, tag=f"x{scale:g}:", **self.asking)
      scaled[f"{scale:g}"] = self._summary(cases, found)
    free = benchmarks.answer(self.unlimited, generator, tag="unlimited:", **self.asking)
    report = benchmarks.evaluate(self.benchmark, generator, self.judge, self.spec, scales=(), **self.asking)
    return {
      "limited": self._summary(self.limited, samples),
      "by_limit": {
        str(limit): self._summary(*self._only(limit, samples)) for limit in self.config.evaluate.limits
      },
      "scaled": scaled,
      "unlimited": self._summary(self.unlimited, free),
      "benchmark": report,
    }

  def _only(self, limit: int, samples: Sequence[Sample]) -> tuple[list[LengthCase], list[Sample]]:
    places = [place for place, case in enumerate(self.limited) if case.limit == limit]
    return [self.limited[place] for place in places], [samples[place] for place in places]

  def _summary(self, cases: Sequence[LengthCase], samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns violation with its interval over answers, words, quality, and the mean limit."""
    outcomes = benchmarks.judge_cases(cases, samples, None, self.spec.counter)
    known = [place for place, each in enumerate(outcomes) if each.is_violation is not None]
    violations = np.array([outcomes[place].is_violation for place in known], np.float64)
    qualities = self.world.qualities(
      [cases[place].instruction for place in known], [samples[place].text for place in known]
    )
    interval = bootstrap_ratio(violations, np.ones_like(violations), seed=0, samples=1000)
    return {
      **benchmarks.summarize(outcomes),
      "violation_ci95": [interval.low, interval.high],
      "quality": float(np.mean(qualities)),
      "mean_limit": float(np.mean([case.limit for case in cases])),
    }


def measure_on_files(context: StageContext, generator: InProcess, name: str) -> dict[str, Any]:
  """Returns the measurements on each benchmark whose file the config names, and keeps the answers.

  Without a judge: violations and words only.
  """
  config, spec = context.config, settings.lift_spec(context.config)
  asking = dict(max_new_tokens=config.evaluate.max_new_tokens, chain=config.evaluate.chain, seed=config.seed)
  found, prompts = {}, _training_prompts(context)
  for title, cases in open_benchmarks(config).items():
    folder = context.directory / name / title
    measure = functools.partial(measure_cases, generator=generator, spec=spec, folder=folder, asking=asking)
    judge = open_judge(config, context.directory / f"{name}_judge.jsonl")
    limited = {limit: [with_limit(case, limit, spec) for case in cases] for limit in config.evaluate.limits}
    free = [
      case._replace(id=f"{case.id}/{number}", prompt=case.instruction)
      for case in cases
      for number in range(config.evaluate.answers_without_limit)
    ]
    found[title] = {
      **measure(cases, judge=judge),
      "counter": spec.counter,
      "judge": judge.name if judge is not None else None,
      "seen": sum(case.instruction in prompts for case in cases),
      "scales": benchmarks.sweep_scales(cases, generator, spec, config.evaluate.scales, **asking),
      "by_limit": {str(limit): measure(each, tag=f"limit{limit}:") for limit, each in limited.items()},
      "unlimited": measure(free, tag="unlimited:") if free else None,
    }
  return found


def measure_cases(
  cases: Sequence[LengthCase],
  *,
  generator: InProcess,
  spec: LiftSpec,
  folder: pathlib.Path,
  asking: dict[str, Any],
  tag: str = "",
  judge: PairJudge | None = None,
) -> dict[str, Any]:
  """Answers cases and returns their summary, intervals over them, and the numbers of each.

  Args:
    cases: what is answered.
    generator: the model.
    spec: for the counter of words.
    folder: gets the answers.
    asking: of the requests: max_new_tokens, chain, seed.
    tag: in front of the requests' ids, and name of the file.
    judge: compares with the baselines; None: nobody.
  """
  samples = benchmarks.answer(cases, generator, tag=tag, **asking)
  outcomes = benchmarks.judge_cases(cases, samples, judge, spec.counter)
  write_answers(folder / f"{tag.rstrip(':') or 'answers'}.jsonl", cases, samples, outcomes)
  return {
    **benchmarks.summarize(outcomes),
    **benchmarks.intervals(outcomes),
    "by_case": benchmarks.by_case(outcomes),
  }


def with_limit(case: LengthCase, limit: int, spec: LiftSpec) -> LengthCase:
  """Returns the case with another limit; its baseline need not obey it and is left out."""
  return case._replace(limit=limit, prompt=spec.render(case.instruction, limit), baseline=None)


def _training_prompts(context: StageContext) -> set[str]:
  """Returns the instructions of the pairs that arms are trained on: none of them should be measured on."""
  files = context.inputs["pairs"]["files"].values()
  prompts = [pair.prompt for each in files for pair in read_pairs(context.path(each["path"]))]
  return {each if isinstance(each, str) else each[-1]["content"] for each in prompts}


def open_benchmarks(config: Any) -> dict[str, list[LengthCase]]:
  """Returns the cases of each benchmark that the config names, by title."""
  found = {}
  if config.evaluate.alpaca_eval_li:
    found["alpaca_eval_li"] = benchmarks.load_alpaca_eval_li(config.evaluate.alpaca_eval_li)
  if config.evaluate.mt_bench_li:
    found["mt_bench_li"] = benchmarks.load_mt_bench_li(
      config.evaluate.mt_bench_li, config.evaluate.mt_bench_li_baselines or None
    )
  if config.evaluate.answered:
    found["answered"] = benchmarks.load_answered(config.evaluate.answered, settings.lift_spec(config))
  most = config.evaluate.most_cases
  return {title: cases[:most] if most else cases for title, cases in found.items()}


def write_answers(
  path: Any, cases: Sequence[LengthCase], samples: Sequence[Sample], outcomes: Sequence[Outcome]
) -> None:
  """Writes prompts, answers and what became of them as JSON lines."""
  records = benchmarks.as_records(cases, samples, outcomes)
  write_json_lines(path, (json_line(json.loads(json.dumps(each)), str(path)) for each in records))
