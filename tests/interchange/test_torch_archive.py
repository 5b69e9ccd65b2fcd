"""Torch files read as data: what is read, and that nothing in them runs."""

import io
import pathlib
import pickletools
import zipfile

import numpy as np
import pytest

from nr.interchange.torch_archive import ArchivedTensor, read_torch_archive

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sae_openai" / "autoencoder.pt"


def rewrite(path, change):
  """The committed file with its parts changed: `change` maps {name: bytes} to the same."""
  with zipfile.ZipFile(GOLDEN) as archive:
    parts = change({name: archive.read(name) for name in archive.namelist()})
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in parts.items():
      archive.writestr(name, content)
  return path


def program(*parts):
  """A file whose program is these bytes."""
  return lambda found: {**found, "autoencoder/data.pkl": b"".join(parts)}


def test_tensors_and_plain_values_are_read():
  state = read_torch_archive(GOLDEN)
  assert state["activation"] == "TopK" and state["activation_state_dict"] == {"k": 3, "postact_fn": "ReLU"}
  assert state["encoder.weight"].shape == (10, 6) and state["encoder.weight"].dtype == np.float32
  assert state["stats_last_nonzero"].dtype == np.int64
  decoder = state["decoder.weight"].read()  # stored transposed: its strides are not those of its shape
  assert decoder.shape == (6, 10) and np.isfinite(decoder).all() and decoder.std() > 0.5
  with zipfile.ZipFile(GOLDEN) as archive:
    assert archive.read("autoencoder/byteorder") == b"little"


@pytest.mark.oracle
def test_they_are_what_torch_says(tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
  expected = torch.load(GOLDEN, weights_only=True)
  found = read_torch_archive(GOLDEN)
  assert set(found) == set(expected)
  for name, tensor in expected.items():
    if isinstance(tensor, torch.Tensor):
      np.testing.assert_array_equal(found[name].read(), tensor.numpy())
  base = torch.arange(24.0).reshape(4, 6)
  kinds = {
    "half": base.half(), "brain": base.bfloat16(), "double": base.double(), "bool": base > 3, "slice": base[1:3, ::2],
    "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base), "again": base,
  }  # fmt: skip
  values = {"list": [1, 2.5, "three", None, True, (4, -5, 2**40)], "nested": {"a": {"b": base}}}
  for protocol in (2, 4):
    torch.save({**kinds, **values}, tmp_path / "kinds.pt", pickle_protocol=protocol)
    found = read_torch_archive(tmp_path / "kinds.pt")
    for name, tensor in kinds.items():
      np.testing.assert_array_equal(found[name].read().astype(np.float64), tensor.detach().double().numpy())
    assert found["list"] == values["list"]
    np.testing.assert_array_equal(found["nested"]["a"]["b"].read(), base.numpy())


def test_a_program_that_would_run_something_is_refused_and_does_not_run(tmp_path):
  marker = tmp_path / "ran"
  command = f"touch {marker}".encode()
  # os.system(command), as an unpickler would carry it out.
  call = b"\x80\x02cos\nsystem\n(X" + len(command).to_bytes(4, "little") + command + b"tR."
  pickletools.dis(call, io.StringIO())  # a well-formed program
  with pytest.raises(ValueError, match=r"holds os.system, which is more than tensors and plain values"):
    read_torch_archive(rewrite(tmp_path / "bad.pt", program(call)))
  assert not marker.exists()


@pytest.mark.parametrize(
  ("code", "message"),
  [
    (b"\x80\x02}q\x00.", None),
    (b"\x80\x02]q\x00.", "holds a list; save the state dictionary"),
    (b"\x80\x02c__main__\nThing\n)\x81.", "holds instruction NEWOBJ"),
    (b"\x80\x02}q\x00}X\x01\x00\x00\x00aK\x01sb.", "holds attributes of an object"),
    (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "holds collections.OrderedDict"),
    (b"\x80\x02h\x07.", "its program is damaged"),
    (b"\x80\x02}", "its program"),
    (b"", "its program"),
  ],
)
def test_other_programs(code, message, tmp_path):
  path = rewrite(tmp_path / "file.pt", program(code))
  if message is None:
    assert read_torch_archive(path) == {}
    return
  with pytest.raises(ValueError, match=message):
    read_torch_archive(path)


def test_tensors_that_reach_outside_of_their_storage_are_refused(tmp_path):
  path = rewrite(tmp_path / "file.pt", lambda found: found)
  state = read_torch_archive(path)
  tensor = state["encoder.weight"]
  archive, storage = tensor._archive, tensor._storage
  ArchivedTensor(archive, storage, 0, (10, 6), (6, 1))
  for offset, shape, strides in (
    (1, (10, 6), (6, 1)),
    (0, (10, 6), (7, 1)),
    (-1, (1,), (1,)),
    (0, (2,), (-1,)),
    (0, (3,), ()),
  ):
    with pytest.raises(ValueError, match="reaches outside of its storage"):
      ArchivedTensor(archive, storage, offset, shape, strides)


def test_damaged_archives_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    read_torch_archive(tmp_path / "nothing.pt")
  path = tmp_path / "old.pt"
  path.write_bytes(b"\x80\x02\x8a\nl\xfc")
  with pytest.raises(ValueError, match="not a zip archive as torch.save writes since torch 1.6"):
    read_torch_archive(path)
  cut = rewrite(
    tmp_path / "cut.pt", lambda found: {**found, "autoencoder/data/0": found["autoencoder/data/0"][:-4]}
  )
  with pytest.raises(ValueError, match="storage 0 is cut off"):
    for value in read_torch_archive(cut).values():
      if isinstance(value, ArchivedTensor):
        value.read()
  gone = rewrite(
    tmp_path / "gone.pt",
    lambda found: {name: part for name, part in found.items() if not name.endswith("data/0")},
  )
  with pytest.raises(ValueError, match="storage 0 is missing"):
    for value in read_torch_archive(gone).values():
      if isinstance(value, ArchivedTensor):
        value.read()
  big = rewrite(tmp_path / "big.pt", lambda found: {**found, "autoencoder/byteorder": b"big"})
  with pytest.raises(ValueError, match="byte order is b'big'"):
    read_torch_archive(big)
  none = rewrite(tmp_path / "none.pt", lambda found: {"readme": b""})
  with pytest.raises(ValueError, match="it has no data.pkl"):
    read_torch_archive(none)
