"""What the devices are: peak speed of each known accelerator, for model FLOP/s utilisation.

Figures are the vendors' dense bfloat16 peaks per jax device. An unknown device has no peak, and no
utilisation is claimed for it.
"""

from typing import Any

# jax's device_kind -> dense bfloat16 FLOP/s of one jax device.
PEAK_BF16_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Returns the dense bfloat16 peak of `device` in FLOP/s, or None if it is not known."""
    return PEAK_BF16_FLOPS.get(device.device_kind)
