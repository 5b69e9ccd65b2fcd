"""The training section of every config, with its defaults, and its checks."""

from typing import Any

from nr.training import optimizers

# Fields that say how a run is carried out. They change neither its data nor its mathematics
# (another mesh sums in another order), and a run may be continued with other values.
OPERATIONAL = ("checkpoint", "profile", "progress", "log_every", "eval_every", "spike", "mesh")


def get_training_config() -> Any:
  """Returns the training section as an unlocked `ml_collections.ConfigDict`.

  Sizes are in steps (updates), rows of the global batch, and seconds. 0 means
  "none" or "never" wherever that makes sense.
  """
  from ml_collections import ConfigDict

  return ConfigDict(
    dict(
      steps=1000,  # updates
      batch_size=32,  # rows a step, over all devices and processes
      accumulation=1,  # microbatches a step
      seed=0,  # initial parameters, and with the step every key inside it
      clip=1.0,  # largest global norm of the gradients; 0: none
      optimizer=dict(
        name="adamw",  # adamw | adam | sgd
        learning_rate=1e-3,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.0,  # on what Method.decay matches
        mu_dtype="float32",  # type of the first moment
      ),
      schedule=dict(
        name="cosine",  # constant | cosine | linear
        warmup_steps=0,
        final_fraction=0.1,
        steps=0,  # length of the schedule; 0: the steps of the run
      ),
      mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1),  # one may be -1: all devices that remain
      log_every=10,
      eval_every=0,  # 0: only at the end
      flops_per_token=0.0,  # forward and backward; 0: estimated as 6 x trained parameters
      progress=True,  # progress bar on stderr
      checkpoint=dict(
        every=0,  # 0: only at the end and on SIGTERM
        keep=1,  # newest checkpoints kept
        keep_best=1,  # best ones kept besides, by best_metric
        best_metric="",  # for example "validation/loss"; "": no best one
        best_mode="min",  # min | max
        restore_step=-1,  # -1: the newest complete one
        allow_changed_config=False,  # resume although the mathematics changed
      ),
      spike=dict(action="warn", factor=3.0, patience=20, window=200),  # action: off | warn | error
      profile=dict(start=-1, steps=3),  # first profiled step of this process (-1: none), and how many
    )
  )


def training_section(**changes: Any) -> Any:
  """Returns the training section with changes; a field inside another is written "optimizer__epsilon".

  Raises:
    KeyError: a field that the section does not have.
  """
  section = get_training_config()
  section.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return section


def _fail(field: str, value: Any, remedy: str) -> None:
  """Raises the ValueError of a bad field."""
  raise ValueError(f"training.{field}: {value!r} {remedy}")


def validate(config: Any, mesh_sizes: dict[str, int], process_count: int = 1) -> None:
  """Refuses a training section that cannot work, before any device time is spent.

  Args:
    config: the training section.
    mesh_sizes: size of every mesh axis, by name.
    process_count: number of processes that feed data.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  for field in ("steps", "batch_size", "accumulation", "log_every"):
    if config[field] < 1:
      _fail(field, config[field], "must be 1 or more")
  for field in ("eval_every", "clip"):
    if config[field] < 0:
      _fail(field, config[field], "must be 0 or more")
  if not 0 <= config.seed < 2**32:
    _fail("seed", config.seed, "must lie between 0 and 4294967295")
  if config.batch_size % config.accumulation:
    _fail("accumulation", config.accumulation, f"does not divide training.batch_size={config.batch_size}")
  ways = mesh_sizes["data"] * mesh_sizes["fsdp"]
  rows = config.batch_size // config.accumulation
  if rows % ways:
    _fail(
      "batch_size",
      config.batch_size,
      f"in {config.accumulation} microbatch(es) of {rows} rows is not divided by the mesh's data x fsdp = "
      f"{mesh_sizes['data']} x {mesh_sizes['fsdp']}; use a multiple of {ways * config.accumulation} "
      "or a smaller mesh",
    )
  if config.batch_size % process_count:
    _fail("batch_size", config.batch_size, f"is not divided by the {process_count} processes")
  choices = {
    "optimizer.name": optimizers.OPTIMIZERS,
    "schedule.name": optimizers.SCHEDULES,
    "checkpoint.best_mode": ("min", "max"),
    "spike.action": ("off", "warn", "error"),
  }
  for field, allowed in choices.items():
    section, name = field.split(".")
    if config[section][name] not in allowed:
      _fail(field, config[section][name], f"is unknown; choose one of {', '.join(allowed)}")
  if config.checkpoint.keep < 1:
    _fail("checkpoint.keep", config.checkpoint.keep, "must be 1 or more, or a resumed run loses work")
  for field in ("every", "keep_best"):
    if config.checkpoint[field] < 0:
      _fail(f"checkpoint.{field}", config.checkpoint[field], "must be 0 or more")
  if config.spike.action != "off" and (config.spike.factor <= 1 or config.spike.patience < 1):
    _fail("spike", dict(config.spike), "needs factor > 1 and patience >= 1")
