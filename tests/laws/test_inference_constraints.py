"""Constraints: the locally masked law of "no b", automata against brute force and against two peers."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.constraints.automaton import Automaton, Constrain, join
from nr.generation.constraints.choices import choices
from nr.generation.constraints.matchers import AutomatonMatcher, grammar_vocabulary, num_words, regex_grammar
from nr.generation.constraints.regular import byte_automaton, regex
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.stopping import BROKEN, Stop
from nr.generation.transforms.algebra import chain
from tests.generation import toy

outlines_core = pytest.importorskip("outlines_core", reason="regular expressions need nr[constraints]")
llguidance = pytest.importorskip("llguidance", reason="grammars need nr[constraints]")

TOY_BYTES = [b"a", b"b", b"c", None]
# Pieces that overlap, a character cut in two, and an end of text.
PIECES = [b"a", b"b", b"ab", b"c", b"bc", b"abc", "é".encode(), b"\xc3", b"\xa9", b"a\xc3", None]
END = len(PIECES) - 1
PATTERNS = [
  "(ab)+c",
  "a|ab",
  "(a|ab)(c|bcd?)",
  "a*?b?",
  "(a|b)*a(a|b)",
  "é+a",
  "[^a]c*",
  "b{2,3}|",
  "[abc]{3}",
]


def replayed(transform):
  drawn = sample(
    toy.TOY,
    jnp.full((40, 1), toy.BOS),
    chain=chain(transform),
    sampler=Replay(jnp.asarray(toy.padded())),
    max_new_tokens=3,
    stop=Stop(ids_E=[toy.EOS]),
  )
  return np.exp(np.asarray(drawn.transformed_log_probs_RN, np.float64).sum(axis=1)), drawn


def test_masking_b_gives_the_local_law_and_its_weights_the_exact_one():
  law, drawn = replayed(Constrain(regex("[ac]*", TOY_BYTES), end_of_text_ids=[toy.EOS]))
  names = list(toy.outcomes())
  local = dict(zip(names, law))
  for name, expected in {"aE": 0.307692, "cE": 0.164103, "acE": 0.123077, "E": 0.076923}.items():
    np.testing.assert_allclose(local[name], expected, atol=1e-6)
  np.testing.assert_allclose(law.sum(), 1, atol=1e-6)
  kept = [name for name in names if "b" not in name]
  assert len(kept) == 15 and {name for name in names if local[name] > 0} == set(kept)
  original = np.array([toy.outcomes()[name] for name in kept])
  masked = np.array([local[name] for name in kept])
  weights = dict(zip(kept, original / masked))
  for name, expected in {"aE": 0.52, "cE": 0.4875, "acE": 0.39, "E": 0.65}.items():
    np.testing.assert_allclose(weights[name], expected, atol=1e-6)
  mean = (masked * list(weights.values())).sum()
  square = (masked * np.array(list(weights.values())) ** 2).sum()
  np.testing.assert_allclose(
    [original.sum(), mean, square - mean**2, mean**2 / square], [0.467, 0.467, 0.006107, 0.972759], atol=1e-6
  )
  exact = original / original.sum()
  np.testing.assert_allclose((masked * np.log(masked / exact)).sum(), 0.013435, atol=1e-6)
  # Texts with b were forced on the driver by `Replay`: where they go on behind b, the row is reported.
  is_past_b = [name.find("b") in range(len(name) - 1) for name in names]
  np.testing.assert_array_equal(np.asarray(drawn.finish_R) == BROKEN, is_past_b)


def test_end_of_text_is_banned_outside_accepting_states():
  law, _ = replayed(Constrain(regex("[abc]*c[abc]*", TOY_BYTES), end_of_text_ids=[toy.EOS]))
  local = dict(zip(toy.outcomes(), law))
  assert all(local[name] == 0 for name in local if name.endswith("E") and "c" not in name)
  assert local["cE"] > 0 and local["ab" + "c"] > 0


def test_transitions_of_ab_plus_c_are_the_recorded_ones():
  vocabulary = outlines_core.Vocabulary(4, {"a": [0], "b": [1], "ab": [2], "c": [3]})
  index = outlines_core.Index("(ab)+c", vocabulary)
  edges = {
    state: {token: then for token, then in edges.items() if token != 4}
    for state, edges in index.get_transitions().items()
  }
  assert edges == {32: {0: 56, 2: 40}, 56: {1: 40}, 40: {0: 56, 2: 40, 3: 48}, 48: {}}
  assert index.get_final_states() == {48} and index.get_initial_state() == 32
  ours = regex("(ab)+c", [b"a", b"b", b"ab", b"c", None])
  assert ours.num_states == 4
  _assert_isomorphic(ours, edges, 32, {48})


def _assert_isomorphic(automaton: Automaton, edges: dict, start: int, finals: set):
  twin, waiting = {start: int(automaton.start)}, [start]
  class_V, next_SC = np.asarray(automaton.class_V), np.asarray(automaton.next_SC)
  while waiting:
    state = waiting.pop()
    row = next_SC[twin[state]][class_V[:-1]]
    assert {token: row[token] >= 0 for token in edges[state]} == dict.fromkeys(edges[state], True)
    assert (row >= 0).sum() == len(edges[state])
    assert bool(automaton.accepting_S[twin[state]]) == (state in finals)
    for token, then in edges[state].items():
      if then not in twin:
        twin[then] = int(row[token])
        waiting.append(then)
      assert twin[then] == row[token]


def _language(pattern: str, longest: int) -> set[bytes]:
  words = ("".join(word) for n in range(longest + 1) for word in itertools.product("abcé", repeat=n))
  return {word.encode() for word in words if re.fullmatch(pattern, word)}


def test_allowed_tokens_are_those_that_lead_to_a_member_of_the_language():
  """Histories of up to two tokens and three bytes, in a language enumerated up to seven characters."""
  histories = [list(ids) for n in range(3) for ids in itertools.product(range(END), repeat=n)]
  joined = join([regex(pattern, PIECES) for pattern in PATTERNS])
  alphabet = {piece for piece in PIECES if piece}
  for number, pattern in enumerate(PATTERNS):
    members = {word for word in _language(pattern, 7) if _is_spelled(word, alphabet)}
    beginnings = {word[:size] for word in members for size in range(len(word) + 1)}
    states = jnp.full(len(histories), joined.start[number])
    for slot in range(2):
      tokens = jnp.array([ids[slot] if slot < len(ids) else 0 for ids in histories])
      is_there = jnp.array([slot < len(ids) for ids in histories])
      states = jnp.where(is_there, joined.step(states, tokens), states)
    allowed = np.asarray(joined.allowed(states))
    accepting = np.asarray(joined.is_accepting(states))
    for ids, row, is_accepting in zip(histories, allowed, accepting):
      text = b"".join(PIECES[id] for id in ids)
      if len(text) > 3:
        continue
      expected = [id for id in range(END) if _lives(text + PIECES[id], beginnings, members, alphabet)]
      assert np.nonzero(row)[0].tolist() == expected, (pattern, text)
      assert is_accepting == (text in members), (pattern, text)


def _is_spelled(word: bytes, alphabet: set[bytes]) -> bool:
  return not word or any(word.startswith(p) and _is_spelled(word[len(p) :], alphabet) for p in alphabet)


def _lives(text: bytes, beginnings: set, members: set, alphabet: set) -> bool:
  """Whether tokens can complete the text to a member of the language."""
  if text not in beginnings:
    return False
  return any(member.startswith(text) and _is_spelled(member[len(text) :], alphabet) for member in members)


def _byte_pieces(count: int, seed: int) -> list[bytes | None]:
  """Returns all single bytes and random longer pieces of what the patterns speak of, some equal."""
  draws = np.random.default_rng(seed)
  letters = [c.encode() for c in '0123456789-"\\ abé日\n']
  pieces = [bytes([byte]) for byte in range(256)]
  pieces += [b"".join(draws.choice(letters, draws.integers(2, 5))) for _ in range(count)]
  return [*pieces, None]


@pytest.mark.parametrize(
  "pattern", [r"\d{4}-\d{2}(-\d{2})?", r'"([^"\\]|\\["\\n])*"', r"(?s).*é日", r"\w+( \w+)*"]
)
def test_tables_agree_with_the_guide_of_outlines_core_on_random_walks(pattern):
  pieces = _byte_pieces(200, 0)
  end = len(pieces) - 1
  spelled = {}
  for id, piece in enumerate(pieces[:-1]):
    spelled.setdefault(piece, []).append(id)
  guide = outlines_core.Guide(
    outlines_core.Index(rf"(?:{pattern})\z", outlines_core.Vocabulary(end, spelled)), 100
  )
  matcher = AutomatonMatcher(regex(pattern, pieces), [end])
  draws, ended, words = np.random.default_rng(1), 0, np.zeros(num_words(len(pieces)), np.int32)
  for _ in range(12):
    guide.reset()
    follower = matcher.fork()
    for _ in range(25):
      follower.fill(words)
      allowed = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist()
      assert allowed == sorted(guide.get_tokens())
      assert (end in allowed) == (guide.is_finished() or end in guide.get_tokens())
      token = int(draws.choice(allowed))
      ended += token == end
      if token == end:
        break
      guide.advance(token)
      assert follower.consume(token)
  assert ended or "*" in pattern or "+" in pattern


def test_patterns_are_matched_as_a_whole_and_not_by_the_order_of_alternatives():
  ours = byte_automaton("a|ab")
  state = ours.next_SQ[ours.start, ord("a")]
  assert ours.accepting_S[state] and ours.accepting_S[ours.next_SQ[state, ord("b")]]


def test_host_masks_are_those_of_the_tables_where_nothing_is_forced():
  """llguidance writes forced text one way only; its language is the same."""
  vocabulary = grammar_vocabulary(PIECES, [END])
  draws, words = np.random.default_rng(2), np.zeros(num_words(len(PIECES)), np.int32)
  strict = equal = 0
  for pattern in PATTERNS + ["abcabc(a|b)", "(abc|bc)+"]:
    table, host = AutomatonMatcher(regex(pattern, PIECES), [END]), regex_grammar(pattern, vocabulary)
    for _ in range(10):
      ours, theirs = table.fork(), host.fork()
      for _ in range(8):
        ours.fill(words)
        allowed = set(np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist())
        theirs.fill(words)
        canonical = set(np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist())
        forced = theirs.forced()
        assert canonical <= allowed
        if forced:
          assert canonical == {forced[0]}
        else:
          assert canonical == allowed, pattern
        assert all(theirs.accepts([token]) == (token in allowed) for token in range(END)), pattern
        strict, equal = strict + (canonical < allowed), equal + (canonical == allowed)
        token = int(draws.choice(sorted(canonical)))
        if token == END:
          break
        assert ours.consume(token) and theirs.consume(token)
  assert strict > 0 and equal > 0


def test_the_state_after_a_history_is_that_of_its_tokens_one_by_one():
  automaton = join([regex("(ab)+c", PIECES), choices([[0, 1, 3], [0, 3]], PIECES), regex("[abc]*", PIECES)])
  law = Constrain(automaton, [END], start=automaton.start[jnp.array([0, 1, 2, 2])]).prepared()
  tokens = np.array([[7, 0, 1, 3, END], [0, 3, END, 0, 0], [1, 2, 3, 4, 5], [9, 9, END, 1, 1]], np.int32)
  prompts = np.array([1, 0, 2, 2], np.int32)
  whole = sample_context(tokens, np.array([5, 3, 5, 4], np.int32), prompts)
  now = sample_context(tokens, prompts, prompts)
  state = law.init(now, len(PIECES))
  for _ in range(5):
    token = jnp.asarray(tokens)[jnp.arange(4), jnp.minimum(now.lengths_B, 4)]
    is_kept = now.lengths_B < whole.lengths_B
    state = jnp.where(is_kept, law.commit(state, token, now), state)
    now = now.append(token, is_kept)
  np.testing.assert_array_equal(jax.jit(law.init, static_argnums=1)(whole, len(PIECES)), state)
  # Row 3: the end of text in an accepting state, then an ordinary token.
  assert (np.asarray(state) >= 0).tolist() == [True, True, True, True]


def sample_context(tokens, lengths, prompts):
  from nr.generation.transforms.algebra import Context

  keys = jax.random.split(jax.random.key(0), len(tokens))
  return Context(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(prompts), keys)
