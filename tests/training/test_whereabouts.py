"""Where each process stands: the first knows the last sign of every other, and for how long each has been silent."""

from lm.training.whereabouts import Where, Whereabouts
from tests.training.test_timeline import Clock


class Store(dict):
    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.items() if name.startswith(key)]


class Gone:
    def key_value_set(self, key, value, allow_overwrite):
        raise RuntimeError("UNAVAILABLE: failed to connect")


def test_the_first_knows_where_each_stands_and_how_long_it_is_silent():
    clock, store = Clock(), Store()
    first, second, _ = (Whereabouts(store, process, 3, clock) for process in range(3))
    second.sign(7, "data", 0.5)
    first.sign(7, "step", 0.2)
    for _ in range(3):
        clock.now += 2.0
        first.sign(7, "step", clock.now)
    assert first.read() == [
        Where(0, 7, "step", clock.now, 0.0),
        Where(1, 7, "data", 0.5, 6.0),
        Where(2, -1, "", 0.0, 0.0),
    ]
    assert second.read() == []
    assert [str(where) for where in first.read()[1:]] == [
        "process 1: step 7, phase data for 0.5 s, last seen 6.0 s ago",
        "process 2: no sign yet",
    ]
    # The same place is a new sign all the same.
    second.sign(7, "data", 0.5)
    clock.now += 1.0
    first.sign(7, "step", 9.0)
    assert first.read()[1].silent_seconds == 0.0


def test_signs_are_few_and_a_service_that_is_gone_harms_nobody():
    clock, store = Clock(), Store()
    one = Whereabouts(store, 1, 64, clock)
    for _ in range(40):
        one.sign(1, "step", 0.0)
        clock.now += 0.25
    assert store["lm/where/1"].startswith("[3,")
    Whereabouts(Gone(), 0, 2, clock).sign(1, "step", 0.0)
    alone = Whereabouts(Gone(), 0, 1, clock)
    alone.sign(1, "step", 0.0)
    assert alone.read() == []
