"""What a program costs one device: operations, bytes through memory, most bytes alive, and collectives.

Knows neither programs nor hardware. Law: costs add up; a loop's is its body's times its length.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Collective:
    """Messages of one kind over the same mesh axes, those of a whole step added up.

    Attributes:
      kind: its name in a compiled program, such as "all-gather".
      axes: mesh axes of the devices that take part.
      count: how many.
      bytes: of the whole array that each device ends with (all-gather), begins with (reduce-scatter, all-to-all), or
        both; all of them together.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int


@dataclasses.dataclass
class Cost:
    """What a program, or the body of a loop, costs one device.

    Attributes:
      flops: operations in matrix products.
      traffic: bytes read from and written to memory.
      peak: most bytes alive at once, arguments not counted.
      collectives: by (kind, axes): how many, and their bytes.
    """

    flops: float = 0.0
    traffic: float = 0.0
    peak: int = 0
    collectives: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, other: "Cost", times: int) -> None:
        """Adds what is done `times` times; the peak is the caller's affair."""
        self.flops += times * other.flops
        self.traffic += times * other.traffic
        for key, (count, size) in other.collectives.items():
            self.send(*key, times * count, times * size)

    def send(self, kind: str, axes: tuple[str, ...], count: int, size: int) -> None:
        """Adds messages."""
        before = self.collectives.get((kind, axes), (0, 0))
        self.collectives[kind, axes] = (before[0] + count, before[1] + size)

    def messages(self) -> list[Collective]:
        """Returns the collectives, those that move most first."""
        found = [Collective(kind, axes, *amount) for (kind, axes), amount in self.collectives.items()]
        return sorted(found, key=lambda message: -message.bytes)
