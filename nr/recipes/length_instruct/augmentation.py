"""Pairs with a limit of words in their prompts: each pair gives one that both obey and one that one obeys.

    limited = augment(pairs, LiftSpec())                    # D', two samples a pair that is kept
    training = mixture(pairs, limited, "union")             # D plus D'

A pure function of one pair, keyed by its id: no order, share or worker changes a limit.
Source: arXiv 2406.17744, section 4 (as its anonymous submission prints it).
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nr.data.bad_records import DataError
from nr.data.examples import Response
from nr.data.preferences import PreferencePair, Prompt
from nr.judges.length import count_words
from nr.names import unknown
from nr.spec import Spec

# README of facebookresearch/RAM, projects/length_instruct, byte for byte.
TEMPLATE = "Answer the following instruction using {limit} words or less.\n\n{instruction}"
MIXES = ("plain", "augmented_only", "union")
LOOSE, TIGHT = "loose", "tight"


@dataclasses.dataclass(frozen=True)
class LiftSpec(Spec):
  """How limits are put into prompts.

  Attributes:
    template: with {limit} and {instruction}, each once; other braces stay as they are.
    counter: of words, see `nr.judges.length.count_words`.
    min_difference: pairs whose responses differ by fewer words are dropped.
    margin: words of room above the longer response in the sample that both obey.
    seed: of the drawn limits, with the pair's id.
  """

  template: str = TEMPLATE
  counter: str = "words"
  min_difference: int = 10
  margin: int = 10
  seed: int = 0

  def __post_init__(self):
    for slot in ("{limit}", "{instruction}"):
      if self.template.count(slot) != 1:
        raise ValueError(
          f"template={self.template!r}: it holds {slot} {self.template.count(slot)} times, give it once"
        )
    count_words("", self.counter)
    if self.min_difference < 1:
      raise ValueError(
        f"min_difference={self.min_difference}: give at least 1; equal lengths leave no limit between"
      )
    if self.margin < 0:
      raise ValueError(f"margin={self.margin}: give 0 or more words")

  def render(self, instruction: str, limit: int) -> str:
    """Returns the instruction with its limit in front, itself unchanged.

    >>> LiftSpec().render("Name {a} colour.", 3)
    'Answer the following instruction using 3 words or less.\\n\\nName {a} colour.'
    """
    head, tail = self.template.split("{instruction}")
    return head.replace("{limit}", str(limit)) + instruction + tail.replace("{limit}", str(limit))

  def limit_prompt(self, prompt: Prompt, limit: int) -> Prompt:
    """Returns the prompt with the limit in its text, or in the last turn of the user.

    Raises:
      DataError: a conversation without a turn of the user.
    """
    if isinstance(prompt, str):
      return self.render(prompt, limit)
    turns = [dict(turn) for turn in prompt]
    own = [turn for turn in turns if turn["role"] == "user"]
    if not own:
      raise DataError("a conversation without a turn of the user has no instruction to limit; leave it out")
    own[-1]["content"] = self.render(own[-1]["content"], limit)
    return tuple(turns)


class Lengths(NamedTuple):
  """Words of a pair's responses."""

  chosen: int
  rejected: int

  @property
  def is_longer_chosen(self) -> bool:
    """Whether the preferred response is the longer one: its tight sample is swapped."""
    return self.chosen > self.rejected


def drawn_integer(seed: int, id: str, low: int, high: int) -> int:
  """Returns an integer in low..high, uniform over seeds and ids: a hash, so that nothing else decides it."""
  digest = hashlib.sha256(f"{seed}\0{id}".encode("utf-8", "surrogatepass")).digest()
  return low + int.from_bytes(digest[:8], "big") % (high - low + 1)


def lengths_of(pair: PreferencePair, spec: LiftSpec) -> Lengths:
  """Returns the words of both responses. Raises DataError for a response known by its tokens only."""
  for side in ("chosen", "rejected"):
    if getattr(pair, side) is None:
      raise DataError(f"pair {pair.id!r}, field {side!r}: words are counted in text; decode its tokens")
  return Lengths(count_words(pair.chosen, spec.counter), count_words(pair.rejected, spec.counter))


def is_kept(lengths: Lengths, spec: LiftSpec) -> bool:
  """Whether the responses differ by enough words, and some limit lies between: none does between 0 and 1."""
  return max(lengths) > 1 and abs(lengths.chosen - lengths.rejected) >= spec.min_difference


def loose_sample(pair: PreferencePair, lengths: Lengths, spec: LiftSpec) -> PreferencePair:
  """Returns the sample whose limit both responses obey: quality decides, as before."""
  return _limited(pair, spec, LOOSE, max(lengths) + spec.margin)


