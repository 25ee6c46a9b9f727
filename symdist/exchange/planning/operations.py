"""Counts the operations of matrix products, and the time that they take."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from symdist.hardware import Hardware
from symdist.rules.linalg import orthonormal, products

_COUNTS = {
    **flop_registry,
    **{
        operator: shape_wrapper(count)
        for operator, count in [*orthonormal.OPERATIONS.items(), *products.OPERATIONS.items()]
    },
}


class OperationCounter(TorchDispatchMode):
    """Adds up what runs within it, as PyTorch's FlopCounterMode does, but knows in which dtype.

    Args:
        hardware: The speed of each dtype.

    Attributes:
        operations: The operations of matrix products and decompositions.
        seconds: The time they take.

    Example:
        >>> with OperationCounter(Hardware.of("h100")) as counter:
        ...     torch.empty(8, 8, device="meta") @ torch.empty(8, 8, device="meta")
        >>> counter.operations
        1024.0
    """

    def __init__(self, hardware: Hardware):
        super().__init__()
        self.operations = 0.0
        self.seconds = 0.0
        self._hardware = hardware

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = _COUNTS.get(func._overloadpacket)
        if count is not None:
            operations = float(count(*args, **kwargs, out_val=result))
            dtype = next(value.dtype for value in args if isinstance(value, torch.Tensor))
            self.operations += operations
            self.seconds += operations / self._hardware.speed(dtype)
        return result
