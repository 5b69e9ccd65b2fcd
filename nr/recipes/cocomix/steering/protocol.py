"""The protocol: one concept at every strength, beside its controls, with intervals.

For a concept, at each strength:

    effect     how much of a continuation is about it: the share of words with a keyword (what distinctively
               follows the concept's firings, found without any steered text), and the share of tokens on which
               the teacher's own latent fires as the teacher reads the text
    cost       perplexity of the continuation under the unsteered model and under the baseline; KL of the
               next-token distribution
    side       what the same edit does to held-out text in which the concept never fires (neutral), and in
    effects    which it does (related): KL, share of most likely tokens that change, change of the loss
    agreement  rank correlation of the changes of all tokens' log-probabilities with those that the same edit of
               the same latent makes in the teacher

Controls: strength None, the same program editing nowhere; a random concept that fires as often, steered alike
and judged by the first one's measures; the teacher's shift against that control's.

Intervals are 95 % bootstrap intervals over prompts. The paper has samples only (arXiv 2502.08524, section 3.2).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.data.tokenizers import Tokenizer
from nr.evaluation import steering
from nr.evaluation.statistics import bootstrap_ratio, mean_interval
from nr.evaluation.steering import Shift, Sweep
from nr.judges.keywords import KeywordShare
from nr.judges.protocol import Item, Judge
from nr.models import parameters
from nr.models.steered_transformer import SteeredTransformer
from nr.training.model_files import Model

CONTROL_NEIGHBOURS = 8
"""Concepts nearest in firing frequency, of which one is drawn as control."""

RESAMPLES = 2000
"""Bootstrap samples of an interval; there are hundreds of intervals."""

REFERENCE_MODE = "force_reference"
"""Mode force_value in units of a stored reference: the largest coefficient a concept had on held-out text."""


class Models(NamedTuple):
  """Who takes part.

  Attributes:
    student: the concept model that is steered.
    baseline: the arm that judges continuations.
    teacher: whose latents the concepts are.
    autoencoder: of the teacher.
    layer: block of the teacher after which it reads, from 0.
  """

  student: Model
  baseline: Model
  teacher: Model
  autoencoder: Model
  layer: int


class Measured(NamedTuple):
  """One sweep, a row for each strength; P prompts.

  Attributes:
    shift: of the next-token distributions of the prompts.
    nll_SP: nats of the continuations under the unsteered model itself.
    baseline_nll_SP: the same under the baseline.
    tokens_SP: tokens of the continuations.
    keywords_SP: share of words with a keyword; NaN where a text has no words, or there is no keyword.
    fired_SP: tokens of the continuations on which the teacher's latent fires.
    texts: [S][P] continuations.
  """

  shift: Shift
  nll_SP: np.ndarray
  baseline_nll_SP: np.ndarray
  tokens_SP: np.ndarray
  keywords_SP: np.ndarray
  fired_SP: np.ndarray
  texts: list[list[str]]


class Protocol:
  """Measures concepts one after the other; programs are compiled for the first one.

  Args:
    config: section `steer`.
    seed: of sampling, controls and intervals.
    models: who takes part.
    tokenizer: of all of them.
    prompts_PL: held-out prompts.
  """

  def __init__(self, config: Any, seed: int, models: Models, tokenizer: Tokenizer, prompts_PL: np.ndarray):
    self.config, self.seed, self.models = config, seed, models
    self.tokenizer, self.prompts_PL = tokenizer, prompts_PL
    self.prompts = [tokenizer.decode(prompt.tolist()) for prompt in prompts_PL]
    self.strengths = [None, *map(float, config.strengths)]
    self.student = models.student.graphdef, models.student.params
    self.teacher = steerable_teacher(models)

  def measure(
    self,
    model: tuple[Any, Any],
    edited: int,
    judged: int,
    judge: Judge | None,
    reference: float,
  ) -> Measured:
    """Steers a model by one concept, at every strength, and measures the texts for another (or the same)."""
    config, models = self.config, self.models
    mode, strengths = resolved(config.mode, self.strengths, reference)
    swept = steering.continue_prompts(
      model,
      self.prompts_PL,
      edited,
      mode,
      strengths,
      key=jax.random.key(self.seed),
      temperature=config.temperature,
      max_new_tokens=config.new_tokens,
      stop_id=self.tokenizer.end_of_text_id,
    )
    texts = self.texts(swept)
    baseline = models.baseline.graphdef, models.baseline.params
    return Measured(
      steering.shift(model, self.prompts_PL, edited, mode, strengths),
      steering.continuation_nll(model, self.prompts_PL, swept),
      steering.continuation_nll(baseline, self.prompts_PL, swept),
      swept.lengths_SP,
      self.judged(judge, texts),
      steering.latent_rate(models.teacher, models.autoencoder, models.layer, self.prompts_PL, swept, judged),
      texts,
    )

  def texts(self, swept: Sweep) -> list[list[str]]:
    """Returns the continuations as text."""
    return [
      [self.tokenizer.decode(row[:length].tolist()) for row, length in zip(rows, lengths)]
      for rows, lengths in zip(swept.tokens_SPN, swept.lengths_SP)
    ]

  def judged(self, judge: Judge | None, texts: list[list[str]]) -> np.ndarray:
    """Returns the scores [S, P] of texts, NaN where there is none."""
    if judge is None:
      return np.full((len(texts), len(self.prompts)), np.nan)
    items = [
      Item(f"{row}/{place}", prompt, text)
      for row, line in enumerate(texts)
      for place, (prompt, text) in enumerate(zip(self.prompts, line))
    ]
    scores = [each.score for each in judge.judge(items)]
    return np.array([math.nan if score is None else score for score in scores]).reshape(len(texts), -1)

  def side_effects(self, concept: int, reference: float, pieces_PL: np.ndarray | None) -> list[dict] | None:
    """Returns, for each strength, what an edit of every token of some pieces of text does to them."""
    if pieces_PL is None:
      return None
    mode, strengths = resolved(self.config.mode, self.strengths, reference)
    found = steering.shift(self.student, pieces_PL, concept, mode, strengths)
    fields = ("kl", "flips", "loss_change")
    return [
      {field: self.mean(getattr(found, f"{field}_SP")[row]) for field in fields}
      for row in range(len(strengths))
    ]

  def mean(self, values_P: np.ndarray, weights_P: np.ndarray | None = None) -> dict[str, float] | None:
    """Returns a mean over prompts with its interval; None where nothing could be measured."""
    values_P = np.asarray(values_P, np.float64)
    weights_P = np.ones_like(values_P) if weights_P is None else np.asarray(weights_P, np.float64)
    known_P = np.isfinite(values_P) & (weights_P > 0)
    if not known_P.any():
      return None
    found = bootstrap_ratio(values_P[known_P], weights_P[known_P], seed=self.seed, samples=RESAMPLES)
    return found._asdict()

  def points(self, measured: Measured) -> list[dict[str, Any]]:
    """Returns a row for each strength; gains are differences from the unedited texts of the same prompts."""
    fired_SP = measured.fired_SP / measured.tokens_SP
    return [
      {
        "strength": strength,
        "kl": self.mean(measured.shift.kl_SP[row]),
        "continuation_ppl": exponential(self.mean(measured.baseline_nll_SP[row], measured.tokens_SP[row])),
        "unsteered_ppl": exponential(self.mean(measured.nll_SP[row], measured.tokens_SP[row])),
        "keywords": self.mean(measured.keywords_SP[row]),
        "keywords_gain": self.mean(measured.keywords_SP[row] - measured.keywords_SP[0]),
        "latent": self.mean(measured.fired_SP[row], measured.tokens_SP[row]),
        "latent_gain": self.mean(fired_SP[row] - fired_SP[0]),
      }
      for row, strength in enumerate(self.strengths)
    ]

  def agreement(self, student: Measured, control: Measured, teacher: Measured | None) -> list[dict] | None:
    """Returns, for each strength but None, how alike student and teacher shift the next token."""
    if teacher is None:
      return None
    rows = []
    for row, strength in enumerate(self.strengths):
      if strength is None:
        continue
      own, other, target = (each.shift.log_ratio_SPV[row] for each in (student, control, teacher))
      count = min(self.config.top_tokens, own.shape[-1])
      rows.append(
        {
          "strength": strength,
          "rank_correlation": self.mean(steering.rank_correlation(own, target)),
          "control_rank_correlation": self.mean(steering.rank_correlation(other, target)),
          "top_overlap": self.mean(steering.top_overlap(own, target, count)),
          "control_top_overlap": self.mean(steering.top_overlap(other, target, count)),
        }
      )
    return rows


def steerable_teacher(models: Models) -> tuple[Any, Any] | None:
  """Returns the teacher with its autoencoder in its stream; None where that reads the teacher's last block."""
  if models.layer == models.teacher.spec.num_layers - 1:
    return None
  transformer = parameters.merge(models.teacher.graphdef, models.teacher.params)
  autoencoder = parameters.merge(models.autoencoder.graphdef, models.autoencoder.params)
  return parameters.split(SteeredTransformer(transformer, autoencoder, models.layer))


