"""CoCoMix: pretraining with continuous concepts (arXiv 2502.08524), from text to report.

  python -m nr.main --config=configs/cocomix.py:tiny --workdir=runs/cocomix

Variants:
  tiny        the offline experiment: real text, two CPU cores, a few minutes
  seeds       tiny with three seeds of each student and their paired difference
  miniature   every stage in seconds on very little text, for tests; its numbers mean nothing

Sizes below are ours, chosen for two CPU cores; the shape of the experiment (tap in
the middle of the teacher, insertion in the lower half, k of the student equal to
k of the autoencoder, 4 labels a token, loss weight 0.1) is the paper's.
"""

from ml_collections import ConfigDict

from nr import names
from nr.recipes.sections import model_section
from nr.training.defaults import training_section

VARIANTS = ("tiny", "seeds", "miniature")


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the config of a variant; every field can be set on the command line."""
  if variant not in VARIANTS:
    raise ValueError(names.unknown("config variant", variant, VARIANTS))
  config = ConfigDict()
  config.recipe = "nr.recipes.cocomix"
  config.variant = variant
  config.seed = 0

  config.corpus = _corpus()
  config.tokenizer = ConfigDict(
    {
      "path": "",  # an existing tokenizer (SentencePiece model, tokenizer.json, GPT-2 files); "" trains one
      "vocab_size": 2048,
      "model_type": "bpe",  # or "unigram", which trains several times longer
    }
  )
  config.window = ConfigDict(
    {
      "length": 128,  # tokens; teacher, autoencoder and students all see windows of this length
      "reset_at_documents": False,  # the reference lets attention cross documents
    }
  )

  # Tokens whose next-token logits are held at a time (0: all). Exact, and on CPU also faster.
  config.compute = ConfigDict({"loss_chunk": 512})

  config.teacher = _teacher()
  config.sae = _sae()
  config.targets = _targets()
  config.labels = ConfigDict({"batch_size": 32})

  config.students = _students()
  config.evaluate = ConfigDict({"batch_size": 32})
  config.steer = _steer()
  if variant == "seeds":
    config.students.seeds = (0, 1, 2)
  if variant == "miniature":
    _make_miniature(config)
  return config


def _corpus() -> ConfigDict:
  """Returns where text comes from and how documents are split."""
  return ConfigDict(
    {
      "name": "sotu",  # sotu | docstrings | a file or folder of .txt .jsonl .parquet | tfds:NAME | hf:NAME
      "text_field": "text",
      "id_field": "id",
      "packages": ("jax", "flax", "optax", "orbax", "grain", "numpy", "scipy"),  # read by "docstrings"
      "text_unit": "file",  # of a .txt file: one document a "file", or a "blank_line" block
      "source_split": "train",  # of a tfds or hf dataset
      "subset": "",
      "data_dir": "",
      "max_documents": 0,  # 0: all
      "on_bad_record": "raise",  # or "quarantine", with quarantine_path
      "quarantine_path": "",
      "validation_fraction": 0.1,  # of the documents, by hash of the text
      "test_fraction": 0.5,  # held out and not read at all: keeps tiny short; 0 for real runs
      "split_salt": "",
    }
  )


def _teacher() -> ConfigDict:
  """Returns the language model whose activations the concepts are read from."""
  return ConfigDict(
    {
      "model": model_section(family="gpt2", num_layers=4, model_dim=96, num_heads=2),
      "tap_layer": 1,  # concepts are read after this block, counted from 0 (the paper: 5 of 12)
      "train": _language_modeltraining_section(),
    }
  )


def _sae() -> ConfigDict:
  """Returns the sparse autoencoder on the teacher's activations."""
  return ConfigDict(
    {
      "arch": "topk",
      "normalisation": "layer_norm_unbiased",
      "dtype": "float32",  # compute type of the two large products
      "num_latents": 512,  # C, the number of concepts
      "k": 16,  # active latents a token
      "k_aux": 48,  # half the width, as libraries do
      "alpha": 1 / 32,
      "dead_tokens": 204_800,  # dead after so many tokens without firing: 100 steps
      "decoding": "dense",  # or "gather"; the same result, gather for large dictionaries
      "top_k": "chunked",  # implementation of the exact top-k
      "chunk_batches": 50,  # batches whose activations are shuffled together
      "windows_per_call": 32,  # windows the teacher reads at once
      "skip_first": True,  # leave out position 0, whose activations are abnormal
      "sample_tokens": 8192,  # activations for the geometric median and the scale of the error
      "train": training_section(
        steps=400,
        batch_size=2048,
        optimizer__name="adam",
        optimizer__learning_rate=1e-3,
        optimizer__beta2=0.999,
        optimizer__epsilon=6.25e-10,
        schedule__name="constant",
        clip=0.0,
        checkpoint__every=200,
        log_every=10,
      ),
    }
  )


