"""Manifests: any changed, missing or shortened file is found and named."""

import errno
import os

import pytest

from lm.training.manifests import MANIFEST, add_metrics, find_damage, read_manifest, write_manifest

FILES = {"params/d/a": b"weights" * 100, "params/empty": b"", "state/_METADATA": b"{}", "data/metadata": b'{"at": 1}'}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path, {"step": 3})
    return tmp_path


def test_figures_that_cannot_be_added_are_told_and_leave_nothing(folder, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    assert not add_metrics(folder, {"nll": 1.0})
    assert "could not be added to it (No space left on device)" in caplog.text
    assert not list(folder.glob("*.new"))
    monkeypatch.undo()
    assert add_metrics(folder, {"nll": 1.0})
    assert not add_metrics(folder, {"nll": 2.0})
    assert read_manifest(folder)["metrics"] == {"nll": 1.0}
    assert find_damage(folder) is None


def test_what_was_written_is_sound(folder):
    assert find_damage(folder) is None
    assert read_manifest(folder)["step"] == 3
    assert set(read_manifest(folder)["files"]) == set(FILES)
    # Orbax writes on after the manifest.
    (folder / "commit_success.txt").write_text("done")
    assert find_damage(folder) is None


@pytest.mark.parametrize("name", [name for name, data in FILES.items() if data])
def test_one_flipped_bit_is_found(folder, name):
    data = bytearray(FILES[name])
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    assert find_damage(folder) == f"{name} holds other bytes than were written"
    assert find_damage(folder, sizes_only=True) is None
    # Two processes look at one half each, and one of them finds it.
    assert sorted(find_damage(folder, (i, 2)) is None for i in range(2)) == [False, True]


@pytest.mark.parametrize("name", FILES)
def test_missing_and_longer_files_are_found(folder, name):
    (folder / name).write_bytes(FILES[name] + b"x")
    size = len(FILES[name])
    assert find_damage(folder, sizes_only=True) == f"{name} has {size + 1} bytes instead of {size}"
    (folder / name).unlink()
    assert find_damage(folder) == f"{name} is missing"


def test_a_damaged_manifest_is_damage_and_none_is_not(folder):
    text = (folder / MANIFEST).read_text()
    for bad in ("", text[: len(text) // 2], "[]"):
        (folder / MANIFEST).write_text(bad)
        assert MANIFEST in find_damage(folder)
    (folder / MANIFEST).unlink()
    assert find_damage(folder) is None
