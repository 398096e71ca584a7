"""Times of collectives by hand, on tori and on nodes."""

import pytest

from lm.parallel.hardware import HARDWARE, PEAK_BF16_FLOPS

GB = 1e9


def test_a_ring_sends_all_but_its_own_part():
    v5p = HARDWARE["v5p"]
    # One mesh axis has all links of the chip: 600 GB/s.
    assert v5p.seconds("all-gather", ["fsdp"], 8 * GB, {"fsdp": 8}) == pytest.approx(7 / 600)
    assert v5p.seconds("all-reduce", ["fsdp"], 8 * GB, {"fsdp": 8}) == pytest.approx(14 / 600)
    assert v5p.seconds("collective-permute", ["stage"], 6 * GB, {"stage": 2}) == pytest.approx(6 / 600)
    assert v5p.seconds("all-gather", ["fsdp"], 8 * GB, {"fsdp": 1}) == 0


def test_mesh_axes_of_a_slice_share_its_links():
    sizes = {"fsdp": 8, "tensor": 4}
    assert HARDWARE["v5p"].links.bandwidth(["fsdp"], sizes) == 300 * GB
    assert HARDWARE["v5p"].links.bandwidth(["fsdp", "tensor"], sizes) == 600 * GB


def test_an_axis_that_leaves_the_slice_has_the_networks_speed():
    links = HARDWARE["v6e"].links
    sizes = {"data": 4, "fsdp": 256}
    assert links.bandwidth(["fsdp"], sizes) == 400 * GB
    # Each chip's own share of the network: no two chips of a slice have the same shard.
    assert links.bandwidth(["data"], sizes) == 12.5 * GB
    # A gather over two slices: all 256 chips of a slice bring in what all of them need.
    assert links.bandwidth(["fsdp"], {"fsdp": 512}) == 400 * GB


def test_devices_of_a_node_bring_their_adapters_together():
    links = HARDWARE["h100"].links
    assert links.bandwidth(["fsdp"], {"fsdp": 8}) == 450 * GB
    assert links.bandwidth(["fsdp"], {"fsdp": 64}) == 400 * GB
    assert links.bandwidth(["data"], {"data": 8, "tensor": 8}) == 50 * GB
    assert links.bandwidth(["tensor"], {"data": 8, "tensor": 8}) == 450 * GB


def test_every_kind_has_its_peak():
    assert all(PEAK_BF16_FLOPS[kind] == chip.flops for chip in HARDWARE.values() for kind in chip.kinds)
