"""Laws of the transforms that mix several distributions, on one vector of logits.

Every case is a row of one batch or a call of the real transform; the expected numbers
were computed independently, in double precision, and are printed to six decimals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.contrastive_search import contrastive_scores, unit
from nr.generation.transforms.algebra import Context, chain
from nr.generation.transforms.guidance import Args, Fudge, Gedi, Rad, ValueGuidance
from nr.generation.transforms.layer_contrast import LayerContrast, divergence
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
  head,
)
from nr.generation.transforms.retrieval import Datastore, KnnMix, interpolate

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
AMATEUR = [1.0, 1.5, 0.0, 0.5, 0.0, -2.0]
ANTI = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
NEVER = -np.inf
SCORES = [0.2, 0.9, 0.5, NEVER, NEVER, NEVER]
LOG_SCORES = [*np.log([0.2, 0.9, 0.5]), NEVER, NEVER, NEVER]

CONTRASTIVE = [0.487142, 0.108696, 0.295466, 0.108696, 0, 0]
REASONING = [0.708478, 0.123115, 0.123115, 0.045292, 0, 0]
GUIDED = [0.698192, 0.121328, 0.121328, 0.044634, 0.012788, 0.001731]
EXPERTS = [0.113160, 0.836146, 0.003417, 0.041629, 0.005634, 0.000014]
PRODUCT = [0.558862, 0.338967, 0.045874, 0.045874, 0.010236, 0.000187]
LAYERS = [0.385950, 0.385950, 0.086117, 0.141983, 0, 0]
REWARDED = [0.002446, 0.986594, 0.010960, 0, 0, 0]
CLASSIFIED = [0.311208, 0.515192, 0.173600, 0, 0, 0]


def context(hidden=None, **streams) -> Context:
  given = {"a": AMATEUR, "c": ANTI, "scores": SCORES, "log_scores": LOG_SCORES}
  streams = {name: jnp.array([values], jnp.float32) for name, values in {**given, **streams}.items()}
  zeros = jnp.zeros(1, jnp.int32)
  keys = jax.random.split(jax.random.key(0), 1)
  return Context(jnp.zeros((1, 4), jnp.int32), zeros, zeros, keys, streams, hidden or {})


def apply(law, seen=None, logits=LOGITS) -> np.ndarray:
  """Returns the logits that leave a transform."""
  seen = context() if seen is None else seen
  law = chain(law).prepared()
  return np.asarray(law.apply(jnp.array([logits], jnp.float32), law.init(seen, len(logits)), seen)[0])


def probabilities(law, seen=None, logits=LOGITS) -> np.ndarray:
  return np.asarray(jax.nn.softmax(apply(law, seen, logits)))


CASES = {
  "contrastive_decoding": (ContrastiveDecoding(0.1, stream="a"), CONTRASTIVE),
  "contrastive_decoding_as_mix": (Mix({"a": -1.0}, alpha=0.1), CONTRASTIVE),
  "contrastive_reasoning": (ContrastiveReasoning(0.5, 0.1, stream="a"), REASONING),
  "contrastive_reasoning_on_log_probs": (
    ContrastiveReasoning(0.5, 0.1, stream="a", of="log_probs"),
    REASONING,
  ),
  "guidance": (Guidance(1.5, stream="a"), GUIDED),
  "guidance_on_logits": (Guidance(1.5, stream="a", of="logits"), GUIDED),
  "context_aware_is_guidance": (ContextAware(0.5, stream="a"), GUIDED),
  "dexperts": (DExperts(2.0, expert="a", anti_expert="c"), EXPERTS),
  "proxy_tuning_is_dexperts": (ProxyTuning(2.0, tuned="a", untuned="c"), EXPERTS),
  "product_of_experts": (ProductOfExperts(streams=("a",)), PRODUCT),
  "autoregressive_reward_is_a_product": (AutoregressiveReward(1.0, stream="a"), PRODUCT),
  "dola_paper": (LayerContrast((1, 2), 0.1), LAYERS),
  "dola_hf": (LayerContrast((1, 2), 0.1, variant="hf"), LAYERS),
  "rad": (Rad(10.0, candidates=3, stream="scores"), REWARDED),
  "args_of_rewards_within_0_and_1_is_rad": (Args(10.0, candidates=3, stream="scores"), REWARDED),
  "values_are_rewards": (ValueGuidance(10.0, stream="scores"), REWARDED),
  "fudge": (Fudge(1.0, candidates=3, stream="log_scores"), CLASSIFIED),
}


@pytest.mark.parametrize("name", CASES)
def test_law(name):
  law, expected = CASES[name]
  seen = context(layer_1=AMATEUR, layer_2=ANTI)
  np.testing.assert_allclose(probabilities(law, seen), expected, atol=1e-6)


def test_scores_before_the_softmax():
  contrastive = apply(ContrastiveDecoding(0.1, stream="a"))
  np.testing.assert_allclose(contrastive, [0.818218, -0.681782, 0.318218, -0.681782, NEVER, NEVER], atol=1e-6)
  reasoning = apply(ContrastiveReasoning(0.5, 0.1, stream="a"))
  np.testing.assert_allclose(reasoning, [2.5, 0.75, 0.75, -0.25, NEVER, NEVER], atol=1e-6)
  experts = apply(DExperts(2.0, expert="a", anti_expert="c"))
  np.testing.assert_allclose(experts, [2, 4, -1.5, 1, -1, -7], atol=1e-6)


def test_both_forms_of_the_head_are_one_set():
  logits = jnp.array([LOGITS])
  law = jax.nn.softmax(logits)
  for alpha in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0):
    by_probability = np.asarray(law >= alpha * law.max())
    np.testing.assert_array_equal(head(logits, alpha), by_probability)
  assert np.asarray(head(logits, 0.1)).tolist() == [[True] * 4 + [False] * 2]


def test_how_far_layers_are_apart():
  mature, first, second = (jax.nn.log_softmax(jnp.array([each])) for each in (LOGITS, AMATEUR, ANTI))
  paper = [float(divergence(mature, each)[0]) for each in (first, second)]
  np.testing.assert_allclose(paper, [0.065616, 0.090211], atol=1e-6)
  hf = [float(divergence(mature, each, "hf")[0]) for each in (first, second)]
  np.testing.assert_allclose(hf, [0.011567, 0.019935], atol=1e-6)


def test_the_farthest_layer_is_chosen():
  seen = context(layer_1=AMATEUR, layer_2=ANTI)
  for variant in ("paper", "hf"):
    _, chosen = LayerContrast((1, 2), variant=variant).farthest(jnp.array([LOGITS]), seen)
    assert chosen.tolist() == [1]


def test_nearest_neighbours():
  expected = [0.420670, 0.279756, 0.218864, 0.056932, 0.020944, 0.002834]
  given = jnp.log(jnp.array([[0, 0.5, 0.5, 0, 0, 0]]))
  mixed = interpolate(jax.nn.log_softmax(jnp.array([LOGITS])), given, 0.25)
  np.testing.assert_allclose(np.exp(mixed[0]), expected, atol=1e-6)
  # Two entries at the same distance, followed by tokens 1 and 2; a third is no neighbour.
  store = Datastore(jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]), jnp.array([1, 2, 5]))
  seen = context(hidden={"last": jnp.zeros((1, 2))})
  for chunk in (1, 2, 8):
    law = probabilities(KnnMix(store, 0.25, neighbours=2, chunk=chunk), seen)
    np.testing.assert_allclose(law, expected, atol=1e-6)


def test_neighbours_count_by_their_distance():
  # Distances 1 and 4 at temperature 3, entry 2 followed by the same token as entry 0.
  store = Datastore(jnp.array([[1.0], [2.0], [-2.0]]), jnp.array([3, 0, 3]))
  shares = np.exp([-1 / 3, -4 / 3, -4 / 3])
  shares /= shares.sum()
  law = probabilities(KnnMix(store, 1.0, temperature=3.0), context(hidden={"last": jnp.zeros((1, 1))}))
  np.testing.assert_allclose(law, [shares[1], 0, 0, shares[0] + shares[2], 0, 0], atol=1e-6)


def test_scores_of_contrastive_search():
  candidates = unit(jnp.array([[[1, 0.1], [-1, 0.2], [0.5, -0.5]]]))
  # The third state of the text is a candidate itself, and hidden: it must not count.
  text = unit(jnp.array([[[1.0, 0.0], [0.0, 1.0], [-1, 0.2]]]))
  given = jnp.array([[0.5, 0.3, 0.2]])
  is_text = jnp.array([[True, True, False]])
  scores = contrastive_scores(given, candidates, text, is_text, jnp.array([0.6]))
  np.testing.assert_allclose(scores, [[-0.397022, 0.002330, -0.344264]], atol=1e-6)
  assert int(jnp.argmax(scores)) == 1


def test_class_conditional_models_by_bayes_rule():
  """Two steps of the posterior, restated in NumPy."""
  law = chain(Gedi(3.0, scale=2.0, bias=0.4, desired="a", undesired="c")).prepared()
  seen = context()
  state = law.init(seen, 6)
  base, desired, undesired = (
    np.asarray(each) - np.log(np.exp(each).sum()) for each in (LOGITS, AMATEUR, ANTI)
  )
  ratios = desired - undesired
  for total, count in ((0.0, 1), (ratios[1], 2)):
    posterior = 1 / (1 + np.exp(-(2.0 * (total + ratios) / count + 0.4)))
    guided = law.apply(jnp.array([LOGITS]), state, seen)
    np.testing.assert_allclose(guided[0], base + 3.0 * np.log(posterior), atol=1e-5)
    state = law.commit(state, jnp.array([1]), seen)


def test_the_filter_of_class_conditional_models():
  """Restated from the authors' loop over tokens in order of their posterior."""
  law = Gedi(1.0, mass=0.5, target=0.6, desired="a", undesired="c")
  plain = apply(Gedi(1.0, desired="a", undesired="c"))
  posterior = np.exp(np.asarray(law.log_posterior(law.init(context(), 6), context()))[0])
  shares, dropped, total = np.exp(plain) / np.exp(plain).sum(), set(), 0.0
  for token in np.argsort(posterior):
    total += shares[token]
    if total < 0.5 and posterior[token] < 0.6:
      dropped.add(int(token))
  assert 0 < len(dropped) < 6
  filtered = apply(law)
  assert set(np.flatnonzero(filtered == NEVER).tolist()) == dropped
  np.testing.assert_allclose(filtered[filtered > NEVER], plain[filtered > NEVER], atol=1e-6)
