"""The orders and parameter names of transformers, vLLM and llama.cpp.

A chain's law depends on its order, and peers differ in theirs. Nothing here is
implicit: `ordered` sorts transforms into a peer's order, `from_settings` makes the
chain that a peer's settings stand for. Orders read in transformers 5.23
(`_get_logits_processor`), vLLM 0.33 (`v1/sample/sampler.py`) and llama.cpp
(`common/common.h`, `common/sampling.cpp`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nr.generation.transforms.adaptive_truncation import AdaptiveP, MirostatV1, MirostatV2, Xtc
from nr.generation.transforms.algebra import Chain, Transform, chain
from nr.generation.transforms.biases import BadWords, LogitBias, SequenceBias
from nr.generation.transforms.penalties import Dry, FrequencyPresence, NoRepeatNgram, RepetitionPenalty
from nr.generation.transforms.temperature import DynamicTemperature, Temperature
from nr.generation.transforms.token_rules import (
  AllowedTokens,
  ExponentialDecay,
  ForcedTokens,
  MaxLength,
  MinLength,
  SuppressTokens,
)
from nr.generation.transforms.truncation import Epsilon, Eta, MinP, TopH, TopK, TopNSigma, TopP, Typical
from nr.names import unknown

ORDERS = {
  "hf": (
    ("guidance",),
    ("sequence_bias", "logit_bias"),
    ("repetition_penalty",),
    ("no_repeat_ngram",),
    ("bad_words",),
    ("min_length",),
    ("allowed_tokens",),
    ("forced_tokens",),
    ("max_length",),
    ("exponential_decay",),
    ("suppress_tokens",),
    ("temperature", "adaptive_temperature"),
    ("top_h",),
    ("top_k",),
    ("top_p",),
    ("min_p",),
    ("typical",),
    ("epsilon",),
    ("eta",),
    ("green_list", "tournament"),
  ),
  "vllm": (
    ("allowed_tokens",),
    ("bad_words",),
    ("min_length",),
    ("logit_bias",),
    ("repetition_penalty",),
    ("frequency_presence",),
    ("temperature", "adaptive_temperature"),
    ("min_p",),
    ("top_k",),
    ("top_p",),
  ),
  "llamacpp": (
    ("logit_bias",),
    ("repetition_penalty",),
    ("frequency_presence",),
    ("dry",),
    ("top_n_sigma",),
    ("top_k",),
    ("typical",),
    ("top_p",),
    ("min_p",),
    ("xtc",),
    ("temperature", "dynamic_temperature"),
    ("adaptive_p", "mirostat_v1", "mirostat_v2"),
  ),
}


def ordered(transforms: Iterable[Transform], preset: str) -> Chain:
  """Sorts transforms into a peer's order.

  Args:
    transforms: in any order; those of one place keep theirs.
    preset: "hf", "vllm" or "llamacpp".

  Returns:
    The chain.

  Raises:
    ValueError: an unknown preset, or a transform that has no place in it.
  """
  if preset not in ORDERS:
    raise ValueError(unknown("preset", preset, ORDERS))
  places = {name: place for place, names in enumerate(ORDERS[preset]) for name in names}
  flat = chain(*transforms).transforms
  for each in flat:
    if each.name not in places:
      raise ValueError(
        f"{each.name} has no place in the order of {preset!r}, which has {', '.join(places)}; "
        "write the order out with chain(...)"
      )
  return chain(*sorted(flat, key=lambda each: places[each.name]))


# Settings of the same objects that are not about the law of the next token.
DRIVERS = {
  "hf": (
    "assistant_early_exit bos_token_id cache_implementation do_sample early_stopping eos_token_id "
    "length_penalty max_length max_new_tokens max_time num_beams num_return_sequences "
    "output_attentions output_hidden_states output_logits output_scores pad_token_id "
    "return_dict_in_generate stop_strings transformers_version use_cache"
  ).split(),
  "vllm": (
    "detokenize eos_token_id ignore_eos include_stop_str_in_output logprobs max_tokens n output_kind "
    "prompt_logprobs seed skip_special_tokens spaces_between_special_tokens stop stop_token_ids"
  ).split(),
  "llamacpp": "cache_prompt ignore_eos max_tokens n_keep n_predict n_probs seed stop stream".split(),
}


def from_settings(settings: Mapping[str, Any], order: str = "hf") -> Chain:
  """Makes the chain that settings under a peer's names stand for, in the peer's order.

  Only what is given makes a transform, and None counts as not given: a peer's
  defaults, such as the top-k of 50 or 40, are not assumed. Settings of the decoding
  around the law (lengths, beams, seeds, stops) are left to the drivers.

  Args:
    settings: such as {"temperature": 0.7, "top_p": 0.9}, each for all rows.
    order: whose names and order: "hf" (`GenerationConfig`), "vllm" (`SamplingParams`; words as
      token ids) or "llamacpp" (server parameters; sequence breakers as token ids).

  Returns:
    The chain.

  Raises:
    ValueError: a name that this peer does not have, with the nearest it has, or one
      that has no counterpart here.
  """
  makers: dict[str, Callable[[dict], list[Transform]]] = {"hf": _hf, "vllm": _vllm, "llamacpp": _llamacpp}
  if order not in makers:
    raise ValueError(unknown("order", order, makers))
  reader = _Reader({name: value for name, value in settings.items() if value is not None})
  made = makers[order](reader)
  known = [*reader.asked, *DRIVERS[order]]
  for name in reader:
    if name not in known:
      raise ValueError(unknown(f"{order} setting", name, sorted(known)))
  return ordered((each for each in made if not each.is_off()), order)


class _Reader(dict):
  """A mapping that remembers which names were asked for."""

  def __init__(self, settings: Mapping[str, Any]):
    super().__init__(settings)
    self.asked: list[str] = []

  def read(self, name: str, default: Any = None) -> Any:
    self.asked.append(name)
    return self.get(name, default)

  def make(self, cls: type, *names: str, **fixed: Any) -> list[Transform]:
    """Returns a transform with the values of the names in front, if the first is given."""
    values = [self.read(name) for name in names]
    return [] if values[0] is None else [cls(*values, **fixed)]

  def needed(self, name: str, what: str) -> Any:
    if self.read(name) is None:
      raise ValueError(f"{what} needs {name}; give the token ids that end a text")
    return self[name]

  def refuse(self, name: str, why: str) -> None:
    if self.read(name) is not None:
      raise ValueError(f"{name}={self[name]!r}: {why}")


def _pairs(biases: Any) -> tuple[list, list]:
  items = biases.items() if isinstance(biases, Mapping) else biases
  keys, values = zip(*items, strict=True)
  return list(keys), list(values)


def _hf(reader: _Reader) -> list[Transform]:
  made = _hf_rules(reader)
  ends = reader.read("eos_token_id")
  count = 1 if ends is None or isinstance(ends, int) else len(ends)
  beams = reader.read("num_beams", 1)
  # As transformers: beams need a token to go on with besides those that end them.
  least = dict(min_tokens_to_keep=count + 1) if beams > 1 else {}
  if reader.read("do_sample") is False:
    for name in (
      "temperature",
      "top_k",
      "top_p",
      "min_p",
      "typical_p",
      "epsilon_cutoff",
      "eta_cutoff",
      "top_h",
    ):
      reader.read(name)  # transformers ignores them too
    return made + ([] if beams > 1 else [Temperature(0.0)])
  made += reader.make(Temperature, "temperature")
  made += reader.make(TopH, "top_h", variant="hf")
  made += reader.make(TopK, "top_k", **least)
  made += reader.make(TopP, "top_p", **least)
  made += reader.make(MinP, "min_p", **least)
  made += reader.make(Typical, "typical_p", **least)
  made += reader.make(Epsilon, "epsilon_cutoff", **least)
  made += reader.make(Eta, "eta_cutoff", **least)
  return made


def _hf_rules(reader: _Reader) -> list[Transform]:
  reader.refuse("guidance_scale", "add guidance(...) to the chain, and its stream to the model")
  reader.refuse("watermarking_config", "its green lists cannot be reproduced here; use green_list(...)")
  made: list[Transform] = []
  if (biases := reader.read("sequence_bias")) is not None:
    made.append(SequenceBias(*_pairs(biases)))
  made += reader.make(RepetitionPenalty, "repetition_penalty")
  made += reader.make(NoRepeatNgram, "no_repeat_ngram_size")
  if (words := reader.read("bad_words_ids")) is not None:
    ends = reader.read("eos_token_id", [])
    ends = [ends] if isinstance(ends, int) else ends
    # As transformers: the end of text cannot be a bad word.
    if words := [word for word in words if word not in [[end] for end in ends]]:
      made.append(BadWords(words))
  if (least := reader.read("min_length")) is not None:
    made.append(MinLength(reader.needed("eos_token_id", "min_length"), least, "all"))
  if (least := reader.read("min_new_tokens")) is not None:
    made.append(MinLength(reader.needed("eos_token_id", "min_new_tokens"), least))
  if (tokens := reader.read("forced_bos_token_id")) is not None:
    made.append(ForcedTokens(tokens, 1, "all"))
  if (tokens := reader.read("forced_eos_token_id")) is not None:
    made.append(MaxLength(tokens, reader.needed("max_length", "forced_eos_token_id"), "all"))
  if (decay := reader.read("exponential_decay_length_penalty")) is not None:
    made.append(ExponentialDecay(reader.needed("eos_token_id", "exponential_decay_length_penalty"), *decay))
  made += reader.make(SuppressTokens, "suppress_tokens")
  made += reader.make(SuppressTokens, "begin_suppress_tokens", steps=1)
  return made


def _vllm(reader: _Reader) -> list[Transform]:
  made = reader.make(AllowedTokens, "allowed_token_ids")
  made += reader.make(BadWords, "bad_words")
  if reader.read("min_tokens"):
    made.append(MinLength(reader.needed("stop_token_ids", "min_tokens"), reader["min_tokens"]))
  if biases := reader.read("logit_bias"):
    tokens, values = _pairs(biases)
    made.append(LogitBias([int(token) for token in tokens], values))
  made += reader.make(RepetitionPenalty, "repetition_penalty")
  made += _frequency_presence(reader, scope="generated")
  made += reader.make(Temperature, "temperature")
  made += reader.make(MinP, "min_p")
  made += _top_k(reader)
  made += reader.make(TopP, "top_p")
  return made


def _llamacpp(reader: _Reader) -> list[Transform]:
  made: list[Transform] = []
  if biases := reader.read("logit_bias"):
    tokens, values = _pairs(biases)
    made.append(LogitBias([int(token) for token in tokens], values))
  mode = reader.read("mirostat", 0)
  if mode not in (0, 1, 2):
    raise ValueError(f"mirostat={mode!r}: give 0, 1 or 2")
  target, rate = reader.read("mirostat_tau", 5.0), reader.read("mirostat_eta", 0.1)
  steered = [(MirostatV1, MirostatV2)[mode - 1](target, rate)] if mode else []
  others = _llamacpp_chain(reader)
  # As llama.cpp: Mirostat takes the place of all samplers but the temperature.
  made += [each for each in others if each.name == "temperature"] if mode else others
  aim = reader.read("adaptive_target", -1)
  if aim >= 0 and not mode:
    made.append(AdaptiveP(aim, min(max(reader.read("adaptive_decay", 0.9), 0.0), 0.99)))
  reader.read("adaptive_decay")
  return made + steered


def _llamacpp_chain(reader: _Reader) -> list[Transform]:
  last = reader.read("repeat_last_n", 64)
  window = dict(window=max(last, 0))  # -1 is the whole context, our 0; their 0 is off
  made: list[Transform] = []
  penalties = reader.make(RepetitionPenalty, "repeat_penalty", **window)
  penalties += _frequency_presence(reader, scope="all", **window)
  made += penalties if last else []
  multiplier, dry_last = reader.read("dry_multiplier", 0.0), reader.read("dry_penalty_last_n", -1)
  base, allowed = reader.read("dry_base", 1.75), reader.read("dry_allowed_length", 2)
  breakers = reader.read("dry_sequence_breakers", ())
  if multiplier and base >= 1 and dry_last:
    made.append(Dry(multiplier, base, allowed, max(dry_last, 0), breakers))
  if (n := reader.read("top_n_sigma")) is not None:
    made.append(TopNSigma(max(n, 0)))
  made += _top_k(reader)
  made += reader.make(Typical, "typical_p")
  made += reader.make(TopP, "top_p")
  made += reader.make(MinP, "min_p")
  chance, threshold = reader.read("xtc_probability", 0.0), reader.read("xtc_threshold", 0.1)
  made += [Xtc(chance, threshold)] if chance > 0 else []
  middle, spread = reader.read("temperature"), reader.read("dynatemp_range", 0.0)
  exponent = reader.read("dynatemp_exponent", 1.0)
  if spread > 0:
    middle = 1.0 if middle is None else middle
    made.append(DynamicTemperature(max(middle - spread, 0), middle + spread, exponent))
  elif middle is not None:
    made.append(Temperature(max(middle, 0)))
  return made


def _top_k(reader: _Reader) -> list[Transform]:
  k = reader.read("top_k")
  return [] if k is None else [TopK(max(k, 0))]  # vLLM and llama.cpp write -1 for all


def _frequency_presence(reader: _Reader, **fixed: Any) -> list[Transform]:
  frequency, presence = reader.read("frequency_penalty"), reader.read("presence_penalty")
  if frequency is None and presence is None:
    return []
  return [FrequencyPresence(frequency or 0.0, presence or 0.0, **fixed)]
