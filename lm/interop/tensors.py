"""Folders of safetensors: one file, or shards with an index; read and written one tensor at a time.

Knows names, shapes and bytes, no model. Writes the format itself, since the package `safetensors` wants
all tensors of a file in memory at once. Law: never more than one tensor in memory beyond the caller's.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from lm.config import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Dtype = Literal["float32", "bfloat16", "float16"]
# The dtypes of weights; what a file calls them, and how they are held here.
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
LIMIT = 5_000_000_000


class InteropError(UserError):
    """A folder of another project that cannot be read, or a model that it cannot express."""


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InteropError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InteropError(f"{file.parent} has no {file.name}; give a folder with a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InteropError(f"{file} holds no JSON object")
    return found


class Tensors:
    """The tensors of a folder, found by name.

    Attributes:
      names: of all tensors, in the order of the files.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Opens the files, and checks that each is whole; reads no tensor.

        Raises:
          InteropError: a file is missing or cut short, or lacks what the index says.
        """
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        try:
            for file in _files(folder):
                opened = self._open(folder / file)
                self._files.update(dict.fromkeys(opened.keys(), opened))
            self._check_index()
        except InteropError:
            self.close()
            raise
        self.names = list(self._files)

    def _open(self, file: pathlib.Path) -> Any:
        import safetensors

        if not file.is_file():
            raise InteropError(f"{file.parent} has no {file.name}, which its index names")
        try:
            return self._stack.enter_context(safetensors.safe_open(file, framework="np"))
        except (safetensors.SafetensorError, OSError) as error:
            raise InteropError(
                f"{file} is damaged or cut short ({file.stat().st_size} bytes: {error}); download it again"
            ) from error

    def _check_index(self) -> None:
        index = self._folder / INDEX
        if (self._folder / SINGLE).is_file() or not index.is_file():
            return
        for name, file in read_json(index)["weight_map"].items():
            if name not in self._files:
                raise InteropError(f"{self._folder / file} lacks the tensor {name}, which {INDEX} promises")

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32.

        Raises:
          InteropError: it is not of a dtype of weights.
        """
        try:
            dtype = self._files[name].get_slice(name).get_dtype()
            if dtype not in DTYPES:
                kinds = ", ".join(DTYPES)
                raise InteropError(f"{self._folder}: the tensor {name} is of dtype {dtype}; weights are {kinds}")
            return np.asarray(self._files[name].get_tensor(name)).astype(np.float32, copy=False)
        except (OSError, ValueError) as error:
            raise InteropError(f"{self._folder}: the tensor {name} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def close(self) -> None:
        """Lets go of the files."""
        self._stack.close()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _files(folder: pathlib.Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InteropError(f"{folder / INDEX} has no weight_map from tensors to files")
        for name, file in weight_map.items():
            # What is downloaded must not lead out of its folder.
            if not isinstance(file, str) or file != pathlib.PurePath(file).name or len(file) > 255:
                raise InteropError(
                    f"{folder / INDEX}: the tensor {name} has {str(file)[:80]!r}, which is no file's name"
                )
        return sorted(set(weight_map.values()))
    found = "" if folder.is_dir() else ", and there is no such folder"
    raise InteropError(f"{folder} has neither {SINGLE} nor {INDEX}{found}")


def tensor_names(folder: pathlib.Path) -> list[str] | None:
    """Returns the names of a folder's tensors, or None if it has no files of tensors.

    Raises:
      InteropError: as `Tensors`.
    """
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        return None
    with Tensors(folder) as tensors:
        return tensors.names


def write_tensors(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], np.ndarray],
    dtype: Dtype = "float32",
    limit: int = LIMIT,
) -> None:
    """Writes tensors to one file, or to shards with an index, in the given order.

    Args:
      folder: exists, and holds none yet.
      shapes: shape of each tensor by name.
      make: returns a tensor by its name; asked for once each, and let go of when written.
      dtype: of the tensors in the files.
      limit: bytes of a shard; a larger tensor has a file of its own.
    """
    held = DTYPES[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]]
    sizes = {name: int(np.prod(shape)) * held.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > limit:
            shards.append([])
        shards[-1].append(name)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in names}, make, held)


def _write_file(
    file: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], np.ndarray], held: np.dtype
) -> None:
    """Writes one file: the header's length, the header, and the tensors one after the other, little-endian."""
    kind = next(name for name, dtype in DTYPES.items() if dtype == held)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * held.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, shape in shapes.items():
            array = make(name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, not {shape}")
            out.write(np.ascontiguousarray(array.astype(held, copy=False)).reshape(-1).view(np.uint8).data)
            # Else it would live until the next one is made.
            del array


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder beside `target` to write to, and renames it to `target` if all went well; else removes it.

    Raises:
      InteropError: `target` exists and is not empty, or cannot be written beside.
    """
    import shutil
    import tempfile

    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InteropError(f"{target} exists and is not empty; remove it or choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InteropError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
