"""Constraints in the drivers: choices, schemas, stop strings, healing, grammars, forced tokens, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.constraints.automaton import Constrain, anything, join
from nr.generation.constraints.choices import choices
from nr.generation.constraints.grammar import GrammarMask, sample_with_grammar, unpack
from nr.generation.constraints.healing import heal, prefix
from nr.generation.constraints.matchers import (
  AutomatonMatcher,
  grammar_vocabulary,
  json_grammar,
  lark_grammar,
  num_words,
)
from nr.generation.constraints.regular import json_schema, regex
from nr.generation.constraints.stop_strings import cut_text, stop_strings
from nr.generation.constraints.vocabulary import token_bytes
from nr.generation.decoding import pad_prompts
from nr.generation.markov import Markov
from nr.generation.sample import sample
from nr.generation.samplers import Greedy, Replay
from nr.generation.stopping import BROKEN, LENGTH, STOP_ID, STOP_STRING, Stop
from nr.generation.transforms.algebra import Transform, chain, column, guarded, row, transform
from nr.generation.transforms.text import parse
from tests.generation import toy

# 32 pieces, the vocabulary of the models.
TEXTS = (
  '{ } " : , 0 1 2 a b [ ] true false null ( ) x y n {" "} ": "a" ab ye es no yes ba'.split() + [" "] + [None]
)
PIECES = token_bytes(TEXTS)
END = 31
STOP = Stop(ids_E=[END])
PROMPTS = toy.random_prompts([3, 7, 5])
MAX_NEW = 32
SCHEMA = dict(
  type="object",
  properties=dict(a=dict(enum=["x", "ab"]), b=dict(type="boolean"), n=dict(enum=[0, 12])),
  required=["a", "b", "n"],
)


@pytest.fixture(scope="module")
def model():
  return Markov(jax.random.normal(jax.random.key(0), (32, 32)))


@transform("test_sharpen")
class Sharpen(Transform):
  by: object = row(1.0)

  def apply(self, logits_BV, state, context):
    return logits_BV * column(self.by)


def spell(tokens, length) -> str:
  return b"".join(PIECES[int(id)] or b"" for id in tokens[: int(length)]).decode()


def constrained(model, automaton, starts=None, num_samples=4):
  law = Constrain(automaton, [END], start=starts)
  settings = dict(max_new_tokens=MAX_NEW, num_samples=num_samples, stop=STOP)
  drawn = sample(model, *pad_prompts(PROMPTS), jax.random.key(0), chain=chain(law), **settings)
  return drawn, [spell(*each) for each in zip(drawn.tokens_RN, drawn.lengths_R)]


def test_rows_keep_to_their_own_automata(model):
  pytest.importorskip("outlines_core", reason="JSON schemas need nr[constraints]")
  options = [[28, 18], [27], [28]]
  automata = [
    choices(["yes", "no", "yesno"], PIECES),
    choices(options, PIECES),
    json_schema(SCHEMA, PIECES),
    anything(len(PIECES)),
  ]
  joined = join(automata)
  drawn, written = constrained(model, joined, joined.start[jnp.array([0, 2, 1])])
  assert (np.asarray(drawn.finish_R) == STOP_ID).all()
  assert set(written[:4]) <= {"yes", "no", "yesno"} and len(set(written[:4])) > 1
  for text in written[4:8]:
    value = json.loads(text)
    assert value["a"] in ("x", "ab") and value["b"] in (True, False) and value["n"] in (0, 12)
    assert list(value) == ["a", "b", "n"]
  bodies = [row[: int(n) - 1].tolist() for row, n in zip(np.asarray(drawn.tokens_RN), drawn.lengths_R)]
  assert all(body in options for body in bodies[8:])
  # A text may be cut in other ways than an option of ids says.
  assert not bool(joined.allowed(joined.start[1:2])[0, 25])


def test_rows_without_a_constraint_are_untouched_and_complete_ones_without_an_end_are_flagged():
  joined = join([choices(["no", "yes"], PIECES), anything(len(PIECES))])
  law = Constrain(joined, start=joined.start[jnp.array([0, 1])]).prepared()
  logits, states = jax.random.normal(jax.random.key(0), (2, 32)), law.start
  first = law.apply(logits, states, None)
  np.testing.assert_array_equal(first[1], logits[1])
  assert np.nonzero(np.isfinite(first[0]))[0].tolist() == [18, 27, 28]
  states = law.commit(states, jnp.array([27, 5]), None)
  repaired, is_broken = guarded(law.apply(logits, states, None), logits)
  assert is_broken.tolist() == [True, False] and int(repaired[0].argmax()) == int(logits[0].argmax())


def test_ids_beyond_the_tokenizer_are_banned():
  automaton = choices(["ab"], [b"a", b"b", None])
  logits = jnp.zeros((1, 6))
  law = Constrain(automaton, [2]).prepared()
  first = law.apply(logits, automaton.start[None], None)
  np.testing.assert_array_equal(np.isfinite(first[0]), [True, False, False, False, False, False])
  assert int(automaton.step(automaton.start[None], jnp.array([5]))[0]) == -1


def test_stop_strings_are_found_where_a_search_of_the_text_finds_them():
  """Random texts: the first token after which the text holds a stop string, and where it is cut."""
  pieces = [b"a", b"b", b"ab", b"ba", b"bab", "é".encode(), b"\xc3", b"\xa9b", None]
  strings = ["abab", "bb", "éb", "a\u00e9"]
  automaton = stop_strings(strings, pieces)
  draws = np.random.default_rng(0)
  tokens = draws.integers(0, len(pieces), (400, 12))
  states = jnp.full(400, automaton.start)
  accepted = []
  for slot in range(12):
    states = automaton.step(states, jnp.asarray(tokens[:, slot]))
    accepted.append(np.asarray(automaton.is_accepting(states)))
  for ids, found in zip(tokens, np.stack(accepted, axis=1)):
    texts = [b"".join(pieces[id] or b"" for id in ids[: n + 1]) for n in range(12)]
    expected = [any(string.encode() in text for string in strings) for text in texts]
    assert found.tolist() == expected
  assert 0.2 < np.mean(accepted[5]) < 0.9
  assert bool(automaton.allowed(states).all())


@pytest.mark.parametrize(
  "text, strings, left",
  [
    ("one\n\ntwo", ["\n\n"], "one"),
    ("one", ["two"], None),
    ("a stop word", ["stop word", "stop"], "a "),
    ("xabab", ["b", "aba"], "xa"),
    ("see END", ["END", "see END"], ""),
  ],
)
def test_text_is_cut_before_the_string_that_is_completed_first(text, strings, left):
  offset = cut_text(text, strings)
  assert (None if offset is None else text[:offset]) == left


def test_rows_end_with_a_stop_string_across_tokens(model):
  free = sample(model, *pad_prompts(PROMPTS), max_new_tokens=12)
  # The end of one token and the beginning of the next, as the first row writes them.
  texts = [PIECES[int(id)] or b"" for id in free.tokens_RN[0]]
  place = next(n for n in range(1, 12) if texts[n - 1] and texts[n])
  string = (texts[place - 1][-1:] + texts[place][:1]).decode()
  stop = Stop(strings=stop_strings([string, "never"], PIECES))
  drawn = sample(model, *pad_prompts(PROMPTS), max_new_tokens=12, stop=stop)
  for tokens, length, finish, whole in zip(drawn.tokens_RN, drawn.lengths_R, drawn.finish_R, free.tokens_RN):
    seen = [string in spell(whole, n + 1) for n in range(12)]
    assert int(length) == (seen.index(True) + 1 if any(seen) else 12)
    assert int(finish) == (STOP_STRING if any(seen) else LENGTH)
    np.testing.assert_array_equal(tokens[: int(length)], whole[: int(length)])
  assert int(drawn.lengths_R[0]) <= place + 1


def test_a_healed_prompt_may_go_on_with_the_longer_token(nr_data):
  pytest.importorskip("tokenizers", reason="GPT-2's vocabulary needs nr[text]")
  from nr.data.tokenizers import load_tokenizer

  tokenizer = load_tokenizer(nr_data / "tokenizers")
  pieces = token_bytes(tokenizer)
  prompt = tokenizer.encode("see http:")
  shortened, removed = heal(prompt, pieces)
  assert (tokenizer.decode(shortened), removed) == ("see http", b":")
  automaton = prefix(removed, pieces)
  allowed = np.nonzero(np.asarray(automaton.allowed(automaton.start[None]))[0])[0]
  assert set(allowed) == {id for id, piece in enumerate(pieces) if piece and piece.startswith(b":")}
  (longer,) = tokenizer.encode("://")
  assert longer in allowed and prompt[-1] in allowed
  after = automaton.step(jnp.full(1, automaton.start), jnp.array([longer]))
  assert bool(automaton.allowed(after).all()) and bool(automaton.is_accepting(after)[0])
  # Two tokens: the first new one may be a part of what was taken off, or reach beyond it.
  shortened, removed = heal(tokenizer.encode("a http"), pieces, max_tokens=2)
  assert removed == b" http"
  automaton = prefix(removed, pieces)
  allowed = set(np.nonzero(np.asarray(automaton.allowed(automaton.start[None]))[0])[0].tolist())
  reach = {id for id, p in enumerate(pieces) if p and (p.startswith(removed) or removed.startswith(p))}
  assert allowed == reach and len({len(pieces[id]) for id in allowed}) > 3


def test_healing_leaves_what_no_token_could_extend():
  pieces = [b"a", b"ab", b"c", None]
  assert heal([0, 2], pieces) == ([0, 2], b"")
  assert heal([2, 0], pieces) == ([2], b"a")
  assert heal([0], pieces) == ([0], b"") and heal([0, 3], pieces) == ([0, 3], b"")
  behind = choices(["x", "bc"], [b"a", b"ab", b"c", None, b"x"], after=b"a")
  assert np.asarray(behind.allowed(behind.start[None]))[0].tolist() == [True, True, False, False, False]


def grammar_drawn(model, matchers, fast_forward=7, law=None, seed=0, num_samples=2, **settings):
  return sample_with_grammar(
    model,
    *pad_prompts(PROMPTS),
    jax.random.key(seed),
    grammar=matchers,
    chain=law or chain(),
    max_new_tokens=MAX_NEW,
    num_samples=num_samples,
    stop=STOP,
    fast_forward=fast_forward,
    **settings,
  )


def assert_same_rows(one, other):
  np.testing.assert_array_equal(one.tokens_RN, other.tokens_RN)
  np.testing.assert_array_equal(one.lengths_R, other.lengths_R)
  np.testing.assert_array_equal(one.finish_R, other.finish_R)
  np.testing.assert_allclose(one.log_probs_RN, other.log_probs_RN, atol=3e-5)
  np.testing.assert_allclose(one.transformed_log_probs_RN, other.transformed_log_probs_RN, atol=3e-5)


def test_the_host_driver_draws_what_the_compiled_loop_draws_in_fewer_calls():
  """Tables on the device, tables on the host, and with forced tokens read in one call."""
  pytest.importorskip("outlines_core", reason="JSON schemas need nr[constraints]")
  # No piece but the single characters and the values: so that every character between choices is forced.
  known = [b"{", b"}", b'"', b":", b",", b"0", b"1", b"2", b"a", b"b", b"n", b"x", b"true", b"false"]
  pieces = [piece if piece in known else None for piece in PIECES]
  automaton = json_schema(SCHEMA, pieces, whitespace="")
  network = toy.tiny_network(num_layers=1)
  scales = Sharpen(jnp.array([0.5, 1.0, 2.0]))
  compiled = sample(
    network,
    *pad_prompts(PROMPTS),
    jax.random.key(0),
    chain=chain(Constrain(automaton, [END]), scales),
    max_new_tokens=MAX_NEW,
    num_samples=2,
    stop=STOP,
  )
  matcher = AutomatonMatcher(automaton, [END])
  forwarded = grammar_drawn(network, matcher, law=scales)
  stepwise = grammar_drawn(network, [matcher] * 3, fast_forward=0, law=chain(GrammarMask(), scales))
  assert_same_rows(stepwise, compiled)
  assert_same_rows(forwarded, compiled)
  assert (np.asarray(compiled.finish_R) == STOP_ID).all()
  assert int(stepwise.calls) == int(compiled.calls) == int(compiled.lengths_R.max()) - 1
  # Forced: {"a":" | ... ","b": | ... ,"n": | ... }
  assert int(forwarded.calls) < int(stepwise.calls) / 2
  assert (forwarded.forced_R >= 12).all() and (stepwise.forced_R == 0).all()
  for tokens, length in zip(forwarded.tokens_RN, forwarded.lengths_R):
    assert json.loads(spell(tokens, length))["a"] in ("x", "ab")


def test_grammars_beyond_automata_hold_and_forced_tokens_change_nothing(model):
  pytest.importorskip("llguidance", reason="grammars need nr[constraints]")
  vocabulary = grammar_vocabulary(PIECES, [END])
  tree = json_grammar(
    dict(
      type="object",
      properties=dict(a={"anyOf": [{"$ref": "#"}, {"type": "boolean"}]}),
      required=["a"],
      additionalProperties=False,
    ),
    vocabulary,
    whitespace_flexible=False,
  )
  brackets = lark_grammar('start: "(" start ")" | "[" start "]" | "x" | "ab"', vocabulary)
  forwarded = grammar_drawn(model, [brackets, tree, brackets])
  stepwise = grammar_drawn(model, [brackets, tree, brackets], fast_forward=0)
  assert_same_rows(forwarded, stepwise)
  assert int(forwarded.calls) < int(stepwise.calls) and forwarded.errors == ("",) * 6
  ended = np.asarray(forwarded.finish_R) == STOP_ID
  assert ended.sum() >= 3 and ended[2:4].any()
  for place, (tokens, length) in enumerate(zip(forwarded.tokens_RN, forwarded.lengths_R)):
    text = spell(tokens, length)
    if place in (2, 3):
      if ended[place]:
        value = json.loads(text)
        while not isinstance(value, bool):
          assert list(value) == ["a"]
          value = value["a"]
    elif ended[place]:
      opened = text[: len(text) // 2] if text[-1] in ")]" else ""
      assert text.strip("([])") in ("x", "ab")
      assert [dict(zip("([", ")]"))[c] for c in opened if c in "(["][::-1] == [c for c in text if c in ")]"]


def test_forced_text_is_written_as_the_tokenizer_writes_it(nr_data):
  pytest.importorskip("tokenizers", reason="GPT-2's vocabulary needs nr[text]")
  pytest.importorskip("llguidance", reason="grammars need nr[constraints]")
  from nr.data.tokenizers import load_tokenizer

  tokenizer = load_tokenizer(nr_data / "tokenizers")
  vocabulary = grammar_vocabulary(tokenizer)
  rest = lark_grammar('start: "The house stands on a hill" ("." | "!")', vocabulary)
  assert rest.forced() == tokenizer.encode("The house stands on a hill")
  schema = json_grammar(dict(SCHEMA, additionalProperties=False), vocabulary)
  draws, words, num_forced = np.random.default_rng(0), np.zeros(num_words(50257), np.int32), 0
  for matcher in [rest.fork() for _ in range(2)] + [schema.fork() for _ in range(6)]:
    tokens = []
    while tokenizer.end_of_text_id not in tokens:
      matcher.fill(words)
      (allowed,) = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
      forced = matcher.forced()
      assert not forced or allowed.tolist() == forced[:1]
      num_forced += len(forced) > 0
      tokens.append(int(draws.choice(allowed)))
      assert matcher.consume(tokens[-1])
    text = tokenizer.decode(tokens)
    assert text[:-1] == "The house stands on a hill" or set(json.loads(text)) == {"a", "b", "n"}
  assert num_forced > 12


def test_a_row_whose_matcher_gives_up_is_broken_and_told(model):
  """`Replay` draws tokens that may not come, or that lead where no piece goes on; other rows stay."""
  pytest.importorskip("llguidance", reason="grammars need nr[constraints]")
  table = AutomatonMatcher(choices(["yes", "no"], PIECES), [END])
  grammar = lark_grammar('start: "x" | "no"', grammar_vocabulary(PIECES, [END]))
  tokens = np.full((3, MAX_NEW), END)
  tokens[:, 0] = [28, 18, 19]
  tokens[1, 2] = 5
  drawn = grammar_drawn(model, [table, table, grammar], sampler=Replay(jnp.asarray(tokens)), num_samples=1)
  assert np.asarray(drawn.finish_R).tolist() == [STOP_ID, BROKEN, BROKEN]
  # "y" is followed by "es" whatever the sampler says.
  assert drawn.tokens_RN[1, :3].tolist() == [18, 26, 5] and drawn.forced_R.tolist() == [0, 1, 0]
  assert drawn.errors[:2] == ("", "token 5 may not come here") and drawn.errors[2]


def test_bits_of_masks_are_unpacked_in_order():
  is_allowed = np.random.default_rng(0).random((3, 70)) < 0.5
  words = np.packbits(np.pad(is_allowed, ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.int32)
  np.testing.assert_array_equal(unpack(jnp.asarray(words), 70), is_allowed)


REFUSALS = {
  "repetitions": (lambda: regex("[ab]{1,200}", PIECES, max_bytes=2000), r"table of \d+ states x .* max_bytes=2000"),
  "unspelled": (lambda: regex("a+z", PIECES), "regex 'a\\+z' cannot be satisfied: no sequence"),
  "empty": (lambda: regex(r"a[^\s\S]", PIECES), "cannot be satisfied: no text matches"),
  "malformed": (lambda: regex("(a", PIECES), r"regex '\(a' is not understood .*; write it"),
  "boundary": (lambda: regex(r"\bab", PIECES), "is not understood .*word boundaries"),
  "schema": (lambda: json_schema({"type": "objct"}, PIECES), "no regular expression for this JSON schema"),
  "no json": (lambda: json_schema("{", PIECES), "no regular expression for this JSON schema"),
  "no choice": (lambda: choices([], PIECES), "at least one option"),
  "mixed": (lambda: choices(["a", [1]], PIECES), "texts, or lists of token ids"),
  "id": (lambda: choices([[1, 99]], PIECES), r"99 is no token id; give ids in 0..31"),
  "choice": (lambda: choices(["zz"], PIECES), "1 choices cannot be satisfied"),
  "large trie": (lambda: choices([[1] * 500], PIECES, max_bytes=2000), "501 states x 2 token classes"),
  "large bytes": (lambda: choices(["a" * 500], PIECES, max_bytes=2000), "501 states x 256"),
  "no string": (lambda: stop_strings([], PIECES), "at least one string"),
  "empty string": (lambda: stop_strings(["a", ""], PIECES), "none empty"),
  "one string": (lambda: stop_strings("ab", PIECES), "a list of strings"),
  "vocabularies": (lambda: join([anything(3), anything(4)]), "one vocabulary, not of sizes 3, 4"),
  "pieces": (lambda: token_bytes([b"a", 3]), r"token_bytes\[1\]=3: give bytes"),
  "tokenizer": (lambda: token_bytes(object()), "object does not tell what bytes"),
  "no automaton": (lambda: parse("constrain(3)"), "constrain.automaton=3: build one"),
  "starts": (lambda: Constrain(join([anything(4)] * 2)).prepared(), "constrain.start is missing: 2 automata"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_constraints_that_cannot_be_are_refused_when_built(name):
  pytest.importorskip("outlines_core", reason="regular expressions need nr[constraints]")
  build, message = REFUSALS[name]
  with pytest.raises(ValueError, match=message):
    build()


def test_grammars_that_cannot_be_are_refused_when_built():
  pytest.importorskip("llguidance", reason="grammars need nr[constraints]")
  vocabulary = grammar_vocabulary(PIECES, [END])
  with pytest.raises(ValueError, match='Lark grammar is not understood: .*"other"'):
    lark_grammar('start: "a" other', vocabulary)
  with pytest.raises(ValueError, match="Lark grammar cannot be satisfied"):
    lark_grammar('start: "q"', vocabulary)
  with pytest.raises(ValueError, match="JSON schema is not understood: .*objct"):
    json_grammar({"type": "objct"}, vocabulary)
  with pytest.raises(ValueError, match="JSON schema is not JSON"):
    json_grammar("{", vocabulary)
  with pytest.raises(ValueError, match="end_of_text_ids: give at least one"):
    grammar_vocabulary(PIECES)


def test_requests_that_cannot_be_are_refused(model):
  matcher = AutomatonMatcher(choices(["no"], PIECES), [END])
  prompts = pad_prompts(PROMPTS)
  settings = dict(max_new_tokens=4, stop=STOP)
  with pytest.raises(ValueError, match="2 matchers for 3 prompts"):
    sample_with_grammar(model, *prompts, grammar=[matcher] * 2, **settings)
  with pytest.raises(ValueError, match=r"stop ids \[4\]: the grammar ends its texts with \[31\]"):
    sample_with_grammar(model, *prompts, grammar=matcher, max_new_tokens=4, stop=Stop(ids_E=[4]))
  with pytest.raises(ValueError, match="fast_forward=-1"):
    sample_with_grammar(model, *prompts, grammar=matcher, fast_forward=-1, **settings)
  large = AutomatonMatcher(anything(40), [END])
  with pytest.raises(ValueError, match="made for 40 tokens, the model has 32"):
    sample_with_grammar(model, *prompts, grammar=large, sampler=Greedy(), **settings)
  with pytest.raises(ValueError, match="built for 40 tokens, the model has 32"):
    sample(model, *prompts, chain=Constrain(anything(40)), max_new_tokens=4)


@pytest.mark.parametrize("package", ["outlines_core", "llguidance"])
def test_missing_packages_are_named_with_their_extra(package, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, package, None)
  build = dict(outlines_core=lambda: regex("a", PIECES), llguidance=lambda: grammar_vocabulary(PIECES, [END]))
  with pytest.raises(ImportError, match=r"pip install 'nr\[constraints\]'"):
    build[package]()
