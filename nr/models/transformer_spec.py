"""Settings of a decoder-only transformer: one frozen record for four families."""

import dataclasses
from typing import Any, Self

from nr.spec import Spec

POSITIONS = ("learned", "rotary")
NORMS = ("layer_norm", "rms_norm")
MLPS = ("gelu", "gelu_exact", "swiglu", "geglu")
DTYPES = ("float32", "bfloat16", "float16")
LAYERS = ("scan", "unroll")
REMATS = ("none", "full", "dots")
ATTENTIONS = ("auto", "dot_product", "blocked")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
  """Llama 3's stretching of slow rotary frequencies (arXiv:2407.21783, and its released code).

  Wavelengths longer than `original_max_length / low_frequency_factor` are
  multiplied by `factor`, those shorter than `original_max_length /
  high_frequency_factor` are kept, and those between are interpolated.
  """

  factor: float = 8.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class TransformerSpec(Spec):
  """Settings of `Transformer`; GPT-2, Llama, Qwen and Gemma are values of it.

  Attributes:
    vocab_size: number of token ids V.
    num_layers: number of blocks N.
    model_dim: width D of the residual stream.
    num_heads: query heads H.
    num_kv_heads: key and value heads J; H when None.
    head_dim: size K of a head; D / H when None.
    mlp_dim: hidden width F; when None 4 D, or for gated MLPs 8 D / 3 rounded up to a multiple of 64.
    max_length: most positions a sequence may have (the table's size when learned).
    positions: "learned" absolute positions or "rotary" (arXiv:2104.09864, half-split).
    rotary_base: base of the rotary wavelengths.
    rotary_scaling: Llama 3's frequency scaling, or None.
    norm: "layer_norm" or "rms_norm"; statistics are float32.
    norm_epsilon: added to the variance.
    norm_offset: norms multiply by 1 + scale, with scale starting at 0 (Gemma).
    mlp: "gelu" (tanh), "gelu_exact", "swiglu" (arXiv:2002.05202) or "geglu" (tanh).
    use_bias: biases in every projection and in layer norms.
    use_qkv_bias: biases on queries, keys, values; as `use_bias` when None (Qwen2: True).
    use_qk_norm: RMS norm of queries and keys per head, before rotation (Qwen3).
    scale_embedding: multiply embeddings by sqrt(D) (Gemma).
    tied_head: the token embedding is also the output head.
    dropout: probability of dropping embeddings, attention weights and residual outputs.
    init_std: standard deviation of initial weights; divided by sqrt(2 N) for
      projections that write to the residual stream.
    dtype: compute type; softmax, norm statistics and logits are float32 whatever it is.
    param_dtype: storage type of parameters.
    layers: "scan" (stacked blocks under `lax.scan`: compiles fast, for accelerators)
      or "unroll" (an array a layer: fastest on CPU). Values are the same.
    remat: "none", "full" (save block inputs only) or "dots" (also matrix products).
    attention: "blocked" (static blocks of queries), "dot_product"
      (`jax.nn.dot_product_attention`) or "auto" (blocked on CPU).
  """

  vocab_size: int
  num_layers: int
  model_dim: int
  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  max_length: int = 1024
  positions: str = "learned"
  rotary_base: float = 10000.0
  rotary_scaling: RotaryScaling | None = None
  norm: str = "layer_norm"
  norm_epsilon: float = 1e-5
  norm_offset: bool = False
  mlp: str = "gelu"
  use_bias: bool = True
  use_qkv_bias: bool | None = None
  use_qk_norm: bool = False
  scale_embedding: bool = False
  tied_head: bool = True
  dropout: float = 0.0
  init_std: float = 0.02
  dtype: str = "float32"
  param_dtype: str = "float32"
  layers: str = "scan"
  remat: str = "none"
  attention: str = "auto"

  def __post_init__(self):
    self._resolve_sizes()
    for name, choices in _CHOICES.items():
      _require(self, name, getattr(self, name) in choices, f"choose one of {', '.join(choices)}")
    kv = self.num_kv_heads
    _require(self, "num_kv_heads", self.num_heads % kv == 0, f"it must divide num_heads={self.num_heads}")
    is_paired = self.positions == "learned" or self.head_dim % 2 == 0
    _require(self, "head_dim", is_paired, "rotary positions need an even size")
    _require(self, "dropout", 0 <= self.dropout < 1, "give a probability in [0, 1)")
    for name in ("rotary_base", "norm_epsilon", "init_std"):
      _require(self, name, getattr(self, name) > 0, "give a positive number")
    unused = self.rotary_scaling is not None and self.positions != "rotary"
    _require(self, "rotary_scaling", not unused, "it needs positions='rotary'")

  def _resolve_sizes(self) -> None:
    for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "max_length"):
      value = getattr(self, name)
      _require(self, name, isinstance(value, int) and value > 0, "give a positive integer")

    def resolve(name: str, value: Any) -> None:
      object.__setattr__(self, name, value)

    if isinstance(self.rotary_scaling, dict):
      resolve("rotary_scaling", RotaryScaling(**self.rotary_scaling))
    if self.num_kv_heads is None:
      resolve("num_kv_heads", self.num_heads)
    if self.head_dim is None:
      divides = self.model_dim % self.num_heads == 0
      _require(self, "num_heads", divides, f"it must divide model_dim={self.model_dim}, or set head_dim")
      resolve("head_dim", self.model_dim // self.num_heads)
    if self.mlp_dim is None:
      gated_dim = -(-8 * self.model_dim // (3 * 64)) * 64
      resolve("mlp_dim", gated_dim if self.is_gated else 4 * self.model_dim)
    if self.use_qkv_bias is None:
      resolve("use_qkv_bias", self.use_bias)
    for name in ("num_kv_heads", "head_dim", "mlp_dim"):
      is_size = isinstance(getattr(self, name), int) and getattr(self, name) > 0
      _require(self, name, is_size, "give a positive integer, or None for the default")

  @property
  def is_gated(self) -> bool:
    """Whether the MLP multiplies an activated gate with a linear path."""
    return self.mlp in ("swiglu", "geglu")

  @classmethod
  def gpt2(cls, **settings: Any) -> Self:
    """GPT-2: learned positions, layer norm, biases, tanh-GELU, tied head; 124M by default."""
    family = dict(vocab_size=50257, num_layers=12, model_dim=768, num_heads=12, max_length=1024)
    return cls(**(family | settings))

  @classmethod
  def llama(cls, **settings: Any) -> Self:
    """Llama: rotary positions, RMS norm, SwiGLU, no biases, untied head. Give the sizes."""
    family = dict(positions="rotary", norm="rms_norm", mlp="swiglu", use_bias=False, tied_head=False)
    return cls(**(family | dict(max_length=2048) | settings))

  @classmethod
  def qwen2(cls, **settings: Any) -> Self:
    """Qwen2: Llama with biases on queries, keys and values."""
    family = dict(use_qkv_bias=True, norm_epsilon=1e-6, rotary_base=1e6, max_length=32768)
    return cls.llama(**(family | settings))

  @classmethod
  def qwen3(cls, **settings: Any) -> Self:
    """Qwen3: Llama with RMS norm of each head's queries and keys, and heads of 128."""
    family = dict(use_qk_norm=True, head_dim=128, norm_epsilon=1e-6, rotary_base=1e6, max_length=32768)
    return cls.llama(**(family | settings))

  @classmethod
  def gemma(cls, **settings: Any) -> Self:
    """Gemma 1: GeGLU, 1 + scale norms, scaled and tied embeddings, heads of 256."""
    family = dict(mlp="geglu", norm_offset=True, scale_embedding=True, tied_head=True)
    return cls.llama(**(family | dict(head_dim=256, norm_epsilon=1e-6, max_length=8192) | settings))

  def replace(self, **settings: Any) -> Self:
    """Returns a copy with other settings; derived sizes (mlp_dim, head_dim) stay as they are."""
    return dataclasses.replace(self, **settings)


_CHOICES = {
  "positions": POSITIONS,
  "norm": NORMS,
  "mlp": MLPS,
  "dtype": DTYPES,
  "param_dtype": DTYPES,
  "layers": LAYERS,
  "remat": REMATS,
  "attention": ATTENTIONS,
}


def _require(spec: TransformerSpec, name: str, is_valid: bool, remedy: str) -> None:
  if not is_valid:
    raise ValueError(f"TransformerSpec.{name}={getattr(spec, name)!r}: {remedy}")
