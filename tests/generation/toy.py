"""A chain whose 40 texts can be enumerated, its draft, and tiny networks: what decoders are tested on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nr.generation.language_models import Network
from nr.generation.markov import Markov
from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.parameters import split
from nr.models.transformer import Transformer, TransformerSpec

A, B, C, EOS, BOS = range(5)
MAX_NEW = 3
NAMES = "abcE"

# Rows: after a, b, c, the end (never read), the beginning.
TARGET_CV = np.array(
  [
    [0.10, 0.20, 0.30, 0.40],
    [0.05, 0.05, 0.05, 0.85],
    [0.25, 0.25, 0.10, 0.40],
    [0.25] * 4,
    [0.40, 0.35, 0.20, 0.05],
  ]
)
DRAFT_CV = np.array([[0.30, 0.30, 0.20, 0.20], [0.10, 0.10, 0.10, 0.70], [0.25] * 4, [0.25] * 4, [0.25] * 4])
TOY = Markov(jnp.log(jnp.asarray(TARGET_CV, jnp.float32)))
DRAFT = Markov(jnp.log(jnp.asarray(DRAFT_CV, jnp.float32)))
PROMPT = jnp.array([[BOS]], jnp.int32)


def texts() -> list[tuple[int, ...]]:
  """Returns the 40 texts: up to 3 tokens, ended by the end of text or the limit."""
  found = []
  for length in range(1, MAX_NEW + 1):
    for body in itertools.product((A, B, C), repeat=length - 1):
      ends = (EOS,) if length < MAX_NEW else (A, B, C, EOS)
      found += [(*body, end) for end in ends]
  return found


def name(text) -> str:
  """Spells a text, "abE"."""
  return "".join(NAMES[token] for token in text)


def probability(text, table_CV=TARGET_CV) -> float:
  """Returns the probability of a text under a chain."""
  return float(np.prod([table_CV[context, token] for context, token in zip((BOS, *text), text)]))


def outcomes(table_CV=TARGET_CV) -> dict[str, float]:
  """Returns the probability of every text, by name."""
  return {name(text): probability(text, table_CV) for text in texts()}


def padded() -> np.ndarray:
  """Returns int32 [40, 3]: the texts, the end of text behind them."""
  return np.array([(*text, *(EOS,) * (MAX_NEW - len(text))) for text in texts()], np.int32)


def tiny_spec(**settings) -> TransformerSpec:
  """Returns settings of a two-layer model with 32 tokens and visible differences between them."""
  sizes = dict(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=2, max_length=64, init_std=0.4, layers="unroll"
  )
  return TransformerSpec.llama(**{**sizes, **settings})


def tiny_network(
  kind: str = "transformer", seed: int = 0, network: dict | None = None, **settings
) -> Network:
  """Returns a small random network.

  Args:
    kind: "transformer" or "concepts" (two rows a token above block 1).
    seed: of its parameters.
    network: fields of `Network`.
    **settings: of the transformer.
  """
  spec, rngs = tiny_spec(**settings), nnx.Rngs(jax.random.key(seed))
  if kind == "concepts":
    model = ConceptMixingTransformer(
      spec, ConceptMixingSpec(num_concepts=24, top_k=4, insert_at=1), rngs=rngs
    )
  else:
    model = Transformer(spec, rngs=rngs)
  return Network(*split(model), **(network or {}))


def random_prompts(lengths, seed: int = 1, vocab_size: int = 32) -> list[list[int]]:
  """Returns random token lists of the given lengths."""
  draws = np.random.default_rng(seed)
  return [draws.integers(0, vocab_size, length).tolist() for length in lengths]
