"""Settings of a sparse autoencoder: one frozen record, in which no option is idle.

An option that only some architectures read is None where nobody set it. For an architecture that
reads it, None becomes that architecture's own value; for another one, a value is refused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from nr import names
from nr.models.top_k import IMPLEMENTATIONS
from nr.spec import Spec

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "relu")
NORMALISATIONS = ("layer_norm_unbiased", "constant_norm", "none")
DECODINGS = ("gather", "dense")
DECODER_NORMS = ("unit", "scaled")
PENALTIES = ("l0", "target", "tanh")
_CHOICES = {
  "arch": ARCHITECTURES,
  "normalisation": NORMALISATIONS,
  "decoding": DECODINGS,
  "decoder_norm": DECODER_NORMS,
  "top_k": IMPLEMENTATIONS,
}
BATCH_SELECTING = ("batchtopk", "matryoshka")
"""Architectures that choose among all latents of a batch in training and use a threshold afterwards."""
_SELECTING = ("topk", *BATCH_SELECTING)
_PENALISED = ("jumprelu", "gated", "relu")
# Shares of the dictionary that each of the nested ones adds; the last takes what is left.
_PREFIX_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
# Ours: the loss is a fraction of variance, not a sum over the width as in the libraries.
_SPARSITY = {"gated": 3e-3, "relu": 3e-3, "l0": 1e-3, "target": 1.0, "tanh": 1e-3}


@dataclasses.dataclass(frozen=True)
class SparseAutoencoderSpec(Spec):
  """Settings of a sparse autoencoder.

  Attributes:
    model_dim: width D of the activations.
    num_latents: number C of latents (concepts).
    k: active latents a token: exactly so many (topk), on average over the batch (batchtopk, matryoshka), or
      the number aimed at (jumprelu with penalty "target"). Where training does not read it, it still sets
      `max_active`.
    k_aux: dead latents used by the auxiliary loss; all of them when fewer are dead. For architectures
      that select (topk, batchtopk, matryoshka); None: half the width, as libraries have it (the
      release: 256 for a width of 768).
    alpha: weight of the auxiliary loss, for the same architectures; None: 1/32.
    dead_tokens: a latent is dead when it has not fired for more than this many tokens.
    epsilon: added to the standard deviation (not inside the root) in the normalisation.
    arch: "topk" (arXiv 2406.04093), "batchtopk" (2412.06410), "matryoshka" (2503.17547, nested dictionaries
      under BatchTopK), "jumprelu" (2407.14435), "gated" (2404.16014), "relu" (ReLU with an L1 penalty).
    normalisation: "layer_norm_unbiased", standard deviation with D - 1 in the denominator; "constant_norm",
      every activation scaled to norm sqrt(D); "none".
    decoding: how a sparse code is decoded: "gather" reads its decoder rows, "dense" multiplies by the whole
      decoder; same result. Gathering moves less on accelerators, the dense product is quicker for
      small C on CPU.
    top_k: implementation of the exact top-k (see `nr.models.top_k`); the result does not depend on it.
    decoder_norm: "unit" keeps decoder rows at norm 1 through training; "scaled" leaves them free and
      measures every latent in units of its row's norm, which is the same function with the norm moved
      into the encoder.
    subtract_pre_bias: whether the encoder reads u - pre_bias (or u itself, as some published ones do).
    max_active: room of a sparse code, for all but topk (which has k); of more active latents the largest
      are kept. None: 4 k, at most C.
    threshold_rate: batchtopk and matryoshka: how fast the inference threshold follows the smallest kept
      activation of a batch; None: 0.01.
    prefixes: matryoshka: sizes of the nested dictionaries, ascending, the last one C; None: 1/32,
      3/32, 7/32, 15/32 and all of C.
    penalty: jumprelu: "l0", sparsity * L0 (the paper); "target", sparsity * (L0 / k - 1)^2
      (dictionary_learning); "tanh", sparsity * sum tanh(tanh_scale * activation) (Anthropic); None: "l0".
    bandwidth: jumprelu: width of the kernel of the straight-through gradient; None: 0.05 (SAELens;
      dictionary_learning and the paper have 0.001 on other scales).
    initial_threshold: jumprelu: None: 0.01 (SAELens).
    tanh_scale: jumprelu with penalty "tanh"; None: 4.
    sparsity: jumprelu, gated, relu: weight of the sparsity penalty beside an error measured as a fraction
      of variance; None: 1e-3 ("l0", "tanh"), 1 ("target"), 3e-3 (gated, relu). Ours.
    sparsity_warmup: the same: steps over which that weight grows from 0; None: 0, from the start.
    is_decoder_frozen: gated: whether the auxiliary reconstruction leaves the decoder alone (the paper,
      dictionary_learning) or trains it too (SAELens); None: True.
    dtype: compute type of the two large products; pre-activations and top-k stay float32.
    param_dtype: type of the parameters.
  """

  model_dim: int
  num_latents: int
  k: int
  k_aux: int | None = None
  alpha: float | None = None
  dead_tokens: int = 10_000_000
  epsilon: float = 1e-5
  arch: str = "topk"
  normalisation: str = "layer_norm_unbiased"
  decoding: str = "gather"
  top_k: str = "chunked"
  decoder_norm: str = "unit"
  subtract_pre_bias: bool = True
  max_active: int | None = None
  threshold_rate: float | None = None
  prefixes: tuple[int, ...] | None = None
  penalty: str | None = None
  bandwidth: float | None = None
  initial_threshold: float | None = None
  tanh_scale: float | None = None
  sparsity: float | None = None
  sparsity_warmup: int | None = None
  is_decoder_frozen: bool | None = None
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    for field, allowed in _CHOICES.items():
      if getattr(self, field) not in allowed:
        raise ValueError(names.unknown(f"sparse autoencoder {field}", getattr(self, field), allowed))
    if self.model_dim < 2:
      raise ValueError(f"model_dim={self.model_dim}: the unbiased deviation needs a width of at least 2")
    if not 1 <= self.k <= self.num_latents:
      raise ValueError(f"k={self.k} must lie between 1 and num_latents={self.num_latents}")
    self._resolve()
    self._check_numbers()

  def _resolve(self) -> None:
    """Gives options their architecture's values, and refuses those that it does not read."""
    for name, option in OPTIONS.items():
      value = getattr(self, name)
      if value is None and self.arch in option.architectures:
        object.__setattr__(self, name, option.default(self))
      elif value is not None and self.arch not in option.architectures:
        if name == "max_active" and value == self.k:
          continue  # what topk has in any case
        raise ValueError(
          f"{name}={value!r} decides nothing for arch={self.arch!r}; leave it unset (None), or choose one of "
          f"{', '.join(option.architectures)}"
        )
    if self.arch == "topk":
      object.__setattr__(self, "max_active", self.k)
    if self.prefixes is not None:
      object.__setattr__(self, "prefixes", tuple(self.prefixes))
    if self.arch == "jumprelu":
      if self.penalty not in PENALTIES:
        raise ValueError(names.unknown("sparse autoencoder penalty", str(self.penalty), PENALTIES))
      if self.tanh_scale is None and self.penalty == "tanh":
        object.__setattr__(self, "tanh_scale", 4.0)
      elif self.tanh_scale is not None and self.penalty != "tanh":
        raise ValueError(
          f"tanh_scale={self.tanh_scale} decides nothing for penalty={self.penalty!r}; leave it unset"
        )

  def _check_numbers(self) -> None:
    for name in ("k_aux", "max_active"):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= self.num_latents:
        raise ValueError(f"{name}={value} must lie between 1 and num_latents={self.num_latents}")
    if not 0 < self.dead_tokens < 2**30:
      raise ValueError(f"dead_tokens={self.dead_tokens} must lie between 1 and 2**30 - 1 (an int32 counter)")
    for name in ("alpha", "sparsity"):
      value = getattr(self, name)
      if value is not None and value < 0:
        raise ValueError(f"{name}={value} must not be negative; 0 switches that loss off")
    for name in ("sparsity_warmup", "initial_threshold"):
      value = getattr(self, name)
      if value is not None and value < 0:
        raise ValueError(f"{name}={value} must not be negative")
    for name in ("bandwidth", "tanh_scale"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(f"{name}={value} must be positive")
    if self.threshold_rate is not None and not 0 < self.threshold_rate <= 1:
      raise ValueError(f"threshold_rate={self.threshold_rate} must lie above 0 and at most at 1")
    if self.prefixes is not None:
      ascending = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes))
      if not ascending or self.prefixes[-1:] != (self.num_latents,):
        raise ValueError(
          f"prefixes={self.prefixes} must ascend from 1 or more to num_latents={self.num_latents}"
        )

  @property
  def is_selecting_in_batch(self) -> bool:
    """Whether this is the training form of an autoencoder that is used with a threshold."""
    return self.arch in BATCH_SELECTING

  def in_architecture(self, arch: str, **changes: Any) -> "SparseAutoencoderSpec":
    """Returns these settings for another architecture, options that it does not read left out."""
    fields = {
      name: value
      for name, value in self.to_dict().items()
      if name not in OPTIONS or arch in OPTIONS[name].architectures
    }
    return SparseAutoencoderSpec(**{**fields, "arch": arch, **changes})


