"""Transforms of next-token logits: one algebra, and everything that is built in it."""

from nr.generation.transforms.adaptive_truncation import AdaptiveP, MirostatV1, MirostatV2, Xtc
from nr.generation.transforms.algebra import REGISTRY, Chain, Context, Transform, chain, transform
from nr.generation.transforms.penalties import Dry, FrequencyPresence, NoRepeatNgram, RepetitionPenalty
from nr.generation.transforms.temperature import AdaptiveTemperature, DynamicTemperature, Temperature
from nr.generation.transforms.text import describe, parse
from nr.generation.transforms.token_rules import (
  AllowedTokens,
  BadWords,
  ExponentialDecay,
  ForcedTokens,
  LogitBias,
  MaxLength,
  MinLength,
  SequenceBias,
  SuppressTokens,
  ThinkingBudget,
  is_looping,
)
from nr.generation.transforms.truncation import Epsilon, Eta, MinP, TopH, TopK, TopNSigma, TopP, Typical
from nr.generation.transforms.watermarks import GreenList, GumbelWatermark, Tournament

__all__ = [
  "REGISTRY",
  "AdaptiveP",
  "AdaptiveTemperature",
  "AllowedTokens",
  "BadWords",
  "Chain",
  "Context",
  "Dry",
  "DynamicTemperature",
  "Epsilon",
  "Eta",
  "ExponentialDecay",
  "ForcedTokens",
  "FrequencyPresence",
  "GreenList",
  "GumbelWatermark",
  "LogitBias",
  "MaxLength",
  "MinLength",
  "MinP",
  "MirostatV1",
  "MirostatV2",
  "NoRepeatNgram",
  "RepetitionPenalty",
  "SequenceBias",
  "SuppressTokens",
  "Temperature",
  "ThinkingBudget",
  "TopH",
  "TopK",
  "TopNSigma",
  "TopP",
  "Tournament",
  "Transform",
  "Typical",
  "Xtc",
  "chain",
  "describe",
  "is_looping",
  "parse",
  "transform",
]
