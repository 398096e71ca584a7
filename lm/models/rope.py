"""Stretched wavelengths of rotary positions, one small class a method.

Each maps (theta, rotated channels) to frequencies, in NumPy float64, and is checked against the
`transformers` function of the same method. Knows nothing of attention.
"""

import dataclasses
import math

import numpy as np


def _frequencies(theta: float, rotated: int) -> np.ndarray:
    return theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions are divided by a factor (Chen et al. 2023).

    Attributes:
      factor: how many times longer the sequences may be.
    """

    factor: float

    def frequencies(self, theta: float, rotated: int) -> tuple[np.ndarray, float]:
        """Returns f64[rotated/2], radians per position, and the factor on sines and cosines."""
        return _frequencies(theta, rotated) / self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkScaling:
    """Theta grows so that the longest wavelength is stretched by the factor and the shortest stays (NTK-aware).

    Attributes:
      factor: how many times longer the sequences may be.
    """

    factor: float

    def frequencies(self, theta: float, rotated: int) -> tuple[np.ndarray, float]:
        """Returns f64[rotated/2], radians per position, and the factor on sines and cosines."""
        return _frequencies(theta * self.factor ** (rotated / (rotated - 2)), rotated), 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Long wavelengths are interpolated, short ones kept, with a ramp between (YaRN, Peng et al. 2023).

    Attributes:
      factor: how many times longer the sequences may be.
      original_max_length: length of pre-training.
      beta_fast: wavelengths with more turns than this in the original length are kept.
      beta_slow: wavelengths with fewer turns than this are interpolated.
      attention_factor: factor on sines and cosines; None means 0.1 ln(factor) + 1.
      truncate: whether the ramp's ends are rounded outwards to whole channels.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, theta: float, rotated: int) -> tuple[np.ndarray, float]:
        """Returns f64[rotated/2], radians per position, and the factor on sines and cosines."""
        plain = _frequencies(theta, rotated)

        def channel(turns: float) -> float:
            return rotated * math.log(self.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        high = high + 0.001 if low == high else high
        interpolated = np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)
        default = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        attention_factor = default if self.attention_factor is None else self.attention_factor
        return plain / self.factor * interpolated + plain * (1 - interpolated), attention_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Wavelengths beyond the original length are interpolated, short ones kept, smoothly between (Llama 3.1).

    Attributes:
      factor: how many times longer the sequences may be.
      low_frequency_factor: wavelengths above original_max_length over this are divided by the factor.
      high_frequency_factor: wavelengths below original_max_length over this are kept.
      original_max_length: length of pre-training.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_length: int = 8192

    def frequencies(self, theta: float, rotated: int) -> tuple[np.ndarray, float]:
        """Returns f64[rotated/2], radians per position, and the factor on sines and cosines."""
        plain = _frequencies(theta, rotated)
        turns = self.original_max_length * plain / (2 * math.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (1 - kept) * plain / self.factor + kept * plain, 1.0
