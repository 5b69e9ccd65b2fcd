"""Speculative decoding of a chain whose 40 texts can be enumerated: the law, and the number of calls.

Every prefix is drafted for in every way in one batch, through the functions of the
driver; what verification may end with is summed instead of drawn. The driver itself
is then run on many rows and compared by chi-square.
"""

import functools
import itertools
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation import decoding
from nr.generation.speculation.draft_trees import DraftTree, draft_laws
from nr.generation.speculation.drafters import NgramDrafter, Proposal
from nr.generation.speculation.model_drafters import ModelDrafter, TreeDrafter
from nr.generation.speculation.speculative import read_drafts, speculative, verify
from nr.generation.speculation.verification import (
  RULES,
  expected_speed_up,
  token_outcomes,
  tokens_per_call,
)
from nr.generation.stopping import Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms import (
  Dry,
  GreenList,
  MinP,
  NoRepeatNgram,
  RepetitionPenalty,
  TopP,
  Xtc,
  chain,
)
from nr.generation.transforms.mixtures import ContrastiveDecoding
from tests.generation.toy import (
  BOS,
  DRAFT,
  DRAFT_CV,
  EOS,
  MAX_NEW,
  PROMPT,
  TARGET_CV,
  TOY,
  name,
  outcomes,
  texts,
)

PREFIXES = [prefix for length in range(MAX_NEW) for prefix in itertools.product(range(3), repeat=length)]
CASES = dict(
  plain={},
  top_p={"top_p": 0.7},
  repetition={"repetition": 1.5},
  no_repeat={"no_repeat": 2},
  xtc={"xtc": 0.5},
  min_p={"min_p": 0.3},
  dry={"dry": 0.8},
  watermark={"bias": 2.0},
  contrastive={"coefficient": 1.0, "alpha": 0.1},
  all={"top_p": 0.9, "repetition": 1.2, "no_repeat": 1, "xtc": 0.5, "min_p": 0.05, "dry": 0.5, "bias": 1.0},
)
OFF = dict(
  top_p=1.0, repetition=1.0, no_repeat=0, xtc=0.0, min_p=0.0, dry=0.0, bias=0.0, coefficient=0.0, alpha=0.0
)


def chain_of_cases():
  """Every row of the batch has one case switched on: one program serves all."""
  of = {field: np.array([{**OFF, **case}[field] for case in CASES.values()]) for field in OFF}
  return chain(
    ContrastiveDecoding(alpha=of["alpha"], coefficient=of["coefficient"]),
    RepetitionPenalty(of["repetition"]),
    NoRepeatNgram(of["no_repeat"]),
    Dry(of["dry"], allowed_length=1),
    GreenList(bias=of["bias"]),
    TopP(of["top_p"]),
    MinP(of["min_p"]),
    Xtc(of["xtc"], threshold=0.15),
  )


@functools.partial(jax.jit, static_argnames=("tree", "rules"))
def all_rounds(target, draft, law, draft_law, prompts_BP, valid_BP, tokens_BN, *, tree, rules):
  """Returns the drafts' probabilities [B], the outcomes by rule, and the laws [B, V] at the prompts."""
  rows = prompts_BP.shape[0]
  keys_B = jnp.repeat(jax.random.key(4)[None], rows)
  is_first = jnp.bool_(True)

  def read(model, law):
    sizes = (prompts_BP, valid_BP, keys_B, MAX_NEW)
    begun = decoding.begin(model, law, *sizes, uneven=True, extra_tokens=tree.room)
    # The prefix counts as generated text, as it is in the driver.
    context = begun.context._replace(prompt_lengths_B=jnp.ones(rows, jnp.int32))
    last_B = jnp.zeros(rows, jnp.int32)
    outputs, _ = read_drafts(model, tree, last_B, tokens_BN, begun.cache, is_first, begun.outputs)
    return law.init(context, 4), context, outputs

  state, context, outputs = read(draft, draft_law)
  q_BMV = draft_laws(draft_law, state, context, tree, outputs, tokens_BN).transformed_BMV
  log_q_BNV = q_BMV[:, np.array(tree.parents, int)]
  q_BN = jnp.take_along_axis(jnp.exp(log_q_BNV), tokens_BN[..., None], axis=-1)[..., 0]
  remaining_B = MAX_NEW - context.generated_B
  proposal = Proposal(tokens_BN, log_q_BNV, tree.depths[1:] <= remaining_B[:, None])
  state, context, outputs = read(target, law)
  verified = [verify(law, state, context, tree, RULES[rule], outputs, proposal) for rule in rules]
  root_BV = verified[0][1].transformed_BMV[:, 0]
  return q_BN.prod(axis=1), {rule: each for rule, (each, _) in zip(rules, verified)}, jnp.exp(root_BV)


