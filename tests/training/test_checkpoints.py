"""Checkpoints: what is damaged is noticed and named, what is best or newest is kept, disks fill up."""

import errno
import json
import pathlib
import shutil
import subprocess
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nr.training import integrity, sharding, storage
from nr.training.checkpoints import Checkpointer, CheckpointError, load_tree, save_tree, tree_hash
from nr.training.optimizers import make_optimizer
from nr.training.state import TrainState, abstract_state, create_state, state_shardings
from tests.training import toy


def section(**changes):
  return toy.config(**{f"checkpoint__{name}": value for name, value in changes.items()}).checkpoint


def state(value=0.0, layers="apart"):
  """A train state with two layers, moments, a masked leaf and a typed key."""
  rng = np.random.default_rng(0)
  kernels = rng.normal(size=(2, 64, 64)).astype(np.float32) + value
  if layers == "apart":
    blocks = {index: {"kernel": jnp.asarray(kernels[index])} for index in range(2)}
  else:
    blocks = {"kernel": jnp.asarray(kernels)}
  params = {"blocks": blocks, "scale": jnp.ones(3, jnp.bfloat16)}
  moments = (optax.EmptyState(), {"mu": dict(params, scale=optax.MaskedNode())})
  return TrainState(jnp.int32(7), params, moments, {"key": jax.random.key(3)})


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  assert integrity.leaf_hashes(first) == integrity.leaf_hashes(second)


def save(directory, steps=(1, 2), **changes):
  checkpointer = Checkpointer(directory, section(keep=len(steps), **changes))
  for step in steps:
    checkpointer.save(step, state(step), record={"step": step})
  checkpointer.close()


def largest_file(directory):
  return max((p for p in pathlib.Path(directory).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def restore_error(directory, **changes):
  checkpointer = Checkpointer(directory, section(keep=9, **changes))
  try:
    with pytest.raises(CheckpointError) as caught:
      checkpointer.restore(state())
  finally:
    checkpointer.close()
  text = str(caught.value)
  assert "\n" not in text
  return text


def test_a_state_comes_back_bit_for_bit_in_either_layout(tmp_path):
  save(tmp_path)
  for layers in ("apart", "stacked"):
    checkpointer = Checkpointer(tmp_path, section(keep=2))
    restored = checkpointer.restore(jax.eval_shape(lambda layers=layers: state(layers=layers)))
    checkpointer.close()
    assert restored.step == 2 and restored.record == {"step": 2}
    assert_same(restored.state, state(2, layers))


def test_disk_holds_stacked_layers(tmp_path):
  save(tmp_path, (1,))
  content = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())["content"]
  assert content["types"]["params/blocks/kernel"] == "float32[2,64,64]"
  assert content["types"]["opt_state/1/mu/blocks/kernel"] == "float32[2,64,64]"


def test_one_flipped_byte_is_noticed_and_the_newest_intact_step_is_named(tmp_path):
  save(tmp_path, (1, 2, 3))
  noticed = 0
  path = largest_file(tmp_path / "3" / "state")
  good = path.read_bytes()
  for place in (len(good) // 3, len(good) // 2):
    damaged = bytearray(good)
    damaged[place] ^= 0x40
    path.write_bytes(damaged)
    text = restore_error(tmp_path)
    assert str(tmp_path / "3") in text and "newest intact step is 2" in text and "restore_step=2" in text
    noticed += "does not have the bytes that were saved" in text
  assert noticed, "no flip reached the hashes: Orbax noticed them all by itself"


@pytest.mark.parametrize("damage", ["delete", "truncate", "meta"])
def test_damaged_files_give_one_line(tmp_path, damage):
  save(tmp_path)
  path = largest_file(tmp_path / "2" / "state")
  if damage == "delete":
    path.unlink()
  elif damage == "truncate":
    path.write_bytes(path.read_bytes()[:100])
  else:
    path = tmp_path / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 4'))
  text = restore_error(tmp_path)
  assert "newest intact step is 1" in text and len(text.splitlines()) == 1
  said = {"delete": "is missing", "truncate": "has 100 bytes", "meta": "meta/metadata"}
  assert path.name in text and said[damage] in text


def test_nothing_intact_is_said(tmp_path):
  save(tmp_path)
  for step in ("1", "2"):
    (tmp_path / step / "meta" / "metadata").unlink()
  assert "no intact step remains; remove" in restore_error(tmp_path)


def test_restore_step_sets_newer_ones_aside(tmp_path):
  save(tmp_path / "c", (1, 2, 3))
  checkpointer = Checkpointer(tmp_path / "c", section(keep=1, restore_step=2))
  assert checkpointer.restore(state()).step == 2
  assert checkpointer.steps() == [1, 2]
  checkpointer.save(3, state(9))
  checkpointer.close()
  assert checkpointer.steps() == [3]
  assert (tmp_path / "c_set_aside" / "3").is_dir()
  assert "restore_step: 8 is not one of the complete steps" in restore_error(tmp_path / "c", restore_step=8)


def test_another_model_is_refused_by_leaf(tmp_path):
  save(tmp_path)
  other = state()
  other.params["scale"] = jnp.ones(4, jnp.bfloat16)
  checkpointer = Checkpointer(tmp_path, section())
  with pytest.raises(CheckpointError, match=r"'params/scale' was saved as bfloat16\[3\].* bfloat16\[4\]"):
    checkpointer.restore(other)
  checkpointer.close()


def test_newest_and_best_are_both_kept(tmp_path):
  config = section(keep=1, keep_best=1, best_metric="validation/loss")
  checkpointer = Checkpointer(tmp_path, config)
  for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], start=1):
    checkpointer.save(step, state(step), metrics={"validation/loss": loss, "other": 0.0})
  checkpointer.save(5, state(5))  # Saved without an evaluation.
  checkpointer.wait()
  assert checkpointer.steps() == [2, 5] and checkpointer.best_step() == 2
  checkpointer.close()
  reopened = Checkpointer(tmp_path, config)
  reopened.save(6, state(6), metrics={"validation/loss": float("nan")})
  reopened.wait()
  assert reopened.steps() == [2, 6] and reopened.best_step() == 2
  assert_same(reopened.load(2, state()).state, state(2))
  reopened.close()


