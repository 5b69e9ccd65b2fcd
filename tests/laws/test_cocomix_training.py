"""Training a CoCoMix student: number 36 of the specification."""

import jax
import numpy as np
import pytest

from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix.method import cocomix_method
from nr.training.defaults import get_training_config
from nr.training.loop import train
from nr.training.model_files import ConceptMixingModelSpec
from nr.training.writers import read_metrics
from tests.training.method_suite import Batches

ROWS, LENGTH, VOCABULARY, CONCEPTS = 8, 16, 32, 24


def learnable_batch():
  """A corpus in which each token decides the next and its labels."""
  generator = np.random.default_rng(0)
  follower = generator.permutation(VOCABULARY)
  labels_of = np.stack([generator.permutation(CONCEPTS)[:4] for _ in range(VOCABULARY)])
  tokens = np.empty((ROWS, LENGTH + 1), np.int32)
  tokens[:, 0] = generator.integers(0, VOCABULARY, ROWS)
  for column in range(LENGTH):
    tokens[:, column + 1] = follower[tokens[:, column]]
  weights = np.ones((ROWS, LENGTH), np.float32)
  weights[:, -1] = 0
  labels = labels_of[tokens[:, :-1]].astype(np.int32)
  labels[:, -1] = 65535
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "labels": labels}


def config(steps):
  section = get_training_config()
  section.update({"steps": steps, "batch_size": ROWS, "log_every": 1, "progress": False})
  section.schedule.name = "constant"
  section.optimizer.learning_rate = 1e-2
  section.checkpoint.every = 25
  section.mesh.data = 1
  return section


@pytest.mark.slow
def test_36_both_losses_fall_and_resuming_at_25_repeats_steps_26_to_50(tmp_path):
  spec = ConceptMixingModelSpec(
    TransformerSpec.gpt2(vocab_size=VOCABULARY, num_layers=2, model_dim=16, num_heads=2, max_length=LENGTH),
    ConceptMixingSpec(insert_at=1, num_concepts=CONCEPTS, top_k=4),
  )
  method, batch = cocomix_method(spec, loss_weight=0.1), learnable_batch()
  whole = train(config(50), method, Batches(batch), (), tmp_path / "whole")
  train(config(25), method, Batches(batch), (), tmp_path / "parts")
  parts = train(config(50), method, Batches(batch), (), tmp_path / "parts")
  jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)

  rows = {name: read_metrics(tmp_path / name) for name in ("whole", "parts")}
  for metric in ("next_token_loss", "concept_loss"):
    curves = {
      name: {row["step"]: row[metric] for row in found if metric in row} for name, found in rows.items()
    }
    assert [curves["parts"][step] for step in range(26, 51)] == [
      curves["whole"][step] for step in range(26, 51)
    ]
    assert curves["whole"][50] < 0.8 * curves["whole"][1]
    if metric == "concept_loss":
      assert curves["whole"][50] > np.log(4)  # four labels of equal weight allow no less
