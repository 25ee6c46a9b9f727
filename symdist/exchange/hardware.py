"""What ranks can do: decides between strategies, and gives plans their times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

HardwareLike: TypeAlias = "Hardware | str"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The speeds of one rank, as achieved.

    Attributes:
        bandwidth: Bytes per second that it sends.
        flops: Operations per second of the optimizer's float32 matrix products.
        model_flops: Operations per second of forward and backward.

    Raises:
        ValueError: If a speed is not positive.

    Example:
        >>> Hardware.of("h100").flops_per_byte
        1200.0
        >>> SymDist(groups, exchange={"hardware": Hardware(bandwidth=25e9, flops=60e12, model_flops=400e12)})
    """

    bandwidth: float
    flops: float
    model_flops: float

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "model_flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"hardware: {name}={getattr(self, name)!r} must be positive")

    @property
    def flops_per_byte(self) -> float:
        """The operations that a rank does in the time it takes to send one byte, by which strategies are chosen."""
        return self.flops / self.bandwidth

    @classmethod
    def of(cls, hardware: HardwareLike) -> Hardware:
        """Return hardware by its name.

        Args:
            hardware: One of `HARDWARE`, or hardware, which is returned as it is.

        Returns:
            The hardware.

        Raises:
            ValueError: For another name; the message lists those known.
        """
        if isinstance(hardware, cls):
            return hardware
        if not isinstance(hardware, str) or hardware not in HARDWARE:
            known = ", ".join(map(repr, HARDWARE))
            raise ValueError(f"hardware={hardware!r} must be one of {known}, or a symdist.exchange.Hardware")
        return HARDWARE[hardware]


# 0.9 of the makers' dense float32 peak, 0.4 of the bfloat16 peak: 67 and 989 Tflop/s (H100 and H200 SXM), 75 and 2,250
# (B200), 163 and 1,307 (MI300X); one 400 Gb/s port for each. "cpu" is the order of one core with a fast loopback.
HARDWARE = {
    "h100": Hardware(bandwidth=50e9, flops=60e12, model_flops=400e12),
    "h200": Hardware(bandwidth=50e9, flops=60e12, model_flops=400e12),
    "b200": Hardware(bandwidth=50e9, flops=67e12, model_flops=900e12),
    "mi300x": Hardware(bandwidth=50e9, flops=147e12, model_flops=520e12),
    "cpu": Hardware(bandwidth=2e9, flops=50e9, model_flops=25e9),
}
