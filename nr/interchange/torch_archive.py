"""Tensors and plain values of a file that `torch.save` wrote, read as data.

Such a file is a zip archive: `data.pkl` is a program for Python's unpickler, and every storage is a file of
raw bytes beside it. Unpickling runs whatever the program names. Here nothing runs: the few instructions
that a dictionary of tensors, numbers and strings needs are carried out on plain values, no name in
the file is ever looked up, and any other instruction or name is refused. Needs no torch.

Files from before torch 1.6 (no zip archive) are not read.
"""

import pathlib
import pickletools
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_TENSOR_MAKERS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER_MAKER = "torch._utils _rebuild_parameter"
_DICTIONARY_MAKER = "collections OrderedDict"
_STORAGES = {
  "torch FloatStorage": np.dtype(np.float32),
  "torch DoubleStorage": np.dtype(np.float64),
  "torch HalfStorage": np.dtype(np.float16),
  "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch LongStorage": np.dtype(np.int64),
  "torch IntStorage": np.dtype(np.int32),
  "torch ShortStorage": np.dtype(np.int16),
  "torch CharStorage": np.dtype(np.int8),
  "torch ByteStorage": np.dtype(np.uint8),
  "torch BoolStorage": np.dtype(np.bool_),
}
_PUSHED = {
  "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT",
  "LONG", "LONG1", "BINFLOAT", "FLOAT",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Name(str):
  """A name that the file mentions; it is compared, never looked up."""


class _Storage(NamedTuple):
  """Raw numbers of the archive, not yet read."""

  key: str
  dtype: np.dtype
  size: int


class ArchivedTensor:
  """A tensor of the archive; its numbers are read when asked for.

  Attributes:
    shape: of the tensor.
    dtype: NumPy type.
  """

  def __init__(self, archive: "_Archive", storage: _Storage, offset: int, shape: tuple, strides: tuple):
    self.shape, self.dtype = tuple(shape), storage.dtype
    self._archive, self._storage, self._offset, self._strides = archive, storage, offset, tuple(strides)
    places = [offset] + [(size - 1) * stride for size, stride in zip(self.shape, self._strides)]
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *self.shape, *self._strides))
    is_inside = not np.prod(self.shape, dtype=object) or sum(places) < storage.size
    if not whole or len(self.shape) != len(self._strides) or not is_inside:
      raise ValueError(f"{archive.path}: a tensor of shape {self.shape} reaches outside of its storage")

  def read(self) -> np.ndarray:
    """Returns the numbers as a new array."""
    flat = self._archive.read_storage(self._storage)[self._offset :]
    strides = [stride * self.dtype.itemsize for stride in self._strides]
    return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False).copy()


def read_torch_archive(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns the dictionary that `torch.save` wrote, tensors as `ArchivedTensor`.

  Args:
    path: of the file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not such an archive, or one that holds more than tensors, numbers, strings, lists, tuples
      and dictionaries; the message says what.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"{path}: not a zip archive as torch.save writes since torch 1.6; load it with torch and save it again, "
      "or save its tensors with safetensors"
    )
  archive = _Archive(path)
  value = _Machine(archive).run(archive.program())
  if not isinstance(value, dict):
    raise ValueError(f"{path}: holds a {type(value).__name__}; save the state dictionary instead")
  return value


