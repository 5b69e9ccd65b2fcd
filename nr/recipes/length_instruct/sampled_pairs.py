"""Preference pairs that a checkpoint makes itself, from instructions in a file of the user's.

The model answers each instruction several times (pools, kept on disk). Which of two responses
is preferred, `pools.judge.kind` says:

  reference       the answer in the file, to each of the model's; nobody judges
  words           the longer one: a bias towards length and nothing else, to study it with
  reward_model    the one that a reward model scores best, to the one that it scores worst
  language_model  the same by a model behind a server

Responses that did not end by themselves are left out: nobody knows how long they are.
"""

import collections
from collections.abc import Sequence
from typing import Any

from nr.data.instructions import Instruction, read_instructions
from nr.data.pools import Pool, PoolSample
from nr.data.preferences import PreferencePair
from nr.generators.protocol import COMPLETE
from nr.judges.protocol import Rule
from nr.recipes.languages import Language
from nr.recipes.length_instruct import settings
from nr.recipes.length_instruct.judges import pool_judge
from nr.recipes.sampling_rounds import PoolPrompt, RoundSpec, draw_pools
from nr.recipes.stages import StageContext

Counts = collections.Counter[str]
_NOBODY = Rule(lambda item: None, "nobody")


def sample_pairs(
  context: StageContext, language: Language, seed: int
) -> tuple[list[PreferencePair], dict[str, int]]:
  """Draws pools with the base model of a seed and makes pairs of them.

  A run that was stopped goes on behind the pools that it has written.

  Returns:
    The pairs, and counts: prompts, samples, and why prompts and samples gave no pair.

  Raises:
    DataError: instructions that cannot be read.
    ValueError: none that fits.
  """
  config, pools = context.config, context.config.pools
  counts: Counts = collections.Counter()
  prompts = _prompts(config, language, counts)
  base = context.inputs["base"]["models"][str(seed)]
  drawn = draw_pools(
    context.directory / f"pools_seed{seed}.jsonl",
    prompts,
    settings.make_generator(config, *settings.open_model(context, base), language, base["fingerprint"]),
    pool_judge(config, context.directory) or _NOBODY,
    RoundSpec(
      steps_per_round=1,
      prompts_per_round=len(prompts),
      num_samples=pools.num_samples,
      max_new_tokens=pools.max_new_tokens,
      chain=pools.chain,
      seed=config.seed + seed,
    ),
    0,
    base["fingerprint"],
  )
  is_reference = pools.judge.kind == "reference"
  pairs = [
    pair
    for pool in drawn
    for pair in (
      against_reference(pool, pools.pairs_per_prompt, counts)
      if is_reference
      else best_and_worst(pool, counts)
    )
  ]
  return pairs, dict(counts)


def _prompts(config: Any, language: Language, counts: Counts) -> list[PoolPrompt]:
  """Returns the instructions that leave room for an answer."""
  pools, room = config.pools, config.data.max_length - config.pools.max_new_tokens
  given: Sequence[Instruction] = read_instructions(pools.instructions, settings.instruction_fields(config))
  prompts = []
  for each in given[: pools.most_prompts or None]:
    if pools.judge.kind == "reference" and each.reference is None:
      counts["without_reference"] += 1
    elif len(language.format.encode_prompt(each.text)) > room:
      counts["too_long"] += 1
    else:
      prompts.append(PoolPrompt(each.id, each.text, each.reference))
  counts["prompts"] = len(prompts)
  if not prompts:
    raise ValueError(
      f"pools.instructions={pools.instructions!r}: none of {sum(counts.values())} instructions can be used "
      f"({dict(counts)}); raise data.max_length, name pools.fields.reference, or choose another judge"
    )
  return prompts


def _finished(pool: Pool, counts: Counts) -> list[PoolSample]:
  """Returns the responses that ended by themselves and say something."""
  found = [each for each in pool.samples if each.finish_reason in COMPLETE and (each.text or "").strip()]
  counts["samples"] += len(pool.samples)
  counts["unfinished"] += len(pool.samples) - len(found)
  return found


def against_reference(pool: Pool, most: int, counts: Counts) -> list[PreferencePair]:
  """Returns pairs of the reference with each of the first `most` responses that differ from it."""
  others = [each for each in _finished(pool, counts) if each.text != pool.reference]
  return [
    _pair(f"{pool.id}/{each.index}", pool, pool.reference, each.text, {"chosen": "reference"})
    for each in others[:most]
  ]


def best_and_worst(pool: Pool, counts: Counts) -> list[PreferencePair]:
  """Returns the pair of the best and the worst response, of equals the first; none where all are alike."""
  finished = _finished(pool, counts)
  scored = [each for each in finished if each.score is not None]
  counts["unscored"] += len(finished) - len(scored)
  if len(scored) < 2:
    return []
  best, worst = max(scored, key=lambda each: each.score), min(scored, key=lambda each: each.score)
  if best.score == worst.score:
    counts["ties"] += 1
    return []
  scores = {"chosen": best.score, "rejected": worst.score}
  return [_pair(pool.id, pool, best.text, worst.text, {"scores": scores})]


def _pair(id: str, pool: Pool, chosen: str, rejected: str, provenance: dict[str, Any]) -> PreferencePair:
  return PreferencePair(id, pool.prompt, chosen, rejected, provenance={"pool": pool.id, **provenance})
