"""Stage `pairs`: one pair a pool, by the experiment's rule; those of some prompts are held out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nr.data.pools import Pool, read_pools
from nr.data.preferences import PreferencePair, read_pairs, write_pairs
from nr.recipes.adaptive_decoding import families, settings
from nr.recipes.adaptive_decoding.pair_rules import Scores, make_pair
from nr.recipes.stages import Artifact, StageContext

SPLITS = ("train", "held_out")


def run(context: StageContext) -> Artifact:
  """Makes the pairs of every seed and experiment."""
  config, artifact = context.config, {}
  for key, pooled in context.inputs["pools"].items():
    name, seed = key.split("/")
    experiment = config.experiments[name]
    pools = read_pools(context.path(pooled["path"]))
    random = settings.random_of(config.seed, seed, name, "pairs")
    pairs, counts = pairs_of(pools, experiment, random)
    is_held_out = held_out_pairs(pairs, experiment.held_out, random, group_of(config))
    entry: dict[str, Any] = {"counts": counts, "settings": {}}
    for split, members in zip(SPLITS, (~is_held_out, is_held_out)):
      path = context.directory / f"{name}_seed{seed}_{split}.jsonl"
      chosen = [pair for pair, is_member in zip(pairs, members) if is_member]
      if not chosen:
        raise ValueError(
          f"experiments.{name}: no pair for split {split!r} of seed {seed}; raise num_prompts or held_out"
        )
      write_pairs(path, chosen)
      entry[split] = context.relative(path)
      counts[split] = len(chosen)
    entry["settings"] = setting_counts(read_arrays(context.path(entry["train"])), len(experiment["values"]))
    artifact[key] = entry
  return artifact


def group_of(config: Any) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
  """Returns what prompts share that are not to be parted: digits of toys, else all of the prompt."""
  return (lambda tokens: tokens[families.DIGITS]) if settings.is_toy(config) else (lambda tokens: tokens)


def pairs_of(
  pools: list[Pool], experiment: Any, random: np.random.Generator
) -> tuple[list[PreferencePair], dict[str, int]]:
  """Returns the pairs, how many pools gave none, and how many pairs have one setting on both sides.

  Such a pair is kept: Eq. 10 has no gradient on it where a setting is picked once a response, but Eq. 11 and
  the likelihood of what was chosen have. Responses that could not be judged are passed over, and pools with
  too few others are counted as `unjudged`.
  """
  pairs, counts = [], {"prompts": len(pools), "no_pair": 0, "same_setting": 0}
  fewest = 2 * experiment.pair_top if experiment.pair_rule == "constraint" else 2
  for pool in pools:
    judged = [sample for sample in pool.samples if sample.score is not None and "quality" in sample.details]
    if len(judged) < fewest:
      counts["unjudged"] = counts.get("unjudged", 0) + 1
      continue
    scores = Scores(
      np.asarray([sample.score for sample in judged]),
      np.asarray([sample.details["quality"] for sample in judged]),
    )
    found = make_pair(experiment.pair_rule, scores, random, experiment.pair_top)
    if found is None:
      counts["no_pair"] += 1
      continue
    sides = [judged[index] for index in found]
    choices = [list(side.extras["choices"]) for side in sides]
    if experiment.level == "sequence" and choices[0][0] == choices[1][0]:
      counts["same_setting"] += 1
    pairs.append(
      PreferencePair(
        id=pool.id,
        prompt=pool.prompt,
        chosen=sides[0].text,
        rejected=sides[1].text,
        prompt_tokens=pool.prompt_tokens,
        chosen_tokens=sides[0].tokens,
        rejected_tokens=sides[1].tokens,
        provenance={
          "choices": choices,
          "scores": [side.score for side in sides],
          "samples": [side.index for side in sides],
          "rule": experiment.pair_rule,
        },
      )
    )
  return pairs, counts


def held_out_pairs(
  pairs: list[PreferencePair],
  share: float,
  random: np.random.Generator,
  group: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> np.ndarray:
  """Returns bool [P], the pairs whose prompts are held out.

  Args:
    pairs: P of them.
    share: of the distinct groups of prompts, rounded; at least one is held out and one is not, if there are two.
    random: decides which.
    group: of a prompt's tokens; prompts of a group stay together.
  """
  groups = [group(pair.prompt_tokens) for pair in pairs]
  distinct = sorted(set(groups))
  number = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
  held_out = {distinct[index] for index in random.permutation(len(distinct))[: max(number, 0)]}
  return np.asarray([each in held_out for each in groups], bool)


class PairArrays(NamedTuple):
  """Pairs as arrays, chosen first; positions predict the token behind them.

  Attributes:
    tokens: int32 [P, 2, T], prompt, response and padding.
    targets: int32 [P, 2, T], the next token of each position.
    weights: float32 [P, 2, T], 1 where the target belongs to the response.
    choices: int32 [P, 2, T], the setting that the target was drawn with; 0 elsewhere.
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  choices: np.ndarray


def read_arrays(path: Any, length: int | None = None) -> PairArrays:
  """Reads a file of pairs.

  Args:
    path: JSON lines.
    length: positions T; None: as many as the longest pair takes.
  """
  pairs = list(read_pairs(path))
  wholes = [
    [(*pair.prompt_tokens, *response) for response in (pair.chosen_tokens, pair.rejected_tokens)]
    for pair in pairs
  ]
  longest = max(len(whole) for sides in wholes for whole in sides)
  shape = (len(pairs), 2, longest - 1 if length is None else length)
  tokens, choices = np.zeros((*shape[:2], shape[2] + 1), np.int32), np.zeros(shape, np.int32)
  weights = np.zeros(shape, np.float32)
  for row, (pair, sides) in enumerate(zip(pairs, wholes)):
    for side, whole in enumerate(sides):
      tokens[row, side, : len(whole)] = whole
      place = slice(len(pair.prompt_tokens) - 1, len(whole) - 1)
      weights[row, side, place] = 1
      choices[row, side, place] = pair.provenance["choices"][side]
  return PairArrays(tokens[..., :-1], tokens[..., 1:], weights, choices)


def token_shares(arrays: PairArrays) -> np.ndarray:
  """Returns float64 [P, 2, T], the weights scaled so that each response has 1 in all."""
  # In float32 the sum would differ between lengths, and ties would not be ties.
  weights_P2T = arrays.weights.astype(np.float64)
  return weights_P2T / np.maximum(weights_P2T.sum(-1, keepdims=True), 1)


def setting_counts(arrays: PairArrays, count: int) -> dict[str, list[float]]:
  """Returns how often each setting was chosen and rejected, a response counting 1 in all."""
  shares, weights_P2T = [], token_shares(arrays)
  for side in (0, 1):
    of_side = np.bincount(arrays.choices[:, side].ravel(), weights_P2T[:, side].ravel(), minlength=count)
    shares.append(of_side.tolist())
  return {"chosen": shares[0], "rejected": shares[1]}


def setting_scores(counts: dict[str, list[float]]) -> np.ndarray:
  """Returns for each setting the log of how often it was chosen by how often it was rejected.

  It is the ratio that carries the signal (the paper's figure 7); 1 is added to both, our choice.
  """
  return np.log(np.asarray(counts["chosen"]) + 1) - np.log(np.asarray(counts["rejected"]) + 1)
