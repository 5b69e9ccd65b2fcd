"""Beam search against `transformers`: the same sequences and scores, live."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")

from nr.generation.beams.beam_search import beam_search  # noqa: E402
from nr.generation.language_models import Network  # noqa: E402
from nr.generation.stopping import Stop  # noqa: E402
from nr.interchange.huggingface import save_huggingface  # noqa: E402
from nr.models.parameters import split  # noqa: E402
from nr.models.transformer import Transformer, TransformerSpec  # noqa: E402
from tests.generation import toy  # noqa: E402

pytestmark = pytest.mark.oracle

VOCAB, MAX_NEW, PENALTIES = 24, 7, (0.0, 1.0, 2.0)
RULES = {"never": "never", "heuristic": False, "when_full": True}
PROMPTS = np.array(toy.random_prompts([5] * 4, seed=3, vocab_size=VOCAB))


def theirs(model, prompts, width, penalty, rule, ends, max_new):
  """Returns [B][K] lists of generated tokens up to the end, and scores [B, K] (None for one beam)."""
  generated = model.generate(
    torch.tensor(prompts),
    attention_mask=torch.ones(prompts.shape, dtype=torch.long),
    num_beams=width,
    num_return_sequences=width,
    do_sample=False,
    max_new_tokens=max_new,
    length_penalty=penalty,
    early_stopping=RULES[rule],
    eos_token_id=ends,
    pad_token_id=ends[0],
    return_dict_in_generate=True,
    output_scores=True,
  )
  tokens = generated.sequences.numpy()[:, prompts.shape[1] :].reshape(len(prompts), width, -1)
  scores = generated.sequences_scores.numpy().reshape(len(prompts), width) if width > 1 else None
  return [[trimmed(row.tolist(), ends) for row in rows] for rows in tokens], scores


def trimmed(tokens, ends):
  places = [place for place, token in enumerate(tokens) if token in ends]
  return tokens[: places[0] + 1] if places else tokens


def ours(model, prompts, width, penalty, rule, ends, max_new):
  beams = beam_search(
    model,
    prompts,
    beam_width=width,
    max_new_tokens=max_new,
    length_penalty=penalty,
    stop_rule=rule,
    stop=Stop(ids_E=ends),
  )
  rows = zip(np.asarray(beams.tokens_BKN), np.asarray(beams.lengths_BK))
  tokens = [[row[:length].tolist() for row, length in zip(*prompt)] for prompt in rows]
  return tokens, np.asarray(beams.scores_BK)


# Stop ids that end texts now and then; two of them call for more candidates.
@pytest.mark.parametrize("family, widths, ends", [("llama", (1, 2, 4), [5]), ("gpt2", (3,), [1, 16])])
def test_the_same_beams_of_a_random_network(family, widths, ends, tmp_path):
  sizes = dict(vocab_size=VOCAB, num_layers=2, model_dim=16, num_heads=2, max_length=32, init_std=0.5)
  spec = getattr(TransformerSpec, family)(**sizes, layers="unroll")
  graphdef, params = split(Transformer(spec, rngs=nnx.Rngs(jax.random.key(4))))
  save_huggingface(tmp_path, spec, params)
  their_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  outcomes, is_early = set(), set()
  for width in widths:
    for penalty in PENALTIES:
      for rule in RULES:
        setting = (width, penalty, rule, ends, MAX_NEW)
        expected, expected_scores = theirs(their_model, PROMPTS, *setting)
        found, scores = ours(Network(graphdef, params), PROMPTS, *setting)
        assert found == expected, setting
        if expected_scores is not None:
          np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
        outcomes.add(str(found))
        is_early |= {len(text) < MAX_NEW for texts in found for text in texts}
  # The settings do matter, and texts end of both causes.
  assert len(outcomes) >= 2 * len(widths) and is_early == {True, False}


class TableConfig(transformers.PretrainedConfig):
  model_type = "table_of_next_tokens"


class Table(transformers.PreTrainedModel, transformers.GenerationMixin):
  """The toy chain as a model of transformers."""

  config_class = TableConfig

  def __init__(self, config):
    super().__init__(config)
    self.table = torch.nn.Parameter(torch.log(torch.tensor(toy.TARGET_CV, dtype=torch.float32)))

  def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
    return {"input_ids": input_ids}

  def forward(self, input_ids, **_):
    # The fifth column, the beginning of text, is an id of theirs; nothing makes it.
    rows = self.table[input_ids]
    logits = torch.cat([rows, torch.full((*rows.shape[:2], 1), -1e9)], dim=-1)
    return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_the_same_beams_of_the_toy_chain():
  model = Table(TableConfig(vocab_size=5, num_hidden_layers=1)).eval()
  model.generation_config.use_cache = False
  for width in (2, 3):
    for penalty in PENALTIES:
      for rule in RULES:
        setting = (width, penalty, rule, [toy.EOS], toy.MAX_NEW)
        expected, expected_scores = theirs(model, np.array([[toy.BOS]]), *setting)
        found, scores = ours(toy.TOY, np.array([[toy.BOS]]), *setting)
        assert found == expected, setting
        np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