def enumerate_rounds(tree, rules, target, law, draft_law, cases):
  """Returns, by rule and case, the law of the text, the mean calls, and the law of plain sampling."""
  drafts = np.array(list(itertools.product(range(4), repeat=tree.size)), np.int32).reshape(
    4**tree.size, tree.size
  )
  prompts, valid = decoding.pad_prompts([(BOS, *prefix) for prefix in PREFIXES], MAX_NEW)
  D, F, C = len(drafts), len(PREFIXES), cases
  rows = np.tile(np.repeat(np.arange(F), D), C)
  of_case = jnp.repeat(jnp.arange(C), F * D)
  law, draft_law = law.prepared().take(of_case), draft_law.prepared().take(of_case)
  arrays = (prompts[rows], valid[rows], jnp.tile(jnp.asarray(drafts), (C * F, 1)))
  q, verified, root = all_rounds(target, DRAFT, law, draft_law, *arrays, tree=tree, rules=rules)
  q, root = np.asarray(q).reshape(C, F, D), np.asarray(root).reshape(C, F, D, 4)[:, :, 0]
  np.testing.assert_allclose(q.sum(axis=-1), 1, atol=1e-6)
  results = {}
  for rule, each in verified.items():
    stops = np.asarray(each.stop_BM).reshape(C, F, D, -1)
    nexts = np.asarray(each.next_BMV).reshape(C, F, D, -1, 4)
    np.testing.assert_allclose(stops.sum(axis=-1), 1, atol=1e-6)
    results[rule] = [add_up(tree, drafts, q[case], stops[case], nexts[case]) for case in range(C)]
  plain = [{name(text): plain_probability(text, root[case]) for text in texts()} for case in range(C)]
  return results, plain


def plain_probability(text, root_FV) -> float:
  return np.prod([root_FV[PREFIXES.index(text[:step]), token] for step, token in enumerate(text)])


def add_up(tree, drafts, q_FD, stops_FDM, nexts_FDMV):
  """Returns the probability of every text, and the mean number of rounds."""
  paths = [[node for node in dict.fromkeys(path) if node] for path in tree.paths]
  law, calls, reached = defaultdict(float), 0.0, {(): 1.0}
  for number, prefix in enumerate(PREFIXES):  # by length, so each is complete when its turn comes
    mass = reached.get(prefix, 0.0)
    calls += mass
    for draft, weight in zip(range(len(drafts)), mass * q_FD[number]):
      for node, stop in enumerate(stops_FDM[number, draft]):
        run = prefix + tuple(int(drafts[draft, step - 1]) for step in paths[node])
        for token, chance in enumerate(nexts_FDMV[number, draft, node]):
          text = (*run, token)[:MAX_NEW]
          text = text[: text.index(EOS) + 1] if EOS in text else text
          is_ended = text[-1] == EOS or len(text) == MAX_NEW
          into, key = (law, name(text)) if is_ended else (reached, text)
          into[key] = into.get(key, 0.0) + weight * stop * chance
  return dict(law), calls


def assert_same_law(found, wanted):
  # Outcomes of probability 0 may be missing on either side.
  for text in {*found, *wanted}:
    assert found.get(text, 0.0) == pytest.approx(wanted.get(text, 0.0), abs=1e-6), text


@pytest.mark.parametrize("length, calls", [(0, 2.3625), (1, 1.5725), (2, 1.29)])
def test_the_law_is_the_targets_and_calls_are_those_of_the_fixture(length, calls):
  tree = DraftTree.chain(length)
  results, plain = enumerate_rounds(tree, ("token", "block"), TOY, chain(), chain(), 1)
  assert_same_law(plain[0], outcomes())
  for rule, [(law, mean_calls)] in results.items():
    assert_same_law(law, outcomes())
    assert mean_calls == pytest.approx(calls, abs=1e-6), rule


@pytest.mark.parametrize("tree", [DraftTree.chain(2), DraftTree((0, 0, 1))], ids=["chain", "tree"])
def test_under_a_chain_of_transforms_the_law_is_the_plain_one(tree):
  target = WithStreams(TOY, {"amateur": Stream(DRAFT)})
  law = chain_of_cases()
  rules = ("token", "block") if tree.is_chain else ("token",)
  # The drafter is the amateur, under all transforms but the one that reads the amateur, or none.
  draft_law = chain(*law.transforms[1:]) if tree.is_chain else chain()
  results, plain = enumerate_rounds(tree, rules, target, law, draft_law, len(CASES))
  assert_same_law(plain[0], outcomes())
  for case, label in enumerate(CASES):
    if case:  # each case is another law, or it would prove nothing
      assert max(abs(plain[case][text] - outcomes()[text]) for text in plain[case]) > 1e-3, label
    for by_case in results.values():
      assert_same_law(by_case[case][0], plain[case])