def test_saving_a_step_twice_is_an_error(tmp_path):
  save(tmp_path)
  checkpointer = Checkpointer(tmp_path, section())
  with pytest.raises(CheckpointError, match="step 2 was not saved.*there already"):
    checkpointer.save(2, state())
  checkpointer.close()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
  checkpointer = Checkpointer(tmp_path, section())
  bad = state()
  bad.params["scale"] = jnp.array([1, jnp.nan, 1], jnp.bfloat16)
  with pytest.raises(CheckpointError, match="step 1 was not saved: 'params/scale' holds NaN"):
    checkpointer.save(1, bad)
  assert checkpointer.steps() == []
  checkpointer.close()


def test_any_mesh_restores_what_another_saved(tmp_path):
  method, config = toy.make(), toy.config()
  optimizer = make_optimizer(config, method)
  meshes = [
    sharding.make_mesh(dict(data=1, fsdp=4, tensor=2, sequence=1)),
    sharding.make_mesh(dict(data=4, fsdp=2, tensor=1, sequence=1)),
  ]
  like = abstract_state(method, optimizer)
  placed = [state_shardings(method, like, mesh) for mesh in meshes]
  with sharding.context(meshes[0]):
    saved = create_state(method, optimizer, 0, meshes[0])
  checkpointer = Checkpointer(tmp_path, section())
  checkpointer.save(1, saved, shardings=placed[0])
  restored = checkpointer.restore(like, shardings=placed[1]).state
  checkpointer.close()
  assert_same(restored, saved)
  jax.tree.map(
    lambda x, s: None if x.sharding == s else pytest.fail(f"{x.sharding} is not {s}"), restored, placed[1]
  )


def test_layers_kept_apart_restore_onto_a_mesh(tmp_path):
  mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1, sequence=1))
  tree = {"blocks": {i: {"w": jnp.arange(32.0).reshape(8, 4) + i} for i in range(3)}}
  placed = sharding.shardings({"blocks": {i: {"w": ("embed", None)} for i in range(3)}}, mesh)
  tree = jax.device_put(tree, placed)
  checkpointer = Checkpointer(tmp_path, section())
  checkpointer.save(1, tree, shardings=placed)
  restored = checkpointer.restore(tree, shardings=placed).state
  checkpointer.close()
  assert_same(restored, tree)
  assert restored["blocks"][2]["w"].sharding.is_equivalent_to(placed["blocks"][2]["w"], 2)


