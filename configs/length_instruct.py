"""LIFT: following length constraints in instructions (arXiv 2406.17744).

  python -m nr.main --config=configs/length_instruct.py:tiny --workdir=runs/length_instruct

Variants:
  tiny        the offline experiment: a small world with a built-in bias towards length; minutes on two cores
  seeds       tiny with five seeds and bootstrap intervals over them
  miniature   every stage in seconds, for tests; its numbers mean nothing
  benchmark   a checkpoint that you name, measured as it is on benchmark files that you name
  paper       the paper's data sizes on a checkpoint and files that you name; what the paper leaves open is ours
"""

from ml_collections import ConfigDict

from nr import names
from nr.recipes.length_instruct.augmentation import TEMPLATE
from nr.recipes.sections import model_section
from nr.training.defaults import training_section

VARIANTS = ("tiny", "seeds", "miniature", "benchmark", "paper")


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the config of a variant; every field can be set on the command line."""
  if variant not in VARIANTS:
    raise ValueError(names.unknown("config variant", variant, VARIANTS))
  config = ConfigDict()
  config.recipe = "nr.recipes.length_instruct"
  config.variant = variant
  config.seed = 0
  config.seeds = (0,)

  config.lift = _lift()
  config.world = _world()
  config.base = _base()
  config.data = ConfigDict(
    {
      "pairs": "",  # JSON lines of preference pairs (nr.data.preferences); "": sampled in the toy world
      "chat_template": "",  # of a checkpoint: "own", a built-in name (nr.chat_templates), or "" for plain text
      "prompts_per_topic": 250,  # two answers each
      "rows_per_call": 512,  # texts sampled together; decides speed and memory, not what is sampled
      "max_length": 20,  # tokens of a prompt with its response; longer examples are left out
    }
  )
  config.arms = _arms()
  config.train = training_section(
    # Few pairs have small limits: with fewer steps or a smaller rate they are not learnt, and what
    # preference training takes from the rejected goes to tokens that no answer has.
    steps=1000,
    batch_size=64,  # pairs
    optimizer__name="adam",
    optimizer__learning_rate=1e-3,
    optimizer__beta2=0.999,
    schedule__name="constant",
    clip=0.0,
    log_every=20,
  )
  config.evaluate = _evaluate()
  if variant == "seeds":
    config.seeds = (0, 1, 2, 3, 4)
  if variant == "miniature":
    _make_miniature(config)
  if variant in ("benchmark", "paper"):
    _make_paper(config)
  if variant == "benchmark":
    for arm in config.arms:
      config.arms[arm].mix = ""
    config.data.chat_template = "own"
  return config


def _lift() -> ConfigDict:
  """Returns how limits are put into prompts: the paper's rule in the toy's language."""
  return ConfigDict(
    {
      "template": "limit_{limit} {instruction}",
      "counter": "spaces",  # words | nltk | nltk_sentences | spaces
      "min_difference": 2,  # words by which responses must differ
      "margin": 2,  # words of room in the sample that both responses obey
      "seed": 0,
    }
  )


def _world() -> ConfigDict:
  """Returns the sizes of the toy world."""
  return ConfigDict(
    {
      "num_topics": 8,
      "num_words": 24,
      "relevant": 8,
      "mean_words": 8.0,
      "std_words": 3.0,
      "max_words": 14,
      "max_limit": 16,
      "relevant_share": 0.5,
      "limited_share": 0.05,
    }
  )


def _base() -> ConfigDict:
  """Returns the model that arms begin from."""
  return ConfigDict(
    {
      "checkpoint": "",  # a folder or file that nr.generators.checkpoints opens; "": trained in the toy world
      "responses": "",  # JSON lines {id, prompt, response} to fine-tune a checkpoint on first; "": none
      "examples": 16_000,  # of the toy world
      "model": model_section(),
      "train": training_section(
        steps=1500,
        batch_size=64,
        optimizer__name="adam",
        optimizer__learning_rate=3e-3,
        optimizer__beta2=0.999,
        schedule__warmup_steps=20,
        log_every=20,
      ),
    }
  )


def _arms() -> ConfigDict:
  """Returns the arms: which pairs each sees, and its loss (fields of PreferenceSpec).

  An arm may set fields of the section `train` for itself, in a section `train` of its own.

  The toy's losses hold a token-mean NLL of the chosen response (our choice, as the specification
  of preference learning asks for on small worlds): without it the probability that training
  takes from rejected answers goes to tokens that no answer has, on some seeds and not on others.
  """
  nll = 0.3
  return ConfigDict(
    {
      "dpo": {"mix": "plain", "loss": {"beta": 0.1, "nll_weight": nll}},
      # alpha > 0 penalises length, in tokens; the paper's tables print it with the other sign.
      "r_dpo_small": {"mix": "plain", "loss": {"beta": 0.1, "nll_weight": nll, "length_penalty": 0.2}},
      "r_dpo_large": {"mix": "plain", "loss": {"beta": 0.1, "nll_weight": nll, "length_penalty": 1.0}},
      "lift_augmented_only": {"mix": "augmented_only", "loss": {"beta": 0.1, "nll_weight": nll}},
      "lift": {"mix": "union", "loss": {"beta": 0.1, "nll_weight": nll}},
      "lift_no_nll": {"mix": "union", "loss": {"beta": 0.1, "nll_weight": 0.0}},
    }
  )


def _evaluate() -> ConfigDict:
  """Returns what is measured."""
  return ConfigDict(
    {
      "limits": (3, 4, 5, 6, 7, 8, 9, 10, 11),
      "scales": (0.75, 0.5, 0.25),
      "answers_per_limit": 8,  # of each topic
      "answers_without_limit": 64,
      "cases_per_topic": 32,  # of the benchmark
      # Of a given checkpoint:
      "alpaca_eval_li": "",  # length_instructed_alpaca_baseline.json
      "mt_bench_li": "",  # question.jsonl
      "mt_bench_li_baselines": "",  # length_instructed_turn1_baseline.jsonl
      "answered": "",  # JSON lines {id, instruction, responses} of one's own, made into cases by the same rule
      "most_cases": 0,  # of each benchmark; 0: all
      "max_new_tokens": 2048,
      "chain": "temperature(0.7)|top_p(0.9)",  # ours, in every variant
      "judge": {
        "url": "",  # "": no judge
        "model": "",
        "api_key_variable": "",
        "max_new_tokens": 1024,
        "max_tokens_field": "max_tokens",  # OpenAI's newer models want "max_completion_tokens"
      },
    }
  )


def _make_miniature(config: ConfigDict) -> None:
  config.world.update(
    num_topics=3, num_words=9, relevant=4, mean_words=4.0, std_words=2.0, max_words=6, max_limit=8
  )
  config.base.examples = 300
  config.base.model.update(num_layers=1, model_dim=16)
  config.base.train.update(steps=20, batch_size=16, progress=False, log_every=5)
  config.base.train.schedule.warmup_steps = 2
  config.data.update(prompts_per_topic=20, max_length=12)
  config.train.update(steps=10, batch_size=8, progress=False, log_every=5)
  for arm in ("r_dpo_small", "lift_augmented_only", "lift_no_nll"):
    config.arms[arm].mix = ""  # left out
  config.evaluate.update(
    batch_size=64,
    limits=(2, 4),
    scales=(0.5,),
    answers_per_limit=2,
    answers_without_limit=4,
    cases_per_topic=3,
  )


def _make_paper(config: ConfigDict) -> None:
  """The paper's template, filter and losses; its unknown settings are ours and marked so."""
  config.lift.update(template=TEMPLATE, counter="words", min_difference=10, margin=10)
  config.data.max_length = 2048  # ours
  # The anonymous submission gives no beta, learning rate, batch size or number of epochs (what the arXiv
  # version gives is not known to us): all ours, as is how answers are sampled (evaluate.chain).
  config.train.update(steps=279, batch_size=64)  # two epochs of D plus D' (2,977 + 5,954 pairs)
  config.train.optimizer.update(name="adamw", learning_rate=5e-7, beta2=0.95)
  config.train.schedule.update(name="cosine", warmup_steps=28)
  # Two epochs for the other mixes too: steps of their own, which train.steps does not change.
  for mix, steps in (("plain", 93), ("augmented_only", 186)):
    for arm in config.arms:
      if config.arms[arm].mix == mix:
        config.arms[arm].train = ConfigDict({"steps": steps, "schedule": {"warmup_steps": steps // 10}})
  config.train.clip = 1.0
  config.train.checkpoint.every = 200
  config.base.train.update(steps=100, batch_size=64)  # 3,200 answers, two epochs
  config.base.train.optimizer.update(name="adamw", learning_rate=5.5e-6)
  config.base.train.schedule.warmup_steps = 10
  config.arms.r_dpo_small.loss.length_penalty = 0.01
  config.arms.r_dpo_large.loss.length_penalty = 0.1
  config.arms.lift_no_nll.mix = ""  # the toy's: here no arm has an NLL
  for arm in config.arms:
    config.arms[arm].loss.nll_weight = 0.0
  config.data.rows_per_call = 32
  config.evaluate.update(scales=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))
