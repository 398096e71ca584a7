"""Folders of safetensors: what is written is what `safetensors` reads, in one file or in shards, or not at all."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.interop.tensors import INDEX, SINGLE, InteropError, Tensors, new_folder, tensor_names, write_tensors

ARRAYS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.float32([1.5, -2.0]),
    "scalar": np.float32(3.25).reshape(()),
    "empty": np.zeros((0, 2), np.float32),
    "last": np.full((5, 5), 0.1, np.float32),
}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}


def test_one_file_is_what_safetensors_reads(tmp_path):
    write_tensors(tmp_path, SHAPES, ARRAYS.__getitem__)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("limit", [1, 60, 110])
def test_shards_with_an_index(tmp_path, limit):
    write_tensors(tmp_path, SHAPES, ARRAYS.__getitem__, limit=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == ARRAYS.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    with Tensors(tmp_path) as tensors:
        assert sorted(tensors.names) == sorted(ARRAYS)
        for name, array in ARRAYS.items():
            assert tensors.shape(name) == array.shape
            np.testing.assert_array_equal(tensors.read(name), array)


def test_only_one_tensor_is_asked_for_at_a_time(tmp_path):
    alive = []

    class Counted(np.ndarray):
        def __del__(self):
            alive.pop()

    def make(name):
        assert not alive
        alive.append(name)
        return np.ascontiguousarray(ARRAYS[name]).view(Counted)

    write_tensors(tmp_path, {"b.weight": (3, 4), "last": (5, 5)}, make)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_narrow_dtypes_round_and_come_back_as_float32(tmp_path, dtype, numpy_dtype):
    write_tensors(tmp_path, SHAPES, ARRAYS.__getitem__, dtype)
    with Tensors(tmp_path) as tensors:
        found = tensors.read("last")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, ARRAYS["last"].astype(numpy_dtype).astype(np.float32))


def test_dtypes_that_are_no_weights_are_refused(tmp_path):
    save_file({"ids": np.arange(3)}, tmp_path / SINGLE)
    with Tensors(tmp_path) as tensors, pytest.raises(InteropError, match="the tensor ids is of dtype I64"):
        tensors.read("ids")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_file_cut_short_is_named(tmp_path, keep):
    write_tensors(tmp_path, SHAPES, ARRAYS.__getitem__)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:keep])
    with pytest.raises(InteropError, match=rf"{SINGLE} is damaged or cut short \(\d+ bytes"):
        Tensors(tmp_path)


def test_headers_that_lie_are_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 400]}}).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(InteropError, match="damaged or cut short"):
        Tensors(tmp_path)


def test_incomplete_shards_are_named(tmp_path):
    write_tensors(tmp_path, SHAPES, ARRAYS.__getitem__, limit=1)
    index = json.loads((tmp_path / INDEX).read_text())
    first = index["weight_map"]["a.bias"]
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"more": first}}))
    with pytest.raises(InteropError, match=f"{first} lacks the tensor more"):
        Tensors(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(InteropError, match=f"no {first}"):
        Tensors(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(InteropError, match=INDEX):
        Tensors(tmp_path)


def test_folders_without_tensors(tmp_path):
    assert tensor_names(tmp_path) is None
    with pytest.raises(InteropError, match=f"neither {SINGLE} nor"):
        Tensors(tmp_path)
    with pytest.raises(InteropError, match="no such folder"):
        Tensors(tmp_path / "nothing")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(IsADirectoryError), new_folder(tmp_path / "out") as partial:
        partial.write_text("half")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("x")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(InteropError, match="not empty"), new_folder(tmp_path / "deep" / "out"):
        pass
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
