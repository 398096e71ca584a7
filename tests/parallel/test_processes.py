"""The start of many processes: settings that cannot work, who is missing, which rows are whose."""

import jax
import pytest

from lm import parallel
from lm.config import UserError
from lm.parallel import MeshConfig, processes
from lm.parallel.processes import RollCall, Start, missing_sentence, row_block


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Start(), None),
        (Start(num_processes=1), None),
        (Start(coordinator="host:1234", num_processes=2, process_id=1), None),
        (Start(coordinator="host:1234"), "together, or none of them"),
        (Start(num_processes=2, process_id=0), "together, or none of them"),
        (Start(coordinator="host", num_processes=2, process_id=0), "HOST:PORT of process 0, got host"),
        (Start(coordinator="host:1234", num_processes=2, process_id=2), "--process_id is 0 to 1, got 2"),
        (Start(coordinator="host:1234", num_processes=0, process_id=0), "--num_processes is a number from 1 up, got 0"),
        (Start(join_timeout=0), "--join_timeout is a number of seconds from 1 up, got 0"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(start, words):
    found = start.problems()
    assert found == [] if words is None else len(found) == 1 and words in found[0]


def test_the_missing_are_those_that_give_no_sign(tmp_path):
    folder = tmp_path / "processes" / "train"
    folder.mkdir(parents=True)
    # Left by an earlier start, whose processes are gone.
    for number in (1, 3):
        (folder / str(number)).write_text("1234 waits, 7")
    mine, other = RollCall(folder), RollCall(folder)
    mine.sign(0)
    other.sign(1)
    assert mine.look() == {0, 1}
    other.leave(1)
    # Whoever was seen once and is gone has given up, and is not the one to look for.
    assert mine.look() == {0, 1}
    sentence = missing_sentence(Start(join_timeout=9), 0, 4, mine.look())
    assert sentence.startswith("processes 2, 3 of 4 did not join within 9 s: ")
    mine.leave(0)
    assert sorted(path.name for path in folder.iterdir()) == ["3"]


def test_without_a_folder_nobody_is_accused(tmp_path):
    roll = RollCall(tmp_path / "no" / "such" / "folder")
    roll.sign(0)
    assert roll.look() == set()
    assert "check that all were started" in missing_sentence(Start(), 0, 2, roll.look())
    roll.leave(0)


@pytest.mark.parametrize(
    ("mesh", "num_processes", "expected"),
    [
        (MeshConfig(data=8), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(data=4, fsdp=2), 2, [(0, 2), (1, 2)]),
        # Tensor parallelism over processes: they read the same rows.
        (MeshConfig(data=2, tensor=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(data=1, tensor=8), 4, [(0, 1)] * 4),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(monkeypatch, mesh, num_processes, expected):
    built = parallel.build_mesh(mesh)

    def of_many(sharding, shards):
        each = 8 // num_processes
        held = {}
        for device, (rows,) in sharding.devices_indices_map((shards,)).items():
            held.setdefault(device.id // each, set()).add(rows.start or 0)
        return {process: tuple(sorted(parts)) for process, parts in held.items()}

    monkeypatch.setattr(processes, "_blocks", of_many)
    found = []
    for index in range(num_processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(row_block(built, parallel.DEFAULT_RULES))
    assert found == expected
    monkeypatch.undo()
    assert row_block(built, parallel.DEFAULT_RULES) == (0, 1)


def test_alone_nothing_is_passed_around():
    assert processes.gather("word") == ["word"]
    done = []
    processes.first(lambda: done.append(1))
    assert done == [1]

    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        processes.first(fail)