def _targets() -> ConfigDict:
  """Returns which latents are labels: every axis on which the paper, its code and its critics differ."""
  return ConfigDict(
    {
      "source": "cache",  # online labels are not available yet
      "k_attr": 4,
      "act": "post",  # post: activation after top-k (released code); pre: Eq. 1 of the first version
      "scope": "future",  # gradient of the loss of all later tokens (code) or of the next one only
      "eval_point": "original",  # gradient at the activation (code) or at its reconstruction (Eq. 1)
      "sign": "paper",  # largest activation x gradient of the loss; negated; abs
      "restrict_active": True,  # only active latents may be labels (the code lets inactive ones in)
      "mask_last": True,  # no label where no loss depends on the activation
      "mask_first": False,  # no label at position 0, whose activations are abnormal in GPT-2-like teachers
      "weights": "uniform",
      "drop_nonpositive": False,
    }
  )


def _students() -> ConfigDict:
  """Returns the baseline and the CoCoMix student, trained alike."""
  return ConfigDict(
    {
      "seeds": (0,),
      # The baseline is as wide as makes its parameters match what CoCoMix activates: base + (C + k) d.
      "ntp": {"model": model_section(family="gpt2", num_layers=4, model_dim=100, num_heads=2)},
      "cocomix": {
        "model": model_section(family="gpt2", num_layers=4, model_dim=96, num_heads=2),
        "concept": {
          "mode": "cocomix",
          "insert_at": 2,  # blocks before the insertion
          "top_k": 16,
          "norm": "reference",  # the released code's normalisation, or "none": Eq. 3 to the letter
          "head_impl": "dense",  # or "fused": logits of a chunk of positions at a time, for many concepts
          "compression_impl": "gather",  # or "dense"; the same result
          "top_k_impl": "chunked",
        },
        "loss_weight": 0.1,  # lambda of Eq. 4; mode mix_only is trained with 0
        "kd_weight": 0.0,  # of the distillation baseline; not available yet
      },
      "train": _language_modeltraining_section(),
    }
  )


def _steer() -> ConfigDict:
  """Returns what is listed, forced and measured."""
  return ConfigDict(
    {
      "num_concepts": 3,  # concepts swept
      "table_concepts": 20,  # concepts listed with their contexts
      "contexts": 5,  # contexts listed for each
      "max_windows": 512,  # validation windows searched for contexts; 0: all
      "max_density": 0.1,  # concepts that fire on more of the tokens are not swept
      "context_tokens": 12,  # tokens to the left and right of an activation
      "mode": "force",
      "strengths": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
      "prompts": 16,
      "prompt_tokens": 32,
      "new_tokens": 32,
      "temperature": 0.8,
    }
  )


def _language_modeltraining_section() -> ConfigDict:
  """Returns the training of teacher and students, which see the same number of tokens."""
  return training_section(
    steps=240,
    batch_size=32,
    optimizer__learning_rate=3e-3,
    optimizer__weight_decay=0.1,
    schedule__warmup_steps=20,
    eval_every=80,
    checkpoint__every=80,
    checkpoint__keep=2,
    checkpoint__best_metric="validation/loss",
    log_every=10,
  )


def _make_miniature(config: ConfigDict) -> None:
  config.corpus.max_documents = 24
  config.corpus.validation_fraction = 0.25
  config.tokenizer.vocab_size = 320
  config.window.length = 32
  for section in (config.teacher, config.students.ntp, config.students.cocomix):
    section.model.update(num_layers=2, model_dim=32, num_heads=2)
  config.teacher.tap_layer = 0
  config.sae.update(
    num_latents=64, k=8, k_aux=16, chunk_batches=10, windows_per_call=8, sample_tokens=512, dead_tokens=4000
  )
  config.students.cocomix.concept.update(insert_at=1, top_k=8)
  for train, steps in ((config.teacher.train, 30), (config.sae.train, 30), (config.students.train, 30)):
    train.update(steps=steps, log_every=2)
    train.checkpoint.every = train.eval_every = 10
    train.progress = False
  config.sae.train.batch_size = 256
  config.teacher.train.batch_size = config.students.train.batch_size = 8
  config.teacher.train.schedule.warmup_steps = config.students.train.schedule.warmup_steps = 2
  config.steer.update(
    num_concepts=2, table_concepts=4, strengths=(0.0, 4.0), prompts=4, prompt_tokens=8, new_tokens=8
  )