def resolved(
  mode: str, strengths: Sequence[float | None], reference: float
) -> tuple[str, list[float | None]]:
  """Returns the mode and the strengths that models know; "force_reference" is in units of `reference`."""
  if mode != REFERENCE_MODE:
    return mode, list(strengths)
  return "force_value", [None if value is None else value * reference for value in strengths]


def draw_control(
  concept: int, frequency_C: np.ndarray, excluded: Sequence[int], random: np.random.Generator
) -> int:
  """Returns a concept that fires about as often: one of the nearest in frequency, drawn at random.

  Raises:
    ValueError: no other concept ever fires.
  """
  is_open_C = frequency_C > 0
  is_open_C[[concept, *excluded]] = False
  if not is_open_C.any():
    raise ValueError(f"steer: no concept is left as a control of concept {concept}; sweep fewer concepts")
  with np.errstate(divide="ignore"):
    distance_C = np.abs(np.log(frequency_C) - np.log(frequency_C[concept]))
  nearest = np.argsort(np.where(is_open_C, distance_C, np.inf), kind="stable")
  return int(random.choice(nearest[: min(CONTROL_NEIGHBOURS, int(is_open_C.sum()))]))


def exponential(interval: dict[str, float] | None) -> dict[str, float] | None:
  """Returns the interval of a perplexity from that of a loss in nats."""
  return None if interval is None else {name: math.exp(value) for name, value in interval.items()}


