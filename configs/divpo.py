"""DivPO: Diverse Preference Optimization (arXiv 2501.18101).

  python -m nr.main --config=configs/divpo.py:tiny --workdir=runs/divpo

Variants:
  tiny        the offline experiment: personas in a small language; minutes on two cores
  seeds       tiny with five seeds
  groups      tiny with GRPO in place of pairs: with the score as reward, and with score times diversity (DARLING)
  miniature   every stage in seconds, for tests; its numbers mean nothing
  smollm      first names by a checkpoint that you name (SmolLM2-135M-Instruct was meant), with an adapter
  smollm_smoke   smollm with a few steps: every stage in minutes on two cores; its numbers mean nothing
  llama       the paper's task with an adapter on a model of 8B parameters, on one host with several accelerators
  paper       what is known of the paper's setting on a checkpoint that you name; unknown values are marked
"""

from ml_collections import ConfigDict

from nr import names
from nr.recipes.sections import model_section
from nr.training.defaults import training_section

SUBJECTS = (
  "a pirate", "a nurse", "a queen", "a baker", "a sailor", "a dancer", "a farmer", "a wizard", "a singer", "a judge",
  "a teacher", "a painter", "a soldier", "a pilot", "a gardener", "a doctor", "a poet", "a knight", "a spy", "a cook",
  "a dragon", "a lawyer", "a fisherman", "a princess", "a carpenter", "a detective", "a robot", "a miner", "a hunter",
  "a librarian", "an astronaut", "a clown", "a monk", "a tailor", "a violinist", "a shepherd",
)  # fmt: skip
VARIANTS = ("tiny", "seeds", "groups", "miniature", "smollm", "smollm_smoke", "llama", "paper")


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the config of a variant; every field can be set on the command line."""
  if variant not in VARIANTS:
    raise ValueError(names.unknown("config variant", variant, VARIANTS))
  config = ConfigDict()
  config.recipe = "nr.recipes.divpo"
  config.variant = variant
  config.seed = 0
  config.seeds = (0,)

  config.task = _task()
  config.base = _base()
  config.sampling = ConfigDict(
    {
      "num_samples": 16,  # N responses of a pool (the paper's number is not known to us)
      "max_new_tokens": 8,
      "max_length": 9,  # tokens of a prompt with its response and end; longer pairs are left out
      "chain": "",  # transforms of the logits while pools are drawn; "": the policy's own law
      "batch_size": 256,  # rows decoded together
    }
  )
  config.adapter = ConfigDict({"rank": 0, "alpha": 32.0})  # rank 0: all of the model is trained
  config.compute = ConfigDict({"loss_chunk": 0})  # tokens whose logits are held at a time; 0: all
  config.arms = _arms()
  config.train = training_section(
    steps=150,
    batch_size=16,  # pairs, one a pool
    optimizer__name="adam",
    optimizer__learning_rate=1e-3,
    optimizer__beta2=0.999,
    schedule__name="constant",
    clip=0.0,
    log_every=10,
  )
  config.evaluate = ConfigDict({"samples": 1000, "pool_size": 16, "chain": ""})
  if variant == "seeds":
    config.seeds = (0, 1, 2, 3, 4)
  if variant == "groups":
    with config.unlocked():
      config.arms = _group_arms()
  if variant == "miniature":
    _make_miniature(config)
  if variant in ("smollm", "smollm_smoke", "llama", "paper"):
    _make_real(config)
  if variant in ("llama", "paper"):
    _make_paper(config)
  if variant == "llama":
    _make_llama(config)
  if variant == "smollm_smoke":
    _make_smoke(config)
  return config


def _task() -> ConfigDict:
  """Returns what is written."""
  return ConfigDict(
    {
      "kind": "world",  # world | json | answers; all but the world need base.checkpoint
      "world": {"num_values": 40, "exponent": 1.3, "malformed": 0.12},
      "json": {},  # instruction and attributes, where they are to be others than the recipe's
      "answers": {
        "template": "A first name for {subject}?",
        "subjects": SUBJECTS[:20],
        "held_out_subjects": SUBJECTS[20:],
        "pattern": "[A-Z][a-z]{1,11}[.]?",
        # (subject, answer) shown as earlier turns: without them SmolLM2-135M-Instruct writes sentences, and at
        # temperature 1 about one answer in ten is a name. Long tasks in words ("answer with the name only") help less.
        "examples": (("a king", "Edmund"), ("a thief", "Sable")),
      },
    }
  )


def _base() -> ConfigDict:
  """Returns the model that arms begin from."""
  return ConfigDict(
    {
      "checkpoint": "",  # a folder or file that nr.generators.checkpoints opens; "": pre-trained on personas
      "chat_template": "own",  # of a checkpoint: "own", or a built-in name (nr.chat_templates)
      "dtype": "float32",  # of a checkpoint: type of its weights and of computing; training's own stay float32
      "remat": "none",  # of a checkpoint: none | dots | full, what the backward pass computes again
      "examples": 20_000,
      "max_length": 8,
      "model": model_section(),
      "train": training_section(
        steps=600,
        batch_size=64,
        optimizer__name="adam",
        optimizer__learning_rate=3e-3,
        optimizer__beta2=0.999,
        schedule__warmup_steps=20,
        log_every=20,
      ),
    }
  )


def _arm(
  method: str,
  *,
  is_online: bool,
  select: dict | None = None,
  steps: int = 0,
  learning_rate: float = 0.0,
  group: dict | None = None,
  **loss,
) -> dict:
  """Returns an arm: which pairs it picks (fields of SelectionSpec), when, and its loss (of PreferenceSpec, or of
  GroupRelativeSpec for "grpo")."""
  picked = {"method": method, "criterion": "probability", "rho": 0.0, "tie_policy": "diversity_only"}
  return {
    "select": {**picked, **(select or {})},
    "loss": {"beta": 0.1, **loss},
    "group": group or {},
    "steps_per_round": 1 if is_online else 0,  # 0: offline, one round for the whole run
    "prompts_per_round": 0,  # 0: as many as its steps take pairs
    "sync_reference_every": 0,  # 0: the reference stays the base
    "steps": steps,  # 0: train.steps
    "learning_rate": learning_rate,  # 0: train.optimizer.learning_rate
  }


def _arms() -> ConfigDict:
  """Returns the arms of the offline experiment. Rewards are 0 or 1, so any rho below 0.5 gives the same sets."""
  online = dict(is_online=True)
  # Off the policy, both methods lose validity at the online rate within few steps.
  offline = dict(is_online=False, steps=100, learning_rate=3e-4)
  return ConfigDict(
    {
      "dpo_online": _arm("dpo", **online),
      "divpo_online": _arm("divpo", **online),
      "divpo_skip_online": _arm("divpo", select={"tie_policy": "skip"}, **online),
      "frequency_online": _arm("divpo", select={"criterion": "attribute_frequency"}, **online),
      "random_online": _arm("divpo", select={"criterion": "random", "tie_policy": "skip"}, **online),
      "dpo_offline": _arm("dpo", **offline, nll_weight=0.3),
      "divpo_offline": _arm("divpo", **offline, nll_weight=0.3),
      "dpo_offline_no_nll": _arm("dpo", **offline),
      "divpo_offline_no_nll": _arm("divpo", **offline),
    }
  )


def _group_arms() -> ConfigDict:
  """Returns arms without pairs, beside online DivPO."""
  darling = {"reward": "score_times_diversity", "criterion": "attribute_frequency"}
  return ConfigDict(
    {
      "divpo_online": _arm("divpo", is_online=True),
      "grpo_online": _arm("grpo", is_online=True),
      "darling_online": _arm("grpo", is_online=True, select=darling),
    }
  )


def _make_real(config: ConfigDict) -> None:
  """Changes the config to short answers by a checkpoint, with an adapter: minutes on two cores."""
  with config.unlocked():
    config.task.kind = "answers"
    config.base.checkpoint = "CHECKPOINT"
    # Ours: at temperature 1 a model of this size mostly writes noise, which is diverse.
    config.sampling.update(
      dict(num_samples=8, max_new_tokens=8, max_length=88, batch_size=64, chain="temperature(0.6)")
    )
    config.evaluate.chain = config.sampling.chain
    config.adapter.update(dict(rank=16, alpha=32.0))
    config.arms = ConfigDict(
      {
        "dpo_online": _arm("dpo", is_online=True),
        "divpo_online": _arm("divpo", is_online=True),
      }
    )
    config.train = training_section(
      steps=60,
      batch_size=4,
      optimizer__learning_rate=3e-4,
      schedule__name="constant",
      clip=1.0,
      log_every=5,
      checkpoint__every=20,
    )
    config.evaluate.update(dict(samples=32))


def _make_paper(config: ConfigDict) -> None:
  """Changes the config to what is known of the paper's persona experiment.

  Known: Llama 3.1 8B Instruct, beta 0.1, all valid outputs tie, offline and online. The authors' recipe
  defaults (not known to be the paper's values): AdamW 5.5e-6, betas 0.9 and 0.95, weight decay 0.1, cosine
  to 0.2 of the peak. Ours: steps, batch size, N, no adapter.
  """
  with config.unlocked():
    config.task.kind = "json"
    config.sampling.update(dict(num_samples=16, max_new_tokens=64, max_length=192, chain=""))
    config.evaluate.chain = ""
    config.adapter.rank = 0
    # Weights split over the devices of one host (train.mesh below), little kept for the backward pass.
    config.base.update(dict(dtype="bfloat16", remat="full"))
    config.compute.loss_chunk = 8192
    config.arms = ConfigDict(
      {
        "dpo_online": _arm("dpo", is_online=True),
        "divpo_online": _arm("divpo", is_online=True),
        "frequency_online": _arm("divpo", select={"criterion": "attribute_frequency"}, is_online=True),
        "dpo_offline": _arm("dpo", is_online=False),
        "divpo_offline": _arm("divpo", is_online=False),
      }
    )
    config.train = training_section(
      steps=1000,
      batch_size=32,
      optimizer__learning_rate=5.5e-6,
      optimizer__weight_decay=0.1,
      schedule__final_fraction=0.2,
      mesh__fsdp=-1,
      mesh__data=1,
    )
    config.evaluate.update(dict(samples=1000))


def _make_llama(config: ConfigDict) -> None:
  """Changes the paper's config to an adapter and its online arms. Sizes are ours."""
  with config.unlocked():
    config.adapter.update(dict(rank=64, alpha=64.0))
    for arm in ("frequency_online", "dpo_offline", "divpo_offline"):
      config.arms[arm].select.method = ""
    config.train.update(dict(steps=300))
    config.train.optimizer.learning_rate = 5e-5
    config.train.schedule.warmup_steps = 10


def _make_smoke(config: ConfigDict) -> None:
  """Changes the config to a few steps: every stage of a checkpoint's run in minutes on two cores."""
  with config.unlocked():
    config.task.answers.held_out_subjects = config.task.answers.held_out_subjects[:4]
    config.train.update(dict(steps=2, batch_size=2, log_every=1))
    config.sampling.num_samples = 4
    config.evaluate.update(dict(samples=4, pool_size=4))


def _make_miniature(config: ConfigDict) -> None:
  """Shrinks every stage to seconds."""
  with config.unlocked():
    config.task.world.num_values = 6
    config.base.update(dict(examples=400))
    config.base.model.update(dict(num_layers=1, model_dim=16))
    config.base.train.update(dict(steps=100, batch_size=32))
    config.sampling.update(dict(num_samples=4, batch_size=32))
    config.train.update(dict(steps=6, batch_size=8, log_every=2))
    config.evaluate.update(dict(samples=64))
    for arm in ("dpo_offline", "divpo_offline", "divpo_offline_no_nll"):
      config.arms[arm].update(dict(steps=4, learning_rate=1e-3))
    for arm in (
      "divpo_skip_online",
      "frequency_online",
      "random_online",
      "dpo_offline_no_nll",
    ):
      config.arms[arm].select.method = ""
