"""Stage `steer`: what the student's concepts are, and what forcing them costs and does.

The paper (arXiv 2502.08524 section 3.2) multiplies a concept's logit during
generation and shows samples; where, when and at what cost it leaves open. Here
the edit has explicit semantics (`nr.models.concept_intervention`), and a sweep of
its strength is measured against (a) the KL divergence from the unsteered
next-token distribution and (b) the perplexity of what is generated under the
baseline, both with 95 % bootstrap intervals over prompts.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nr.data.concept_labels import latent_counts
from nr.data.tokenizers import load_tokenizer
from nr.evaluation.statistics import bootstrap_ratio
from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from nr.generation.transforms.algebra import chain
from nr.generation.transforms.temperature import Temperature
from nr.models import parameters
from nr.models.concept_intervention import ConceptIntervention, concept_intervention
from nr.objectives.language_modeling import token_nll
from nr.recipes.cocomix import contexts, corpus, settings
from nr.recipes.cocomix import labels as labels_stage
from nr.recipes.cocomix.students import run_name
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import Model, load_model


class Steered(NamedTuple):
  """One strength of one concept.

  Attributes:
    kl_P: [prompts] mean KL(steered || unsteered) over the prompt's positions, nats.
    nll_P: [prompts] negative log-likelihood of the continuation under the baseline, nats.
    tokens_P: [prompts] tokens of the continuation.
    texts: continuations.
    log_ratio_V: mean change of each token's log-probability, nats.
  """

  kl_P: np.ndarray
  nll_P: np.ndarray
  tokens_P: np.ndarray
  texts: list[str]
  log_ratio_V: np.ndarray


def run(context: StageContext) -> Artifact:
  """Lists the most used concepts with their contexts, and sweeps the strength of a few."""
  config, inputs = context.config.steer, context.inputs
  seed, first = inputs["students"]["seeds"][0], inputs["students"]["arms"][0]
  steered = settings.steered_arm(context.config)
  fingerprint = inputs["tokenizer"]["fingerprint"]
  models = {
    "teacher": load_model(context.path(inputs["teacher"]["model"]), fingerprint),
    "sae": load_model(context.path(inputs["sae"]["model"]), fingerprint),
    "student": load_model(
      context.path(inputs["students"]["runs"][run_name(steered, seed)]["model"]), fingerprint
    ),
    "baseline": load_model(
      context.path(inputs["students"]["runs"][run_name(first, seed)]["model"]), fingerprint
    ),
  }
  tokenizer = load_tokenizer(context.path(inputs["tokenizer"]["tokenizer"]))
  dataset = corpus.open_split(context, "validation")
  layer = context.config.teacher.tap_layer
  firings = contexts.find_firings(
    context, models["teacher"], models["sae"], layer, context.config.evaluate.batch_size, config.max_windows
  )
  kind = settings.label_kind(context.config, steered)
  labels = labels_stage.counted_labels(context, inputs["labels"], kind).labels
  counts = latent_counts(labels, models["sae"].spec.num_latents)
  ranked = rank_concepts(counts, firings.frequency(), config.max_density)
  table = [
    {
      "concept": int(concept),
      "label_count": int(counts[concept]),
      "firing_frequency": float(firings.frequency()[concept]),
      "contexts": [
        {"value": value, "text": contexts.context_text(dataset, tokenizer, place, config.context_tokens)}
        for place, value in firings.strongest(int(concept), config.contexts, apart=config.context_tokens)
      ],
    }
    for concept in ranked[: config.table_concepts]
  ]
  prompts_PL = validation_prompts(dataset, config.prompts, config.prompt_tokens)
  sweeps = [
    sweep(config, context.config.seed, models, tokenizer, prompts_PL, int(concept))
    for concept in tqdm(ranked[: config.num_concepts], desc="steering", unit="concept", leave=False)
  ]
  return {
    "arm": steered,
    "mode": config.mode,
    "prompts": [tokenizer.decode(prompt.tolist()) for prompt in prompts_PL],
    "concepts": table,
    "sweeps": sweeps,
  }


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
  return np.stack([dataset.tokens[row * room : row * room + length] for row in range(count)]).astype(np.int32)


def sweep(
  config: Any, seed: int, models: dict[str, Model], tokenizer: Any, prompts_PL: np.ndarray, concept: int
) -> dict[str, Any]:
  """Measures one concept at every strength, and without any edit."""
  num_concepts = models["sae"].spec.num_latents
  neutral = concept_intervention([concept], config.mode, 0.0, num_concepts=num_concepts, active_BL=False)
  unsteered = measure(config, seed, models, tokenizer, prompts_PL, neutral)
  rows, samples = [point(None, unsteered, seed)], [{"strength": None, "text": unsteered.texts[0]}]
  for strength in config.strengths:
    edit = concept_intervention([concept], config.mode, float(strength), num_concepts=num_concepts)
    steered = measure(config, seed, models, tokenizer, prompts_PL, edit)
    rows.append(point(float(strength), steered, seed))
    samples.append({"strength": float(strength), "text": steered.texts[0]})
    strongest = steered.log_ratio_V
  promoted = np.argsort(-strongest)[:8]
  return {
    "concept": concept,
    "mode": config.mode,
    "points": rows,
    "promoted_tokens": [tokenizer.decode([int(token)]) for token in promoted],
    "promoted_log_ratios": [float(strongest[token]) for token in promoted],
    "samples": samples,
  }


def point(strength: float | None, steered: Steered, seed: int) -> dict[str, Any]:
  """Returns one row of the sweep: KL in nats and perplexity, each with its 95 % interval."""
  divergence = bootstrap_ratio(steered.kl_P, np.ones_like(steered.kl_P), seed=seed)
  loss = bootstrap_ratio(steered.nll_P, steered.tokens_P, seed=seed)
  return {
    "strength": strength,
    "kl": divergence.estimate,
    "kl_ci95": [divergence.low, divergence.high],
    "continuation_ppl": math.exp(loss.estimate),
    "continuation_ppl_ci95": [math.exp(loss.low), math.exp(loss.high)],
  }


def measure(
  config: Any,
  seed: int,
  models: dict[str, Model],
  tokenizer: Any,
  prompts_PL: np.ndarray,
  edit: ConceptIntervention,
) -> Steered:
  """Steers the student on all prompts at once; the strength is traced, so a sweep compiles once."""
  student, baseline = models["student"], models["baseline"]
  kl_P, log_ratio_V = next_token_shift(student.graphdef, student.params, prompts_PL, edit)
  network = Network(student.graphdef, student.params, intervention=edit, intervene_on="generation")
  continued = sample(
    network,
    prompts_PL,
    key=jax.random.key(seed),
    chain=chain(Temperature(config.temperature)),
    max_new_tokens=config.new_tokens,
    stop=Stop(ids_E=[tokenizer.end_of_text_id]),
  )
  nll_P = continuation_nll(
    baseline.graphdef, baseline.params, prompts_PL, continued.tokens_RN, continued.lengths_R
  )
  lengths_P = np.asarray(continued.lengths_R)
  texts = [
    tokenizer.decode(row[:length].tolist()) for row, length in zip(np.asarray(continued.tokens_RN), lengths_P)
  ]
  return Steered(np.asarray(kl_P), np.asarray(nll_P), lengths_P, texts, np.asarray(log_ratio_V))


@functools.partial(jax.jit, static_argnums=0)
def next_token_shift(
  graphdef: Any, params: Any, tokens_PL: jax.Array, edit: ConceptIntervention
) -> tuple[jax.Array, jax.Array]:
  """Compares next-token distributions with and without the edit at every position.

  Returns:
    (KL(steered || unsteered) [P], mean over positions, nats;
    mean change of every token's log-probability [V], nats).
  """
  model = parameters.merge(graphdef, params)
  clean_PLV = jax.nn.log_softmax(model(tokens_PL))
  steered_PLV = jax.nn.log_softmax(model(tokens_PL, intervention=edit))
  change_PLV = steered_PLV - clean_PLV
  kl_PL = (jnp.exp(steered_PLV) * change_PLV).sum(-1)
  return kl_PL.mean(-1), change_PLV.mean((0, 1))


@functools.partial(jax.jit, static_argnums=0)
def continuation_nll(
  graphdef: Any, params: Any, prompts_PL: jax.Array, tokens_PN: jax.Array, lengths_P: jax.Array
) -> jax.Array:
  """Returns the nats [P] of each continuation under a model, summed over its own tokens."""
  model = parameters.merge(graphdef, params)
  whole_PT = jnp.concatenate([prompts_PL, tokens_PN], axis=1)
  hidden_PTD = model.hidden(whole_PT[:, :-1])
  first = prompts_PL.shape[1] - 1
  nll_PN = token_nll(hidden_PTD[:, first:], model.unembedding_VD, tokens_PN)
  is_own_PN = jnp.arange(tokens_PN.shape[1]) < lengths_P[:, None]
  return jnp.where(is_own_PN, nll_PN, 0.0).sum(-1)
