"""LIFT: following length constraints in instructions (arXiv 2406.17744).

  python -m nr.main --config=configs/length_instruct.py:tiny --workdir=runs/length_instruct

Variants:
  tiny        the offline experiment: a small world with a built-in bias towards length; minutes on two cores
  seeds       tiny with five seeds and bootstrap intervals over them
  miniature   every stage in seconds, for tests; its numbers mean nothing
  benchmark   a checkpoint that you name, measured as it is on benchmark files that you name
  smollm      an adapter on a small chat model that you name (SmolLM2-135M-Instruct was meant), on pairs that it
              makes itself from a file of instructions with answers; measured on prompts that strong models have
              answered. Two cores
  smollm_smoke   smollm with a few prompts and steps: every stage in minutes; its numbers mean nothing
  llama       the same for a model of 8B parameters on one host with several accelerators
  paper       the paper's data sizes, on a checkpoint and pairs that you name; what the paper leaves open is ours

  python -m nr.main --config=configs/length_instruct.py:smollm --workdir=runs/lift \\
    --config.base.checkpoint=MODEL.gguf --config.pools.instructions=TRAIN.jsonl --config.evaluate.answered=TEST.jsonl
"""

from ml_collections import ConfigDict

from nr import names
from nr.recipes.length_instruct.augmentation import TEMPLATE
from nr.recipes.sections import model_section
from nr.training.defaults import training_section

VARIANTS = ("tiny", "seeds", "miniature", "benchmark", "smollm", "smollm_smoke", "llama", "paper")


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
  config.pools = _pools()
  config.adapter = ConfigDict({"rank": 0, "alpha": 32.0})  # rank 0: all of the model is trained
  config.compute = ConfigDict({"loss_chunk": 0})  # tokens whose logits are held at a time; 0: all
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
  if variant in ("benchmark", "smollm", "smollm_smoke", "llama", "paper"):
    _make_paper(config)
  if variant == "benchmark":
    for arm in config.arms:
      config.arms[arm].mix = ""
    config.data.chat_template = "own"
  if variant in ("smollm", "smollm_smoke", "llama"):
    _make_sampled(config)
  if variant == "llama":
    _make_llama(config)
  if variant in ("llama", "paper"):
    _make_large(config)
  if variant == "smollm_smoke":
    _make_smoke(config)
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


def _pools() -> ConfigDict:
  """Returns how a checkpoint makes its own pairs."""
  return ConfigDict(
    {
      "instructions": "",  # .jsonl (.gz too), .json or .parquet; "": none, pairs are given (data.pairs)
      "fields": {  # paths in a record of it, such as "instances.0.output"
        "instruction": "instruction",
        "input": "input",  # put behind the instruction, a blank line between
        "reference": "output",  # an answer
        "id": "id",
      },
      "most_prompts": 0,  # 0: all
      "num_samples": 4,  # responses of each
      "max_new_tokens": 512,  # a response that reaches them is left out
      "chain": "",  # transforms of the logits while sampling; "": the model's own law
      "pairs_per_prompt": 2,  # most pairs of a reference with responses; other judges give one a prompt
      "judge": {
        "kind": "reference",  # reference | words | reward_model | language_model: what decides (sampled_pairs.py)
        "path": "",  # folder of a reward model
        "chat_template": "own",  # of the reward model: "own", a built-in name, or "" for plain text
        **_server(),
      },
    }
  )


def _server(max_new_tokens: int = 1024) -> dict:
  """Returns the fields of a judge behind a server with OpenAI's interface."""
  return {
    "url": "",  # "": no such judge
    "model": "",
    "api_key_variable": "",
    "max_new_tokens": max_new_tokens,
    "max_tokens_field": "max_tokens",  # OpenAI's newer models want "max_completion_tokens"
  }


def _base() -> ConfigDict:
  """Returns the model that arms begin from."""
  return ConfigDict(
    {
      "checkpoint": "",  # a folder or file that nr.generators.checkpoints opens; "": trained in the toy world
      "dtype": "float32",  # of a checkpoint: type of its weights and of computing; training's own stay float32
      "remat": "none",  # of a checkpoint: none | dots | full, what the backward pass computes again
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
      "limits": (
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
      ),  # of every topic; of a checkpoint, of every prompt beside its own
      "scales": (0.75, 0.5, 0.25),
      "answers_per_limit": 8,  # of each topic
      "answers_without_limit": 64,  # of each topic or prompt
      "cases_per_topic": 32,  # of the benchmark
      # Of a given checkpoint:
      "alpaca_eval_li": "",  # length_instructed_alpaca_baseline.json
      "mt_bench_li": "",  # question.jsonl
      "mt_bench_li_baselines": "",  # length_instructed_turn1_baseline.jsonl
      "answered": "",  # JSON lines {id, instruction, responses} of one's own, made into cases by the same rule
      "most_cases": 0,  # of each benchmark; 0: all
      "max_new_tokens": 2048,
      "chain": "temperature(0.7)|top_p(0.9)",  # ours, in every variant
      "judge": _server(),  # compares answers with baselines
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
  config.base.checkpoint = "CHECKPOINT"  # yours
  config.evaluate.update(
    limits=(), answers_without_limit=0, scales=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
  )


def _make_sampled(config: ConfigDict) -> None:
  """A small chat model on pairs of its own. Sizes, and all of training, are ours: for two cores.

  The arms train for as long: those that have more pairs go through them less often.
  """
  config.data.update(chat_template="own", max_length=320)
  config.adapter.rank = 16
  config.pools.update(instructions="INSTRUCTIONS", max_new_tokens=128)
  for arm in config.arms:
    config.arms[arm].train = ConfigDict({})
    config.arms[arm].mix = "" if arm.startswith("r_dpo") else config.arms[arm].mix
  config.train.update(steps=60, batch_size=4, log_every=5)
  config.train.optimizer.learning_rate = 5e-4
  config.train.schedule.warmup_steps = 5
  config.train.checkpoint.every = 10
  config.evaluate.update(
    limits=(10, 30, 60), answers_without_limit=1, scales=(), most_cases=32, max_new_tokens=128
  )


def _make_smoke(config: ConfigDict) -> None:
  """Every stage of a checkpoint's run in minutes on two cores."""
  config.pools.update(most_prompts=8, num_samples=2, max_new_tokens=48)
  config.data.max_length = 192
  config.train.update(steps=2, batch_size=2, log_every=1)
  config.train.schedule.warmup_steps = 1
  config.evaluate.update(limits=(20,), most_cases=4, max_new_tokens=48)


def _make_llama(config: ConfigDict) -> None:
  """8B parameters: longer responses, more of them, an adapter of a higher rank. Sizes are ours."""
  config.adapter.update(rank=64, alpha=64.0)
  config.data.update(max_length=2048, rows_per_call=128)
  config.pools.update(max_new_tokens=1024)
  config.train.update(steps=279, batch_size=64)  # as in the variant paper, which has 8,931 pairs
  config.train.optimizer.learning_rate = 2e-5
  config.train.schedule.warmup_steps = 28
  config.train.checkpoint.every = 50
  config.evaluate.update(limits=(20, 50, 100, 200), most_cases=0, max_new_tokens=2048)


def _make_large(config: ConfigDict) -> None:
  """What several accelerators of one host need: weights split over them, little kept for the backward pass."""
  config.base.update(dtype="bfloat16", remat="full")
  config.compute.loss_chunk = 8192
  for section in (config.train, config.base.train):
    section.mesh.update(data=1, fsdp=-1)