class Option(NamedTuple):
  """A setting that not every architecture reads.

  Attributes:
    architectures: those that do.
    default: from the other settings to the value it has where none is given.
  """

  architectures: tuple[str, ...]
  default: Callable[[SparseAutoencoderSpec], Any]


def _default_prefixes(spec: SparseAutoencoderSpec) -> tuple[int, ...]:
  sizes, total = [], 0
  for share in _PREFIX_SHARES:
    total += int(share * spec.num_latents)
    sizes.append(total)
  return tuple(sorted({size for size in sizes if size} | {spec.num_latents}))


def _default_sparsity(spec: SparseAutoencoderSpec) -> float:
  return _SPARSITY.get(spec.penalty if spec.arch == "jumprelu" else spec.arch, 0.0)


OPTIONS = {
  "k_aux": Option(_SELECTING, lambda spec: min(max(1, spec.model_dim // 2), spec.num_latents)),
  "alpha": Option(_SELECTING, lambda spec: 1 / 32),
  "max_active": Option((*BATCH_SELECTING, *_PENALISED), lambda spec: min(4 * spec.k, spec.num_latents)),
  "threshold_rate": Option(BATCH_SELECTING, lambda spec: 0.01),
  "prefixes": Option(("matryoshka",), _default_prefixes),
  "penalty": Option(("jumprelu",), lambda spec: "l0"),
  "bandwidth": Option(("jumprelu",), lambda spec: 0.05),
  "initial_threshold": Option(("jumprelu",), lambda spec: 0.01),
  "tanh_scale": Option(("jumprelu",), lambda spec: None),
  "sparsity": Option(_PENALISED, _default_sparsity),
  "sparsity_warmup": Option(_PENALISED, lambda spec: 0),
  "is_decoder_frozen": Option(("gated",), lambda spec: True),
}
"""Settings that not every architecture reads, by name; sparsity is resolved after penalty."""