def test_acceptance_is_the_shared_mass_and_several_candidates_are_accepted_more_often():
  # Up to 4 candidates behind the beginning, and one behind every context, in one batch.
  drafts = np.array(list(itertools.product(range(4), repeat=4)), np.int32)
  cases = [(BOS, 1, 0.75), (BOS, 2, 0.875), (BOS, 3, 0.9375), (BOS, 4, 0.959375)]
  cases += [(0, 1, 0.70), (1, 1, 0.85), (2, 1, 0.85)]
  contexts, widths, acceptances = (np.repeat(values, len(drafts)) for values in zip(*cases))
  tokens = jnp.asarray(np.tile(drafts, (len(cases), 1)))
  log_p = np.full((len(contexts), 5, 4), np.log(0.25), np.float32)
  log_p[:, 0] = np.log(TARGET_CV[contexts])
  log_q = np.repeat(np.log(DRAFT_CV[contexts])[:, None], 4, axis=1)
  log_q = np.where(np.arange(4)[:, None] < widths[:, None, None], log_q, -np.inf)
  tree = DraftTree.branching(4)
  each = jax.jit(token_outcomes, static_argnums=0)(tree, log_p, jnp.asarray(log_q, jnp.float32), tokens)
  weights = DRAFT_CV[contexts[:, None], tokens].prod(axis=1).reshape(len(cases), -1)
  stops = np.asarray(each.stop_BM).reshape(*weights.shape, 5)
  nexts = np.asarray(each.next_BMV).reshape(*weights.shape, 5, 4)
  for case, (context, width, acceptance) in enumerate(cases):
    rejected = weights[case] * stops[case, :, 0]
    assert 1 - rejected.sum() == pytest.approx(acceptance, abs=1e-6)
    assert (stops[case, :, 1 + width :] == 0).all()
    first_V = rejected @ nexts[case, :, 0]
    if (context, width) == (BOS, 1):
      np.testing.assert_allclose(nexts[case, :, 0], np.tile([0.6, 0.4, 0, 0], (len(drafts), 1)), atol=1e-6)
    np.add.at(first_V, drafts, weights[case][:, None] * stops[case, :, 1:])
    np.testing.assert_allclose(first_V, TARGET_CV[context], atol=1e-6)


@jax.jit
def outcomes_by_all_rules(log_p_BMV, log_q_BNV, tokens_BN):
  return [rule(DraftTree.chain(2), log_p_BMV, log_q_BNV, tokens_BN) for rule in RULES.values()]


def test_where_both_laws_are_the_same_everything_is_accepted():
  log_p = jnp.log(jnp.asarray(TARGET_CV[[BOS, 0, 1]], jnp.float32))[None]
  for each in outcomes_by_all_rules(log_p, log_p[:, :2], jnp.argmax(log_p[:, :2], axis=-1)):
    np.testing.assert_allclose(each.stop_BM, [[0, 0, 1]], atol=1e-6)
    assert np.isfinite(each.next_BMV).all()


def test_formulas():
  assert tokens_per_call(0.8, 5) == pytest.approx(3.68928, abs=1e-9)
  assert expected_speed_up(0.8, 5, 0.1) == pytest.approx(2.45952, abs=1e-9)
  assert tokens_per_call(0.882, 1) / 2 == pytest.approx(0.941, abs=1e-9)
  assert tokens_per_call(0.863, 5) / 6 == pytest.approx(0.714, abs=5e-4)
  assert tokens_per_call(1.0, 4) == 5


def upper_tail(statistic: float, degrees: int) -> float:
  return float(jax.scipy.stats.chi2.sf(statistic, degrees))


@pytest.mark.parametrize(
  "drafter, length, rule, calls",
  [
    (ModelDrafter(DRAFT), 4, "token", 1.29),
    (TreeDrafter(DRAFT, shape=DraftTree.branching(2, 2)), None, "token", None),
    pytest.param(ModelDrafter(DRAFT), 1, "token", 1.5725, marks=pytest.mark.slow),
    pytest.param(ModelDrafter(DRAFT), 2, "token", 1.29, marks=pytest.mark.slow),
    pytest.param(ModelDrafter(DRAFT), 2, "block", 1.29, marks=pytest.mark.slow),
    pytest.param(NgramDrafter(), 2, "token", None, marks=pytest.mark.slow),
  ],
)
def test_many_rows_follow_the_law(drafter, length, rule, calls):
  rows = 40_000
  generation = speculative(
    TOY,
    drafter,
    PROMPT,
    key=jax.random.key(7),
    max_new_tokens=MAX_NEW,
    draft_length=length,
    rule=rule,
    num_samples=rows,
    stop=Stop(jnp.array([EOS])),
  )
  pairs = zip(np.asarray(generation.tokens_RN), np.asarray(generation.lengths_R))
  found = Counter(name(tokens[:length]) for tokens, length in pairs)
  assert set(found) <= set(outcomes())
  statistic = sum((found[text] - rows * p) ** 2 / (rows * p) for text, p in outcomes().items())
  assert upper_tail(statistic, len(outcomes()) - 1) > 1e-4
  if calls is not None:
    assert float(generation.row_calls_R.mean()) == pytest.approx(calls, abs=0.02)
