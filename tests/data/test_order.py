"""An epoch's windows hold every document once; another epoch has another order."""

import pytest

from lm.data.order import Windows


def epoch_order(windows, epoch):
    order = []
    for window in range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch):
        found, places = windows.places(window)
        assert found == epoch
        order += [windows.document(found, place) for place in places]
    return order


@pytest.mark.parametrize(("num_documents", "size"), [(1, 1), (10, 3), (12, 4), (100, 64), (7, 20)])
def test_every_document_once_an_epoch(num_documents, size):
    windows = Windows(num_documents, size, (0, 0), shuffle=True)
    for epoch in range(3):
        assert sorted(epoch_order(windows, epoch)) == list(range(num_documents))


def test_orders_differ_by_epoch_seed_and_source():
    orders = [
        tuple(epoch_order(Windows(50, 8, seed, shuffle=True), epoch))
        for seed in ((0, 0), (0, 1), (1, 0))
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == len(orders)
    assert epoch_order(Windows(50, 8, (1, 0), shuffle=True), 1) == list(orders[7])


def test_places_are_spread_evenly():
    # Each document should stand in the first half of about half of the epochs.
    windows = Windows(20, 20, (3, 0), shuffle=True)
    counts = [0] * 20
    for epoch in range(100):
        for document in epoch_order(windows, epoch)[:10]:
            counts[document] += 1
    assert all(30 <= count <= 70 for count in counts)


def test_without_shuffle_the_order_is_the_corpus():
    assert epoch_order(Windows(10, 3, (0, 0), shuffle=False), 0) == list(range(10))
