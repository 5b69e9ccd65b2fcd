"""Stage `steer`: what the student's concepts are, and what steering them costs and does.

The paper (arXiv 2502.08524 section 3.2) multiplies a concept's logit during
generation and shows samples; where, when and at what cost it leaves open. Here
concepts are named by what they do in held-out text (`steering.naming`), edits have
explicit semantics (`nr.models.concept_intervention`), and a sweep of their strength is
measured beside controls and beside the same edit of the teacher (`steering.protocol`).
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nr.data.concept_labels import latent_counts
from nr.data.tokenizers import Tokenizer, load_tokenizer
from nr.files import replace_text
from nr.recipes.cocomix import contexts, corpus, settings
from nr.recipes.cocomix import labels as labels_stage
from nr.recipes.cocomix.contexts import Firings
from nr.recipes.cocomix.steering import naming, protocol
from nr.recipes.cocomix.steering.naming import Names
from nr.recipes.cocomix.steering.protocol import Models, Protocol
from nr.recipes.cocomix.students import run_name
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import Model, load_model
from nr.training.optimizers import make_schedule

TEXTS = "continuations.jsonl"
"""Every continuation of the sweep, a line each."""


def run(context: StageContext) -> Artifact:
  """Lists the most used concepts with what names them, and sweeps the strength of a few."""
  config = context.config.steer
  arm, models = settings.steered_arm(context.config), open_models(context)
  names, swept = name_concepts(context, models)
  prompts_PL = validation_prompts(names.dataset, config.prompts, config.prompt_tokens)
  measure = Protocol(config, context.config.seed, models, names.tokenizer, prompts_PL)
  random = np.random.default_rng(context.config.seed)
  sweeps, lines = [], []
  for concept in tqdm(swept, desc="steering", unit="concept", leave=False):
    control = protocol.draw_control(concept, names.firings.frequency(), swept, random)
    record, texts = sweep(measure, names, concept, control)
    sweeps.append(record)
    lines += texts
  replace_text(context.directory / TEXTS, "".join(json.dumps(line) + "\n" for line in lines))
  return {
    "arm": arm,
    "mode": config.mode,
    "prompts": measure.prompts,
    "texts": context.relative(context.directory / TEXTS),
    "concepts": [names.describe(each, config.contexts, config.context_tokens) for each in names.concepts],
    "compression": naming.compression_norms(models.student, names.use, decay_left(context.config, arm)),
    "sweeps": sweeps,
    "overall": protocol.overall(sweeps),
  }


def open_models(context: StageContext) -> Models:
  """Opens the steered student, the baseline, and the teacher with its autoencoder."""
  inputs, fingerprint = context.inputs, context.inputs["tokenizer"]["fingerprint"]
  students = inputs["students"]

  def student(arm: str) -> Model:
    return load_model(
      context.path(students["runs"][run_name(arm, students["seeds"][0])]["model"]), fingerprint
    )

  return Models(
    student=student(settings.steered_arm(context.config)),
    baseline=student(students["arms"][0]),
    teacher=load_model(context.path(inputs["teacher"]["model"]), fingerprint),
    autoencoder=load_model(context.path(inputs["sae"]["model"]), fingerprint),
    layer=context.config.teacher.tap_layer,
  )


def open_tokenizer(context: StageContext) -> Tokenizer:
  """Opens the run's tokenizer."""
  return load_tokenizer(context.path(context.inputs["tokenizer"]["tokenizer"]))


def name_concepts(context: StageContext, models: Models) -> tuple[Names, list[int]]:
  """Returns what concepts are named from, and which are swept."""
  config, batch_size = context.config.steer, context.config.evaluate.batch_size
  firings = contexts.find_firings(
    context, models.teacher, models.autoencoder, models.layer, batch_size, config.max_windows
  )
  kind = settings.label_kind(context.config, settings.steered_arm(context.config))
  labels = labels_stage.counted_labels(context, context.inputs["labels"], kind).labels
  counts_C = latent_counts(labels, models.autoencoder.spec.num_latents)
  ranked = rank_concepts(counts_C, firings.frequency(), config.max_density)
  swept = [int(each) for each in (config.concepts or ranked[: config.num_concepts])]
  shown = list(dict.fromkeys([*swept, *map(int, ranked[: config.table_concepts])]))
  teacher_lens_CV, student_lens_CV = naming.lenses(models.teacher, models.autoencoder, models.student, shown)
  names = Names(
    dataset=corpus.open_split(context, "validation"),
    tokenizer=open_tokenizer(context),
    firings=firings,
    use=naming.find_use(context, models.student, batch_size, config.max_windows),
    label_counts_C=counts_C,
    teacher_lens_CV=teacher_lens_CV,
    student_lens_CV=student_lens_CV,
    concepts=shown,
  )
  return names, swept


