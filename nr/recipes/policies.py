"""Given models in a recipe: how they are opened, what of them is trained, on which devices they lie.

A config has `base.checkpoint`, `base.dtype` and `base.remat`, and a section `adapter` (fields of
LoraSpec; rank 0: all of the model is trained).
"""

import dataclasses
from typing import Any

import jax

from nr.generators.checkpoints import Checkpoint, open_checkpoint
from nr.models.lora import LoraSpec, merge
from nr.models.transformer_spec import DTYPES, REMATS
from nr.names import unknown
from nr.training import sharding
from nr.training.policy import Policy, full_policy, lora_policy


def check_base(base: Any) -> None:
  """Refuses types and rematerialisations that models do not have, before a checkpoint is opened."""
  for field, allowed in (("dtype", DTYPES), ("remat", REMATS)):
    if base[field] not in allowed:
      raise ValueError(unknown(f"base.{field}", base[field], allowed))


def open_base(base: Any) -> Checkpoint:
  """Opens the checkpoint of a config's section `base`, in the type and with the remat that it names."""
  found = open_checkpoint(base.checkpoint, dtype=base.dtype)
  if base.remat == "none":
    return found
  return found._replace(spec=dataclasses.replace(found.spec, remat=base.remat))


def adapter_spec(config: Any) -> LoraSpec | None:
  """Returns the settings of the adapter; None where all of the model is trained."""
  return LoraSpec.from_dict(config.adapter.to_dict()) if config.adapter.rank else None


def make_policy(config: Any, spec: Any, params: Any, seed: int) -> Policy:
  """Returns what is trained: all of the model, or an adapter."""
  adapter = adapter_spec(config)
  if adapter is None:
    return full_policy(spec, params)
  return lora_policy(spec, params, adapter, jax.random.key(config.seed + seed))


def reference_kind(policy: Policy) -> str:
  """Returns the reference of a policy that is never replaced: the base under an adapter, or a frozen copy."""
  return "base" if policy.base is not None else "frozen"


def whole_params(config: Any, policy: Policy, trained: Any) -> Any:
  """Returns the parameters of the trained model, an adapter added into the weights, in the model's type.

  The type is that of `spec.param_dtype`: of float32 weights in training, a bfloat16 model keeps half.
  """
  adapter = adapter_spec(config)
  if adapter is not None:
    return merge(policy.fixed, trained, adapter)
  return jax.tree.map(lambda leaf: leaf.astype(policy.spec.param_dtype), trained)


def model_mesh(mesh: Any) -> jax.sharding.Mesh | None:
  """Returns the mesh that a given model lies on, split or copied as the sharding rules say; None for one device.

  Args:
    mesh: section of a config.
  """
  made = sharding.make_mesh(mesh)
  return made if made.size > 1 else None