def tight_sample(pair: PreferencePair, lengths: Lengths, spec: LiftSpec) -> PreferencePair:
  """Returns the sample whose limit only the shorter response obeys: it wins, whatever its quality.

  The limit is uniform over the integers shorter .. longer - 1 (at least 1). The paper does not
  say how it is drawn; our choice: all that the shorter obeys and the longer breaks.
  """
  limit = drawn_integer(spec.seed, pair.id, max(1, min(lengths)), max(lengths) - 1)
  if not lengths.is_longer_chosen:
    return _limited(pair, spec, TIGHT, limit)
  swapped = pair._replace(
    chosen=pair.rejected,
    rejected=pair.chosen,
    chosen_tokens=pair.rejected_tokens,
    rejected_tokens=pair.chosen_tokens,
  )
  return _limited(swapped, spec, TIGHT, limit, is_swapped=True)


def _limited(
  pair: PreferencePair, spec: LiftSpec, kind: str, limit: int, is_swapped: bool = False
) -> PreferencePair:
  told = {"kind": kind, "limit": limit, "pair": pair.id, "is_swapped": is_swapped, "counter": spec.counter}
  return pair._replace(
    id=f"{pair.id}/{kind}",
    prompt=spec.limit_prompt(pair.prompt, limit),
    # Tokens and reference scores of the prompt without the limit are those of another prompt.
    prompt_tokens=None,
    provenance={**pair.provenance, "lift": told},
  )


def limited_samples(pair: PreferencePair, spec: LiftSpec) -> list[PreferencePair]:
  """Returns both samples of a pair, or none where its responses are too alike in length."""
  lengths = lengths_of(pair, spec)
  if not is_kept(lengths, spec):
    return []
  return [loose_sample(pair, lengths, spec), tight_sample(pair, lengths, spec)]


def augment(pairs: Iterable[PreferencePair], spec: LiftSpec) -> list[PreferencePair]:
  """Returns D': two samples of each pair that is kept, in the order of the pairs."""
  return [sample for pair in pairs for sample in limited_samples(pair, spec)]


def mixture(
  pairs: Sequence[PreferencePair], limited: Sequence[PreferencePair], mix: str
) -> list[PreferencePair]:
  """Returns what an arm is trained on: "plain" D, "augmented_only" D', or "union" D and D'.

  Raises:
    ValueError: another mix.
  """
  if mix not in MIXES:
    raise ValueError(unknown("mix", mix, MIXES))
  return {"plain": list(pairs), "augmented_only": list(limited), "union": [*pairs, *limited]}[mix]


def limited_response(response: Response, spec: LiftSpec) -> Response:
  """Returns a response for fine-tuning under a limit that it obeys: its words and 0 .. margin more.

  The paper fine-tunes with limits too and does not say how it chooses them; our choice, by hash of the id.
  """
  if response.response is None:
    raise DataError(f"response {response.id!r}: words are counted in text; decode its tokens")
  limit = count_words(response.response, spec.counter) + drawn_integer(spec.seed, response.id, 0, spec.margin)
  return response._replace(
    id=f"{response.id}/limited", prompt=spec.limit_prompt(response.prompt, max(1, limit)), prompt_tokens=None
  )


def statistics(pairs: Iterable[PreferencePair], spec: LiftSpec) -> dict[str, Any]:
  """Returns what augmentation makes of pairs: counts, words, and how often the winner is the shorter.

  Returns:
    pairs, kept, limited (samples), swaps, equal (pairs of equal length), mean words of
    chosen and rejected, and `shorter_wins`: by mix, the share among samples of unequal
    lengths whose winner is the shorter (None without any).
  """
  lengths = [lengths_of(pair, spec) for pair in pairs]
  kept = [each for each in lengths if is_kept(each, spec)]
  longer = sum(each.is_longer_chosen for each in kept)
  unequal = [each for each in lengths if each.chosen != each.rejected]
  plain = sum(not each.is_longer_chosen for each in unequal), len(unequal)
  # Of the two samples of a pair, the tight one is won by the shorter, the loose one as the pair is.
  limited = 2 * len(kept) - longer, 2 * len(kept)
  union = tuple(map(sum, zip(plain, limited)))
  shares = {
    mix: part / whole if whole else None for mix, (part, whole) in zip(MIXES, (plain, limited, union))
  }
  return {
    "pairs": len(lengths),
    "kept": len(kept),
    "limited": 2 * len(kept),
    "swaps": longer,
    "equal": len(lengths) - len(unequal),
    "chosen_words": _mean(each.chosen for each in lengths),
    "rejected_words": _mean(each.rejected for each in lengths),
    "shorter_wins": shares,
    "counter": spec.counter,
  }


def _mean(values: Iterable[float]) -> float | None:
  values = list(values)
  return math.fsum(values) / len(values) if values else None


def lift_of(pair: PreferencePair) -> Mapping[str, Any] | None:
  """Returns what augmentation says of a limited sample; None for a pair as it was given."""
  return pair.provenance.get("lift")
