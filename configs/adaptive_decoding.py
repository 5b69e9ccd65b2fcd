"""Adaptive decoding by latent preference optimisation (arXiv 2411.09661), from a toy model to a report.

  python -m nr.main --config=configs/adaptive_decoding.py:tiny --workdir=runs/adaptive_decoding

Variants:
  tiny        the offline experiments with one seed: two CPU cores, a few minutes
  seeds       the same with five seeds, and intervals over prompts and seeds
  miniature   every stage in seconds, for tests; its numbers mean nothing
  paper       the sizes that the paper states, for its head, sets and pools. Its tasks (UltraFeedback, GSM8K,
              stories) and its judge are not here: the toys stand in for them, and for Llama 3.0 8B Instruct a
              model of its size that would be trained on the toys. For building and sizing, not for results

Three experiments:
  mini        two tasks that a prompt's first word tells apart; one wants greedy decoding, one temperature 1
  hidden      the best temperature depends on what the prompt does not show: no head can beat the best fixed one
  sentences   a temperature for every token: first words of sentences must be right, the others varied

The paper gives no beta, learning rate, optimiser, batch size, number of steps or response length: those
below are ours.
"""

from ml_collections import ConfigDict

from nr import names
from nr.training.defaults import training_section

VARIANTS = ("tiny", "seeds", "miniature", "paper")
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # stated, sections 4.3 and 4.4


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the config of a variant; every field can be set on the command line."""
  if variant not in VARIANTS:
    raise ValueError(names.unknown("config variant", variant, VARIANTS))
  config = ConfigDict()
  config.recipe = "nr.recipes.adaptive_decoding"
  config.variant = variant
  config.seed = 0
  config.seeds = (0, 1, 2, 3, 4) if variant == "seeds" else (0,)  # each has a language model of its own
  config.language_model = _language_model()
  config.experiments = ConfigDict(
    {
      "mini": _experiment(families=("sums", "words")),
      "hidden": _experiment(families=("hidden",)),
      "sentences": _experiment(families=("story",), level="token", pair_rule="constraint", num_prompts=1000),
    }
  )
  config.heads = _heads()
  config.evaluate = _evaluate()
  if variant == "miniature":
    _make_miniature(config)
  if variant == "paper":
    _make_paper(config)
  return config


def _language_model() -> ConfigDict:
  """Returns the model that writes the responses; it is frozen afterwards."""
  return ConfigDict(
    {
      # A name that is repeated has as many shares of the texts: sums take longest to learn.
      "families": ("sums", "sums", "sums", "sums", "words", "hidden", "story"),
      "num_texts": 40_000,
      "model": {
        "family": "gpt2",  # gpt2 | llama
        "num_layers": 2,
        "model_dim": 48,
        "num_heads": 4,
        "num_kv_heads": 0,  # 0: as many as query heads
        "mlp_dim": 0,  # 0: the family's ratio
        "init_std": 0.1,  # GPT-2's 0.02 is for far wider models; with it sums are hardly learned in this time
        "dtype": "float32",
        "layers": "auto",  # scan | unroll | auto: unrolled on CPU, scanned on accelerators
      },
      "train": training_section(
        steps=1000,
        batch_size=64,
        optimizer__learning_rate=5e-3,
        schedule__warmup_steps=50,
        log_every=50,
      ),
    }
  )


def _experiment(**changes) -> ConfigDict:
  """Returns how pools and pairs of one experiment are made."""
  return ConfigDict(
    {
      "families": (),
      "level": "sequence",  # one choice a response; "token": one a token
      "action": "temperature",  # temperature | top_k | top_p | min_p: what a setting is
      "values": TEMPERATURES,
      "num_prompts": 500,  # training prompts of each family
      "num_test_prompts": 500,
      "num_samples": 16,  # N; stated, appendix A
      "pair_rule": "extremes",  # extremes | correctness | random_pair | constraint
      "pair_top": 4,  # of "constraint"; stated, appendix A.5
      "held_out": 0.1,  # share of the distinct training prompts whose pairs measure how well heads rank
      **changes,
    }
  )


def _heads() -> ConfigDict:
  """Returns the head and its training; all of it ours where the paper is silent."""
  return ConfigDict(
    {
      "variants": ("separate", "latent", "nll"),  # Eq. 10, Eq. 11, section 4.6; also joint, Eq. 9
      "model": {"hidden_dim": 64, "num_hidden_layers": 2},
      "lpo": {
        "beta": 0.1,  # inferred: not in the paper
        "sequence_marginal": "exact",  # "per_token" is Eq. 11 to the letter
        "is_length_normalised": False,
      },
      "cache_hidden": True,  # what the loss reads of the frozen model is computed once
      "train": training_section(
        steps=400,
        batch_size=64,
        optimizer__learning_rate=1e-3,
        schedule__name="constant",
        log_every=20,
      ),
    }
  )


def _evaluate() -> ConfigDict:
  """Returns what the heads are compared with; besides these, every fixed setting."""
  return ConfigDict(
    {
      "num_samples": 4,  # responses to each test prompt, of every arm
      "selections": ("greedy", "sample"),  # Eq. 4, which the paper uses at inference, and Eq. 5
      "bootstrap_samples": 2000,
      # Other rules that adapt, as chains of nr.generation.transforms; settings are ours, none is tuned.
      "baselines": {
        "entropy": "dynamic_temperature(0.0, 1.0)",
        "min_p": "min_p(0.1)",
        "top_n_sigma": "top_n_sigma(1.0)",
        "mirostat": "mirostat_v2(2.0, 0.1)",
      },
    }
  )


def _make_miniature(config: ConfigDict) -> None:
  config.language_model.num_texts = 400
  config.language_model.model.update(num_layers=1, model_dim=16, num_heads=2)
  for train, steps in ((config.language_model.train, 20), (config.heads.train, 10)):
    train.update(steps=steps, log_every=5, batch_size=16, progress=False)
    train.schedule.warmup_steps = 2
  for experiment in config.experiments.values():
    experiment.update(num_prompts=48, num_test_prompts=12, num_samples=8, held_out=0.3)
  config.heads.model.hidden_dim = 8
  config.evaluate.update(num_samples=2, bootstrap_samples=50)


def _make_paper(config: ConfigDict) -> None:
  # Llama 3.0 8B (section 4.1).
  config.language_model.model.update(
    family="llama",
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14_336,
    init_std=0.02,
    dtype="bfloat16",
    layers="scan",
  )
  config.heads.model.update(
    hidden_dim=2048, num_hidden_layers=2
  )  # "3-layer MLP", 2048; read as two hidden layers
  for experiment in config.experiments.values():
    # Section 4.3: 1,000 GSM8K and 1,000 story prompts, 2,000 of UltraFeedback; 1,000 to 1,319 for testing.
    experiment.update(num_prompts=1000, num_test_prompts=1000)
  # Inferred: AdamW, 1e-4, betas (0.9, 0.95), no decay, 64 pairs, 5 epochs of about 3,600 pairs.
  config.heads.train.update(steps=280, batch_size=64)
  config.heads.train.optimizer.learning_rate = 1e-4
