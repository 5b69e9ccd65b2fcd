"""Settings of what CoCoMix and its baselines insert: one frozen record with every axis named."""

import dataclasses

from nr.labels import MAX_CONCEPTS, NO_LABEL
from nr.models.top_k import IMPLEMENTATIONS
from nr.models.transformer_spec import TransformerSpec
from nr.spec import Spec

# All values of an axis; the second tuple holds those that are planned but not built.
MODES = ("cocomix", "mix_only", "prediction_only", "add", "pause", "hidden", "thought", "none"), ()
NORMS = ("reference", "none"), ()
HEAD_IMPLS = ("fused", "dense"), ()
COMPRESSION_IMPLS = ("gather", "dense"), ()
TOP_K_IMPLS = IMPLEMENTATIONS, ("approximate",)
LAST_BLOCKS = ("readout_rows", "all_rows"), ()

PREDICTING = ("cocomix", "mix_only", "prediction_only", "add")
MIXING = ("cocomix", "mix_only", "add")
INTERLEAVING = ("cocomix", "mix_only", "pause", "hidden", "thought")


@dataclasses.dataclass(frozen=True)
class ConceptMixingSpec(Spec):
  """Settings of `ConceptMixingTransformer` besides those of its transformer.

  Attributes:
    insert_at: index of the block before which rows are inserted, from 0.
    num_concepts: C, latents of the teacher's autoencoder; read by modes that predict concepts.
    top_k: K, concepts mixed at a position; likewise.
    mode: "cocomix" interleaves concept rows; "mix_only" is the same model, to be
      trained without the concept loss; "prediction_only" predicts concepts and
      mixes none; "add" adds the concept to its token's stream; "pause" interleaves
      one learned vector; "hidden" predicts the teacher's tapped state and
      interleaves the prediction; "thought" interleaves the model's own last hidden
      state of a first pass, without any teacher; "none" is a plain transformer.
    norm: "reference" normalises the stream before the head and undoes it after
      the compression, as the released code does; "none" is the paper's equation 3.
    insert_every: n; only tokens at positions n - 1, 2n - 1, ... have a row behind
      them and the others are read at their own (ours; the paper: 1).
    target_dim: for "hidden", the width of the teacher.
    mlp_dim: for "hidden", the hidden width of its MLP; 0: four times the
      model's (the paper names none).
    refinements: for "thought", further passes in which thoughts see earlier
      thoughts (Jacobi iterations); with 0 they come from tokens alone.
    head_impl: "fused" holds the logits of `concept_chunk` concepts at a time and
      recomputes them in the backward pass; "dense" holds all. Same values.
    concept_chunk: concepts a chunk, for "fused" (of those on a device, where concepts are
      split over several); 0 takes all at once, as "dense".
    compression_impl: "gather" reads K rows a position, "dense" multiplies by all C;
      with many concepts gather is much the faster on CPU. With concepts split over
      devices dense should need less communication.
    top_k_impl: see `nr.models.top_k`; same values.
    last_block: "readout_rows" computes queries and MLP of the last block only for
      the rows that are read; "all_rows" for all. Same values. With `insert_every`
      above 1 it computes all in either case.
  """

  insert_at: int
  num_concepts: int
  top_k: int = 32
  mode: str = "cocomix"
  norm: str = "reference"
  insert_every: int = 1
  target_dim: int = 0
  mlp_dim: int = 0
  refinements: int = 0
  head_impl: str = "fused"
  concept_chunk: int = 4096
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
    for name in ("num_concepts", "top_k", "insert_every"):
      value = getattr(self, name)
      if not isinstance(value, int) or value <= 0:
        self._refuse(name, "give a positive integer")
    for name, told in _COUNTS.items():
      value = getattr(self, name)
      if not isinstance(value, int) or value < 0:
        self._refuse(name, told)
    if self.num_concepts > MAX_CONCEPTS:
      self._refuse("num_concepts", f"labels are uint16 with {NO_LABEL} for none, so at most {MAX_CONCEPTS}")
    if self.top_k > self.num_concepts:
      self._refuse("top_k", f"must be at most num_concepts={self.num_concepts}")
    self._check_mode()

  def _check_mode(self) -> None:
    """Refuses fields that the mode does not read, and the lack of those that it needs."""
    if self.mode == "hidden" and not self.target_dim:
      self._refuse("target_dim", "mode 'hidden' needs the width of the teacher")
    for name, mode in (("target_dim", "hidden"), ("mlp_dim", "hidden"), ("refinements", "thought")):
      if getattr(self, name) and self.mode != mode:
        self._refuse(name, f"mode {self.mode!r} does not read it, only {mode!r} does; leave it at 0")
    if self.insert_every > 1 and not self.is_interleaving:
      self._refuse("insert_every", f"mode {self.mode!r} inserts no rows; leave it at 1")

  def _refuse(self, name: str, remedy: str) -> None:
    raise ValueError(f"ConceptMixingSpec.{name}={getattr(self, name)!r}: {remedy}")

  def check_model(self, model: TransformerSpec) -> None:
    """Raises ValueError when the insertion is not before one of the model's blocks."""
    if self.insert_at >= model.num_layers:
      last = model.num_layers - 1
      self._refuse("insert_at", f"the model has {model.num_layers} blocks; choose 0 to {last}")

  @property
  def is_predicting(self) -> bool:
    """Whether concepts are predicted, and can be trained on labels."""
    return self.mode in PREDICTING

  @property
  def is_mixing(self) -> bool:
    """Whether predicted concepts reach the stream, and can be steered."""
    return self.mode in MIXING

  @property
  def is_interleaving(self) -> bool:
    """Whether there are rows besides those of the tokens."""
    return self.mode in INTERLEAVING

  def regression_dim(self, model: TransformerSpec) -> int:
    """Returns the hidden width of the MLP of mode "hidden"."""
    return self.mlp_dim or 4 * model.model_dim

  def num_parameters(self, model: TransformerSpec) -> tuple[int, int]:
    """Returns the parameters stored besides the transformer's, and those active for a token.

    Source: arXiv 2502.08524 appendix A counts (C + K) D as active: only K rows of
    the compression are read at a position.
    """
    C, D = self.num_concepts, model.model_dim
    if self.mode == "pause":
      return D, D
    if self.mode == "hidden":
      F, E = self.regression_dim(model), self.target_dim
      stored = D * F + F + F * E + E + E * D + D
      return stored, stored
    if not self.is_predicting:
      return 0, 0
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

# Fields that may be 0, and what is told to whoever gives something else.
_COUNTS = {
  "insert_at": "give the index of a block, from 0",
  "concept_chunk": "give a number of concepts, or 0 for all",
  "target_dim": "give the width of the teacher",
  "mlp_dim": "give a width, or 0 for four times the model's",
  "refinements": "give a number of passes, or 0 for none",
}