def keyword_judge(keywords: Sequence[str], *, is_regex: bool = False) -> KeywordShare | None:
  """Returns the judge of a concept's keywords, None without any."""
  return KeywordShare(keywords, is_regex=is_regex) if len(keywords) else None


SUMMARISED = ("keywords", "latent")
"""Scores that are averaged over concepts."""


def overall(sweeps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns, for each strength but None, means over the swept concepts with Student's intervals.

  Args:
    sweeps: records with `points`, `control_points`, `teacher_points` and `agreement`.

  Returns:
    Rows of gains over the unedited texts (of the student, of the control, of the teacher), of gains over the
    control, of the ratio of perplexities to the unedited one (geometric mean), and of the agreement.
  """
  rows = []
  for number, point in enumerate(sweeps[0]["points"]):
    if point["strength"] is None:
      continue
    row: dict[str, Any] = {"strength": point["strength"], "concepts": len(sweeps)}
    for score in SUMMARISED:
      for who in ("points", "control_points", "teacher_points"):
        name = f"{score}_gain" if who == "points" else f"{who.removesuffix('_points')}_{score}_gain"
        row[name] = over_concepts(sweeps, who, number, score, against=(who, 0))
      row[f"{score}_over_control"] = over_concepts(
        sweeps, "points", number, score, against=("control_points", number)
      )
    ratios = [
      math.log(each["points"][number]["unsteered_ppl"]["estimate"])
      - math.log(each["points"][0]["unsteered_ppl"]["estimate"])
      for each in sweeps
    ]
    row["ppl_ratio"] = exponential(_over(ratios))
    row["kl"] = _over([each["points"][number]["kl"]["estimate"] for each in sweeps])
    for field in ("rank_correlation", "control_rank_correlation", "top_overlap", "control_top_overlap"):
      found = [each["agreement"][number - 1][field] for each in sweeps if each["agreement"]]
      row[field] = _over([value["estimate"] for value in found if value is not None])
    for where in ("neutral", "related"):
      found = [each[where][number]["loss_change"] for each in sweeps if each[where]]
      row[f"{where}_loss_change"] = _over([value["estimate"] for value in found])
    rows.append(row)
  return rows


def over_concepts(
  sweeps: Sequence[dict[str, Any]], who: str, number: int, score: str, against: tuple[str, int]
) -> dict[str, float] | None:
  """Returns the mean over concepts of a score minus another of the same concept."""
  pairs = [
    (each[who][number][score], each[against[0]][against[1]][score])
    for each in sweeps
    if each[who] and each[against[0]]
  ]
  pairs = [(first["estimate"], second["estimate"]) for first, second in pairs if first and second]
  return _over([first - second for first, second in pairs])


def _over(values: Sequence[float]) -> dict[str, float] | None:
  """Returns the mean of independent values with Student's interval; None without any."""
  return mean_interval(np.asarray(values))._asdict() if len(values) else None
