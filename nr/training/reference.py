"""The reference model of a policy under training: where its parameters are, and when they change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.training.policy import Policy

PyTree = Any
KINDS = ("frozen", "synced", "base", "none")


class Reference(NamedTuple):
  """What a `Method` needs for its reference.

  Attributes:
    frozen: the method's frozen arrays, the policy's fixed ones under "policy".
    frozen_axes: their logical axis names.
    params: (frozen, extra state) -> parameters of the reference model, or None.
    method_settings: fields of `Method` for the extra state; {} without one.
  """

  frozen: PyTree
  frozen_axes: PyTree
  params: Callable[[PyTree, PyTree], PyTree | None]
  method_settings: dict[str, Any]


def make_reference(policy: Policy, kind: str, sync_every: int = 0, sync_mix: float = 1.0) -> Reference:
  """Returns the reference of a policy. Both are read without dropout: where they agree, they agree exactly.

  Args:
    policy: what is trained and where it begins.
    kind: where the reference's parameters come from:

      - frozen: a copy of those that training begins from;
      - synced: the same, replaced by the current ones every `sync_every` updates
        (iterative and online DPO; arXiv 2404.19733, 2402.04792), or moved towards
        them (TR-DPO, arXiv 2404.09656, Eq. 4);
      - base: the fixed weights under an adapter, for which no copy is kept;
      - none: there is none.
    sync_every: updates between two copies; "synced" only.
    sync_mix: share a of the current parameters in the reference, which becomes
      a policy + (1 - a) reference; 1 replaces it. Below 1 for a policy whose own
      parameters are trained: two adapters mix into no mixture of their weights.

  Raises:
    ValueError: an unknown kind, or one that the policy cannot have; an adapter with dropout.
  """
  if kind not in KINDS:
    raise ValueError(names.unknown("reference", kind, KINDS))
  if policy.dropout:
    raise ValueError(
      f"LoraSpec.dropout={policy.dropout}: this method compares the policy with a reference or with its own "
      "samples, and reads all of them without dropout; set it to 0"
    )
  if not 0 < sync_mix <= 1:
    raise ValueError(f"sync_mix={sync_mix}: give a share above 0 and at most 1, which replaces the reference")
  if sync_mix != 1 and (kind != "synced" or policy.base is not None):
    raise ValueError(
      f"sync_mix={sync_mix}: needs reference='synced' (here {kind!r}) and a policy without an adapter; set it to 1"
    )
  if kind == "synced" and sync_every < 1:
    raise ValueError(f"sync_every={sync_every}: reference='synced' needs 1 update or more between two copies")
  if kind != "synced" and sync_every:
    raise ValueError(
      f"sync_every={sync_every}: reference={kind!r} is never replaced; set it to 0 or choose 'synced'"
    )
  if kind == "base" and policy.base is None:
    raise ValueError("reference='base': all of this policy is trained; choose 'frozen', or train an adapter")
  if kind == "frozen" and policy.start is None:
    raise ValueError(
      "reference='frozen': this policy begins from nothing that could be copied; use full_policy, or 'synced'"
    )
  frozen, frozen_axes = {"policy": policy.fixed}, {"policy": policy.fixed_axes}
  if kind == "frozen":
    frozen["reference"], frozen_axes["reference"] = policy.start, policy.axes

  def params(frozen: PyTree, extra: PyTree) -> PyTree | None:
    if kind == "base":
      return policy.base(frozen["policy"])
    trained = {"frozen": frozen.get("reference"), "synced": extra}.get(kind)
    return None if trained is None else policy.assemble(trained, frozen["policy"])

  def sync(extra: PyTree, params: PyTree, statistics: PyTree, step: jax.Array) -> PyTree:
    del statistics
    is_due = (step + 1) % sync_every == 0

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
      mixed = new if sync_mix == 1 else sync_mix * new + (1 - sync_mix) * old
      return jnp.where(is_due, mixed, old)

    return jax.tree.map(move, extra, params)

  settings: dict[str, Any] = {}
  if kind == "synced":
    settings = dict(init_extra=lambda params: jax.tree.map(jnp.copy, params), update_extra=sync)
  return Reference(frozen, frozen_axes, params, settings)