class _Archive:
  """The zip file: its program and its storages."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    with zipfile.ZipFile(path) as archive:
      programs = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
      if len(programs) != 1:
        raise ValueError(f"{path}: no archive of torch.save, it has no data.pkl")
      self.root = programs[0].split("/")[0]
      order = f"{self.root}/byteorder"
      if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError(
          f"{path}: its byte order is {archive.read(order)!r}; save it on a little-endian machine"
        )

  def program(self) -> bytes:
    """Returns the bytes of data.pkl."""
    with zipfile.ZipFile(self.path) as archive:
      return archive.read(f"{self.root}/data.pkl")

  def read_storage(self, storage: _Storage) -> np.ndarray:
    """Returns the numbers of a storage."""
    with zipfile.ZipFile(self.path) as archive:
      try:
        content = archive.read(f"{self.root}/data/{storage.key}")
      except KeyError as error:
        raise ValueError(f"{self.path}: storage {storage.key} is missing") from error
    if len(content) < storage.size * storage.dtype.itemsize:
      raise ValueError(f"{self.path}: storage {storage.key} is cut off at {len(content)} bytes")
    return np.frombuffer(content, storage.dtype, storage.size)


class _Machine:
  """Carries out the instructions of a program on plain values."""

  def __init__(self, archive: _Archive):
    self.archive, self.stack, self.marks, self.memory = archive, [], [], {}

  def run(self, program: bytes) -> Any:
    """Returns the value that the program leaves."""
    try:
      instructions = list(pickletools.genops(program))
    except ValueError as error:
      raise ValueError(f"{self.archive.path}: its program is damaged ({error})") from error
    try:
      for opcode, argument, _ in instructions[:-1]:  # the last one is STOP
        self._step(opcode.name, argument)
      return self.stack.pop()
    except (IndexError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{self.archive.path}: its program is damaged ({error!r})") from error

  def _step(self, name: str, argument: Any) -> None:
    stack = self.stack
    if name in _PUSHED:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ("EMPTY_DICT", "EMPTY_LIST"):
      stack.append({} if name == "EMPTY_DICT" else [])
    elif name == "MARK":
      self.marks.append(len(stack))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
      count = int(name[-1])
      stack[-count:] = [tuple(stack[-count:])]
    elif name == "TUPLE":
      stack.append(tuple(self._since_mark()))
    elif name in ("SETITEMS", "SETITEM", "APPENDS", "APPEND"):
      self._fill(name)
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
      self.memory[argument] = stack[-1]
    elif name == "MEMOIZE":
      self.memory[len(self.memory)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
      stack.append(self.memory[argument])
    elif name == "GLOBAL":
      stack.append(_Name(argument))
    elif name == "STACK_GLOBAL":
      last, module = stack.pop(), stack.pop()
      stack.append(_Name(f"{module} {last}"))
    elif name == "BINPERSID":
      stack.append(self._storage(stack.pop()))
    elif name == "REDUCE":
      arguments, maker = stack.pop(), stack.pop()
      stack.append(self._make(maker, arguments))
    elif name == "BUILD":
      self._attach(stack.pop())
    elif name not in ("PROTO", "FRAME"):
      self._refuse(f"instruction {name}")

  def _since_mark(self) -> list:
    start = self.marks.pop()
    items, self.stack[start:] = self.stack[start:], []
    return items

  def _fill(self, name: str) -> None:
    """Adds to the dictionary or list below what is to be added."""
    if name.startswith("SET"):
      items = self._since_mark() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
      if not isinstance(self.stack[-1], dict):
        self._refuse("items of something that is no dictionary")
      self.stack[-1].update(zip(items[::2], items[1::2]))
      return
    items = self._since_mark() if name == "APPENDS" else [self.stack.pop()]
    self.stack[-1].extend(items)

  def _storage(self, reference: Any) -> _Storage:
    kind, storage, key, _, size = reference
    if kind != "storage" or storage not in _STORAGES or not str(key).isalnum():
      self._refuse(f"storage {storage!r}")
    return _Storage(str(key), _STORAGES[storage], int(size))

  def _make(self, maker: Any, arguments: tuple) -> Any:
    if maker in _TENSOR_MAKERS and isinstance(arguments[0], _Storage):
      return ArchivedTensor(self.archive, *arguments[:4])
    if maker == _PARAMETER_MAKER and isinstance(arguments[0], ArchivedTensor):
      return arguments[0]
    if maker == _DICTIONARY_MAKER and not arguments:
      return {}
    self._refuse(f"{str(maker).replace(' ', '.')}")

  def _attach(self, state: Any) -> None:
    """Lets the attributes that torch puts on a state dictionary go: versions of its modules."""
    if not isinstance(self.stack[-1], dict) or not isinstance(state, dict) or set(state) - {"_metadata"}:
      self._refuse("attributes of an object")

  def _refuse(self, what: str) -> None:
    raise ValueError(
      f"{self.archive.path}: holds {what}, which is more than tensors and plain values; only those are read, "
      "save them with safetensors"
    )
