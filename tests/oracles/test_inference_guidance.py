"""Guidance against the processor of `transformers`, live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
from transformers.generation import logits_process as hf  # noqa: E402

from nr.generation.transforms import Context, Guidance, chain  # noqa: E402

pytestmark = pytest.mark.oracle

ROWS, V = 64, 50
_random = np.random.default_rng(4)
CONDITIONAL, UNCONDITIONAL = _random.normal(0, 2.5, (2, ROWS, V)).astype(np.float32)


class Output(dict):
  """What the processor reads of a model: its logits, and that there is no cache."""

  logits = torch.from_numpy(UNCONDITIONAL)[:, None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 3.0])
def test_guidance(scale):
  model = lambda *_, **__: Output()  # noqa: E731
  theirs = hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(
    scale, model, torch.zeros((ROWS, 1), dtype=torch.long)
  )
  expected = theirs(torch.zeros((ROWS, 3), dtype=torch.long), torch.from_numpy(CONDITIONAL)).numpy()
  zeros, keys = jnp.zeros(ROWS, jnp.int32), jax.random.split(jax.random.key(0), ROWS)
  streams = {"unconditional": jnp.asarray(UNCONDITIONAL)}
  context = Context(jnp.zeros((ROWS, 4), jnp.int32), zeros, zeros, keys, streams)
  # One row has another scale, so that scale 1 is computed and not left out.
  law = chain(Guidance([*(scale,) * (ROWS - 1), 2.0])).prepared()
  ours = jax.nn.log_softmax(law.apply(jnp.asarray(CONDITIONAL), law.init(context, V), context))
  np.testing.assert_allclose(ours[:-1], torch.from_numpy(expected).log_softmax(-1)[:-1], atol=2e-5)
