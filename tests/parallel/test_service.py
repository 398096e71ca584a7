"""What jax keeps to itself: there in the versions that are tested, and missed in a sentence where it is gone."""

import types

import pytest

from lm.config import UserError
from lm.parallel import processes, service
from lm.parallel.processes import Start, missing_sentence
from lm.training.whereabouts import Whereabouts


def test_this_version_of_jax_has_what_is_needed():
    service.check_service()
    assert service.client_of_service() is None
    assert service.place_in_run() == (0, 1)


GONE = [None, types.SimpleNamespace(), types.SimpleNamespace(global_state=types.SimpleNamespace(client=None))]


@pytest.mark.parametrize("gone", GONE, ids=["module", "state", "fields"])
def test_where_it_is_gone_many_are_refused_and_one_goes_on(tmp_path, monkeypatch, gone):
    monkeypatch.setattr(service, "distributed", gone)
    start = Start(coordinator="localhost:1", num_processes=2, process_id=0)
    with pytest.raises(UserError, match=r"jax .* does not tell the (client|process_id) of many .*--num_processes=1"):
        processes.join(start, tmp_path)
    processes.join(Start(num_processes=1), tmp_path)
    assert processes.gather("alone") == ["alone"]
    alone = Whereabouts()
    alone.sign(1, "step", 0.0)
    assert alone.read() == []
    assert "check that all were started" in missing_sentence(start, 0, 2, set())
