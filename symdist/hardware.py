"""What ranks can do: decides between strategies and precisions, and gives plans their times."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

HardwareLike: TypeAlias = "Hardware | str"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The speeds of one rank, as achieved.

    Attributes:
        bandwidth: Bytes per second that it sends.
        flops: Operations per second of matrix products in float32. In float64 they are taken to be half as fast.
        model_flops: Operations per second of forward and backward.
        half_flops: Operations per second of the optimizer's matrix products in bfloat16; None (default) if they are as
            fast as those in float32.
        float16_flops: The same in float16; None (default) if they are as fast as those in bfloat16.
        latency: Seconds that a collective takes even if it moves nothing; 20 µs by default.

    Raises:
        ValueError: If a speed is not positive and finite.

    Example:
        >>> Hardware.of("h100").flops_per_byte
        1200.0
        >>> SymDist(groups, exchange={"hardware": Hardware(bandwidth=25e9, flops=60e12, model_flops=400e12)})
    """

    bandwidth: float
    flops: float
    model_flops: float
    half_flops: float | None = None
    float16_flops: float | None = None
    latency: float = 20e-6

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "model_flops", "half_flops", "float16_flops"):
            speed = getattr(self, name)
            if (speed is not None or not name.endswith(("half_flops", "16_flops"))) and not 0 < speed < math.inf:
                raise ValueError(f"hardware: {name}={speed!r} must be positive and finite")
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"hardware: latency={self.latency!r} must be 0 or more and finite")

    @property
    def flops_per_byte(self) -> float:
        """The float32 operations that a rank does in the time it takes to send one byte.

        Strategies are chosen by it.
        """
        return self.flops / self.bandwidth

    def speed(self, dtype: torch.dtype) -> float:
        """Return the operations per second of the optimizer's matrix products in a dtype.

        Args:
            dtype: The dtype of the matrices.

        Returns:
            The operations per second.
        """
        if dtype == torch.float16 and self.float16_flops is not None:
            return self.float16_flops
        if dtype.itemsize < 4:
            return self.half_flops or self.flops
        return self.flops if dtype.itemsize == 4 else self.flops / 2

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


@functools.cache
def hardware_of(device: torch.device) -> Hardware:
    """Return what a device can do, from its name; the same for all devices of one kind.

    Args:
        device: The device of weights. A meta device stands for an accelerator.

    Returns:
        The hardware. For a card that `HARDWARE` does not have, that of an H100, whose ratios between dtypes are those
        of most cards.
    """
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return HARDWARE["cpu"] if fast else replace(HARDWARE["cpu"], half_flops=1e9)
    if device.type != "cuda":
        return HARDWARE["h100"]
    name = torch.cuda.get_device_name(device).lower()
    hardware = next((preset for key, preset in HARDWARE.items() if key in name), HARDWARE["h100"])
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        # No bfloat16 before Ampere.
        hardware = replace(hardware, half_flops=hardware.flops / 10, float16_flops=hardware.half_flops)
    return hardware


# 0.9 of the makers' dense float32 peak, 0.4 of the bfloat16 peak for the model and 0.8 for large products alone: 67 and
# 989 Tflop/s (H100 and H200 SXM), 75 and 2,250 (B200), 163 and 1,307 (MI300X); one 400 Gb/s port for each. float16 has
# the peak of bfloat16. "cpu" is one core that has AVX-512 instructions for bfloat16, and a fast loopback.
HARDWARE = {
    "h100": Hardware(bandwidth=50e9, flops=60e12, model_flops=400e12, half_flops=800e12),
    "h200": Hardware(bandwidth=50e9, flops=60e12, model_flops=400e12, half_flops=800e12),
    "b200": Hardware(bandwidth=50e9, flops=67e12, model_flops=900e12, half_flops=1800e12),
    "mi300x": Hardware(bandwidth=50e9, flops=147e12, model_flops=520e12, half_flops=1050e12),
    "cpu": Hardware(
        bandwidth=2e9,
        flops=90e9,
        model_flops=50e9,
        half_flops=200e9,
        float16_flops=3e9,
        latency=200e-6,
    ),
}
