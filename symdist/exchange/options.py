"""Settings of the communication between ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch

from symdist.hardware import Hardware

BUCKET_BYTES = 1 << 30
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

ExchangeLike: TypeAlias = "ExchangeOptions | Mapping[str, Any] | None"


@dataclass(frozen=True, kw_only=True)
class ExchangeOptions:
    """Settings of the communication between ranks, with the same keys in Python, DeepSpeed configs and Megatron.

    Attributes:
        communication_dtype: The dtype in which matrices are sent to their owners, and updates back: `torch.bfloat16`,
            `torch.float32` or `torch.float64`, or the name of one. None, the default, is the dtype of the state.
            bfloat16 halves the bytes sent, and rounds updates to 8 bits. Sums, Grams, and stacks whose rule remembers
            something are always sent in the dtype of the state.
        bucket_bytes: Bound on the buffers of all waves in flight on a rank, in bytes; 1 GiB by default. Lower it if a
            step runs out of memory: collectives then become smaller and more numerous.
        hardware: What the ranks can do, by which strategies and precisions are chosen: "h100", "h200", "b200", "mi300x"
            or "cpu", or a `Hardware`. By default, strategies are those of "h100", and precisions follow from the device
            of the weights. Give one if the network is far slower or faster than 400 Gb/s a rank.

    Raises:
        ValueError: For any other dtype or hardware, or a `bucket_bytes` that is not a positive whole number.

    Example:
        >>> SymDist(groups, exchange=ExchangeOptions(communication_dtype=torch.bfloat16))
    """

    communication_dtype: Any = None
    bucket_bytes: int = BUCKET_BYTES
    hardware: Any = None
    hardware_given: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        dtype = self.communication_dtype
        dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (None, *_DTYPES.values()):
            raise ValueError(
                f"communication_dtype={self.communication_dtype!r} must be one of {', '.join(map(repr, _DTYPES))}, or "
                "None for the dtype of the state; float16 is left out because it would lose small gradients"
            )
        object.__setattr__(self, "communication_dtype", dtype)
        size = self.bucket_bytes
        if isinstance(size, bool) or not isinstance(size, int | float) or not 1 <= size < 2**60 or size != int(size):
            raise ValueError(f"bucket_bytes={size!r} must be a positive whole number of bytes")
        object.__setattr__(self, "bucket_bytes", int(size))
        object.__setattr__(self, "hardware_given", self.hardware is not None)
        object.__setattr__(self, "hardware", Hardware.of("h100" if self.hardware is None else self.hardware))

    @classmethod
    def of(cls, options: ExchangeLike) -> ExchangeOptions:
        """Make options from a user's or a config's value.

        Args:
            options: Options, which are returned as they are; a mapping with the same keys; or None for the defaults.

        Returns:
            The options.

        Raises:
            ValueError: For an unknown key or an invalid value.
        """
        if isinstance(options, cls):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"exchange={options!r} must be an ExchangeOptions, or a mapping from its option names to values"
            )
        known = [one.name for one in fields(cls) if one.init]
        unknown = sorted(set(options or {}) - set(known))
        if unknown:
            raise ValueError(f"exchange knows no option {', '.join(map(repr, unknown))}; it knows {', '.join(known)}")
        return cls(**(options or {}))
