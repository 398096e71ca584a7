"""The lease of a folder: one machine at a time; a dead one's is taken in the stated time, a lost one ends its run."""

import json
import time

import pytest

from lm.training.lease import FILE, Lease, LeaseError

QUICK = {"beat": 0.05, "expiry": 0.5}


def _hold(workdir, machine, said=None, *, take_over=False, **changes):
    say = print if said is None else said.append
    return Lease(workdir, machine, **{**QUICK, **changes}).held(take_over=take_over, say=say)


def _leave_behind(workdir, machine):
    """The lease of a run that was killed."""
    with _hold(workdir, machine):
        text = (workdir / FILE).read_text()
    (workdir / FILE).write_text(text)


def test_a_living_run_of_another_machine_is_named_and_refused(tmp_path):
    with _hold(tmp_path, "one boot"):
        other = _hold(tmp_path, "two boot", expiry=20.0)
        with pytest.raises(LeaseError, match=r"is in use by process \d+ on one; .* or give --take_over"):
            other.__enter__()
        assert json.loads((tmp_path / FILE).read_text())["machine"] == "one boot"
    assert not (tmp_path / FILE).exists()


def test_what_a_killed_run_left_is_taken_at_once_here_and_after_the_stated_time_elsewhere(tmp_path):
    _leave_behind(tmp_path, "one boot")
    said = []
    with _hold(tmp_path, "one boot", said, expiry=1000.0):
        pass
    assert said == []
    _leave_behind(tmp_path, "one boot")
    before = time.monotonic()
    with _hold(tmp_path, "two boot", said):
        assert time.monotonic() - before >= QUICK["expiry"]
    assert len(said) == 1
    assert "last used by process" in said[0]
    _leave_behind(tmp_path, "one boot")
    with _hold(tmp_path, "two boot", expiry=1000.0, take_over=True):
        pass


def test_a_run_whose_folder_was_taken_over_ends_and_leaves_the_lease_alone(tmp_path):
    ended = []
    with _hold(tmp_path, "one boot", end=ended.append), _hold(tmp_path, "two boot", beat=1000.0, take_over=True):
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "two boot" in (tmp_path / FILE).read_text()
    assert len(ended) == 1
    assert "was taken over by process" in ended[0]
    assert "on two; this run ends here" in ended[0]


def test_a_damaged_or_deleted_lease_stands_in_nobodys_way(tmp_path):
    (tmp_path / FILE).write_text("{")
    with _hold(tmp_path, "two boot", expiry=1000.0):
        (tmp_path / FILE).unlink()
        deadline = time.monotonic() + 20
        while not (tmp_path / FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / FILE).exists()