def rank_concepts(counts_C: np.ndarray, frequency_C: np.ndarray, max_density: float) -> np.ndarray:
  """Returns concepts by how often they are labels; those that fire nearly everywhere come last.

  A latent active on a large share of all tokens says little about any of them.
  """
  return np.lexsort((-counts_C, frequency_C > max_density))


def validation_prompts(dataset: Any, count: int, length: int) -> np.ndarray:
  """Returns [count, length] token ids from evenly spaced places of a split.

  Raises:
    ValueError: the split is too short for so many prompts.
  """
  room = dataset.num_tokens // count
  if room < length:
    raise ValueError(
      f"steer.prompts={count} of steer.prompt_tokens={length} tokens do not fit the {dataset.num_tokens} "
      "validation tokens; ask for fewer or shorter prompts"
    )
  return cut(dataset, np.arange(count) * room, length)


def cut(dataset: Any, starts: np.ndarray, length: int) -> np.ndarray:
  """Returns [starts, length] token ids that begin at given places of a split."""
  return np.stack([dataset.tokens[start : start + length] for start in starts]).astype(np.int32)


def pieces(
  dataset: Any, firings: Firings, concept: int, count: int, length: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Returns up to `count` evenly spaced pieces of held-out text in which a concept fires, and in which it does not.

  None in place of pieces of which there are fewer than two.
  """

  def spread(starts: np.ndarray) -> np.ndarray | None:
    if len(starts) < 2:
      return None
    chosen = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
    return cut(dataset, starts[chosen], length)

  related, neutral = firings.pieces(concept, length)
  return spread(related), spread(neutral)


def sweep(
  measure: Protocol, names: Names, concept: int, control: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Measures one concept at every strength, beside its controls.

  Returns:
    What the artifact says of it, and its continuations, a record each.
  """
  config, firings = measure.config, names.firings
  own = str(concept) in config.keywords
  keywords = (
    config.keywords[str(concept)]
    if own
    else naming.keywords_of(firings, concept, names.dataset, names.tokenizer, config.num_keywords)
  )
  judge = protocol.keyword_judge(keywords, is_regex=own)
  largest_C = names.use.largest_C
  student = measure.measure(measure.student, concept, concept, judge, largest_C[concept])
  other = measure.measure(measure.student, control, concept, judge, largest_C[control])
  teacher = None
  if measure.teacher is not None:
    teacher = measure.measure(measure.teacher, concept, concept, judge, firings.largest(concept))
  related_PL, neutral_PL = pieces(names.dataset, firings, concept, config.prompts, config.prompt_tokens)
  strongest_V = student.shift.log_ratio_SPV[np.argmax(config.strengths) + 1].mean(0)
  record = {
    "concept": concept,
    "control": control,
    "control_frequency": float(firings.frequency()[control]),
    "mode": config.mode,
    "keywords": list(keywords),
    "points": measure.points(student),
    "control_points": measure.points(other),
    "teacher_points": None if teacher is None else measure.points(teacher),
    "related": measure.side_effects(concept, largest_C[concept], related_PL),
    "neutral": measure.side_effects(concept, largest_C[concept], neutral_PL),
    "agreement": measure.agreement(student, other, teacher),
    "unedited_difference": float(student.shift.kl_SP[0].max()),
    "promoted": naming.top_tokens(strongest_V, names.tokenizer),
    "samples": [
      {"strength": strength, "text": student.texts[row][0]} for row, strength in enumerate(measure.strengths)
    ],
  }
  subjects = {"student": (concept, student), "control": (control, other), "teacher": (concept, teacher)}
  return record, list(_lines(measure.strengths, concept, subjects))


def _lines(strengths: Sequence[float | None], concept: int, subjects: dict) -> Iterator[dict[str, Any]]:
  """Yields every continuation with its scores."""
  for subject, (edited, measured) in subjects.items():
    if measured is None:
      continue
    for row, strength in enumerate(strengths):
      for prompt, text in enumerate(measured.texts[row]):
        score = float(measured.keywords_SP[row, prompt])
        yield {
          "concept": concept,
          "subject": subject,
          "edited": edited,
          "strength": strength,
          "prompt": prompt,
          "text": text,
          "keywords": score if np.isfinite(score) else None,
          "fired": int(measured.fired_SP[row, prompt]),
          "tokens": int(measured.tokens_SP[row, prompt]),
          "nll": float(measured.nll_SP[row, prompt]),
        }


def decay_left(config: Any, arm: str) -> float:
  """Returns the factor to which weight decay alone shrinks a parameter over an arm's training."""
  training = config.students.train
  steps = config.students.arms[arm].steps or training.steps
  schedule = make_schedule(
    training.schedule.name,
    training.optimizer.learning_rate,
    steps=training.schedule.steps or steps,
    warmup_steps=training.schedule.warmup_steps,
    final_fraction=training.schedule.final_fraction,
  )
  rates = np.asarray(jax.vmap(schedule)(np.arange(steps)))
  return float(np.prod(1 - rates * training.optimizer.weight_decay))
