"""Settings of the concept path of CoCoMix: one frozen record with every axis named."""

import dataclasses

from nr.labels import MAX_CONCEPTS, NO_LABEL
from nr.models.top_k import IMPLEMENTATIONS
from nr.models.transformer_spec import TransformerSpec
from nr.spec import Spec

# All values of an axis; the second tuple holds those that are planned but not built.
MODES = ("cocomix", "mix_only", "prediction_only", "add", "none"), ("pause", "hidden")
NORMS = ("reference", "none"), ()
HEAD_IMPLS = ("fused", "dense"), ()
COMPRESSION_IMPLS = ("gather", "dense"), ()
TOP_K_IMPLS = IMPLEMENTATIONS, ("approximate",)
LAST_BLOCKS = ("readout_rows", "all_rows"), ()


@dataclasses.dataclass(frozen=True)
class ConceptMixingSpec(Spec):
  """Settings of `ConceptMixingTransformer` besides those of its transformer.

  Attributes:
    insert_at: index of the block before which concepts are inserted, from 0.
    num_concepts: C, latents of the teacher's autoencoder.
    top_k: K, concepts mixed at a position.
    mode: "cocomix" interleaves concept rows; "mix_only" is the same model, to be
      trained without the concept loss; "prediction_only" predicts concepts and
      mixes none; "add" adds the concept to its token's stream; "none" is a plain
      transformer.
    norm: "reference" normalises the stream before the head and undoes it after
      the compression, as the released code does; "none" is the paper's equation 3.
    head_impl: "fused" holds the logits of `chunk_length` positions a row at a time and
      recomputes them in the backward pass; "dense" holds all. Same values; with
      many concepts fused is the faster one on CPU too.
    chunk_length: positions a row, for "fused"; 0 takes all at once, as "dense".
    compression_impl: "gather" reads K rows a position, "dense" multiplies by all C;
      with many concepts gather is much the faster on CPU. With concepts split over
      devices dense should need less communication.
    top_k_impl: see `nr.models.top_k`; same values.
    last_block: "readout_rows" computes queries and MLP of the last block only for
      the rows that are read; "all_rows" for all. Same values.
  """

  insert_at: int
  num_concepts: int
  top_k: int = 32
  mode: str = "cocomix"
  norm: str = "reference"
  head_impl: str = "fused"
  chunk_length: int = 128
  compression_impl: str = "gather"
  top_k_impl: str = "chunked"
  last_block: str = "readout_rows"

  def __post_init__(self):
    for name, (built, planned) in _CHOICES.items():
      value = getattr(self, name)
      if value in planned:
        self._refuse(name, f"not available yet; available are {', '.join(built)}")
      if value not in built:
        self._refuse(name, f"choose one of {', '.join(built)}")
    for name in ("num_concepts", "top_k"):
      value = getattr(self, name)
      if not isinstance(value, int) or value <= 0:
        self._refuse(name, "give a positive integer")
    if not isinstance(self.chunk_length, int) or self.chunk_length < 0:
      self._refuse("chunk_length", "give a number of positions, or 0 for all")
    if not isinstance(self.insert_at, int) or self.insert_at < 0:
      self._refuse("insert_at", "give the index of a block, from 0")
    if self.num_concepts > MAX_CONCEPTS:
      self._refuse("num_concepts", f"labels are uint16 with {NO_LABEL} for none, so at most {MAX_CONCEPTS}")
    if self.top_k > self.num_concepts:
      self._refuse("top_k", f"must be at most num_concepts={self.num_concepts}")

  def _refuse(self, name: str, remedy: str) -> None:
    raise ValueError(f"ConceptMixingSpec.{name}={getattr(self, name)!r}: {remedy}")

  def check_model(self, model: TransformerSpec) -> None:
    """Raises ValueError when the insertion is not before one of the model's blocks."""
    if self.insert_at >= model.num_layers:
      last = model.num_layers - 1
      self._refuse("insert_at", f"the model has {model.num_layers} blocks; choose 0 to {last}")

  @property
  def is_mixing(self) -> bool:
    """Whether predicted concepts reach the stream."""
    return self.mode in ("cocomix", "mix_only", "add")

  @property
  def is_interleaving(self) -> bool:
    """Whether concepts have rows of their own."""
    return self.mode in ("cocomix", "mix_only")

  def num_parameters(self, model: TransformerSpec) -> tuple[int, int]:
    """Returns the parameters that the concept path stores, and those active for a token.

    Source: arXiv 2502.08524 appendix A counts (C + K) D as active: only K rows of
    the compression are read at a position.
    """
    if self.mode == "none":
      return 0, 0
    C, D = self.num_concepts, model.model_dim
    stored, active = C * D + C + D, C * D
    if self.is_mixing:
      stored, active = stored + C * D + D, active + self.top_k * D
    return stored, active


_CHOICES = {
  "mode": MODES,
  "norm": NORMS,
  "head_impl": HEAD_IMPLS,
  "compression_impl": COMPRESSION_IMPLS,
  "top_k_impl": TOP_K_IMPLS,
  "last_block": LAST_BLOCKS,
}
