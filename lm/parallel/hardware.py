"""What the devices are: peak speed, memory and links of each known accelerator, as their makers publish them.

Knows no model. Figures are of one jax device: dense bfloat16 FLOP/s, bytes and bytes/s, links in one direction. Of an
unknown device nothing is claimed. Sources: Google Cloud's pages of TPU v4, v5e, v5p and v6e (the published
interconnect of a chip is both directions together: half of it is sent); NVIDIA's data sheets of A100, H100, H200 and
B200 and of the DGX systems built of them (NVLink likewise halved; one network adapter to each GPU). The host's link is
that of the data sheets of A100 ("PCIe Gen4: 64 GB/s"), H100 and H200 ("PCIe Gen5: 128 GB/s"), halved too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm.parallel.mesh import MESH_AXES

GIB = 2**30


def _stride(axis: str, sizes: Mapping[str, int]) -> int:
    """Returns how far apart two neighbours along a mesh axis are, in devices."""
    return math.prod(sizes.get(inner, 1) for inner in MESH_AXES[MESH_AXES.index(axis) + 1 :])


@dataclasses.dataclass(frozen=True)
class Torus:
    """Chips of a slice joined in rings, slices by a data-centre network.

    Attributes:
      send: bytes/s that a chip sends over all its links.
      slice_size: chips of the largest slice.
      network: bytes/s of a chip to other slices.
    """

    send: float
    slice_size: int
    network: float

    def bandwidth(self, axes: Sequence[str], sizes: Mapping[str, int]) -> float:
        """Returns the bytes/s that each chip sends in a collective over mesh axes.

        The mesh axes within a slice share its links evenly; an axis that leaves the slice is held up by the network,
        of which each chip that takes part brings its share.
        """
        inside = [axis for axis in MESH_AXES if sizes.get(axis, 1) > 1 and _stride(axis, sizes) < self.slice_size]
        share = self.send * max(1, sum(axis in inside for axis in axes)) / max(1, len(inside))
        outer = min(axes, key=MESH_AXES.index)
        inner = max(axes, key=MESH_AXES.index)
        members = math.prod(sizes[axis] for axis in axes)
        if _stride(outer, sizes) * sizes[outer] <= self.slice_size:
            return share
        return min(share, self.network * max(1, min(members, self.slice_size // _stride(inner, sizes))))


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Devices of a node joined by a switch, nodes by a network.

    Attributes:
      send: bytes/s that a device sends within its node.
      size: devices of a node.
      network: bytes/s of a device to other nodes.
    """

    send: float
    size: int
    network: float

    def bandwidth(self, axes: Sequence[str], sizes: Mapping[str, int]) -> float:
        """Returns the bytes/s of each device in a collective over mesh axes.

        Members that share a node each bring their network adapter for what all of them need once.
        """
        stride = min(_stride(axis, sizes) for axis in axes)
        members = math.prod(sizes[axis] for axis in axes)
        outer = min(axes, key=MESH_AXES.index)
        if _stride(outer, sizes) * sizes[outer] <= self.size:
            return self.send
        return min(self.send, self.network * max(1, min(members, self.size // stride)))


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of accelerator.

    Attributes:
      name: what `--hardware` calls it.
      kinds: jax's `device_kind` of it.
      flops: dense bfloat16 FLOP/s.
      memory: bytes.
      memory_bandwidth: bytes/s.
      links: how devices are joined.
      host_link: bytes/s between a device and its host, in each direction; None where it is not published.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    links: Torus | Nodes
    host_link: float | None = None

    def seconds(self, kind: str, axes: Sequence[str], size: float, sizes: Mapping[str, int]) -> float:
        """Returns how long a collective takes at full bandwidth on n devices; latency is not counted.

        all-gather, reduce-scatter, all-to-all: (n - 1) / n times the bytes; all-reduce twice that; a permutation: the
        bytes. Divided by what each device sends in a second.

        Args:
          kind: its name in a compiled program.
          axes: mesh axes of the devices that take part.
          size: bytes of the whole array on each device (gathered, or before it is scattered).
          sizes: of all mesh axes.
        """
        members = math.prod(sizes[axis] for axis in axes)
        if members == 1:
            return 0.0
        share = (members - 1) / members
        sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        return sent * size / self.links.bandwidth(axes, sizes)


_ALL = (
    Hardware("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, Torus(300e9, 4096, 6.25e9)),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, Torus(200e9, 256, 3.125e9)),
    Hardware("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, Torus(600e9, 8960, 6.25e9)),
    Hardware("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, Torus(400e9, 256, 12.5e9)),
    Hardware("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2039e9, Nodes(300e9, 8, 25e9), 32e9),
    Hardware("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3350e9, Nodes(450e9, 8, 50e9), 64e9),
    Hardware("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, Nodes(450e9, 8, 50e9), 64e9),
    Hardware("b200", ("NVIDIA B200",), 2250e12, 180e9, 8000e9, Nodes(900e9, 8, 50e9)),
)
HARDWARE: Mapping[str, Hardware] = {hardware.name: hardware for hardware in _ALL}

# jax's device_kind -> dense bfloat16 FLOP/s of one jax device.
PEAK_BF16_FLOPS = {
    **{kind: hardware.flops for hardware in _ALL for kind in hardware.kinds},
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
}


def peak_flops(device: Any) -> float | None:
    """Returns the dense bfloat16 peak of `device` in FLOP/s, or None if it is not known."""
    return PEAK_BF16_FLOPS.get(device.device_kind)
