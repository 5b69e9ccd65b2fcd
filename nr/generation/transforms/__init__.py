"""Transforms of next-token logits: one algebra, and everything that is built in it."""

from nr.generation.transforms.adaptive_truncation import AdaptiveP, MirostatV1, MirostatV2, Xtc
from nr.generation.transforms.algebra import REGISTRY, Chain, Context, Transform, chain, transform
from nr.generation.transforms.biases import BadWords, LogitBias, SequenceBias
from nr.generation.transforms.guidance import Args, Fudge, Gedi, Rad, ValueGuidance
from nr.generation.transforms.layer_contrast import LayerContrast, early_exit_layers
from nr.generation.transforms.mixtures import (
  AutoregressiveReward,
  ContextAware,
  ContrastiveDecoding,
  ContrastiveReasoning,
  DExperts,
  Guidance,
  Mix,
  ProductOfExperts,
  ProxyTuning,
)
from nr.generation.transforms.penalties import Dry, FrequencyPresence, NoRepeatNgram, RepetitionPenalty
from nr.generation.transforms.presets import from_settings, ordered
from nr.generation.transforms.retrieval import KnnMix, build_datastore
from nr.generation.transforms.temperature import AdaptiveTemperature, DynamicTemperature, Temperature
from nr.generation.transforms.text import describe, parse
from nr.generation.transforms.token_rules import (
  AllowedTokens,
  ExponentialDecay,
  ForcedTokens,
  MaxLength,
  MinLength,
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
  "Args",
  "AutoregressiveReward",
  "BadWords",
  "Chain",
  "Context",
  "ContextAware",
  "ContrastiveDecoding",
  "ContrastiveReasoning",
  "DExperts",
  "Dry",
  "DynamicTemperature",
  "Epsilon",
  "Eta",
  "ExponentialDecay",
  "ForcedTokens",
  "FrequencyPresence",
  "Fudge",
  "Gedi",
  "GreenList",
  "Guidance",
  "GumbelWatermark",
  "KnnMix",
  "LayerContrast",
  "LogitBias",
  "MaxLength",
  "MinLength",
  "MinP",
  "MirostatV1",
  "MirostatV2",
  "Mix",
  "NoRepeatNgram",
  "ProductOfExperts",
  "ProxyTuning",
  "Rad",
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
  "ValueGuidance",
  "Xtc",
  "build_datastore",
  "chain",
  "describe",
  "early_exit_layers",
  "from_settings",
  "is_looping",
  "ordered",
  "parse",
  "transform",
]