def test_grain_position_is_restored_and_its_damage_noticed(tmp_path):
  iterator = iter(toy.data())
  for _ in range(3):
    next(iterator)
  checkpointer = Checkpointer(tmp_path, section())
  checkpointer.save(3, state(), iterator)
  expected = next(iterator)["index"]
  fresh = iter(toy.data())
  checkpointer.restore(state(), fresh)
  np.testing.assert_array_equal(next(fresh)["index"], expected)
  path = next((tmp_path / "3" / "data").glob("process_0-of-1.json"))
  text = path.read_text()
  path.write_text(text.replace("3", "1") if "3" in text else text.replace("48", "16"))
  with pytest.raises(CheckpointError, match="item 'data'"):
    checkpointer.restore(state(), iter(toy.data()))
  checkpointer.close()


Usage = namedtuple("Usage", "total used free")


def test_full_disk_is_answered_before_writing(tmp_path, monkeypatch):
  save(tmp_path, (1,))
  checkpointer = Checkpointer(tmp_path, section())
  monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
  with pytest.raises(CheckpointError, match=r"disk full while saving step 2.*GB free.*free some space"):
    checkpointer.save(2, state())
  with pytest.raises(CheckpointError, match="disk full while saving tree"):
    save_tree(tmp_path / "tree", {"a": jnp.ones(1000)})
  checkpointer.close()


def test_disk_that_fills_during_the_save_is_one_line(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path, section())

  def full(*args, **kwargs):
    raise ValueError("RESOURCE_EXHAUSTED") from OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(checkpointer._manager, "save", full)
  with pytest.raises(CheckpointError, match="disk full while saving step 1") as caught:
    checkpointer.save(1, state())
  assert "\n" not in str(caught.value)
  monkeypatch.undo()
  checkpointer.close()


def test_a_truly_full_disk(tmp_path, monkeypatch):
  """On a real file system of 1 MB; the earlier check of the free space is switched off."""
  small = tmp_path / "small"
  small.mkdir()
  mount = shutil.which("mount")
  if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]).returncode:
    pytest.skip("needs the right to mount a small tmpfs")
  try:
    monkeypatch.setattr(storage, "require_space", lambda *args: None)
    big = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1 << 20,)), jnp.float32)}}
    checkpointer = Checkpointer(small, section())
    with pytest.raises(CheckpointError, match="disk full while saving") as caught:
      checkpointer.save(1, big)
      checkpointer.wait()
    assert "\n" not in str(caught.value)
    assert checkpointer.steps() == []
    checkpointer._manager.close()
  finally:
    subprocess.run([shutil.which("umount"), "-l", small], check=True)


def test_artifacts_round_trip_and_are_checked(tmp_path):
  params = state().params
  save_tree(tmp_path / "tree", params, {"tokenizer": "abc", "layers": [1, 2]})
  tree, metadata = load_tree(tmp_path / "tree")
  assert metadata == {"tokenizer": "abc", "layers": [1, 2]}
  assert tree["blocks"]["kernel"].shape == (2, 64, 64)
  assert tree_hash(tree) == tree_hash(params)
  mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1, sequence=1))
  placed = sharding.shardings({"blocks": {"kernel": ("layers", "embed", None)}, "scale": (None,)}, mesh)
  tree, _ = load_tree(tmp_path / "tree", placed)
  assert tree["blocks"]["kernel"].addressable_shards[0].data.shape == (2, 8, 64)
  path = largest_file(tmp_path / "tree")
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(CheckpointError, match="tree is damaged.*remove it and make it again"):
    load_tree(tmp_path / "tree")
  with pytest.raises(CheckpointError, match="there is no saved tree"):
    load_tree(tmp_path / "nothing")
  with pytest.raises(CheckpointError, match=r"'a' is float64\[2\]; convert it"):
    save_tree(tmp_path / "wide", {"a": np.ones(2)})


def test_hash_sees_type_shape_value_and_name():
  base = {"a": jnp.ones((2, 3))}
  others = [{"b": jnp.ones((2, 3))}, {"a": jnp.ones((3, 2))}, {"a": jnp.ones((2, 3), jnp.int32)}]
  others.append({"a": jnp.ones((2, 3)).at[1, 2].set(jnp.nextafter(1.0, 2.0))})
  assert len({tree_hash(tree) for tree in [base, *others]}) == 5
